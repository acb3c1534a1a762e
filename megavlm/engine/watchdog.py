"""The watchdog: ends a step that exceeds its budget, and leaves behind what every rank was doing.

    RUN/hangs/step-00000012/
        rank-0.json     stage that the rank was in, and for how long
        rank-0.txt      the stacks of all its threads

The next start renames the folder: a number is added.

A rank hangs, the others wait for it: whoever notices first leaves a note in the run folder, and all ranks write. If
some cannot, because they are stopped or dead, that too is in the report.
"""

import faulthandler
import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from megavlm.engine.guard import FaultConfig
from megavlm.runs.exits import Exit
from megavlm.system.files import DamagedFile, read_json, write_atomically
from megavlm.system.harmless import harmless

log = logging.getLogger(__name__)

POLL_S = 0.5
GRACE_S = 5.0
"""How long the ranks have for their stacks."""
LEAST_BUDGET_S = 60.0


class Watchdog:
    """A thread that looks at the clock. One per rank.

    Args:
        folder: ``RUN/hangs``.
        rank: This process.
        world_size: How many there are.
        config: The recipe's ``faults``: the budgets of the first and of later steps.
        end: Called with the exit status instead of ending the process at once; for tests.
        least_budget_s: Never less is granted.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        world_size: int,
        config: FaultConfig,
        end: Callable[[int], None] = os._exit,
        least_budget_s: float = LEAST_BUDGET_S,
    ):
        self.folder = folder
        self.rank = rank
        self.world_size = world_size
        self.config = config
        self.end = end
        self.least_budget_s = least_budget_s
        self.stage = "start"
        self._stage_begin_s = self._step_begin_s = time.monotonic()
        self._step = 0
        self._budget_s = float(config.step_budget_s)
        self._durations_s: deque[float] = deque(maxlen=32)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def enter(self, stage: str) -> None:
        """Name what the rank does from now on."""
        self.stage, self._stage_begin_s = stage, time.monotonic()

    def begin_step(self, step: int) -> None:
        """A step begins: the clock starts again, drawings and reports of the step before it included."""
        now_s = time.monotonic()
        self._step, self._step_begin_s = step, now_s
        self.enter("data")

    def end_step(self) -> None:
        """The step is over: it counts for the budget of the next ones."""
        self._durations_s.append(time.monotonic() - self._step_begin_s)
        self._budget_s = min(
            self.config.step_budget_s, max(self.least_budget_s, self.config.steady_step_budget_factor * max(self._durations_s))
        )

    @property
    def slowest_step_s(self) -> float:
        """Of the last 32."""
        return max(self._durations_s, default=0.0)

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(POLL_S):
            here = self.folder / f"step-{self._step + 1:08d}"
            late_s = time.monotonic() - self._step_begin_s - self._budget_s
            if late_s > 0 or (here / "noticed").exists():
                self._report(here)
                return

    def _report(self, here: Path) -> None:
        seconds = time.monotonic() - self._stage_begin_s
        entry = {"rank": self.rank, "stage": self.stage, "seconds": round(seconds, 1), "host": os.uname().nodename}
        with harmless(f"the stacks of a hang {here}"):
            here.mkdir(parents=True, exist_ok=True)
            (here / "noticed").touch()
            with (here / f"rank-{self.rank}.txt").open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            write_atomically(here / f"rank-{self.rank}.json", json.dumps(entry))
        deadline_s = time.monotonic() + GRACE_S
        while len(found := list(here.glob("rank-*.json"))) < self.world_size and time.monotonic() < deadline_s:
            time.sleep(POLL_S / 5)
        entries = {self.rank: entry}
        for path in found:
            with suppress(DamagedFile, KeyError):
                other = read_json(path)
                entries[other["rank"]] = other
        # one of those that are alive speaks for all
        if self.rank == min(entries):
            log.error(describe_hang(self._step, self._budget_s, entries, self.world_size, here))
        for handler in logging.getLogger().handlers:
            handler.flush()
        self.end(Exit.HUNG)


def describe_hang(step: int, budget_s: float, entries: dict[int, dict], world_size: int, here: Path) -> str:
    """What the ranks were doing, the odd one out first in mind: most ranks merely wait for it."""
    lines = [f"step {step + 1} exceeds its budget of {budget_s:.0f} s; the run ends here. What the ranks were doing:"]
    for rank in range(world_size):
        if rank in entries:
            entry = entries[rank]
            lines.append(f"  rank {rank} on {entry['host']}: in stage '{entry['stage']}' for {entry['seconds']:.0f} s")
        else:
            lines.append(f"  rank {rank}: no answer, not even from its watchdog: the process is stopped or gone")
    lines.append(f"  stacks: {here}\n  do:    look for the rank whose stage or stack differs; start again to go on")
    return "\n".join(lines)
