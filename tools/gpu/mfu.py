"""Section *mfu*: how much of the device training uses.

Two models, two vocabularies, packs of 16,384 tokens; dense, `shared_bypass`, `random_ltd`. Then, with the larger model, every optimisation
taken away by itself, and the remedies of memory put in. Tested by `tests/tools/test_gpu_check.py`.
"""

import dataclasses
import math
from functools import partial
from typing import Any

from megavlm.engine.zero_sizes import ON_CPU
from megavlm.monitor.peaks import peak_flops_per_s
from tools.gpu.context import Context, Item, Outcome
from tools.gpu.models import ROUTES
from tools.gpu.steps import Steps, Variant

BASE = "as it is"
VARIANTS = {
    BASE: Variant(),
    "activation checkpointing": Variant(backbone={"activation_checkpointing": True}),
    "nothing persistent": Variant(zero={"stage3_param_persistence_threshold": 0}),
    "ZeRO's sizes as on a CPU": Variant(zero=ON_CPU),
    "each module by itself, no leaf modules": Variant(engine={"leaf_modules": False}),
    "nothing compiled": Variant(backbone={"compiled": ()}),
    "no overlap": Variant(zero={"overlap_comm": False}),
}
"""Each beside the first, with the larger model and the smaller vocabulary."""


def items(context: Context) -> dict[str, Item]:
    models, ids = list(context.sizes.models), list(context.sizes.vocabularies)
    found = {f"{model}, {size} ids": partial(measure, context, model, size, Variant()) for model in models for size in ids}
    for name, variant in VARIANTS.items():
        if name != BASE:
            found[f"{models[-1]}, {ids[0]} ids, {name}"] = partial(measure, context, models[-1], ids[0], variant)
    return found


def measure(context: Context, model: str, ids: str, variant: Variant) -> Outcome:
    """Steps of every route, one after another, with one engine."""
    steps = Steps(context, model, ids, variant)
    result: dict[str, Any] = {"parameters": steps.num_parameters, "variant": dataclasses.asdict(variant)}
    failures = []
    ceiling = (context.record.result("ceilings", f"products of {model}") or {}).get("best_flops_per_s")
    peak = peak_flops_per_s(context.device)
    for route in ROUTES:
        row: dict[str, Any] = {**steps.measure(route)}
        executed, dense = steps.flops(route)
        tokens = context.sizes.packs_per_step * steps.packs[route].num_tokens
        row |= {"tokens_per_s": tokens / row["step_s"], "executed_flops_per_s": executed / row["step_s"], "flops_share": executed / dense}
        row |= {"mfu": row["executed_flops_per_s"] / peak if peak else None}
        row |= {"mfu_of_ceiling": row["executed_flops_per_s"] / ceiling if ceiling else None}
        result[route] = row
        if not math.isfinite(row["loss"]):
            failures.append(f"{route}: the loss is {row['loss']}")
    for route in ROUTES:
        saved = 1 - result[route]["flops_share"]
        result[route]["realised_saving"] = (1 - result[route]["step_s"] / result["dense"]["step_s"]) / saved if saved > 0.001 else None
    steps.close()
    return Outcome(result, failures)
