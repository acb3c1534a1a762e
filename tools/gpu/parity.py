"""Section *parity*: does the device compute what a CPU computes?

Every policy, heads of 64 and 128 columns, with and without grouped queries. First the choices: which rows each route keeps. Then, with the
CPU's choices, loss and gradients: in float32 to 1e-4; in bfloat16 the loss to 1e-2, and the cosine of the gradients is at least 0.999.
Tested by `tests/tools/test_gpu_check.py`.

Letters: K rows that were chosen.
"""

import copy
from functools import partial
from typing import Any

import torch

from megavlm.data.pack.pack import Pack
from megavlm.model.backbone import Backbone
from megavlm.routing import router
from tools.gpu.context import Context, Item, ModelSizes, Outcome
from tools.gpu.models import EVERY_POLICY, loss_of, make_backbone, make_pack, make_samples, phases_of

NUM_LAYERS, VOCABULARY = 4, 500
FLOAT32_ERROR, BFLOAT16_LOSS_ERROR, LEAST_COSINE = 1e-4, 1e-2, 0.999
TEXTS = (5, 17, 40, 23, 64, 11)
"""Tokens of text of each sample."""


def items(context: Context) -> dict[str, Item]:
    return {
        f"{policy}, heads of {width}{', grouped' if grouped else ''}": partial(compare, context, policy, width, grouped=grouped)
        for policy in EVERY_POLICY
        for width in (64, 128)
        for grouped in (False, True)
    }


def compare(context: Context, policy: str, head_width: int, *, grouped: bool) -> Outcome:
    """One policy on the CPU in float32, on the device in float32 and in bfloat16."""
    backbone, pack = make_case(context, policy, head_width, grouped)
    with Choices() as chosen:
        loss, gradient = loss_and_gradient(backbone, pack)
    result: dict[str, Any] = {"loss": float(loss)}
    failures = []
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        there = in_precision(copy.deepcopy(backbone).to(context.device), dtype)
        with Choices(chosen) as own:
            its_loss, its_gradient = loss_and_gradient(there, pack.to(context.device))
        found = {
            "choices_apart": chosen.share_apart(own),
            "loss_error": float((its_loss - loss).abs() / loss.abs()),
            "gradient_error": float((its_gradient - gradient).norm() / gradient.norm()),
            "gradient_cosine": float(torch.nn.functional.cosine_similarity(its_gradient, gradient, dim=0)),
            "worst_parameter": worst_parameter(backbone, gradient, its_gradient),
        }
        result[name] = found
        failures += [f"{name}: {what}" for what in complaints(dtype, found)]
    return Outcome(result, failures)


def complaints(dtype: torch.dtype, found: dict[str, Any]) -> list[str]:
    """What is not as it should be; `not (x <= y)` also catches NaN."""
    if dtype == torch.float32:
        limits = {"choices_apart": 0.0, "loss_error": FLOAT32_ERROR, "gradient_error": FLOAT32_ERROR}
    else:
        limits = {"loss_error": BFLOAT16_LOSS_ERROR}
    wrong = [f"{name} is {found[name]:.2g}, more than {limit}" for name, limit in limits.items() if not found[name] <= limit]
    if dtype == torch.bfloat16 and not found["gradient_cosine"] >= LEAST_COSINE:
        wrong.append(f"gradient_cosine is {found['gradient_cosine']:.5f}, less than {LEAST_COSINE}")
    return wrong


def make_case(context: Context, policy: str, head_width: int, grouped: bool) -> tuple[Backbone, Pack]:
    """A small backbone on the CPU, as if trained a little, and a pack of uneven samples."""
    heads, phases = context.sizes.parity_heads, phases_of(EVERY_POLICY[policy], NUM_LAYERS)
    width = heads * head_width
    sizes = ModelSizes(width, NUM_LAYERS, heads, heads // 2 if grouped else heads, head_width, 2 * width)
    side = context.sizes.parity_image_side
    samples = make_samples([side**2 + 4 + text for text in TEXTS], side, VOCABULARY)
    num_tokens = sum(sample.num_tokens for sample in samples)
    cpu = torch.device("cpu")
    backbone = make_backbone(sizes.architecture(), VOCABULARY, phases, cpu, max_labels=num_tokens, chunk_rows=num_tokens // 2)
    for name, parameter in backbone.named_parameters():
        if "gates" in name or "norm" in name:  # untrained, they would not tell tokens apart
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    return backbone, make_pack(samples, phases, backbone)


def in_precision(backbone: Backbone, dtype: torch.dtype) -> Backbone:
    """With parameters of that type; buffers, such as the angles of the rotary embedding, stay as they are, as under DeepSpeed."""
    for parameter in backbone.parameters():
        parameter.data = parameter.data.to(dtype)
    return backbone


def loss_and_gradient(backbone: Backbone, pack: Pack) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss and the whole gradient in one row, in float64 on the CPU."""
    loss = loss_of(backbone(pack), pack)
    loss.backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in backbone.parameters()]
    return loss.detach().double().cpu(), torch.cat([g.detach().double().cpu().flatten() for g in gradients])


def worst_parameter(backbone: Backbone, gradient: torch.Tensor, its_gradient: torch.Tensor) -> tuple[str, float]:
    """The parameter whose gradient has the lowest cosine, of those with a thousandth of the whole gradient or more. For readers only."""
    cosines, begin = {}, 0
    for name, parameter in backbone.named_parameters():
        mine, its = (g[begin : begin + parameter.numel()] for g in (gradient, its_gradient))
        begin += parameter.numel()
        if mine.norm() > 1e-3 * gradient.norm():
            cosines[name] = float(torch.nn.functional.cosine_similarity(its, mine, dim=0))
    return min(cosines.items(), key=lambda pair: pair[1])


class Choices:
    """Writes down which rows routers choose; with another's choices, routers go on with those.

    Args:
        forced: The choices to go on with.
    """

    def __init__(self, forced: "Choices | None" = None):
        self.forced = forced
        self.rows: list[torch.Tensor] = []
        self.keys: list[torch.Tensor] = []
        """What similar tokens were found by, where they merge."""

    def __enter__(self) -> "Choices":
        self._choose, self._merge = router.Router._choose, router.merge_spans
        original_choose, original_merge = self._choose, self._merge

        def choose(of_router, choice, stage):
            rows_K = original_choose(of_router, choice, stage)
            self.rows.append(rows_K.cpu())
            return self.forced.rows[len(self.rows) - 1].to(rows_K.device) if self.forced else rows_K

        def merge(h_TD, k_THd, among, kept):
            self.keys.append(k_THd.cpu())
            if self.forced:
                k_THd = self.forced.keys[len(self.keys) - 1].to(k_THd.device)
            return original_merge(h_TD, k_THd, among, kept)

        setattr(router.Router, "_choose", choose)  # noqa: B010 (its type names the first parameter self)
        router.merge_spans = merge
        return self

    def __exit__(self, *_) -> None:
        router.Router._choose, router.merge_spans = self._choose, self._merge

    def share_apart(self, other: "Choices") -> float:
        """The share of chosen rows that the other did not choose."""
        total = sum(map(len, self.rows))
        apart = sum(int((~torch.isin(mine, its)).sum()) for mine, its in zip(self.rows, other.rows, strict=True))
        return apart / total if total else 0.0
