"""Next-token cross-entropy on labelled rows only, in chunks, as sums per group.

Letters: P codes of a block.
"""

import math
from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import Field
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from megavlm.data.pack.patches import ABSENT
from megavlm.model.fusion import compiled
from megavlm.routing.tasks import TaskName
from megavlm.settings import Number, Positive, Settings


class LossConfig(Settings):
    """Next-token cross-entropy per task."""

    task_weights: dict[TaskName, Annotated[Number, Field(ge=0, le=1e6)]] = {
        "understanding": 1.0,
        "generation": 1.0,
        "text": 1.0,
    }
    """Factor of each task's mean loss. A task that is not named has weight 1."""
    gate_weight: Annotated[Number, Field(ge=0, le=1e6)] = 0.01
    """Factor of the auxiliary loss of learned gates (policy `mixture_of_depths`), a mean over image tokens."""
    balance_weight: Annotated[Number, Field(ge=0, le=1e6)] | None = None
    """Factor of the loss that keeps the loads of experts alike, a mean over packs and layers; `null` takes `router_aux_loss_coef` of
    `model.architecture`. Only for models with experts."""
    chunk_rows: Positive = 4096
    """Labelled rows that go through the output head at a time (bounds the memory of the logits)."""


def chunked_loss(
    head: Callable[[torch.Tensor], torch.Tensor],
    h_MD: torch.Tensor,
    targets_M: torch.Tensor,
    groups_M: torch.Tensor,
    *,
    num_groups: int,
    num_chunks: int,
    is_compiled: bool = False,
) -> torch.Tensor:
    """Sums of cross-entropy per group.

    The logits of a chunk are made again in the backward pass, so that never more than one chunk of them exists; a single chunk
    is kept. The number of chunks is the caller's and the same for every pack, because under ZeRO-3 every rank must call the head
    equally often (P7); a chunk may be empty.

    Args:
        head: Output projection, D → V.
        h_MD: Normalised hidden states of the labelled rows.
        targets_M: Ids to predict; ``[M, P]``, filled up with `ABSENT`, where a row predicts several.
        groups_M: Group of each row.
        num_groups: Number of groups.
        num_chunks: Calls of the head.
        is_compiled: Compile what comes after the head.

    Returns:
        float32 ``[num_groups]``.
    """
    cross_entropy = compiled(_cross_entropy) if is_compiled else _cross_entropy
    rows = math.ceil(len(h_MD) / num_chunks)
    lengths = [min(rows, max(0, len(h_MD) - i * rows)) for i in range(num_chunks)]
    # split, not slices: its backward is one concatenation
    chunks = zip(h_MD.split(lengths), targets_M.split(lengths))
    if num_chunks == 1:
        losses = [_chunk_loss(head, cross_entropy, *chunk) for chunk in chunks]
    else:
        losses = [checkpoint(_chunk_loss, head, cross_entropy, *chunk, use_reentrant=False) for chunk in chunks]
    return h_MD.new_zeros(num_groups, dtype=torch.float32).index_add(0, groups_M, torch.cat(losses))


def _chunk_loss(head: Callable, cross_entropy: Callable, h_MD: torch.Tensor, targets_M: torch.Tensor) -> torch.Tensor:
    return cross_entropy(head(h_MD), targets_M)


def _cross_entropy(logits_MV: torch.Tensor, targets_M: torch.Tensor) -> torch.Tensor:
    logits_MV = logits_MV.float()
    if targets_M.dim() == 1:
        return functional.cross_entropy(logits_MV, targets_M, reduction="none")
    # one softmax for all codes of a block
    is_there_MP = targets_M != ABSENT
    of_targets_MP = logits_MV.gather(1, targets_M.clamp(min=0))
    return ((logits_MV.logsumexp(1)[:, None] - of_targets_MP) * is_there_MP).sum(1)
