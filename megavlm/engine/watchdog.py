"""The watchdog: ends a step that exceeds its budget, and leaves behind what every rank was doing.

    RUN/exit_code           `Exit.HUNG`
    RUN/hangs/
        step-00000012/
            rank-0.json     stage that the rank was in, and for how long
            rank-0.txt      the stacks of all its threads
        stuck-rank-1.txt    the same of a rank whose Python stands still: some C code holds the interpreter and does not come back

The next start renames the folder of the step: a number is added.

A rank hangs, the others wait for it: whoever notices first leaves a note in the run folder, and all ranks write. They look for it once
half of their budget is over, for all are in the same step and have nearly the same budget: steps that are well cost the file system
nothing, however many ranks there are. If some cannot write, because they are stopped or dead, that too is in the report. The collectives'
own timeouts come later than all that: they would end the run without a word.
"""

import faulthandler
import json
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from megavlm.engine.guard import FaultConfig
from megavlm.engine.zero import EngineConfig
from megavlm.runs.exits import Exit, LastWord
from megavlm.system.files import DamagedFile, open_to_write, read_json, write_atomically
from megavlm.system.harmless import harmless

log = logging.getLogger(__name__)

POLL_S = 0.5
GRACE_S = 5.0
"""How long the ranks have for their stacks."""
STUCK_S = 15.0
"""So long after its budget a rank whose watchdog cannot run is ended: the others have spoken by then."""
LEAST_BUDGET_S = 60.0
LOOKS_AFTER = 0.5
"""So much of its budget a step has taken when a rank begins to look for another's note."""
SHARE_OF_TIMEOUT = 0.8
"""A budget is at most this much of the time that a collective may take."""


class Watchdog:
    """A thread that looks at the clock. One per rank.

    Args:
        folder: ``RUN/hangs``.
        rank: This process.
        world_size: How many there are.
        faults: The recipe's ``faults``: the budgets of the first and of later steps.
        engine: The recipe's ``engine``: the timeouts that the budgets have to be shorter than.
        last_word: Where the exit status is left.
        end: Called with the exit status instead of ending the process at once; for tests.
        least_budget_s: Never less is granted, unless the timeouts are shorter.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        world_size: int,
        *,
        faults: FaultConfig,
        engine: EngineConfig,
        last_word: LastWord,
        end: Callable[[int], Any] = os._exit,
        least_budget_s: float = LEAST_BUDGET_S,
    ):
        self.folder = folder
        self.rank = rank
        self.world_size = world_size
        self.last_word = last_word
        self.end = end
        self.factor = faults.steady_step_budget_factor
        self.least_budget_s = least_budget_s
        self.largest_budget_s = min(faults.step_budget_s, SHARE_OF_TIMEOUT * engine.step_timeout_s)
        self.listeners: list[Callable[[str], Any]] = []
        """Called with every stage that begins."""
        self.stage = "start"
        self._stage_begin_s = self._step_begin_s = time.monotonic()
        self._step = 0
        self._budget_s = min(faults.step_budget_s, SHARE_OF_TIMEOUT * engine.timeout_s)
        if min(self._budget_s, self.largest_budget_s) < faults.step_budget_s:
            log.info(
                "the watchdog ends the first step after %.0f s and later ones after at most %.0f s instead of faults.step_budget_s = %d: it"
                " has to be faster than engine.timeout_s = %d and engine.step_timeout_s = %d",
                *(self._budget_s, self.largest_budget_s, faults.step_budget_s, engine.timeout_s, engine.step_timeout_s),
            )
        self._durations_s: deque[float] = deque(maxlen=32)
        self._stopped = threading.Event()
        self._stuck = _open_stuck(folder / f"stuck-rank-{rank}.txt")
        self._expect_an_end()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def enter(self, stage: str) -> None:
        """Name what the rank does from now on."""
        self.stage = stage
        self._stage_begin_s = time.monotonic()
        for listen in self.listeners:
            listen(stage)

    def begin_step(self, step: int) -> None:
        """A step begins: the clock starts again, drawings and reports of the step before it included."""
        self._step = step
        self._step_begin_s = time.monotonic()
        self._expect_an_end()
        self.enter("data")

    def end_step(self) -> None:
        """The step is over: it counts for the budget of the next ones."""
        self._durations_s.append(time.monotonic() - self._step_begin_s)
        self._budget_s = min(self.largest_budget_s, max(self.least_budget_s, self.factor * max(self._durations_s)))

    @property
    def slowest_step_s(self) -> float:
        """The slowest of the last 32 steps."""
        return max(self._durations_s, default=0.0)

    def stop(self) -> None:
        """Watch no longer."""
        self._stopped.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        if self._stuck is sys.stderr:
            return
        self._stuck.close()
        with harmless(self._stuck.name):
            path = Path(self._stuck.name)
            if not path.stat().st_size:
                path.unlink()

    def _expect_an_end(self) -> None:
        """Have a thread in C, which needs no interpreter, write the stacks and end the process if the watchdog's own stands still too."""
        faulthandler.dump_traceback_later(self._budget_s + STUCK_S, file=self._stuck, exit=True)

    def _watch(self) -> None:
        while not self._stopped.wait(POLL_S):
            here = self.folder / f"step-{self._step + 1:08d}"
            share = (time.monotonic() - self._step_begin_s) / self._budget_s
            if share > 1 or (share > LOOKS_AFTER and (here / "noticed").exists()):
                self._report(here)
                return

    def _report(self, here: Path) -> None:
        """Write what this rank does, tell what all did, and end; also if the run folder cannot be written to."""
        seconds = time.monotonic() - self._stage_begin_s
        entry = {"rank": self.rank, "stage": self.stage, "seconds": round(seconds, 1), "host": os.uname().nodename}
        with harmless(f"the stacks of a hang {here}"):
            here.mkdir(parents=True, exist_ok=True)
            (here / "noticed").touch()
            with open_to_write(here / f"rank-{self.rank}.txt") as file:
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
            log.error(describe_hang(self._step, self._budget_s, entries, self.world_size, here=here))
        self.last_word.leave(Exit.HUNG)
        for handler in logging.getLogger().handlers:
            with suppress(OSError):  # a full disk
                handler.flush()
        self.end(Exit.HUNG)


def _open_stuck(path: Path) -> IO[str]:
    """Where stacks of a rank that is stuck go: standard error, if the file cannot be written."""
    with harmless(f"{path}, the stacks of a rank that is stuck, which go to standard error instead"):
        path.parent.mkdir(parents=True, exist_ok=True)
        return open_to_write(path, "a")
    return sys.stderr


def describe_hang(step: int, budget_s: float, entries: dict[int, dict], world_size: int, *, here: Path) -> str:
    """What the ranks were doing, the odd one out first in mind: most ranks merely wait for it."""
    lines = [f"step {step + 1} exceeds its budget of {budget_s:.0f} s; the run ends here. What the ranks were doing:"]
    for rank in range(world_size):
        if rank in entries:
            entry = entries[rank]
            lines.append(f"  rank {rank} on {entry['host']}: in stage '{entry['stage']}' for {entry['seconds']:.0f} s")
        else:
            lines.append(f"  rank {rank}: no answer, not even from its watchdog: the process is stopped, gone, or stuck in C")
    lines.append(f"  stacks: {here}, and {here.parent}/stuck-rank-*.txt of ranks that are stuck in C")
    lines.append("  do:    look for the rank whose stage or stack differs; start again to go on")
    return "\n".join(lines)
