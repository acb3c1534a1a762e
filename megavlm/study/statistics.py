"""Synergy and how much of it is kept, with bootstrap intervals over seeds (Efron 1979). Tested by `tests/study/test_report.py`."""

from dataclasses import dataclass
from itertools import product

import numpy as np

LEVEL = 0.95
ENOUGH_SEEDS = 6
"""With fewer seeds the percentiles of the bootstrap are too narrow. The whole range is taken instead, which is that of the seeds."""
MAX_RESAMPLES = 20_000


@dataclass(frozen=True)
class Interval:
    """An estimate and its interval at `LEVEL`."""

    value: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def bootstrap(statistic, *samples: np.ndarray) -> Interval:
    """The percentile interval of a statistic of paired samples, resampling seeds.

    Args:
        statistic: A function of as many arrays ``[num_seeds]`` as there are samples.
        samples: Values per seed; a resample draws the same seeds from all of them.

    With few seeds every resample is enumerated (3 seeds have 27); where there are more than `MAX_RESAMPLES`, that many are drawn.
    With fewer than `ENOUGH_SEEDS` the interval is the whole range of the resamples. It leaves out 0 where all seeds have the same
    sign; that happens by chance in `chance_of_agreement` of cases.
    """
    values = np.array([statistic(*(sample[draw] for sample in samples)) for draw in resamples(len(samples[0]))])
    tail = tail_of(len(samples[0]))
    low, high = np.quantile(values, [tail, 1 - tail])
    return Interval(float(statistic(*samples)), float(low), float(high))


def resamples(num_seeds: int) -> np.ndarray:
    """Which seeds each resample of the bootstrap draws ``[num_resamples, num_seeds]``."""
    if num_seeds**num_seeds <= MAX_RESAMPLES:
        return np.array(list(product(range(num_seeds), repeat=num_seeds)))
    return np.random.default_rng(0).integers(num_seeds, size=(MAX_RESAMPLES, num_seeds))


def tail_of(num_seeds: int) -> float:
    """The share of the resamples that an interval leaves out at either end."""
    return (1 - LEVEL) / 2 if num_seeds >= ENOUGH_SEEDS else 0.0


def chance_of_agreement(num_seeds: int) -> float:
    """The probability that the differences of all seeds have the same sign by chance alone."""
    return 2.0 ** (1 - num_seeds)


def gain(joint: np.ndarray, single: np.ndarray) -> Interval:
    """Synergy of a task: joint training minus training it alone, per seed and then averaged. Higher is better."""
    return bootstrap(lambda j, s: (j - s).mean(), joint, single)


def retained(joint: np.ndarray, single: np.ndarray, dense_joint: np.ndarray, dense_single: np.ndarray) -> Interval:
    """A policy's synergy as a share of dense training's. Meaningful only where the interval of the dense synergy leaves out 0."""
    return bootstrap(
        lambda j, s, dj, ds: (j - s).mean() / d if (d := (dj - ds).mean()) else np.nan, joint, single, dense_joint, dense_single
    )
