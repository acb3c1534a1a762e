"""Wishes from outside, turned into one decision of all ranks between micro-batches.

    touch RUN/save    save at the end of the step, and go on
    touch RUN/stop    save and end with `Exit.STOPPED`
    signals, clock    see `megavlm.engine.signals`

A signal may reach one process only, or each at another moment. So a handler merely notes it, and before every micro-batch
the ranks agree on the strongest wish that any of them has, in one small all-reduce over host memory that waits for no GPU.

Tested by `tests/distributed/test_faults.py`.
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

    def agree(self, step_ends: bool) -> Wish:
        """The strongest wish of any rank. Called by all ranks together.

        Args:
            step_ends: Whether an optimizer step has just been taken; ``SAVE`` is kept until then.
        """
        if self.world.is_main:
            self._look()
        agreed = self.world.agree(torch.tensor([max(signals.noted(), self._stop_wished), int(self._save_wished)]))
        if agreed[0]:
            return Wish(int(agreed[0]))
        if step_ends and agreed[1]:
            self._save_wished = False
            return Wish.SAVE
        return Wish.NOTHING

    @property
    def left_s(self) -> float | None:
        """Seconds until the job is killed, if known."""
        return None if self.end_time_s is None else self.end_time_s - time.time()

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
