"""What a recipe says of routes: policies for the whole run, or phases one after another. Tested by `tests/routing/test_phases.py`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, SerializeAsAny

from megavlm.routing.policies import AnyPolicy, Dense, Policy
from megavlm.routing.tasks import TaskName
from megavlm.settings import Count, Number, Settings, Share

AnyOf = Annotated[SerializeAsAny[Policy], AnyPolicy]
Policies = tuple[Policy, Policy]
"""For understanding and for generation."""
DENSE: Policies = (Dense(), Dense())
ScheduleName = Literal["cosine", "wsd", "linear", "constant"]
"""How a learning rate moves after its warm-up; `megavlm.engine.schedule` computes it."""
LearningRate = Annotated[Number, Field(gt=0, le=10)]


class PhaseOptimizer(Settings):
    """A learning-rate schedule that begins with a phase, warm-up included. What is left out is as in the recipe's `optimizer`."""

    schedule: ScheduleName | None = None
    """How the learning rate moves after the warm-up."""
    learning_rate: LearningRate | None = None
    """Peak learning rate."""
    warmup_steps: Count | None = None
    """Steps of linear warm-up."""
    min_lr_ratio: Share | None = None
    """Learning rate at the schedule's last step, relative to the peak."""
    decay_fraction: Share | None = None
    """`wsd`: the last share of the schedule's steps, in which it decays."""


class PhaseConfig(Settings):
    """Some of the steps, with a route of their own."""

    fraction: Annotated[Number, Field(gt=0, le=1)]
    """Share of the run's steps; those of all phases add up to 1."""
    understanding: AnyOf = Dense()
    """Policy for image spans that the model reads, in this phase."""
    generation: AnyOf = Dense()
    """Policy for image spans that the model draws, in this phase."""
    warmup_fraction: Share = 0.0
    """In this first share of the phase's steps the number of active tokens falls linearly from all to the policy's."""
    optimizer: PhaseOptimizer | None = None
    """A learning-rate schedule that begins with this phase and lasts until a phase begins another, or to the end. By default the schedule
    before goes on."""


class RoutingConfig(Settings):
    """The route of each task over the run."""

    modules: list[str] = []
    """Python modules or files that register policies and selectors of your own; see docs/write-a-policy.md."""
    understanding: AnyOf = Dense()
    """Policy for image spans that the model reads (without a loss)."""
    generation: AnyOf = Dense()
    """Policy for image spans that the model draws (with a loss)."""
    warmup_fraction: Share = 0.0
    """In this first share of the steps the number of active tokens falls linearly from all to the policy's."""
    dense_finish_fraction: Share = 0.0
    """In this last share of the steps every token is active, because inference is dense."""
    phases: Annotated[list[PhaseConfig], Field(max_length=100)] = []
    """Parts of the steps with routes of their own, one after another, instead of the four settings above."""

    @property
    def trained(self) -> Policies:
        """The policies of the last phase that has any: along them a model can be judged."""
        pairs = [(phase.understanding, phase.generation) for phase in self.phases] or [(self.understanding, self.generation)]
        return next((pair for pair in reversed(pairs) if pair != DENSE), DENSE)

    def only(self, task: TaskName) -> "RoutingConfig":
        """The same with every image of the other task active in every layer."""
        others = {other: Dense() for other in ("understanding", "generation") if other != task}
        return self.model_copy(update=others | {"phases": [phase.model_copy(update=others) for phase in self.phases]})

    def phases_in(self, num_steps: int) -> "list[Phase]":
        """The phases of a run, in steps; those without a step are left out."""
        if self.phases:
            found = self._listed(num_steps)
        else:
            # linear warm-up of the reduction: random-LTD, arXiv 2211.11586; a dense finish because inference is dense: MaskDiT, 2306.09305
            pair, end = (self.understanding, self.generation), round(num_steps * (1 - self.dense_finish_fraction))
            found = [Phase(0, end, *pair, warmup_steps=num_steps * self.warmup_fraction), Phase(end, num_steps, *pair, full_strength=0.0)]
        return [phase for phase in found if phase.first_step < phase.end_step]

    def _listed(self, num_steps: int) -> "list[Phase]":
        found, end, so_far = [], 0, 0.0
        for number, phase in enumerate(self.phases):
            so_far += phase.fraction
            first, end = end, min(num_steps, round(num_steps * so_far))
            if number == len(self.phases) - 1:
                end = num_steps
            found.append(
                Phase(
                    first,
                    end,
                    phase.understanding,
                    phase.generation,
                    warmup_steps=(end - first) * phase.warmup_fraction,
                    optimizer=phase.optimizer,
                    place=f"routing.phases.{number}",
                )
            )
        return found


@dataclass(frozen=True)
class Phase:
    """Consecutive steps with one policy for each task."""

    first_step: int
    end_step: int
    understanding: Policy
    generation: Policy
    warmup_steps: float = 0.0
    """In so many steps the number of active tokens falls from all to the policies'."""
    full_strength: float = 1.0
    """Strength after the warm-up: 1 is the policies in full, 0 is dense."""
    optimizer: PhaseOptimizer | None = None
    """A learning-rate schedule that begins here."""
    place: str = "routing"
    """Where the recipe says so."""

    @property
    def policies(self) -> Policies:
        return self.understanding, self.generation

    @property
    def full_from(self) -> float:
        """Where its warm-up ends."""
        return self.first_step + self.warmup_steps

    def strength(self, step: int) -> float:
        """How far every share is on its way from 1 (dense) to the policy's value: 0 is dense, 1 is the policy in full."""
        if step < self.full_from:
            return self.full_strength * (step - self.first_step) / self.warmup_steps
        return self.full_strength
