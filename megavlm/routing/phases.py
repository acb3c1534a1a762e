"""The phases of a run, resolved for a model: which plan a step has, and how far its warm-up is."""

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from megavlm.errors import ConfigError
from megavlm.routing.config import DENSE, Phase
from megavlm.routing.plan import RoutingPlan
from megavlm.routing.policies import Policy


class Moment(NamedTuple):
    """What the routes of a step depend on: they are the same at two steps with equal moments."""

    phase: int
    """Number of the phase, from 0."""
    strength: float
    """0 is dense, 1 is the phase's policies in full."""


class Phases:
    """The routing plans of a run, one for each phase, all with the same stages.

    A stage begins wherever one does in any of the phases, so that costs and counts have the same entries over the whole run.

    Args:
        phases: One after another, the first from step 0 on; the last one goes on for ever.
        num_layers: Layers of the backbone.

    Raises:
        ConfigError: If a policy does not fit the model or the task.
    """

    def __init__(self, phases: Sequence[Phase], num_layers: int):
        self.phases = list(phases)
        self.first_steps = [phase.first_step for phase in phases]
        """The step with which each phase begins."""
        self.plans = [_plan(phase, num_layers, ()) for phase in phases]
        starts = sorted({first for plan in self.plans for first, _ in plan.bounds})
        if any(plan.num_stages < len(starts) for plan in self.plans):
            self.plans = [_plan(phase, num_layers, starts) for phase in phases]

    @classmethod
    def always(cls, understanding: Policy, generation: Policy, num_layers: int, strength: float = 1.0) -> "Phases":
        """The same policies in every step.

        Args:
            understanding: Policy for image spans without a loss.
            generation: Policy for image spans with a loss.
            num_layers: Layers of the backbone.
            strength: 0 is dense, 1 is the policies in full.
        """
        return cls([Phase(0, 1, understanding, generation, full_strength=strength)], num_layers)

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """(first layer, end layer) of every stage."""
        return self.plans[0].bounds

    @property
    def num_stages(self) -> int:
        return len(self.bounds)

    @property
    def layers_per_stage(self) -> np.ndarray:
        return self.plans[0].layers_per_stage

    @property
    def typical_step(self) -> int:
        """A step in the middle of the longest time that a phase has its policies in full, dense phases left out if there are others."""
        routed = [phase for phase in self.phases if phase.full_strength and phase.policies != DENSE] or self.phases
        longest = max(routed, key=lambda phase: phase.end_step - phase.full_from)
        return int((longest.full_from + longest.end_step) / 2)

    def number(self, step: int) -> int:
        """Number of a step's phase, from 0."""
        return bisect_right(self.first_steps, step) - 1

    def moment(self, step: int) -> Moment:
        """What the routes of a step depend on."""
        number = self.number(step)
        return Moment(number, self.phases[number].strength(step))

    def layers_that(self, how: str, task: int) -> list[int]:
        """Layers that have modules of their own for this kind of plan, in any phase."""
        return sorted({layer for plan in self.plans for layer in plan.layers_that(how, task)})

    @property
    def has_patches(self) -> bool:
        """Whether blocks of codes are single tokens in any phase."""
        return any(plan.has_patches for plan in self.plans)

    def check_model(self, head_width: int, family: str) -> None:
        """Refuse what the model's layers have no place for.

        Raises:
            ConfigError: If heads of this width have no room for the bias of merged keys, or layers of this family cannot leave out
                queries alone.
        """
        for plan in self.plans:
            plan.check_head_width(head_width)
            plan.check_family(family)


def _plan(phase: Phase, num_layers: int, starts: Sequence[int]) -> RoutingPlan:
    try:
        plan = RoutingPlan(phase.understanding, phase.generation, num_layers, starts)
        if plan.has_patches and phase.warmup_steps:
            raise ConfigError(
                "routing: patches have no warm-up, because a block is one token or it is not\n  do:    set warmup_fraction to 0"
            )
        return plan
    except ConfigError as error:
        # said of `routing`; where phases are listed, of the one that it is
        raise ConfigError(phase.place + str(error).removeprefix("routing")) from error
