"""The token router: carries the residual stream of a pack from stage to stage.

    active = router.enter(stage)          which rows (decided now, where that was left to the device)
    x_KD = router.take(active)            their hidden states
    …the stage's layers…
    router.write(active, x_KD)            back into the stream

Nothing here makes the host wait: every size and every index that does not depend on content comes with the route (P4).
"""

import torch
from torch import nn

from megavlm.routing.gates import open_gates
from megavlm.routing.merging import merge_spans
from megavlm.routing.route import Choice, Route, Stage
from megavlm.routing.selectors import DEVICE_SELECTORS, Candidates, Evidence, sort_by_span


class Router:
    """The state of one pack on its way through the layers.

    Args:
        route: On the pack's device.
        h_TD: The residual stream after the embedding.
        selectors: Names of the tasks' selectors.
        gates: ``task_layer`` → gate of a mixture of depths.
    """

    def __init__(self, route: Route, h_TD: torch.Tensor, selectors: list[str], gates: nn.ModuleDict):
        self.route, self.h_TD, self.selectors, self.gates = route, h_TD, selectors, gates
        self.log_sizes_T: torch.Tensor | None = None
        """Logarithm of how many tokens each row stands for; None before anything merged."""
        self.gate_T: torch.Tensor | None = None
        """What the stage's outcome is scaled by, for rows behind a learned gate."""
        self.gate_loss = h_TD.new_zeros((), dtype=torch.float32)
        """Sum over gated tokens of the auxiliary loss that teaches the gates."""
        self._q_THd = self._k_THd = None
        self._orders: dict[tuple[int, int], torch.Tensor] = {}
        self._alive_T = dict.fromkeys(route.candidates)

    def enter(self, stage: Stage) -> torch.Tensor | None:
        """Active rows of a stage, ascending; None where that is all of them."""
        self.gate_T = None
        deciding = {choice.task for choice in stage.choices}
        for task in self._alive_T.keys() - deciding:
            self._alive_T[task] = None
        if not stage.choices:
            return stage.active_K
        rows = [self._choose(choice, stage) for choice in stage.choices]
        # choices leave rows open, so active_K is never None here unless there are no candidates at all
        fixed = [] if stage.active_K is None else [stage.active_K]
        if not fixed:
            return None
        return torch.cat(fixed + rows).sort().values

    def take(self, active: torch.Tensor | None, *tables: torch.Tensor) -> list[torch.Tensor]:
        """The active rows of the residual stream and of the given tables."""
        everything = (self.h_TD, *tables)
        return list(everything) if active is None else [table.index_select(0, active) for table in everything]

    def write(self, active: torch.Tensor | None, x_KD: torch.Tensor) -> None:
        """Put the outcome of a stage back into the residual stream."""
        if self.gate_T is not None:
            (before_KD,), gate_K = self.take(active), self.gate_T
            gate_K = gate_K if active is None else gate_K.index_select(0, active)
            x_KD = before_KD + gate_K[:, None].to(x_KD.dtype) * (x_KD - before_KD)
        self.h_TD = x_KD if active is None else self.h_TD.index_copy(0, active, x_KD)

    def watch(self, active: torch.Tensor | None, q_KHd: torch.Tensor, k_KHd: torch.Tensor) -> None:
        """Remember queries and keys of a stage's last layer, without rotary embedding, for the choices of the next.

        Rows that were not active keep what they had.
        """
        if active is None:
            self._q_THd, self._k_THd = q_KHd, k_KHd
            return
        if self._q_THd is None:
            self._q_THd = q_KHd.new_zeros(len(self.h_TD), *q_KHd.shape[1:])
            self._k_THd = self._q_THd
        self._q_THd = self._q_THd.index_copy(0, active, q_KHd)
        self._k_THd = self._k_THd.index_copy(0, active, k_KHd)

    def _choose(self, choice: Choice, stage: Stage) -> torch.Tensor:
        """Rows of a choice's candidates that are active, span by span."""
        among = self.route.candidates[choice.task]
        key = (choice.task, choice.plan.draw)
        if choice.plan.how == "gate":
            chosen_C, gate_T, loss = open_gates(self.gates[f"{choice.task}_{stage.first_layer}"], self.h_TD, among, choice)
            self.gate_T = gate_T if self.gate_T is None else self.gate_T * gate_T
            self.gate_loss = self.gate_loss + loss
            return chosen_C
        if key not in self._orders:
            if choice.plan.how == "merge":
                self.h_TD, self.log_sizes_T, order_C = merge_spans(self.h_TD, self._k_THd, among, choice.kept)
            else:
                order_C = self._order(choice, among)
            self._orders[key] = order_C
        rows_K = self._orders[key].index_select(0, choice.take_K)
        if choice.plan.nested:
            alive_T = torch.zeros(len(self.h_TD), dtype=torch.bool, device=self.h_TD.device)
            self._alive_T[choice.task] = alive_T.index_fill(0, rows_K, True)
        return rows_K

    def _order(self, choice: Choice, among: Candidates) -> torch.Tensor:
        """Rows of the candidates, span by span, within each the highest score first: one composite sort."""
        evidence = Evidence(self.h_TD.detach(), self._q_THd, self._k_THd)
        score_C = DEVICE_SELECTORS[self.selectors[choice.task]].score(evidence, among).float()
        alive_T = self._alive_T[choice.task]
        if choice.plan.nested and alive_T is not None:
            score_C = score_C.masked_fill(~alive_T.index_select(0, among.rows_C), -torch.inf)
        return among.rows_C.index_select(0, sort_by_span(score_C, among.span_C))
