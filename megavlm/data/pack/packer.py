"""Packs of equal cost by construction: every lane builds every pack to the same target, without knowing the others.

The cost of a sample is a vector, one entry per stage and one for the output head, because under ZeRO-3 the ranks wait for each
other at every layer: equal totals with unequal stages still wait. A pack starts from the oldest waiting sample, is filled at random,
and then improved by local search (add, remove, exchange one for one, one for two, two for one) until it meets the target.
"""

from functools import lru_cache

import numpy as np

LEAN = 0.02
"""How far the target of a pack leans from the mixture's towards the look-ahead's own composition, at equal total cost. What a lane
draws wanders; without this the surplus of one kind would gather in the look-ahead until it is full of it."""
TOLERANCE = 5e-4
"""Good enough: deviation from the target, summed over stages and total, relative to the whole cost."""
POOR, MAX_ATTEMPTS = 5e-3, 4
"""A pack that is still further off is built again from another random filling, so many times at most, while that helps."""
TOTAL_WEIGHT = 1.0
"""Weight of the deviation of the total cost beside those of the single stages."""
MAX_MOVES = 24
POOL = 64
"""Waiting samples among which pairs are tried."""
WINDOW = 16
"""Pairs on either side of the wanted total cost that are looked at."""


def choose(costs_nc: np.ndarray, sizes_n: np.ndarray, target_c: np.ndarray, bounds, *, rng: np.random.Generator) -> list[int]:
    """Choose samples for one pack from a look-ahead whose oldest sample comes first.

    The oldest is always taken, so no sample waits for more packs than the look-ahead has places.

    Args:
        costs_nc: Cost vector of each waiting sample.
        sizes_n: Length of each; or several sizes ``[n, b]``.
        target_c: Cost vector to meet.
        bounds: Upper bound of the pack's length; or of each of its sizes ``[b]``. No sample is larger.
        rng: The pack's own random stream.

    Returns:
        Indices of the chosen samples, ascending; at least one.
    """
    costs_nc, target_c = _merge_proportional(costs_nc / max(target_c.sum(), 1.0), target_c / max(target_c.sum(), 1.0))
    mean_c = costs_nc.mean(0)
    if mean_c.sum() > 0:
        target_c = (1 - LEAN) * target_c + LEAN * mean_c / mean_c.sum()
    kinds_n = _kinds(np.column_stack([costs_nc, sizes_n]))
    sizes_bn, bounds_b = np.atleast_2d(sizes_n.T), np.atleast_1d(bounds)
    num_kinds = kinds_n.max() + 1
    best: _Search | None = None
    for _ in range(MAX_ATTEMPTS):
        search = _Search(costs_nc, sizes_bn, kinds_n, target_c, bounds_b=bounds_b)
        search.fill(rng)
        search.improve(rng)
        # where the samples are much alike, another filling ends at the same place
        if best is not None and search.distance >= best.distance - 1e-9:
            break
        best = search
        if best.distance < POOR or num_kinds <= best.chosen.sum():
            break
    assert best is not None  # the first attempt always is
    return np.flatnonzero(best.chosen).tolist()


def _merge_proportional(costs_nc: np.ndarray, target_c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Add up entries that are multiples of each other, such as layers that keep equally many tokens: they say the same."""
    sums_c = costs_nc.sum(0)
    used = np.flatnonzero(sums_c)
    group = _kinds((costs_nc[:, used] / sums_c[used]).T)
    member_cg = np.zeros((len(used), group.max(initial=-1) + 1))
    member_cg[np.arange(len(used)), group] = 1
    return costs_nc[:, used] @ member_cg, target_c[used] @ member_cg


def _kinds(rows_nc: np.ndarray) -> np.ndarray:
    """Numbers from 0 on, the same for equal rows."""
    # a projection tells rows apart: equal ones give equal numbers
    projection = np.modf(np.arange(1, rows_nc.shape[1] + 1) * 0.6180339887498949)[0]
    return np.unique(np.round(rows_nc @ projection, 9), return_inverse=True)[1]


class _Search:
    """A pack in the making: which samples it has, what cost it misses and what has room."""

    def __init__(self, costs_nc: np.ndarray, sizes_bn: np.ndarray, kinds_n: np.ndarray, target_c: np.ndarray, *, bounds_b: np.ndarray):
        # the last entry is the total, so that one sum of absolute values judges stages and total together;
        # the last sample stands for none: it costs nothing
        self.costs_nc = np.zeros((len(costs_nc) + 1, costs_nc.shape[1] + 1))
        self.costs_nc[:-1, :-1], self.costs_nc[:-1, -1] = costs_nc, TOTAL_WEIGHT * costs_nc.sum(1)
        self.sizes_bn = np.zeros((len(sizes_bn), sizes_bn.shape[1] + 1), sizes_bn.dtype)
        self.sizes_bn[:, :-1] = sizes_bn
        self.kinds_n = kinds_n
        self.missing_c = np.append(target_c, TOTAL_WEIGHT * target_c.sum())
        self.room_b = bounds_b
        self.chosen = np.zeros(sizes_bn.shape[1], bool)
        self._exchange([], [0])

    @property
    def distance(self) -> float:
        return float(np.abs(self.missing_c).sum())

    def fill(self, rng: np.random.Generator) -> None:
        """Take samples at random, in which older ones are favoured, as long as they fit."""
        # exponential waiting times make a weighted order without replacement (Efraimidis & Spirakis 2006)
        num = len(self.chosen)
        order = np.argsort(rng.exponential(size=num) / np.linspace(2.0, 1.0, num))
        missing, room, taken, shortest = self.missing_c[-1], self.room_b.tolist(), [], self.sizes_bn[0, :-1].min()
        for i, cost, sizes in zip(order.tolist(), self.costs_nc[order, -1].tolist(), self.sizes_bn[:, order].T.tolist()):
            if room[0] < shortest:
                break
            if i and cost <= missing and all(size <= left for size, left in zip(sizes, room)):
                missing, room = missing - cost, [left - size for size, left in zip(sizes, room)]
                taken.append(i)
        self._exchange([], taken)

    def improve(self, rng: np.random.Generator) -> None:
        """Make the best move again and again until the target is met or no move helps."""
        none, pairs = len(self.chosen), None
        for _ in range(MAX_MOVES):
            if self.distance < TOLERANCE:
                return
            # the oldest stays; of samples that are alike, the youngest leaves first and the oldest comes first
            inside = self._first_of_each_kind(np.flatnonzero(self.chosen)[:0:-1])
            outside = self._first_of_each_kind(np.flatnonzero(~self.chosen))
            out_singles = np.append(inside, none)[:, None]
            if self._exchange_for_one(out_singles, np.append(outside, none)):
                continue
            if pairs is None:
                pairs = self._sorted_pairs(rng)
            out_pairs = np.hstack([out_singles, np.full_like(out_singles, none)])
            if not self._exchange_for_two(np.vstack([out_pairs, _pairs(inside)]), *pairs):
                return

    def _exchange_for_one(self, out_ok: np.ndarray, into_p: np.ndarray) -> bool:
        """Make the best exchange of a row of ``out`` for one of ``into``, if one helps."""
        out_co, into_cp = self.costs_nc[out_ok].sum(1).T, self.costs_nc[into_p].T
        distances_op, entry_op = np.zeros(()), None
        for missing, out_o, into in zip(self.missing_c, out_co, into_cp):
            entry_op = np.subtract((out_o + missing)[:, None], into, out=entry_op)
            distances_op = distances_op + np.abs(entry_op, out=entry_op)
        for sizes_n, room in zip(self.sizes_bn, self.room_b):
            distances_op[sizes_n[into_p] - sizes_n[out_ok].sum(1)[:, None] > room] = np.inf
        o, p = np.unravel_index(distances_op.argmin(), distances_op.shape)
        return self._exchange_if_closer(distances_op[o, p], out_ok[o], into_p[p : p + 1])

    def _first_of_each_kind(self, indices: np.ndarray) -> np.ndarray:
        first = np.full(len(self.chosen), -1)
        first[self.kinds_n[indices[::-1]]] = indices[::-1]  # of those assigned to one place the last one stays
        return first[first >= 0]

    def _sorted_pairs(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All pairs of some samples outside by their total cost: indices ``[P, 2]``, costs ``[P, c]``, sizes ``[b, P]``."""
        outside = np.flatnonzero(~self.chosen)
        first = self._first_of_each_kind(outside)
        is_left = ~self.chosen
        is_left[first] = False
        second = self._first_of_each_kind(np.flatnonzero(is_left))
        pairs_p2 = _pairs(rng.permutation(np.concatenate([first, second]))[:POOL])
        costs_pc = self.costs_nc[pairs_p2[:, 0]] + self.costs_nc[pairs_p2[:, 1]]
        order = np.argsort(costs_pc[:, -1])
        pairs_p2 = pairs_p2[order]
        return pairs_p2, costs_pc[order], self.sizes_bn[:, pairs_p2].sum(2)

    def _exchange_for_two(self, out_ok: np.ndarray, pairs_p2: np.ndarray, costs_pc: np.ndarray, sizes_bp: np.ndarray) -> bool:
        """Make the best exchange of a row of ``out`` for a pair whose total cost is close to what is wanted, if one helps."""
        if len(pairs_p2) == 0:
            return False
        wanted_oc = self.missing_c + self.costs_nc[out_ok].sum(1)
        near_o = np.searchsorted(costs_pc[:, -1], wanted_oc[:, -1])
        near_ow = np.clip(near_o[:, None] + np.arange(-WINDOW, WINDOW), 0, len(pairs_p2) - 1)
        distances_ow = np.abs(wanted_oc[:, None] - costs_pc[near_ow]).sum(2)
        distances_ow[np.any(self.chosen[pairs_p2], 1)[near_ow]] = np.inf
        for sizes_n, sizes_p, room in zip(self.sizes_bn, sizes_bp, self.room_b):
            distances_ow[sizes_p[near_ow] - sizes_n[out_ok].sum(1)[:, None] > room] = np.inf
        o, w = np.unravel_index(distances_ow.argmin(), distances_ow.shape)
        return self._exchange_if_closer(distances_ow[o, w], out_ok[o], pairs_p2[near_ow[o, w]])

    def _exchange_if_closer(self, distance: float, out: np.ndarray, into: np.ndarray) -> bool:
        if distance >= self.distance - 1e-9:
            return False
        none = len(self.chosen)
        self._exchange([i for i in out.tolist() if i != none], [i for i in into.tolist() if i != none])
        return True

    def _exchange(self, out: list[int], into: list[int]) -> None:
        self.chosen[out], self.chosen[into] = False, True
        self.missing_c = self.missing_c + self.costs_nc[out].sum(0) - self.costs_nc[into].sum(0)
        self.room_b = self.room_b + self.sizes_bn[:, out].sum(1) - self.sizes_bn[:, into].sum(1)


def _pairs(indices: np.ndarray) -> np.ndarray:
    return indices[_places_of_pairs(len(indices))]


@lru_cache(maxsize=256)
def _places_of_pairs(num: int) -> np.ndarray:
    return np.stack(np.triu_indices(num, 1), axis=1)
