"""Cost to equal quality: how much dense training would have cost that reaches what a policy reached.

Letters: L lengths of dense training, the shortest first, S seeds, R resamples of them. Tested by `tests/study/test_worth.py`.
"""

import math
from dataclasses import dataclass

import numpy as np

from megavlm.study.statistics import Interval, resamples, tail_of


@dataclass(frozen=True)
class Worth(Interval):
    """A multiple of a cost, with its interval. Where the curve ends, only that it is less or more than the curve's end is known."""

    least: float
    """The curve's lower end: values below are 0."""
    most: float
    """Its upper end: values above are infinite."""

    def __format__(self, spec: str) -> str:
        value, low, high = (self._shown(number, spec) for number in (self.value, self.low, self.high))
        return f"{value} [{low}, {high}]"

    def _shown(self, number: float, spec: str) -> str:
        if number == 0:
            return f"<{self.least:{spec}}"
        return f">{self.most:{spec}}" if math.isinf(number) else f"{number:{spec}}"


def cost_to_reach(quality_R: np.ndarray, costs_LR: np.ndarray, qualities_LR: np.ndarray) -> np.ndarray:
    """The least cost at which each of R curves reaches a quality: 0 if its first point is better already, infinite if none is as good.

    A curve is the best that training has reached by then: linear between points, over the logarithm of the cost, and level where longer
    training is no better, because one would have stopped before. So it is monotone, and never worse than what was measured.

    Args:
        quality_R: Higher is better.
        costs_LR: Ascending.
        qualities_LR: What was reached at these costs.
    """
    best_LR = np.maximum.accumulate(qualities_LR)
    n_R = (best_LR < quality_R).sum(0)
    # between these two points, where there are two
    before_R, after_R = np.clip(n_R - 1, 0, None), np.clip(n_R, None, len(best_LR) - 1)

    def at(table_LR: np.ndarray, place_R: np.ndarray) -> np.ndarray:
        return np.take_along_axis(table_LR, place_R[None], 0)[0]

    rise_R = at(best_LR, after_R) - at(best_LR, before_R)
    share_R = (quality_R - at(best_LR, before_R)) / np.where(rise_R > 0, rise_R, 1.0)
    cost_R = at(costs_LR, before_R) * (at(costs_LR, after_R) / at(costs_LR, before_R)) ** share_R
    return np.where(n_R == len(best_LR), np.inf, np.where(quality_R < best_LR[0], 0.0, cost_R))


def worth(quality_S: np.ndarray, cost_S: np.ndarray, costs_LS: np.ndarray, qualities_LS: np.ndarray) -> Worth:
    """What dense training of the same quality costs, as a multiple of what the policy cost: 1.7 is "worth 1.7 times its FLOPs".

    The interval is the bootstrap's over seeds: a resample draws the same seeds for the policy and for every length. Where a bound lies
    between two resamples, the outer one is taken.

    Args:
        quality_S: The policy's, higher is better.
        cost_S: The policy's; ones give the cost of dense training itself.
        costs_LS: Of dense training.
        qualities_LS: Of dense training.
    """
    num_seeds = len(quality_S)
    # measured times need not be in the order of the lengths
    order_L = costs_LS.mean(1).argsort(kind="stable")
    costs_LS, qualities_LS = costs_LS[order_L], qualities_LS[order_L]
    draws_RS = np.vstack([np.arange(num_seeds), resamples(num_seeds)])
    costs_LR, cost_R = costs_LS[:, draws_RS].mean(2), cost_S[draws_RS].mean(1)
    values_R = cost_to_reach(quality_S[draws_RS].mean(1), costs_LR, qualities_LS[:, draws_RS].mean(2)) / cost_R
    tail = tail_of(num_seeds)
    # an infinite value has no middle between it and another
    low, high = np.quantile(values_R[1:], tail, method="lower"), np.quantile(values_R[1:], 1 - tail, method="higher")
    least, most = costs_LR[[0, -1], 0] / cost_R[0]
    return Worth(float(values_R[0]), float(low), float(high), float(least), float(most))
