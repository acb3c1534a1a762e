"""Routes: the stages of one pack, and the cost of every stage, known before the device sees the pack (P4).

A stage is a run of consecutive layers that see the same rows of the pack. How many rows that are is a function of
lengths, shares and the step alone (`RoutingPlan.kept_tokens`). *Which* rows a host selector keeps is decided here, when the pack is
built; what depends on content is left to the device as a `Choice`, whose outcome has a size that is known here too.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch

from megavlm.errors import ConfigError
from megavlm.routing.policies import DENSE, LayerPlan, Policy
from megavlm.routing.selectors import DEVICE_SELECTORS, HOST_SELECTORS, Candidates

UNDERSTANDING, GENERATION = 0, 1
"""The two kinds of image spans: those that the model reads and those that it draws."""
BIAS_WIDTH = 8
"""Columns that attention adds to queries and keys to carry a bias per key: kernels want head widths in multiples of 8."""


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

    @property
    def max_seqlen(self) -> int:
        return max(self.lengths)

    def map_tensors(self, function) -> "Sequences":
        return map_tensors(self, function)


@dataclass
class Choice:
    """What the device decides at the beginning of a stage: which of the candidates of a task are active."""

    task: int
    plan: LayerPlan
    kept: list[int]
    """How many of each span."""
    take_K: torch.Tensor
    """Where the kept ones stand when the candidates are sorted by span and score."""
    quota_C: torch.Tensor
    """``kept`` for each candidate."""


@dataclass
class Injection:
    """Rows that take no part in a stage but give keys and values to it."""

    task: int
    rows_R: torch.Tensor
    sequences: Sequences
    """Boundaries of active and injected rows together."""


@dataclass
class Stage:
    """Layers ``first_layer … end_layer-1`` and the rows of the pack that are active in them."""

    first_layer: int
    end_layer: int
    sequences: Sequences
    """Boundaries of the active rows."""
    active_K: torch.Tensor | None
    """int64, ascending: active rows, those of choices left out; None where every row is active."""
    choices: list[Choice] = field(default_factory=list)
    injections: list[Injection] = field(default_factory=list)
    is_watched: bool = False
    """The next stage chooses by queries or keys of this one's last layer."""

    def map_tensors(self, function) -> "Stage":
        return map_tensors(self, function)


@dataclass
class Route:
    """The stages of one pack, from the first layer to the last, and what choices choose among, by task."""

    stages: list[Stage]
    candidates: dict[int, Candidates] = field(default_factory=dict)

    def map_tensors(self, function) -> "Route":
        """A copy with ``function`` applied to every tensor (move to a device, pin)."""
        candidates = {task: among.map_tensors(function) for task, among in self.candidates.items()}
        return Route([stage.map_tensors(function) for stage in self.stages], candidates)


def map_tensors(holder, function):
    """A copy of a dataclass with ``function`` applied to its tensors, those in nested dataclasses and lists included."""

    def mapped(value):
        if isinstance(value, torch.Tensor):
            return function(value)
        if isinstance(value, list) and value and hasattr(value[0], "__dataclass_fields__"):
            return [map_tensors(item, function) for item in value]
        return map_tensors(value, function) if isinstance(value, Sequences) else value

    return replace(holder, **{f.name: mapped(getattr(holder, f.name)) for f in fields(holder)})


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


@dataclass
class PackLayout:
    """What a route is built from: S sequences of a pack and their N image spans."""

    lengths: np.ndarray
    """Tokens of each sequence ``[S]``."""
    spans: Sequence
    """Image spans (``height``, ``width``, ``length``, ``task``)."""
    starts: np.ndarray
    """Row at which each span starts ``[N]``."""
    labelled_rows: np.ndarray
    """Rows of tokens with a loss, ascending."""
    prompt_rows: np.ndarray
    """Rows of generation prompts that predict nothing."""


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
        _check_generation(generation, of_task[GENERATION])
        _check_device_selector(understanding, of_task[UNDERSTANDING])
        _check_shared(understanding, generation, of_task)
        layer_plans = list(zip(*of_task, strict=True))
        starts = [i for i in range(num_layers) if i == 0 or layer_plans[i] != layer_plans[i - 1]]
        self.bounds = list(zip(starts, [*starts[1:], num_layers]))
        self.plans: list[tuple[LayerPlan, LayerPlan]] = [layer_plans[first] for first in starts]
        # an injected prompt leaves its image alone
        keeps_spans = [[plan.how == "inject" and task == GENERATION for task, plan in enumerate(p)] for p in self.plans]
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

    def route(self, layout: PackLayout, strength: float, rng: np.random.Generator) -> Route:
        """Build the route of a pack.

        Args:
            layout: Its sequences and spans.
            strength: Of the schedule.
            rng: The pack's own random stream.
        """
        return _RouteBuilder(self, layout, strength, rng).build()

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


class _RouteBuilder:
    """Builds one route; see `RoutingPlan.route`."""

    def __init__(self, plan: RoutingPlan, layout: PackLayout, strength: float, rng: np.random.Generator):
        self.plan, self.layout, self.rng = plan, layout, rng
        self.ends = np.cumsum(layout.lengths)
        self.tasks = [span.task for span in layout.spans]
        self.kept_sN = plan.kept_tokens([span.length for span in layout.spans], self.tasks, strength)
        self.rankings: dict[tuple[int, int], np.ndarray] = {}
        self.is_alive = [np.ones(span.length, bool) for span in layout.spans]

    def build(self) -> Route:
        stages = [self._stage(s, first, end) for s, (first, end) in enumerate(self.plan.bounds)]
        for s, stage in enumerate(stages[:-1]):
            stage.is_watched = self.plan.needs_attention(s + 1)
        chosen_tasks = {choice.task for stage in stages for choice in stage.choices}
        return Route(stages, {task: self._candidates(task) for task in sorted(chosen_tasks)})

    def _stage(self, s: int, first: int, end: int) -> Stage:
        plans, kept_N = self.plan.plans[s], self.kept_sN[s]
        is_active = np.ones(self.ends[-1], bool)
        choices = []
        for task, plan in enumerate(plans):
            # a task without spans chooses all the same: its modules must be called on every rank (P7)
            if self.plan.is_device_choice(task, plan) and plan != DENSE:
                choices.append(self._choice(task, plan, kept_N))
        on_device = {choice.task for choice in choices}
        # rows that are active whatever the device decides
        is_fixed = is_active.copy() if choices else is_active
        for n, (span, start, kept) in enumerate(zip(self.layout.spans, self.layout.starts, kept_N)):
            rows = slice(start, start + span.length)
            if span.task in on_device:
                # which ones is open, how many is not: the first ones stand for them in the lengths
                is_fixed[rows], is_active[rows] = False, np.arange(span.length) < kept
            elif kept < span.length:
                is_active[rows] = is_fixed[rows] = self._select(n, plans[span.task], kept)
            else:
                self.is_alive[n][:] = True
        injected = {task: self._injected(task) for task in (0, 1) if plans[task].how == "inject"}
        for rows in injected.values():
            is_active[rows] = is_fixed[rows] = False
        sequences = self._sequences(is_active)
        active_K = None if is_fixed.all() else torch.from_numpy(np.flatnonzero(is_fixed))
        for rows in injected.values():
            is_active[rows] = True
        together = self._sequences(is_active) if injected else None
        injections = [Injection(task, torch.from_numpy(rows), together) for task, rows in injected.items()]
        return Stage(first, end, sequences, active_K, choices, injections)

    def _select(self, n: int, plan: LayerPlan, kept: int) -> np.ndarray:
        """Active tokens of a span as its host selector chooses, as a mask."""
        span = self.layout.spans[n]
        if (n, plan.draw) not in self.rankings:
            scores = HOST_SELECTORS[self.plan.selectors[span.task]](span.height, span.width, self.rng)
            if plan.nested:
                scores = np.where(self.is_alive[n], scores, np.inf)
            self.rankings[n, plan.draw] = np.argsort(scores, kind="stable")
        self.is_alive[n] = np.zeros(span.length, bool)
        self.is_alive[n][self.rankings[n, plan.draw][:kept]] = True
        return self.is_alive[n]

    def _choice(self, task: int, plan: LayerPlan, kept_N: np.ndarray) -> Choice:
        spans = [n for n, span_task in enumerate(self.tasks) if span_task == task]
        kept = [int(kept_N[n]) for n in spans]
        lengths = np.array([self.layout.spans[n].length for n in spans], np.int64)
        offsets = np.cumsum(lengths) - lengths
        take = [np.arange(offset, offset + k) for offset, k in zip(offsets, kept)]
        quota = np.repeat(np.array(kept, np.int64), lengths)
        return Choice(task, plan, kept, torch.from_numpy(_concatenated(take)), torch.from_numpy(quota))

    def _injected(self, task: int) -> np.ndarray:
        if task == GENERATION:
            return self.layout.prompt_rows
        spans = zip(self.layout.spans, self.layout.starts)
        return _concatenated([np.arange(a, a + span.length) for span, a in spans if span.task == task])

    def _sequences(self, is_active: np.ndarray) -> Sequences:
        return Sequences.of(np.add.reduceat(is_active, self.ends - self.layout.lengths, dtype=np.int64))

    def _candidates(self, task: int) -> Candidates:
        layout = self.layout
        chosen = [n for n, span_task in enumerate(self.tasks) if span_task == task]
        # a question ends at the first row with a loss after its image, or with its sequence
        stops = np.union1d(layout.labelled_rows, self.ends)
        rows, neighbours, questions = [], [], []
        for n in chosen:
            span, start = layout.spans[n], layout.starts[n]
            y, x = np.divmod(np.arange(span.length), span.width)
            own = start + np.arange(span.length)
            rows.append(own)
            inside = [y > 0, y < span.height - 1, x > 0, x < span.width - 1]
            steps = [-span.width, span.width, -1, 1]
            neighbours.append(np.stack([np.where(here, own + step, own) for here, step in zip(inside, steps)], 1))
            questions.append(np.arange(start + span.length, stops[np.searchsorted(stops, start + span.length)]))
        lengths = np.array([len(r) for r in rows], np.int64)
        return Candidates(
            lengths=lengths.tolist(),
            rows_C=torch.from_numpy(_concatenated(rows)),
            span_C=torch.from_numpy(np.repeat(np.arange(len(chosen)), lengths)),
            left_C=torch.from_numpy(_concatenated([np.arange(length, 0, -1) for length in lengths])),
            first_C=torch.from_numpy(np.repeat(np.cumsum(lengths) - lengths, lengths).astype(np.int64)),
            neighbours_C4=torch.from_numpy(_concatenated(neighbours).reshape(-1, 4)),
            question_rows_Q=torch.from_numpy(_concatenated(questions)),
            question_span_Q=torch.from_numpy(np.repeat(np.arange(len(chosen)), [len(q) for q in questions])),
        )


def _concatenated(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0, np.int64)


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
