"""The route of one pack, built from its layout and the plan of the run."""

import numpy as np
import torch

from megavlm.routing.plan import RoutingPlan
from megavlm.routing.policies import DENSE, LayerPlan
from megavlm.routing.route import Choice, Injection, PackLayout, Route, Sequences, Stage
from megavlm.routing.selectors import HOST_SELECTORS, Candidates
from megavlm.routing.tasks import Task


def build_route(plan: RoutingPlan, layout: PackLayout, strength: float, rng: np.random.Generator) -> Route:
    """Build the route of a pack.

    Args:
        plan: The run's policies.
        layout: The pack's sequences and spans.
        strength: Of the schedule: 0 is dense, 1 the policies in full.
        rng: The pack's own random stream.
    """
    return _RouteBuilder(plan, layout, strength, rng).build()


class _RouteBuilder:
    """Builds one route."""

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
        if task == Task.GENERATION:
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
