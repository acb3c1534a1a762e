"""Layers with experts: their blocks, and the loss that keeps the experts' loads alike.

Letters: E experts, k of them take each token.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


def expert_blocks(model: nn.Module) -> list[nn.Module]:
    """The modules that hold the experts of a layer and the router before them, in the layers' order; none of a dense model."""
    return [module for module in model.modules() if hasattr(module, "experts") and hasattr(module, "gate")]


def implementation_for(dtype: torch.dtype) -> str:
    """Which of `transformers`' ways to compute experts is taken: one call for all of them, or a loop where that has no kernel."""
    return "eager" if dtype == torch.float64 else "grouped_mm"


class RouterWatch:
    """Sees what the routers of experts decide, where it is asked to.

    Args:
        blocks: The model's `expert_blocks`.
    """

    def __init__(self, blocks: Sequence[nn.Module]):
        self._seen: list[tuple[torch.Tensor, torch.Tensor]] | None = None
        for block in blocks:
            assert isinstance(block.gate, nn.Module)
            block.gate.register_forward_hook(self._see)

    @contextmanager
    def watching(self) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
        """Within it every router's logits ``[K, E]`` and chosen experts ``[K, k]`` are collected, in the layers' order."""
        self._seen = seen = []
        try:
            yield seen
        finally:
            # a layer that is computed again in the backward pass counts once
            self._seen = None

    def _see(self, _router: nn.Module, _inputs: tuple, output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        if self._seen is not None:
            logits_KE, _scores, chosen_Kk = output
            self._seen.append((logits_KE, chosen_Kk))


def balance_losses(routers: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
    """The mean of the layers' `balance_loss`, float32 ``[1]``; nothing of a dense model."""
    return [torch.stack([balance_loss(*router) for router in routers]).mean(0, keepdim=True)] if routers else []


def balance_loss(logits_KE: torch.Tensor, chosen_Kk: torch.Tensor) -> torch.Tensor:
    """``E * sum_e f_e P_e`` over the tokens that pass the layer (Fedus et al. 2021, arXiv 2101.03961, equations 4 to 6).

    f is the share of tokens that an expert takes, P the mean of its probability. With equal loads it is k, the least there is.
    Waits for nothing on the device.
    """
    num_tokens, num_experts = logits_KE.shape
    chosen = chosen_Kk.flatten()
    # whole numbers: the sum is exact in any order
    taken_E = logits_KE.new_zeros(num_experts, dtype=torch.float32).scatter_add(0, chosen, torch.ones_like(chosen, dtype=torch.float32))
    probability_E = logits_KE.float().softmax(-1).mean(0)
    return num_experts * (taken_E / num_tokens * probability_E).sum()
