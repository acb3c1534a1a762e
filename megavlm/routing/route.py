"""Routes: the stages of one pack, and the cost of every stage, known before the device sees the pack (P4).

A stage is a run of consecutive layers that see the same rows of the pack. How many rows that are is a function of
lengths, shares and the step alone, so costs need no selection (`RoutingPlan.kept_tokens`); *which* rows is decided when the pack
is built (`RoutingPlan.route`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megavlm.errors import ConfigError
from megavlm.routing.policies import LayerPlan, Policy
from megavlm.routing.selectors import SELECTORS


@dataclass
class Sequences:
    """Boundaries of packed sequences, none of them empty (varlen kernels accept none)."""

    lengths: list[int]
    cu_seqlens: torch.Tensor
    """int32 ``[S+1]``."""

    @classmethod
    def of(cls, lengths: np.ndarray) -> "Sequences":
        lengths = lengths[lengths > 0]
        cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        return cls(lengths.tolist(), torch.from_numpy(cu_seqlens))

    def map_tensors(self, function) -> "Sequences":
        return Sequences(self.lengths, function(self.cu_seqlens))

    @property
    def max_seqlen(self) -> int:
        return max(self.lengths)


@dataclass
class Stage:
    """Layers ``first_layer … end_layer-1`` and the rows of the pack that are active in them."""

    first_layer: int
    end_layer: int
    sequences: Sequences
    active_K: torch.Tensor | None
    """int64, ascending; None where every row is active."""


@dataclass
class Route:
    """The stages of one pack, from the first layer to the last."""

    stages: list[Stage]

    def map_tensors(self, function) -> "Route":
        """A copy with ``function`` applied to every tensor (move to a device, pin)."""
        return Route(
            [
                Stage(
                    stage.first_layer,
                    stage.end_layer,
                    stage.sequences.map_tensors(function),
                    None if stage.active_K is None else function(stage.active_K),
                )
                for stage in self.stages
            ]
        )


@dataclass(frozen=True)
class Schedule:
    """How far every share is on its way from 1 (dense) to the policy's value, as a function of the step.

    Linear warm-up of the reduction (random-LTD, arXiv 2211.11586), and a dense finish because inference is dense (MaskDiT, arXiv
    2306.09305).
    """

    num_steps: int
    warmup_fraction: float
    dense_finish_fraction: float

    def strength(self, step: int) -> float:
        """0 is dense, 1 is the policy in full."""
        if step >= round(self.num_steps * (1 - self.dense_finish_fraction)):
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
        ConfigError: If a policy does not fit the model, or would drop tokens with a loss for good.
    """

    def __init__(self, understanding: Policy, generation: Policy, num_layers: int, schedule: Schedule):
        self.schedule = schedule
        self.selectors = [SELECTORS[understanding.selector], SELECTORS[generation.selector]]
        layer_plans = list(zip(understanding.layers(num_layers), generation.layers(num_layers), strict=True))
        if layer_plans[-1][1].keep_ratio < 1:
            raise ConfigError(
                f"routing.generation: {generation.policy} drops tokens before their loss\n"
                "  do:    choose a policy whose tokens come back before the last layer, such as random_ltd"
            )
        starts = [i for i in range(num_layers) if i == 0 or layer_plans[i] != layer_plans[i - 1]]
        self.bounds = list(zip(starts, [*starts[1:], num_layers]))
        self.plans: list[tuple[LayerPlan, LayerPlan]] = [layer_plans[first] for first in starts]
        self._ratios = np.array([[plan.keep_ratio for plan in plans] for plans in self.plans])

    @property
    def num_stages(self) -> int:
        return len(self.bounds)

    @property
    def layers_per_stage(self) -> np.ndarray:
        return np.array([end - first for first, end in self.bounds])

    def kept_tokens(self, span_lengths: Sequence[int], span_tasks: Sequence[int], strength: float) -> np.ndarray:
        """Active tokens ``[num_stages, N]`` of N spans at a strength of the schedule."""
        ratios = (1 - (1 - self._ratios) * strength)[:, np.asarray(span_tasks, np.int64)]
        return num_kept(np.asarray(span_lengths, np.int64), ratios)

    def route(self, lengths: np.ndarray, spans: Sequence, starts: np.ndarray, strength: float, rng) -> Route:
        """Select the rows of a pack.

        Args:
            lengths: Tokens of each sequence ``[S]``.
            spans: The pack's image spans (``height``, ``width``, ``length``, ``task``).
            starts: Row of the pack at which each span starts ``[N]``.
            strength: Of the schedule.
            rng: The pack's own random stream.
        """
        ends = np.cumsum(lengths)
        kept_sN = self.kept_tokens([s.length for s in spans], [s.task for s in spans], strength)
        rankings: dict[tuple[int, int], np.ndarray] = {}
        stages = []
        for (first, end), plans, kept_N in zip(self.bounds, self.plans, kept_sN):
            is_active = np.ones(ends[-1], bool)
            for n, (span, start, kept) in enumerate(zip(spans, starts, kept_N)):
                if kept == span.length:
                    continue
                draw = plans[span.task].draw
                if (n, draw) not in rankings:
                    scores = self.selectors[span.task](span.height, span.width, rng)
                    rankings[n, draw] = np.argsort(scores, kind="stable")
                is_active[start + rankings[n, draw][kept:]] = False
            active_K = np.flatnonzero(is_active)
            if len(active_K) == ends[-1]:
                stages.append(Stage(first, end, Sequences.of(lengths), None))
                continue
            active_lengths = np.diff(np.searchsorted(active_K, ends), prepend=0)
            stages.append(Stage(first, end, Sequences.of(active_lengths), torch.from_numpy(active_K)))
        return Route(stages)
