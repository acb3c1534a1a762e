"""The token router: carries the residual stream of a pack from stage to stage.

    active = router.enter(stage)          which rows (decided now, where that was left to the device)
    x_KD = router.take(active)            their hidden states
    parts = router.parts(stage, active)   which of them ask, and which go through the MLP
    …the stage's layers…
    router.write(active, x_KD)            back into the stream

Letters: C candidates.

Nothing here makes the host wait: every size and every index that does not depend on content comes with the route (P4).

Tested by `tests/model/test_backbone.py`.
"""

from dataclasses import dataclass

import torch
from torch import nn

from megavlm.routing.gates import open_gates
from megavlm.routing.merging import merge_spans
from megavlm.routing.policies import PARTIAL
from megavlm.routing.route import Choice, Route, Stage
from megavlm.routing.rows import take_rows
from megavlm.routing.selectors import DEVICE_SELECTORS, Candidates, Evidence, sort_by_span


@dataclass(frozen=True)
class Parts:
    """Places, among a stage's active rows, of those that go through some part of its layers; None is all of them."""

    asking_P: torch.Tensor | None
    """The others only give keys and values."""
    mlp_P: torch.Tensor | None


WHOLE = Parts(None, None)


class Router:
    """The state of one pack on its way through the layers.

    Args:
        route: On the pack's device.
        h_TD: The residual stream after the embedding.
        gates: ``task_layer`` → gate of a mixture of depths.
    """

    def __init__(self, route: Route, h_TD: torch.Tensor, gates: nn.ModuleDict):
        self.route = route
        self.h_TD = h_TD
        self.gates = gates
        self.log_sizes_T: torch.Tensor | None = None
        """Logarithm of how many tokens each row stands for; None before anything merged."""
        self.gate_T: torch.Tensor | None = None
        """What the stage's outcome is scaled by, for rows behind a learned gate."""
        self.gate_loss = h_TD.new_zeros((), dtype=torch.float32)
        """Sum over gated tokens of the auxiliary loss that teaches the gates."""
        self._q_THd = h_TD.new_zeros(0)
        self._k_THd = h_TD.new_zeros(0)
        self._scores: dict[tuple[int, int], torch.Tensor] = {}
        """What ranks the candidates in a draw, by (task, draw)."""
        self._merged_C: torch.Tensor | None = None
        """Rows of merged spans, those that are left first."""
        self._chosen: dict[int, torch.Tensor] = {}
        """The rows chosen in the stage before, by task."""

    def enter(self, stage: Stage) -> torch.Tensor | None:
        """Active rows of a stage, ascending; None where that is all of them."""
        self.gate_T = None
        self._chosen = {choice.task: self._choose(choice, stage) for choice in stage.choices}
        return self._with_chosen(stage.active_K, stage, left_alone=PARTIAL)

    def parts(self, stage: Stage, active: torch.Tensor | None) -> Parts:
        """What the active rows of a stage, as `enter` gave them, do in its layers."""
        asking = self._with_chosen(stage.asking_K, stage, left_alone=("skip_mlp",))
        through_mlp = self._with_chosen(stage.mlp_K, stage)
        places = [rows if rows is None or active is None else torch.searchsorted(active, rows) for rows in (asking, through_mlp)]
        return Parts(*places)

    def _with_chosen(self, rows_K: torch.Tensor | None, stage: Stage, left_alone: tuple[str, ...] = ()) -> torch.Tensor | None:
        """Rows, and those that were chosen in a stage, but for kinds of plans that leave all their tokens among these rows anyway."""
        chosen = [self._chosen[choice.task] for choice in stage.choices if choice.plan.how not in left_alone]
        # choices leave rows open, so these are only None here if there are no candidates at all
        return rows_K if rows_K is None or not chosen else torch.cat([rows_K, *chosen]).sort().values

    def take(self, active: torch.Tensor | None, *tables: torch.Tensor) -> list[torch.Tensor]:
        """The active rows of the residual stream and of the given tables."""
        everything = (self.h_TD, *tables)
        return list(everything) if active is None else [take_rows(table, active) for table in everything]

    def write(self, active: torch.Tensor | None, x_KD: torch.Tensor) -> None:
        """Put the outcome of a stage back into the residual stream."""
        if self.gate_T is not None:
            (before_KD,), gate_K = self.take(active), self.gate_T
            gate_K = gate_K if active is None else take_rows(gate_K, active)
            x_KD = before_KD + gate_K[:, None].to(x_KD.dtype) * (x_KD - before_KD)
        self.h_TD = x_KD if active is None else self.h_TD.index_copy(0, active, x_KD)

    def watch(self, active: torch.Tensor | None, asking_P: torch.Tensor | None, q_KHd: torch.Tensor, k_KHd: torch.Tensor) -> None:
        """Remember queries and keys of a stage's last layer, without rotary embedding, for the choices of the next.

        Rows that were not active, or did not ask, keep what they had: zeros, if they never did.
        """
        if asking_P is not None:
            q_KHd, k_KHd = take_rows(q_KHd, asking_P), take_rows(k_KHd, asking_P)
            active = asking_P if active is None else active.index_select(0, asking_P)
        if active is None:
            self._q_THd = q_KHd
            self._k_THd = k_KHd
            return
        if not len(self._q_THd):
            self._q_THd = q_KHd.new_zeros(len(self.h_TD), *q_KHd.shape[1:])
            self._k_THd = self._q_THd
        self._q_THd = self._q_THd.index_copy(0, active, q_KHd)
        self._k_THd = self._k_THd.index_copy(0, active, k_KHd)

    def _choose(self, choice: Choice, stage: Stage) -> torch.Tensor:
        """Rows of a choice's candidates that are active."""
        among = self.route.candidates[choice.task]
        if choice.plan.how == "gate":
            rows_K, gate_T, loss = open_gates(self.gates[f"{choice.task}_{stage.first_layer}"], self.h_TD, among, choice)
            self.gate_T = gate_T if self.gate_T is None else self.gate_T * gate_T
            self.gate_loss = self.gate_loss + loss.float()
            return rows_K
        order_C = self._merged(choice, among) if choice.plan.how == "merge" else self._ranked(choice, among)
        return order_C.index_select(0, choice.take_K)

    def _merged(self, choice: Choice, among: Candidates) -> torch.Tensor:
        """Rows of the candidates, span by span, those that are left first; they merge in the first stage that asks."""
        if self._merged_C is None:
            self.h_TD, self.log_sizes_T, self._merged_C = merge_spans(self.h_TD, self._k_THd, among, choice.kept)
        return self._merged_C

    def _ranked(self, choice: Choice, among: Candidates) -> torch.Tensor:
        """Rows of the candidates, span by span, within each the highest score of the draw first: one composite sort."""
        draw = (choice.task, choice.plan.draw)
        if draw not in self._scores:
            evidence = Evidence(self.h_TD.detach(), self._q_THd, self._k_THd)
            self._scores[draw] = DEVICE_SELECTORS[choice.selector].score(evidence, among).float()
        group_C = among.span_C
        if choice.plan.nested and choice.task in self._chosen:
            # within each span, what was active in the stage before comes first
            was_out_T = torch.ones(len(self.h_TD), dtype=torch.int64, device=self.h_TD.device)
            was_out_T = was_out_T.index_fill(0, self._chosen[choice.task], 0)
            group_C = 2 * group_C + was_out_T.index_select(0, among.rows_C)
        return among.rows_C.index_select(0, sort_by_span(self._scores[draw], group_C))
