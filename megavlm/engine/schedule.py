"""The learning rate as a function of the step. Tested by `tests/engine/test_schedule.py`."""

import math
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from megavlm.routing.config import LearningRate, Phase, ScheduleName
from megavlm.settings import Count, Number, Positive, Settings, Share

Decay = Annotated[Number, Field(ge=0, lt=1)]


class OptimizerConfig(Settings):
    """AdamW (Loshchilov & Hutter 2019), and the learning rate: linear warm-up, then a schedule."""

    num_steps: Positive
    """Optimizer steps of the run."""
    learning_rate: LearningRate
    """Peak learning rate."""
    schedule: ScheduleName = "cosine"
    """How the learning rate moves after the warm-up: down along a `cosine` or a line (`linear`); not at all (`constant`); or not at all
    and then down within `decay_fraction` (`wsd`, arXiv 2405.18392)."""
    warmup_steps: Count = 0
    """Steps of linear warm-up."""
    min_lr_ratio: Share = 0.1
    """Learning rate at the last step, relative to the peak; `constant` has no use for it."""
    decay_fraction: Share = 0.2
    """`wsd`: the last share of the schedule's steps, in which it decays."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """AdamW's decay rates of the two moments."""
    eps: Annotated[Number, Field(ge=1e-15, le=1)] = 1e-8
    """AdamW's epsilon."""
    weight_decay: Annotated[Number, Field(ge=0, le=10)] = 0.1
    """For matrices; norms and biases have none."""
    gradient_clipping: Annotated[Number, Field(ge=0, le=1e6)] = 1.0
    """Largest global gradient norm; 0 turns clipping off."""

    @property
    def decay_steps(self) -> int:
        """Steps at the end in which `wsd` decays."""
        return round(self.num_steps * self.decay_fraction)


class LearningRates:
    """The learning rate of every step: schedules one after another, each from the phase that begins it to that which begins the next.

    Args:
        optimizer: The recipe's ``optimizer``: what a phase does not say, and the schedule of the first one.
        phases: The run's phases.
    """

    def __init__(self, optimizer: OptimizerConfig, phases: Sequence[Phase]):
        beginning = [phase for phase in phases if phase.first_step == 0 or phase.optimizer]
        ends = [*(phase.first_step for phase in beginning[1:]), optimizer.num_steps]
        self.schedules: list[tuple[Phase, OptimizerConfig]] = []
        """The phase that begins each, and what it is like: ``num_steps`` is its own."""
        for phase, end in zip(beginning, ends):
            own = phase.optimizer.model_dump(exclude_none=True) if phase.optimizer else {}
            self.schedules.append((phase, optimizer.model_copy(update=own | {"num_steps": end - phase.first_step})))

    def at(self, step: int) -> float:
        """The learning rate of a step of the run, counted from 0."""
        phase, schedule = next(pair for pair in reversed(self.schedules) if pair[0].first_step <= step)
        return learning_rate(step - phase.first_step, schedule)


def learning_rate(step: int, config: OptimizerConfig) -> float:
    """Linear warm-up from 0 to the peak, then down to ``min_lr_ratio`` of it at the last step.

    The cosine is that of Loshchilov & Hutter 2017; `wsd` decays with 1 - sqrt (arXiv 2405.18392).

    Args:
        step: 0 … num_steps-1.
        config: The schedule.
    """
    peak, warmup_steps, lowest = config.learning_rate, config.warmup_steps, config.min_lr_ratio
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, config.num_steps - 1 - warmup_steps)
    if config.schedule == "cosine":
        height = 0.5 * (1 + math.cos(math.pi * progress))
    elif config.schedule == "linear":
        height = 1 - progress
    elif config.schedule == "constant":
        height = 1.0
    else:
        decayed = step + 1 - (config.num_steps - config.decay_steps)
        height = 1 - math.sqrt(decayed / config.decay_steps) if decayed > 0 else 1.0
    return peak * (lowest + (1 - lowest) * height)
