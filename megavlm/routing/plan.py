"""The policies of a run, resolved for a model: stages, and how many tokens are active in each (P4)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import SerializeAsAny

from megavlm.errors import ConfigError
from megavlm.routing.policies import AnyPolicy, Dense, LayerPlan, Policy
from megavlm.routing.selectors import DEVICE_SELECTORS, HOST_SELECTORS
from megavlm.routing.tasks import Task
from megavlm.settings import Settings, Share


class RoutingConfig(Settings):
    """The route of each task and its schedule over the run."""

    modules: list[str] = []
    """Python modules or files that register policies and selectors of your own; see docs/write-a-policy.md."""
    understanding: Annotated[SerializeAsAny[Policy], AnyPolicy] = Dense()
    """Policy for image spans that the model reads (without a loss)."""
    generation: Annotated[SerializeAsAny[Policy], AnyPolicy] = Dense()
    """Policy for image spans that the model draws (with a loss)."""
    warmup_fraction: Share = 0.0
    """In this first share of the steps the number of active tokens falls linearly from all to the policy's."""
    dense_finish_fraction: Share = 0.0
    """In this last share of the steps every token is active, because inference is dense."""


@dataclass(frozen=True)
class Schedule:
    """How far every share is on its way from 1 (dense) to the policy's value, as a function of the step.

    Linear warm-up of the reduction (random-LTD, arXiv 2211.11586), and a dense finish because inference is dense (MaskDiT, arXiv
    2306.09305).
    """

    num_steps: int
    warmup_fraction: float
    dense_finish_fraction: float

    @property
    def first_dense_step(self) -> int:
        """Where the dense finish begins."""
        return round(self.num_steps * (1 - self.dense_finish_fraction))

    def strength(self, step: int) -> float:
        """0 is dense, 1 is the policy in full."""
        if step >= self.first_dense_step:
            return 0.0
        warmup_steps = self.num_steps * self.warmup_fraction
        return min(1.0, step / warmup_steps) if warmup_steps else 1.0


def num_kept(length_tokens: np.ndarray, keep_ratio: np.ndarray) -> np.ndarray:
    """Active tokens of spans: the share rounded up, so that a share above 0 keeps at least one."""
    return np.ceil(length_tokens * keep_ratio - 1e-9).astype(np.int64)


class RoutingPlan:
    """The policies of a run, resolved for a model: stages, counts, and routes of packs.

    Args:
        understanding: Policy for image spans without a loss.
        generation: Policy for image spans with a loss.
        num_layers: Layers of the backbone.
        schedule: Of the shares over the run.

    Raises:
        ConfigError: If a policy does not fit the model or the task.
    """

    def __init__(self, understanding: Policy, generation: Policy, num_layers: int, schedule: Schedule):
        self.schedule = schedule
        self.selectors = [understanding.selector_name, generation.selector_name]
        of_task = [understanding.layers(num_layers), generation.layers(num_layers)]
        _check_generation(generation, of_task[Task.GENERATION])
        _check_device_selector(understanding, of_task[Task.UNDERSTANDING])
        _check_shared(understanding, generation, of_task)
        layer_plans = list(zip(*of_task, strict=True))
        starts = [i for i in range(num_layers) if i == 0 or layer_plans[i] != layer_plans[i - 1]]
        self.bounds = list(zip(starts, [*starts[1:], num_layers]))
        self.plans: list[tuple[LayerPlan, LayerPlan]] = [layer_plans[first] for first in starts]
        # an injected prompt leaves its image alone
        keeps_spans = [[plan.how == "inject" and task == Task.GENERATION for task, plan in enumerate(p)] for p in self.plans]
        ratios = np.array([[plan.keep_ratio for plan in plans] for plans in self.plans])
        self._ratios = np.where(keeps_spans, 1.0, ratios)
        # injection is a matter of architecture: no schedule turns it off
        self._is_fixed = np.array([[plan.how == "inject" for plan in plans] for plans in self.plans])

    @property
    def num_stages(self) -> int:
        return len(self.bounds)

    @property
    def layers_per_stage(self) -> np.ndarray:
        return np.array([end - first for first, end in self.bounds])

    def injects(self, task: int) -> np.ndarray:
        """Whether each stage injects the rows of a task ``[num_stages]``."""
        return self._is_fixed[:, task]

    def merges(self, strength: float) -> np.ndarray:
        """Whether tokens of each stage stand for several ``[num_stages]``."""
        return np.array([strength > 0 and any(plan.how == "merge" for plan in plans) for plans in self.plans])

    def layers_that(self, how: str, task: int) -> list[int]:
        """Layers whose plan for a task is of this kind: they have modules of their own."""
        return [layer for (a, b), p in zip(self.bounds, self.plans) if p[task].how == how for layer in range(a, b)]

    def kept_tokens(self, span_lengths: Sequence[int], span_tasks: Sequence[int], strength: float) -> np.ndarray:
        """Active tokens ``[num_stages, N]`` of N spans at a strength of the schedule."""
        ratios = 1 - (1 - self._ratios) * np.where(self._is_fixed, 1.0, strength)
        return num_kept(np.asarray(span_lengths, np.int64), ratios[:, np.asarray(span_tasks, np.int64)])

    def is_device_choice(self, task: int, plan: LayerPlan) -> bool:
        """Whether the device decides which of a task's tokens are active."""
        return plan.how in ("gate", "merge") or (plan.how == "select" and self.selectors[task] in DEVICE_SELECTORS)

    def needs_attention(self, stage: int) -> bool:
        """Whether choices of a stage look at queries or keys of the layer before."""
        return any(
            plan.how == "merge"
            or (plan.how == "select" and plan.keep_ratio < 1 and name in DEVICE_SELECTORS and DEVICE_SELECTORS[name].needs_attention)
            for plan, name in zip(self.plans[stage], self.selectors)
        )


def _check_generation(policy: Policy, plans: list[LayerPlan]) -> None:
    if any(plan.how == "merge" for plan in plans):
        raise ConfigError("routing.generation: merge would mix tokens with what they predict\n  do:    use it for understanding")
    if plans[-1].keep_ratio < 1 and plans[-1].how != "inject":
        raise ConfigError(
            f"routing.generation: {policy.policy} drops tokens before their loss\n"
            "  do:    choose a policy whose tokens come back before the last layer, such as random_ltd"
        )
    if policy.selector_name in DEVICE_SELECTORS:
        raise ConfigError(
            f"routing.generation: the selector {policy.selector_name} looks at what the model must predict\n"
            f"  do:    use one of {', '.join(HOST_SELECTORS)}, or the policy mixture_of_depths"
        )


def _check_device_selector(policy: Policy, plans: list[LayerPlan]) -> None:
    selector = DEVICE_SELECTORS.get(policy.selector_name)
    if selector and selector.needs_attention and plans[0].keep_ratio < 1:
        raise ConfigError(
            f"routing.understanding: {policy.selector_name} looks at the layer before, and the first layer has none\n"
            "  do:    leave the first layer dense"
        )


def _check_shared(understanding: Policy, generation: Policy, of_task: list[list[LayerPlan]]) -> None:
    blocks = [[plan.draw for plan in plans] for plans in of_task]
    if understanding.policy == generation.policy == "shared_bypass" and blocks[0] != blocks[1]:
        raise ConfigError(
            "routing: shared_bypass has one block of layers for understanding and another for generation\n"
            "  do:    give both the same first_layer and end_layer; only keep_ratio may differ"
        )
