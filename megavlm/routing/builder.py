"""The route of one pack, built from its layout and the plan of its step.

Letters: s stages, C candidates, Q rows of questions, U rows of a stage that give keys.

Tested by `tests/routing/test_route.py`.
"""

import numpy as np
import torch

from megavlm.routing.plan import RoutingPlan
from megavlm.routing.policies import PARTIAL, LayerPlan
from megavlm.routing.route import Choice, Injection, PackLayout, Route, Sequences, Split, Stage
from megavlm.routing.selectors import HOST_SELECTORS, Candidates
from megavlm.routing.tasks import Task


def build_route(plan: RoutingPlan, layout: PackLayout, strength: float, rng: np.random.Generator) -> Route:
    """Build the route of a pack.

    Args:
        plan: The policies of the step.
        layout: The pack's sequences and spans.
        strength: 0 is dense, 1 is the policies in full.
        rng: The pack's own random stream.
    """
    return _RouteBuilder(plan, layout, strength, rng).build()


class _RouteBuilder:
    """Builds one route."""

    def __init__(self, plan: RoutingPlan, layout: PackLayout, strength: float, rng: np.random.Generator):
        self.plan = plan
        self.layout = layout
        self.strength = strength
        self.rng = rng
        self.ends = np.cumsum(layout.lengths)
        self.tasks = [span.task for span in layout.spans]
        lengths = [span.length for span in layout.spans]
        self.kept_sN = plan.kept_tokens(lengths, self.tasks, strength)
        self.merged_sN = plan.merged_spans(lengths, self.tasks, strength)
        self.scores: dict[tuple[int, int], np.ndarray] = {}
        """What ranks a span in a draw, by (span, draw)."""
        self.is_active_before = [np.ones(length, bool) for length in lengths]
        """Which of a span's tokens were active in the stage before, as far as the host decides."""
        self.ranked: set[tuple[int, int]] = set()
        """What the device has ranked by now: (task, draw)."""

    def build(self) -> Route:
        stages = [self._stage(s, first, end) for s, (first, end) in enumerate(self.plan.bounds)]
        _watch(stages)
        chosen_tasks = {choice.task for stage in stages for choice in stage.choices}
        return Route(stages, {task: self._candidates(task) for task in sorted(chosen_tasks)})

    def _stage(self, s: int, first: int, end: int) -> Stage:
        plans, kept_N = self.plan.plans[s], self.kept_sN[s]
        is_active, asks, goes_through_mlp = (np.ones(self.ends[-1], bool) for _ in range(3))
        choices = []
        for task, plan in enumerate(plans):
            # a task without spans chooses all the same: its modules must be called on every rank (P7)
            if self.plan.is_device_choice(task, plan, self.strength):
                choices.append(self._choice(task, plan, kept_N))
        on_device = {choice.task for choice in choices}
        # rows that are active whatever the device decides
        is_fixed = is_active.copy() if choices else is_active
        for n, (span, start, kept) in enumerate(zip(self.layout.spans, self.layout.starts, kept_N)):
            rows, how = slice(start, start + span.length), plans[span.task].how
            is_kept: np.ndarray | bool = True
            if span.task in on_device:
                is_kept = False  # which ones is open, how many is not
            elif kept < span.length:
                is_kept = self._select(n, plans[span.task], kept)
            else:
                self.is_active_before[n][:] = True
            goes_through_mlp[rows] = is_kept
            if how != "skip_mlp":
                asks[rows] = is_kept
            if how not in PARTIAL:
                # the first ones stand for open ones in the lengths
                is_fixed[rows], is_active[rows] = is_kept, np.arange(span.length) < kept if span.task in on_device else is_kept
        injected = {task: self._injected(task) for task in (0, 1) if plans[task].how == "inject"}
        for rows in injected.values():
            is_active[rows] = is_fixed[rows] = asks[rows] = goes_through_mlp[rows] = False
        sequences = self._sequences(is_active)
        active_K = None if is_fixed.all() else torch.from_numpy(np.flatnonzero(is_fixed))
        asking_K, mlp_K = (
            None if (some == is_fixed).all() else torch.from_numpy(np.flatnonzero(some)) for some in (asks, goes_through_mlp)
        )
        for rows in injected.values():
            is_active[rows] = True
        together = self._sequences(is_active) if injected else sequences
        injections = [Injection(task, torch.from_numpy(rows), together) for task, rows in injected.items()]
        return Stage(first, end, sequences, active_K, asking_K, mlp_K, choices, injections, split=self._split(s, is_active))

    def _select(self, n: int, plan: LayerPlan, kept: int) -> np.ndarray:
        """Active tokens of a span as its host selector chooses, as a mask."""
        span = self.layout.spans[n]
        if (n, plan.draw) not in self.scores:
            self.scores[n, plan.draw] = HOST_SELECTORS[self.plan.selectors[span.task]](span.height, span.width, self.rng)
        scores = self.scores[n, plan.draw]
        if plan.nested:
            scores = np.where(self.is_active_before[n], scores, np.inf)
        self.is_active_before[n] = np.zeros(span.length, bool)
        if kept:
            self.is_active_before[n][np.argsort(scores, kind="stable")[:kept]] = True
        return self.is_active_before[n]

    def _choice(self, task: int, plan: LayerPlan, kept_N: np.ndarray) -> Choice:
        spans = [n for n, span_task in enumerate(self.tasks) if span_task == task]
        kept = [int(kept_N[n]) for n in spans]
        lengths = np.array([self.layout.spans[n].length for n in spans], np.int64)
        offsets = np.cumsum(lengths) - lengths
        take = [np.arange(offset, offset + k) for offset, k in zip(offsets, kept)]
        quota = np.repeat(np.array(kept, np.int64), lengths)
        # a gate has no draw
        is_new = plan.how != "gate" and (task, plan.draw) not in self.ranked
        if is_new:
            self.ranked.add((task, plan.draw))
        return Choice(
            task=task,
            plan=plan,
            kept=kept,
            take_K=torch.from_numpy(_concatenated(take)),
            quota_C=torch.from_numpy(quota),
            selector=self.plan.selectors[task],
            needs_attention=is_new and self.plan.looks_at_attention(task, plan),
        )

    def _split(self, s: int, gives_keys: np.ndarray) -> Split | None:
        """The sequences of a stage apart: those in which tokens are merged, and those in which none are."""
        if not self.merged_sN[s].any():
            return None
        owner_N = np.searchsorted(self.ends, self.layout.starts, side="right")
        is_merged_S = np.zeros(len(self.ends), bool)
        is_merged_S[owner_N[self.merged_sN[s]]] = True
        if is_merged_S.all():
            return None
        counts_S = np.add.reduceat(gives_keys, self.ends - self.layout.lengths, dtype=np.int64)
        is_merged_U = np.repeat(is_merged_S, counts_S)
        rows = [np.flatnonzero(is_merged_U), np.flatnonzero(~is_merged_U)]
        return Split(
            merged_rows=torch.from_numpy(rows[0]),
            other_rows=torch.from_numpy(rows[1]),
            back_U=torch.from_numpy(np.argsort(np.concatenate(rows))),
            merged=Sequences.of(counts_S[is_merged_S]),
            others=Sequences.of(counts_S[~is_merged_S]),
        )

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
        is_image = np.zeros(self.ends[-1], bool)
        for span, start in zip(layout.spans, layout.starts):
            is_image[start : start + span.length] = True
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
            following = np.arange(start + span.length, int(stops[np.searchsorted(stops, start + span.length)]))
            questions.append(following[~is_image[following]])
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


def _watch(stages: list[Stage]) -> None:
    """Mark the stages of which queries and keys are looked at later; what a watched stage leaves out keeps what it had before."""
    is_wanted = False
    for stage in reversed(stages):
        stage.is_watched = is_wanted
        leaves_out = stage.active_K is not None or stage.asking_K is not None or bool(stage.choices)
        is_wanted = (is_wanted and leaves_out) or any(choice.needs_attention for choice in stage.choices)


def _concatenated(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0, np.int64)
