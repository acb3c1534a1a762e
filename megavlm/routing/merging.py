"""Bipartite merging of image tokens: the mechanism of the policy `merge` (ToMe, arXiv 2210.09461).

Letters: C candidates.

Tested by `tests/model/test_backbone.py`.
"""

import torch

from megavlm.routing.selectors import Candidates


def merge_spans(
    h_TD: torch.Tensor, k_THd: torch.Tensor, among: Candidates, kept: list[int]
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Merge the most similar tokens of every span.

    Every second token of a span looks for its most similar among the others, by the cosine of the keys averaged over heads; those
    with the highest similarity become one with what they found, as the mean of all that meet there.

    Args:
        h_TD: The residual stream.
        k_THd: Keys of the layer before, without rotary embedding.
        among: The spans' tokens.
        kept: How many of each span are left.

    Returns:
        The stream with merged rows; the logarithm of how many tokens each row stands for ``[T]``, None if nothing merges; the
        candidates' rows, span by span, those that are left first.
    """
    if kept == among.lengths:
        return h_TD, None, among.rows_C
    unit_CD = torch.nn.functional.normalize(k_THd.float().mean(1).index_select(0, among.rows_C), dim=1)
    orders, sources, targets, start = [], [], [], 0
    for length, left in zip(among.lengths, kept):
        rows, unit = among.rows_C[start : start + length], unit_CD[start : start + length]
        start += length
        movable, fixed = rows[1::2], rows[0::2]
        if len(movable) == 0:  # a span of one
            orders.append(rows)
            continue
        closest = (unit[1::2] @ unit[0::2].T).max(1)
        ranked = closest.values.sort(descending=True, stable=True).indices
        gone, stays = ranked[: length - left], ranked[length - left :]
        sources.append(movable.index_select(0, gone))
        targets.append(fixed.index_select(0, closest.indices.index_select(0, gone)))
        orders.append(torch.cat([fixed, movable.index_select(0, stays), sources[-1]]))
    source, target = torch.cat(sources), torch.cat(targets)
    wide = torch.promote_types(h_TD.dtype, torch.float32)
    size_T = torch.ones(len(h_TD), dtype=wide, device=h_TD.device).index_add(0, target, torch.ones_like(target, dtype=wide))
    total_TD = h_TD.index_add(0, target, h_TD.index_select(0, source))
    # rows that nothing merged into keep their bits: a division by 1 is exact
    return total_TD / size_T[:, None].to(h_TD.dtype), size_T.log(), torch.cat(orders)
