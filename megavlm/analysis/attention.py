"""Where attention goes, under fused kernels that never write it down.

A few query rows of each pack are computed again in float32, against all keys of their own sequence, from the queries and keys that the
layer's kernel gets; never the full matrix. The forward pass itself does not change by a bit, and calls no module more often (P7).

    watch = AttentionWatch(shape, vocabulary, seed)
    with watch.on(backbone, pack):            # the pack on the host
        backbone(pack.to(device))
    watch.shares()

The statistics are kept per layer, key/value head (mean over the query heads that share it), task and kind of query: the share of attention
on text, image, special and sink tokens; its entropy in nats; and the effective number of image tokens, which is exp of the entropy of the
attention restricted to image tokens, over the rows with one before them (0 where a sliding window hides them all).

Letters: L layers (or keys of a row), G key/value heads, h query heads of one, Q rows looked at, U active tokens and guests in order,
C cells (task, kind of query), X statistics, R guests.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from megavlm.analysis.rows import IMAGE, KINDS, NUM_CELLS, QUERIES, StageRows, sample_rows
from megavlm.costs import ModelShape
from megavlm.data.pack.pack import Pack
from megavlm.model.attention import Context, Scoring, placed
from megavlm.model.backbone import Backbone
from megavlm.randomness import Purpose, stream
from megavlm.routing.tasks import TASKS
from megavlm.vocabulary import Vocabulary

STATISTICS = (*KINDS, "entropy", "effective_image_tokens")


@dataclass(frozen=True)
class Allocation:
    """Mean statistics of the queries of one kind in one task."""

    queries: int
    """Rows looked at, over all layers."""
    groups_XLG: np.ndarray
    """Mean per statistic of `STATISTICS`, layer and key/value head; NaN where no row was looked at."""

    @property
    def mean_XL(self) -> np.ndarray:
        """The mean over heads."""
        return self.groups_XLG.mean(2)


class AttentionWatch:
    """Sums of the statistics over the packs that it watched.

    Args:
        shape: The model's sizes.
        vocabulary: Tells text from images by their ids.
        seed: Chooses the rows, together with the pack's lane and step.
        num_rows: Most rows of one kind in one sequence.
        num_sequences: Most sequences of one task in a pack.
    """

    def __init__(self, shape: ModelShape, vocabulary: Vocabulary, seed: int, num_rows: int = 16, *, num_sequences: int = 4):
        self.shape = shape
        self.vocabulary = vocabulary
        self.seed = seed
        self.num_rows = num_rows
        self.num_sequences = num_sequences
        self.counts_LC2 = np.zeros((shape.num_layers, NUM_CELLS, 2))
        self._sums_LGCX: torch.Tensor | None = None

    @contextmanager
    def on(self, backbone: Backbone, pack: Pack) -> Iterator[None]:
        """Watch the next forward pass of a pack.

        Args:
            backbone: The backbone itself, not the engine around it.
            pack: On the host.
        """
        rng = stream(self.seed, Purpose.ANALYSIS, pack.lane, pack.step)
        stages = sample_rows(pack, self.vocabulary, self.num_rows, self.num_sequences, rng=rng)
        on_device, seen = {}, set()

        def observe(layer, _active, q_KHd, k_KHd, _v, scoring, context):  # noqa: PLR0917 (called by place, as the backbone calls observers)
            if layer in seen:  # computed again for the backward pass
                return
            seen.add(layer)
            if layer not in on_device:
                stage = next(stage for stage in stages if layer in stage.layers)
                on_device.update(dict.fromkeys(stage.layers, stage.to(q_KHd.device)))
            with torch.no_grad():
                self._sums(q_KHd.device)[layer] += _layer_sums(on_device[layer], q_KHd, k_KHd, scoring, context=context)

        backbone.observe = observe
        try:
            yield
        finally:
            backbone.observe = None
        for stage in stages:
            self.counts_LC2[stage.layers.start : stage.layers.stop] += stage.counts_C2

    def merge(self, sum_over_ranks) -> None:
        """Add up the sums of all ranks. Called by all of them together.

        Args:
            sum_over_ranks: float64 ``[n]`` → their sum over the ranks, such as `World.sum`.
        """
        sums = self._sums(torch.device("cpu"))
        both = np.concatenate([sums.double().cpu().numpy().ravel(), self.counts_LC2.ravel()])
        both = sum_over_ranks(both).cpu().numpy()
        self._sums_LGCX = torch.from_numpy(both[: sums.numel()].reshape(sums.shape))
        self.counts_LC2 = both[sums.numel() :].reshape(self.counts_LC2.shape)

    def shares(self) -> dict[tuple[str, str], Allocation]:
        """(task, kind of query) → mean statistics; pairs without a row are left out."""
        sums_XCLG = self._sums(torch.device("cpu")).double().cpu().numpy().transpose(3, 2, 0, 1)
        of_rows, of_seeing = self.counts_LC2.transpose(2, 1, 0)[..., None]
        with np.errstate(invalid="ignore"):
            means_XCLG = np.concatenate([sums_XCLG[:-1] / of_rows, sums_XCLG[-1:] / of_seeing])
        return {
            (task, query): Allocation(int(of_rows[cell].sum()), means_XCLG[:, cell])
            for t, task in enumerate(TASKS)
            for q, query in enumerate(QUERIES)
            if of_rows[cell := t * len(QUERIES) + q].any()
        }

    def _sums(self, device: torch.device) -> torch.Tensor:
        if self._sums_LGCX is None:
            size = (self.shape.num_layers, self.shape.num_kv_heads, NUM_CELLS, len(STATISTICS))
            self._sums_LGCX = torch.zeros(size, device=device)
        return self._sums_LGCX


def _layer_sums(rows: StageRows, q_KHd, k_KHd, scoring: Scoring, *, context: Context) -> torch.Tensor:
    """Sums of the statistics over the rows looked at: float32 ``[G, C, X]``, G key/value heads."""
    bias_U, guests = context.log_sizes_K, context.guests
    if guests is not None:
        k_KHd = placed(k_KHd, guests, guests.k_RHd)
        bias_U = None if bias_U is None else placed(bias_U, guests, None)
    num_groups = k_KHd.shape[1]
    sums_GCX = torch.zeros(num_groups, NUM_CELLS, len(STATISTICS), device=q_KHd.device)
    for sequence in rows.sequences:
        here = slice(sequence.first, sequence.end)
        q_QGhd = q_KHd.index_select(0, sequence.queries_Q).float().unflatten(1, (num_groups, -1))
        scores_GhQL = torch.einsum("qghd,lgd->ghql", q_QGhd, k_KHd[here].float()) * scoring.scale
        scores_GhQL = scoring.capped(scores_GhQL)
        if bias_U is not None:
            scores_GhQL = scores_GhQL + bias_U[here].float()
        places_L = torch.arange(sequence.end - sequence.first, device=q_KHd.device)
        scores_GhQL = scores_GhQL.masked_fill(scoring.hides(sequence.places_Q, places_L), -torch.inf)
        stats_GQX = statistics(scores_GhQL, rows.kinds_U[here]).mean(1)
        sums_GCX.index_add_(1, sequence.cells_Q, stats_GQX)
    return sums_GCX


def statistics(scores_hQL: torch.Tensor, kinds_L: torch.Tensor) -> torch.Tensor:
    """The statistics of rows of attention.

    Args:
        scores_hQL: Scores before the softmax, float32; -inf for keys that a row cannot see. Any leading dimensions.
        kinds_L: Kinds of the keys.

    Returns:
        ``[…, Q, X]`` in the order of `STATISTICS`; the effective number is 0 for rows that see no image token.
    """
    weights = scores_hQL.softmax(-1)
    is_kind_L4 = kinds_L[:, None] == torch.arange(len(KINDS), device=kinds_L.device)
    shares = weights @ is_kind_L4.to(weights.dtype)
    scores_of_images = scores_hQL.masked_fill(kinds_L != IMAGE, -torch.inf)
    # a softmax of its own: where almost no attention is on images, dividing by their share would divide noise
    of_images = scores_of_images.softmax(-1).nan_to_num(0.0)
    effective = torch.special.entr(of_images).sum(-1).exp() * of_images.sum(-1)
    return torch.cat([shares, torch.special.entr(weights).sum(-1, keepdim=True), effective[..., None]], -1)
