"""Stock layers of which some rows go through a part only: they skip the MLP, or give keys and values and nothing else.

Nothing of a layer is written anew. Hooks hand fewer rows to its modules; rows that are left out get zeros, so the residual stream keeps
what it had. Every family of docs/models.md adds what these modules give, or a norm of it without a bias, to the stream.

Letters: P places of rows among the K active ones.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from megavlm.routing.router import Parts
from megavlm.routing.rows import put_rows, take_rows

ANSWERS = ("o_proj", "dense")
"""Names of the projection of what attention answers."""


@contextmanager
def in_parts(layer: nn.Module, parts: Parts) -> Iterator[None]:
    """Within it, a decoder layer computes for each of its rows what ``parts`` says.

    Rows that do not ask still go through the layer's norm and its projections of keys and values; their queries are zeros, and what
    attention makes of these is thrown away.

    Args:
        layer: A stock layer with ``mlp`` and, if some of its rows do not ask, a ``self_attn`` with ``q_proj`` and one of `ANSWERS`.
        parts: Which of the rows do what.
    """
    handles = []
    if parts.asking_P is not None:
        attention = layer.get_submodule("self_attn")
        answer = next(getattr(attention, name) for name in ANSWERS if hasattr(attention, name))
        for module in (attention.get_submodule("q_proj"), answer):
            handles += _restrict(module, parts.asking_P)
    if parts.mlp_P is not None:
        handles += _restrict(layer.get_submodule("mlp"), parts.mlp_P)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _restrict(module: nn.Module, places_P: torch.Tensor) -> list:
    """Hooks that let a module ``[1, K, …] → [1, K, …]`` see only some of the rows."""
    num_rows = 0

    def take(_module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        nonlocal num_rows
        (x_1KD,) = inputs
        num_rows = x_1KD.shape[1]
        return (take_rows(x_1KD[0], places_P)[None],)

    def put(_module, _inputs, out_1PD: torch.Tensor) -> torch.Tensor:
        return put_rows(out_1PD[0], places_P, num_rows)[None]

    return [module.register_forward_pre_hook(take), module.register_forward_hook(put)]
