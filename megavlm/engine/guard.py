"""Bad steps: a loss or a gradient norm that is not finite, or far above what it was lately. Such a step is not taken.

The decision is made on the device from numbers that are the same on all ranks, and goes into AdamW's fused kernel as
a tensor, as a loss scaler's verdict would: the host waits for nothing, and learns of it one step later. A skipped
step changes neither weights nor moments nor the step counters. (Spikes by standard deviations over a window, and
steps skipped on the device: OLMo-core.)
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field

from megavlm.settings import Number, Positive, Seconds, Settings


class FaultConfig(Settings):
    """Bad steps and hanging ones."""

    spike_sigmas: Annotated[Number, Field(gt=0, le=1e6)] = 6.0
    """A step is skipped if its loss or gradient norm lies more than this many standard deviations above the mean of the window."""
    spike_window_steps: Annotated[Positive, Field(ge=2, le=10**6)] = 128
    """The window: the last accepted steps, from which mean and deviation are computed. Until it is full, no step is a spike."""
    max_skipped_in_a_row: Positive = 10
    """The run ends when this many steps in a row were skipped."""
    step_budget_s: Seconds = 1800
    """Until the first step is done, the watchdog ends a step that takes longer, and writes the stacks of all ranks. At most four fifths of
    `engine.timeout_s`, and later of `engine.step_timeout_s`."""
    steady_step_budget_factor: Annotated[Number, Field(gt=1, le=1e6)] = 20.0
    """After the first step the budget is this many times the slowest of the last steps: at least a minute, at most `step_budget_s`."""


@dataclass(frozen=True)
class BadStep:
    """A step that was skipped."""

    step: int
    """Counted from 0."""
    loss: float
    gradient_norm: float
    reason: str
    context: Any
    """What the trainer gave for this step."""


class Guard:
    """Judges every step.

    Args:
        config: The recipe's ``faults``.
        device: Where losses and norms are.
    """

    def __init__(self, config: FaultConfig, device: torch.device):
        self.config = config
        window = config.spike_window_steps
        # the last accepted (loss, norm) pairs, in a ring
        self._history_2W = torch.zeros(2, window, device=device)
        self._count = torch.zeros((), dtype=torch.long, device=device)
        self._pending: deque[tuple[int, torch.Tensor, torch.cuda.Event | None, Any]] = deque()
        self._found_inf: torch.Tensor | None = None
        self._loss: torch.Tensor | None = None
        self._norm_of: Callable[[], torch.Tensor] | None = None
        self.num_skipped = self.num_skipped_in_a_row = 0

    def begin_anew(self) -> None:
        """Forget what was usual: from now on the model does something else."""
        self._count.zero_()

    def expect(self, loss: torch.Tensor, norm_of: Callable[[], torch.Tensor]) -> None:
        """Announce a step.

        Args:
            loss: Loss of the whole step, the same on all ranks; 0-dimensional.
            norm_of: Gives the gradient norm, once DeepSpeed has computed it; the same on all ranks.
        """
        self._loss = loss
        self._norm_of = norm_of
        self._found_inf = None

    @property
    def found_inf(self) -> torch.Tensor | None:
        """1.0 if the announced step must not be taken, 0.0 if it may; on the device. The optimizer's kernel reads it."""
        if self._found_inf is None and self._loss is not None and self._norm_of is not None:
            pair_2 = torch.stack([self._loss, torch.as_tensor(self._norm_of(), device=self._loss.device)]).float()
            self._found_inf = self._judge(pair_2)
            self._verdict = torch.cat([self._found_inf[None], pair_2])
        return self._found_inf

    def _judge(self, pair_2: torch.Tensor) -> torch.Tensor:
        window = self._history_2W.shape[1]
        mean_2 = self._history_2W.mean(1)
        limit_2 = mean_2 + self.config.spike_sigmas * self._history_2W.std(1)
        # before the window is full nobody knows what is usual
        spike = (pair_2 > limit_2).any() & (self._count >= window)
        bad = ~torch.isfinite(pair_2).all() | spike
        # index_select and index_copy_: subscripts with a tensor would read it back to the host
        place_1 = (self._count % window)[None]
        kept_21 = torch.where(bad, self._history_2W.index_select(1, place_1), pair_2[:, None])
        self._history_2W.index_copy_(1, place_1, kept_21)
        self._count += (~bad).long()
        return bad.float()

    def end_step(self, step: int, context: Any) -> None:
        """Send the verdict of the announced step on its way to the host.

        Args:
            step: Its number.
            context: Comes back in `BadStep` if it was skipped.
        """
        verdict, event = self._verdict, None
        if verdict.is_cuda:
            verdict, event = verdict.to("cpu", non_blocking=True), torch.cuda.Event()
            event.record()
        self._pending.append((step, verdict, event, context))

    def settle(self, keep: int = 1) -> list[BadStep]:
        """The steps that turned out to be skipped. The same on all ranks.

        Args:
            keep: So many of the latest steps are left for the next call: the device may still be at work on them.
        """
        bad = []
        while len(self._pending) > keep:
            step, verdict, event, context = self._pending.popleft()
            if event:
                event.synchronize()
            skipped, loss, norm = verdict.tolist()
            self.num_skipped_in_a_row = self.num_skipped_in_a_row + 1 if skipped else 0
            if skipped:
                self.num_skipped += 1
                finite = math.isfinite(loss) and math.isfinite(norm)
                reason = "a spike" if finite else "not finite"
                bad.append(BadStep(step, loss, norm, reason, context))
        return bad

    def state(self) -> dict:
        """For the checkpoint: plain numbers."""
        return {
            "history": self._history_2W.tolist(),
            "count": int(self._count),
            "skipped": self.num_skipped,
            "skipped_in_a_row": self.num_skipped_in_a_row,
        }

    def load_state(self, state: dict) -> None:
        """Take over ``state()`` of an earlier session; a history of another length is begun anew."""
        self.num_skipped = state["skipped"]
        self.num_skipped_in_a_row = state["skipped_in_a_row"]
        if len(state["history"][0]) == self._history_2W.shape[1]:
            self._history_2W.copy_(torch.tensor(state["history"]))
            self._count.fill_(state["count"])


class GuardedAdamW(torch.optim.AdamW):
    """AdamW (Loshchilov & Hutter 2019), one fused kernel per group, that leaves out the steps its guard refuses.

    Args:
        groups: Parameter groups.
        guard: Judges every step.
        options: As for `torch.optim.AdamW`.
    """

    def __init__(self, groups, guard: Guard, **options):
        self.guard = guard
        super().__init__(groups, fused=True, **options)

    @property
    def found_inf(self) -> torch.Tensor | None:
        """Where torch's fused optimizers look for the verdict of a gradient scaler."""
        return self.guard.found_inf
