"""Causal gates with an exact quota: the selector of `mixture_of_depths`.

Letters: C candidates.

Tested by `tests/model/test_backbone.py`.
"""

import torch
from torch import nn
from torch.nn import functional

from megavlm.routing.route import Choice
from megavlm.routing.rows import take_rows
from megavlm.routing.selectors import Candidates, sort_by_span


def open_gates(gate: nn.Module, h_TD: torch.Tensor, among: Candidates, choice: Choice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Let a learned gate choose ``choice.kept`` tokens of every span, each by itself and those before it alone.

    Args:
        gate: A linear map, D → 1.
        h_TD: The residual stream.
        among: The candidates.
        choice: How many of each span.

    Returns:
        The chosen rows, ascending; what each row's outcome is scaled by ``[T]``, 1 for rows that are not candidates; the
        summed auxiliary loss.
    """
    logit_C = at_least_float32(gate(take_rows(h_TD, among.rows_C))[:, 0])
    chosen_C = causal_quota(logit_C.detach() > 0, among, choice)
    gate_T = logit_C.new_ones(len(h_TD)).index_copy(0, among.rows_C, logit_C.sigmoid())
    # chosen ones first, in order; their number is known
    order_C = (~chosen_C).to(torch.int8).sort(stable=True).indices
    rows_K = among.rows_C.index_select(0, order_C[: sum(choice.kept)])
    return rows_K, gate_T, topk_loss(logit_C, among, choice)


def causal_quota(open_C: torch.Tensor, among: Candidates, choice: Choice) -> torch.Tensor:
    """Which candidates go through: those with an open gate while the quota lasts, and all once no more are left than it needs.

    Exactly ``choice.kept`` per span, and each decision looks only back. In closed form: with c open gates before a token, it is
    forced if ``quota - min(c, quota) >= tokens left``; forcing goes on to the end of the span once it begins.
    """
    running_C = open_C.long().cumsum(0)
    before_C = running_C - open_C.long()
    before_C = before_C - before_C.index_select(0, among.first_C)
    is_forced_C = choice.quota_C - before_C.minimum(choice.quota_C) >= among.left_C
    return is_forced_C | (open_C & (before_C < choice.quota_C))


def topk_loss(logit_C: torch.Tensor, among: Candidates, choice: Choice) -> torch.Tensor:
    """Sum of binary cross-entropies of the gates against membership in their span's top-k (arXiv 2404.02258, section 3.5)."""
    order_C = sort_by_span(logit_C.detach().float(), among.span_C)
    is_top_C = torch.zeros_like(logit_C).index_fill(0, order_C.index_select(0, choice.take_K), 1.0)
    return functional.binary_cross_entropy_with_logits(logit_C, is_top_C, reduction="sum")


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Half precision as float32; wider types as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
