#!/usr/bin/env python
"""How long may a single document be? Memory measured on this CPU, the planner's count of it, and the longest that it finds room for.

    python tools/longest_pack.py --out docs/results/longest_pack.json

Measured: bytes that autograd keeps for a pack of one document, for a small model, at several lengths. Extrapolated: the recipe
`unified-7b` with a document as long as its pack, on 256 GPUs, for 1 to 4 GPUs that share a pack. Prints two tables.
Tested by `tests/planner/test_plan_error.py`.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from megavlm.config import load_config
from megavlm.costs import ModelShape
from megavlm.data.pack.encode import EncodedSample
from megavlm.data.pack.pack import Costing, build_pack
from megavlm.data.read.sample import Coordinates
from megavlm.model.backbone import Backbone, make_causal_lm
from megavlm.model.configuration import read_configuration
from megavlm.planner.load import Load, Stage
from megavlm.planner.memory import activation_bytes, memory_of
from megavlm.planner.model import Model
from megavlm.planner.plan import ROOM, STANDARD_CODES
from megavlm.planner.rates import from_sheet
from megavlm.planner.steptime import Setup, step_time
from megavlm.routing.phases import Phases
from megavlm.routing.policies import Dense
from megavlm.routing.tasks import Task

SMALL = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LENGTHS = (1024, 4096, 16384)
VOCABULARY = 512
GPUS = 256


def one_document(tokens: int, num_layers: int) -> Load:
    """A pack that is one document, dense, with a loss on a quarter of it."""
    return Load(tokens, tokens / 4, [Stage(num_layers, tokens, 0.0, np.array([tokens]), np.ones(1))])


def measured(tokens: int) -> dict[str, Any]:
    """Bytes that the forward pass of such a pack keeps, on this CPU, and by the planner's count."""
    causal_lm = make_causal_lm(SMALL, VOCABULARY)
    shape = ModelShape.of(causal_lm.config)
    phases = Phases.always(Dense(), Dense(), shape.num_layers)
    backbone = Backbone(causal_lm, phases, num_sources=1, max_labels=tokens, chunk_rows=tokens)
    sample = EncodedSample(
        key="0",
        coordinates=Coordinates(0, 0, 0, 0),
        tokens=np.arange(tokens) % VOCABULARY,
        has_loss=np.arange(tokens) > 0,
        tasks=np.full(tokens, Task.TEXT),
        spans=(),
        task=Task.TEXT,
    )
    pack = build_pack([sample], Costing(phases, shape), num_sources=1, lane=0, step=0, seed=0)
    weights = {parameter.untyped_storage().data_ptr() for parameter in backbone.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        backbone.hidden_states(pack)
    config = load_config("unified-7b", {"model.activation_checkpointing": False})
    model = Model(config, causal_lm.config, ((0, shape.num_layers),), on_cuda=False)
    counted = activation_bytes(model, one_document(tokens, shape.num_layers))
    return {"tokens": tokens, "measured_bytes": sum(number for number, _ in kept.values()), "counted_bytes": counted}


def longest(gpu: str, checkpointing: bool, shared: int) -> dict[str, Any]:
    """The longest document of `unified-7b` that fits, in steps of 1,024 tokens; and what 131,072 tokens would hold and take."""
    config = load_config("unified-7b", {"model.activation_checkpointing": checkpointing})
    described = read_configuration(config.model.architecture, config.model.architecture["vocab_size"] + STANDARD_CODES)
    rates = from_sheet(gpu)
    model = Model(config, described, ((0, described.num_hidden_layers),), on_cuda=True, memory_bytes=rates.memory_bytes)
    model.check_sequence_parallel(shared)

    def held(tokens: int) -> float:
        load = one_document(tokens, model.shape.num_layers)
        # chunks of the output head are bounded whatever a pack's length is
        load = Load(tokens, min(load.labels, config.loss.chunk_rows * model.num_chunks), load.stages)
        return memory_of(model, load, GPUS, base_bytes=rates.host.base_bytes, sequence_parallel=shared).total

    fits = [tokens for tokens in range(1024, 2**20 + 1, 1024) if held(tokens) <= ROOM * rates.memory_bytes]
    setup = Setup(rates, GPUS, packs_per_rank=1, sequence_parallel=shared)
    seconds = step_time(model, one_document(2**17, model.shape.num_layers), setup)
    return {
        "gpu": gpu,
        "activation_checkpointing": checkpointing,
        "sequence_parallel": shared,
        "longest_tokens": max(fits, default=0),
        "bytes_of_131072": held(2**17),
        "step_s_of_131072": seconds.total,
        "attention_share_of_131072": seconds.attention / seconds.total,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    small = [measured(tokens) for tokens in LENGTHS]
    large = [longest(gpu, again, shared) for gpu in ("h100", "h200") for again in (False, True) for shared in (1, 2, 4)]
    print("| tokens of the document | kept, measured | the planner's count | error |\n|---|---|---|---|")
    for row in small:
        error = row["counted_bytes"] / row["measured_bytes"] - 1
        print(f"| {row['tokens']:,} | {row['measured_bytes'] / 1e6:.1f} MB | {row['counted_bytes'] / 1e6:.1f} MB | {error:+.1%} |")
    print("\n| GPU | every layer computed again | GPUs that share a pack | longest document | 131,072 tokens: memory | step | attention |")
    print(f"|{'---|' * 7}")
    for row in large:
        print(
            f"| {row['gpu']} | {'yes' if row['activation_checkpointing'] else 'no'} | {row['sequence_parallel']} |"
            f" {row['longest_tokens']:,} | {row['bytes_of_131072'] / 1e9:.0f} GB | {row['step_s_of_131072']:.1f} s |"
            f" {row['attention_share_of_131072']:.0%} |"
        )
    if given.out:
        given.out.write_text(json.dumps({"measured": small, "extrapolated": large}, indent=1) + "\n")


if __name__ == "__main__":
    main()
