"""What the average pack of a step holds, stage by stage, from the layouts of the mixture and the route.

Letters: N layouts, L lengths, s stages.

Tested by `tests/planner/test_plan.py`.
"""

from dataclasses import dataclass

import numpy as np

from megavlm.data.pack.mixture import pack_bounds, target_flops, token_shares
from megavlm.data.pack.pack import Costing
from megavlm.data.tools.simulate import Situation, simulate_lane
from megavlm.randomness import Purpose, stream


@dataclass(frozen=True)
class Stage:
    """Layers with the same active tokens."""

    num_layers: int
    rows: float
    """Active rows of the pack."""
    guests: float
    """Rows that give keys and values only."""
    lengths_L: np.ndarray
    """Attended rows of a sample: each number that there is."""
    samples_L: np.ndarray
    """Samples of that length in the pack."""


@dataclass(frozen=True)
class Load:
    """The average pack at a step of the run."""

    tokens: float
    labels: float
    stages: list[Stage]


def average_load(situation: Situation) -> Load:
    """The mean pack: as many samples of every layout as it has room for."""
    config, costing, step = situation.config, situation.costing, situation.at_step
    shares = token_shares(situation.mixture, config)
    layouts, samples = [], []
    for share, source in zip(shares, situation.mixture.values(), strict=True):
        tokens = sum(count * layout.num_tokens for count, layout in source.layouts)
        layouts += [layout for _, layout in source.layouts]
        samples += [share * count / tokens for count, _ in source.layouts]
    costs_Nc = np.array([costing.flops(layout, step) for layout in layouts])
    target = target_flops(situation.mixture, shares, costing, config, step=step)
    # samples of each layout, so that the whole costs what packs are built for
    samples_N = np.array(samples) * (target.sum() / (np.array(samples) @ costs_Nc.sum(1)))
    rows = [costing.active_and_guests(*costing.at(layout, step)) for layout in layouts]
    active_Ns, guests_Ns = (np.array(values) for values in zip(*rows))
    stages = []
    for s, number in enumerate(costing.phases.layers_per_stage):
        lengths, which_N = np.unique(active_Ns[:, s] + guests_Ns[:, s], return_inverse=True)
        stages.append(
            Stage(
                num_layers=int(number),
                rows=float(samples_N @ active_Ns[:, s]),
                guests=float(samples_N @ guests_Ns[:, s]),
                lengths_L=lengths,
                samples_L=np.bincount(which_N, samples_N),
            )
        )
    return Load(
        tokens=float(samples_N @ [layout.num_tokens for layout in layouts]),
        labels=float(samples_N @ [layout.num_labels for layout in layouts]),
        stages=stages,
    )


def largest_load(load: Load, situation: Situation) -> Load:
    """The average pack, grown to the most tokens that a pack may have: what memory must do for."""
    bounds = pack_bounds(situation.config, situation.costing)
    factor = float(bounds[0]) / load.tokens
    stages = [Stage(s.num_layers, s.rows * factor, s.guests * factor, s.lengths_L, s.samples_L * factor) for s in load.stages]
    return Load(load.tokens * factor, load.labels * factor, stages)


class Imbalance:
    """What waiting for the dearest pack costs: ranks wait for each other at every layer.

    Args:
        situation: Mixture, route and packer.
        num_lanes: Lanes of the real packer that are run.
        num_steps: Packs of each that count, after as many that fill the look-ahead with leftovers.
    """

    def __init__(self, situation: Situation, num_lanes: int = 8, num_steps: int = 40):
        records = [simulate_lane(situation, lane, 2 * num_steps, "megavlm") for lane in range(num_lanes)]
        self.packs_Pc = np.concatenate([record.costs_sc[num_steps:] for record in records])
        self.seed = situation.seed

    def factor(self, num_ranks: int, num_draws: int = 200) -> float:
        """Sum over the stages of the dearest of so many packs, relative to the mean pack; 1 for a single rank."""
        rng = stream(self.seed, Purpose.SYNTHETIC, num_ranks)
        drawn = rng.integers(len(self.packs_Pc), size=(num_draws, num_ranks))
        return float(self.packs_Pc[drawn].max(1).sum(1).mean() / self.packs_Pc.sum(1).mean())


def dense_of(situation: Situation, dense: Costing) -> Situation:
    """The same data without a route."""
    return Situation(situation.mixture, dense, situation.config, situation.seed, situation.at_step)
