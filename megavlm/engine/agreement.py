"""Wishes from outside, turned into one decision of all ranks between micro-batches.

    touch RUN/save    save at the end of the step or the next, and go on
    touch RUN/stop    save and end with `Exit.STOPPED`
    signals, clock    see `megavlm.engine.signals`

A signal may reach one process only, or each at another moment. So a handler merely notes it, and before every micro-batch
the ranks agree on the strongest wish that any of them has, in one small all-reduce over host memory that waits for no GPU. It is begun
one micro-batch ahead, so that nobody waits for it either: a wish is granted before the micro-batch after the next.

Tested by `tests/engine/test_agreement.py` and `tests/distributed/test_faults.py`.
"""

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from megavlm.engine import signals
from megavlm.engine.signals import Wish
from megavlm.system.harmless import harmless
from megavlm.system.world import World

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
"""How often rank 0 looks for files: the run folder may be far away."""


class Wishes:
    """Signals, files and the clock. Made by all ranks together.

    Args:
        world: The processes.
        run: The run folder, where ``save`` and ``stop`` may appear.
        needed_s: How long it would now take to come to the next decision and to write a checkpoint.
        end_time_s: When the job is killed, seconds since the epoch; None if it is not known.
    """

    def __init__(self, world: World, run: Path, needed_s: Callable[[], float], end_time_s: float | None):
        self.world = world
        self.run = run
        self.needed_s = needed_s
        self.end_time_s = end_time_s
        self._stop_wished = Wish.NOTHING
        self._looked_s = 0.0
        self._save_wished = False
        self._asked: Callable[[], torch.Tensor] | None = None

    def agree(self, step_ends: bool) -> Wish:
        """The strongest wish that any rank had at the call before this one. Called by all ranks together.

        Args:
            step_ends: Whether an optimizer step has just been taken; ``SAVE`` is kept until then.
        """
        stop_wished, save_wished = (self._asked or self._ask())().tolist()
        saves = bool(step_ends and save_wished and not stop_wished)
        if saves:
            self._save_wished = False
        self._asked = self._ask()
        return Wish.SAVE if saves else Wish(stop_wished)

    def close(self) -> None:
        """Wait for what is under way: nobody leaves the group with a question open. Called by all ranks together."""
        if self._asked:
            self._asked()
        self._asked = None

    @property
    def left_s(self) -> float | None:
        """Seconds until the job is killed, if known."""
        return None if self.end_time_s is None else self.end_time_s - time.time()

    def _ask(self) -> Callable[[], torch.Tensor]:
        if self.world.is_main:
            self._look()
        return self.world.ask(torch.tensor([max(signals.noted(), self._stop_wished), int(self._save_wished)]))

    def _look(self) -> None:
        now_s = time.monotonic()
        if now_s - self._looked_s < LOOK_EVERY_S:
            return
        self._looked_s = now_s
        for name in ("save", "stop"):
            if not os.path.lexists(self.run / name):
                continue
            with harmless(f"the removal of {self.run / name}"):  # what cannot be removed is no wish: it would be one for ever
                (self.run / name).unlink()
                log.info("found %s", self.run / name)
                if name == "save":
                    self._save_wished = True
                else:
                    self._stop_wished = max(self._stop_wished, Wish.STOP)
        left_s = self.left_s
        if left_s is not None and left_s < self.needed_s():
            self._stop_wished = Wish.INTERRUPT
