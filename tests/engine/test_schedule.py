"""The learning rate: warm-up, four ways down, and schedules that begin anew with a phase."""

import math

import pytest

from megavlm.engine.schedule import LearningRates, OptimizerConfig, learning_rate
from megavlm.routing.config import PhaseConfig, PhaseOptimizer, RoutingConfig

COSINE = OptimizerConfig(num_steps=101, learning_rate=2.0, warmup_steps=0, min_lr_ratio=0.1)


def rates(optimizer: OptimizerConfig, *phases: PhaseConfig) -> list[float]:
    found = LearningRates(optimizer, RoutingConfig(phases=list(phases)).phases_in(optimizer.num_steps))
    return [found.at(step) for step in range(optimizer.num_steps)]


def of(schedule: str, **settings) -> list[float]:
    return rates(COSINE.model_copy(update={"schedule": schedule} | settings))


def test_a_cosine():
    found = of("cosine")
    assert found[0] == 2.0 and found[100] == pytest.approx(0.2) and found[50] == pytest.approx(1.1)
    assert found == [learning_rate(step, COSINE) for step in range(101)]
    assert found[25] == 2.0 * (0.1 + (1 - 0.1) * 0.5 * (1 + math.cos(math.pi * 0.25))), "to the last bit as ever"


def test_a_line():
    found = of("linear", min_lr_ratio=0.0)
    assert found == pytest.approx([2.0 * (1 - step / 100) for step in range(101)])


def test_constant():
    assert of("constant", warmup_steps=4) == pytest.approx([0.5, 1.0, 1.5, 2.0, *[2.0] * 97])


def test_constant_and_then_down():
    """arXiv 2405.18392: the decay is 1 - sqrt."""
    found = of("wsd", num_steps=100, warmup_steps=10, min_lr_ratio=0.0, decay_fraction=0.2)
    assert found[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert found[10:80] == [2.0] * 70
    assert found[80:] == pytest.approx([2.0 * (1 - math.sqrt((step + 1) / 20)) for step in range(20)])
    assert found[-1] == 0
    assert of("wsd", decay_fraction=0.0) == [2.0] * 101


def test_a_phase_begins_a_schedule_of_its_own_with_a_warm_up():
    own = PhaseOptimizer(schedule="wsd", learning_rate=1.0, warmup_steps=5, decay_fraction=0.4)
    optimizer = COSINE.model_copy(update={"num_steps": 100, "warmup_steps": 10})
    found = rates(optimizer, PhaseConfig(fraction=0.6), PhaseConfig(fraction=0.2, optimizer=own), PhaseConfig(fraction=0.2))
    assert found[:60] == [learning_rate(step, optimizer.model_copy(update={"num_steps": 60})) for step in range(60)], (
        "it ends where it ends"
    )
    assert found[59] == pytest.approx(0.2)
    # the third phase goes on with the schedule of the second
    assert found[60:65] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0]) and found[65:84] == [1.0] * 19
    assert found[-1] == pytest.approx(0.1) and found[84] < 1.0


def test_phases_without_a_schedule_change_nothing():
    assert rates(COSINE, PhaseConfig(fraction=0.3), PhaseConfig(fraction=0.7)) == rates(COSINE)


def test_the_first_phase_may_have_one_and_an_empty_one_begins_the_same_again():
    found = rates(COSINE, PhaseConfig(fraction=1.0, optimizer=PhaseOptimizer(schedule="constant")))
    assert found == [2.0] * 101
    halves = rates(
        COSINE.model_copy(update={"num_steps": 100}), PhaseConfig(fraction=0.5), PhaseConfig(fraction=0.5, optimizer=PhaseOptimizer())
    )
    assert halves[:50] == halves[50:]
