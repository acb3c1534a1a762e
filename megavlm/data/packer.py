"""Packs of equal cost by construction: every lane builds every pack to the same target, without knowing the others.

The cost of a sample is a vector, one entry per stage and one for the output head, because under ZeRO-3 the ranks wait for each
other at every layer: equal totals with unequal stages still wait.
"""

import numpy as np


def choose(
    costs_nc: np.ndarray, tokens_n: np.ndarray, target_c: np.ndarray, max_tokens: int, rng: np.random.Generator
) -> list[int]:
    """Choose samples for one pack from a look-ahead whose oldest sample comes first.

    The oldest is always taken, so no sample waits for more packs than the look-ahead has places. Then samples are taken at
    random while there is plenty of room, then those that come closest to the target; swaps one for one finish.

    Args:
        costs_nc: Cost vector of each waiting sample.
        tokens_n: Length of each.
        target_c: Cost vector to meet.
        max_tokens: Upper bound of the pack's length.
        rng: The pack's own random stream.

    Returns:
        Indices of the chosen samples, ascending; at least one.
    """
    # a relative measure, in which each entry weighs by its share of the whole cost
    scale = max(target_c.sum(), 1.0)
    costs_nc, target_c = costs_nc / scale, target_c / scale
    chosen = np.zeros(len(tokens_n), bool)
    chosen[0] = True
    missing_c, room = target_c - costs_nc[0], max_tokens - tokens_n[0]
    largest = costs_nc.sum(1).max()
    while True:
        candidates = np.flatnonzero(~chosen & (tokens_n <= room))
        if len(candidates) == 0:
            break
        if missing_c.sum() > 3 * largest:
            pick = rng.choice(candidates)
        else:
            distances = np.abs(missing_c - costs_nc[candidates]).sum(1)
            pick = candidates[distances.argmin()]
            if distances.min() >= np.abs(missing_c).sum():
                break
        chosen[pick] = True
        missing_c, room = missing_c - costs_nc[pick], room - tokens_n[pick]
    _swap(chosen, costs_nc, tokens_n, missing_c, room)
    return np.flatnonzero(chosen).tolist()


def _swap(chosen: np.ndarray, costs_nc: np.ndarray, tokens_n: np.ndarray, missing_c: np.ndarray, room: int) -> None:
    """Exchange chosen samples for waiting ones while that brings the pack closer to the target; in place."""
    for _ in range(16):
        # the oldest stays
        inside, outside = np.flatnonzero(chosen)[1:], np.flatnonzero(~chosen)
        if len(inside) == 0 or len(outside) == 0:
            return
        after_ioc = missing_c + costs_nc[inside][:, None] - costs_nc[outside][None]
        distances_io = np.abs(after_ioc).sum(2)
        too_long = tokens_n[outside][None] - tokens_n[inside][:, None] > room
        distances_io[too_long] = np.inf
        i, o = np.unravel_index(distances_io.argmin(), distances_io.shape)
        if distances_io[i, o] >= np.abs(missing_c).sum() - 1e-12:
            return
        missing_c = after_ioc[i, o]
        room += tokens_n[inside[i]] - tokens_n[outside[o]]
        chosen[inside[i]], chosen[outside[o]] = False, True
