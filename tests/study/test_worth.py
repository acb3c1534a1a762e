"""The cost to equal quality, on curves whose answer is known."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megavlm.study.worth import Worth, cost_to_reach, worth

COSTS = np.array([0.3, 0.5, 0.7, 1.0])
ONE = np.ones(1)


def reach(quality: float, qualities, costs=COSTS) -> float:
    return float(cost_to_reach(np.array([quality]), costs[:, None], np.array(qualities, float)[:, None])[0])


def test_a_known_curve_is_read_back():
    """Quality that is linear in the logarithm of the cost is interpolated exactly."""
    curve = lambda cost: 3 + 2 * np.log(cost)  # noqa: E731
    for cost in (0.3, 0.31, 0.5, 0.66, 0.99, 1.0):
        assert reach(curve(cost), curve(COSTS)) == pytest.approx(cost)
    assert reach(curve(0.29), curve(COSTS)) == 0
    assert reach(curve(1.01), curve(COSTS)) == math.inf


def test_where_longer_training_is_worse_one_would_have_stopped():
    assert reach(0.8, [0.5, 0.8, 0.7, 0.9]) == 0.5
    assert reach(0.75, [0.5, 0.8, 0.7, 0.9]) < 0.5, "what is worse later does not matter"
    assert 0.7 < reach(0.85, [0.5, 0.8, 0.7, 0.9]) < 1.0
    assert reach(0.81, [0.5, 0.8, 0.7, 0.6]) == math.inf


def test_of_a_level_stretch_the_beginning_counts():
    assert reach(0.6, [0.4, 0.6, 0.6, 0.8]) == 0.5


QUALITIES = st.lists(st.floats(-10, 10), min_size=4, max_size=4)


@given(qualities=QUALITIES, first=st.floats(-11, 11), second=st.floats(-11, 11))
def test_better_never_costs_less(qualities, first, second):
    low, high = sorted((first, second))
    assert reach(low, qualities) <= reach(high, qualities) + 1e-12


@given(qualities=QUALITIES, place=st.integers(0, 3))
def test_a_dense_run_is_worth_itself_or_less(qualities, place):
    """Less where a shorter run was as good."""
    found = reach(qualities[place], qualities)
    assert found <= COSTS[place] + 1e-12
    if qualities[place] > max([-math.inf, *qualities[:place]]):
        assert found == pytest.approx(COSTS[place])


@given(qualities=QUALITIES, quality=st.floats(-11, 11), scale=st.floats(0.1, 10), shift=st.floats(-5, 5))
def test_units_do_not_matter(qualities, quality, scale, shift):
    costs = 7 * COSTS
    here, there = reach(quality, qualities), reach(quality, qualities, costs)
    assert there == pytest.approx(7 * here)
    ends = sorted({min(qualities), max(qualities)})
    if all(abs(quality - end) > 1e-6 for end in [*qualities, *ends]):
        moved = reach(scale * quality + shift, [scale * one + shift for one in qualities])
        assert moved == pytest.approx(here, rel=1e-3)


def curve_of(seeds: np.ndarray) -> np.ndarray:
    """A curve for each seed, the same but for its height."""
    return np.log(COSTS)[:, None] + seeds


def test_what_seeds_share_is_no_uncertainty():
    luck = np.array([-3.0, 0.0, 5.0])
    costs = np.repeat(COSTS[:, None], 3, 1)
    found = worth(np.log(0.6) + luck, np.full(3, 0.4), costs, curve_of(luck))
    assert (found.value, found.low, found.high) == pytest.approx((1.5, 1.5, 1.5))
    assert f"{found:.2f}" == "1.50 [1.50, 1.50]"


def test_beyond_the_curve_only_a_bound_is_known():
    costs = np.repeat(COSTS[:, None], 3, 1)
    quality = np.log([0.2, 0.6, 1.2])
    found = worth(quality, np.full(3, 0.5), costs, curve_of(np.zeros(3)))
    assert found.low == 0 and found.high == math.inf and 1 < found.value < 1.2
    assert (found.least, found.most) == pytest.approx((0.6, 2.0))
    assert f"{found:.1f}" == f"{found.value:.1f} [<0.6, >2.0]"


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """Ten seeds of a noisy curve and a noisy policy that is truly worth 1.5 times its cost."""
    rng = np.random.default_rng(0)
    costs, hits = np.repeat(COSTS[:, None], 10, 1), 0
    for _ in range(60):
        noise = rng.normal(0, 0.1, (5, 10))
        found = worth(np.log(0.6) + noise[0], np.full(10, 0.4), costs, np.log(COSTS)[:, None] + noise[1:])
        hits += found.low <= 1.5 <= found.high
    # of 60, 57 are expected; the bootstrap of ten seeds is a little narrow
    assert hits >= 50


def test_a_single_seed_has_a_value_without_an_interval():
    found = worth(np.log(0.6) * ONE, 0.4 * ONE, COSTS[:, None], np.log(COSTS)[:, None])
    assert isinstance(found, Worth) and found.value == found.low == found.high == pytest.approx(1.5)
