"""How a run ends. The code is the process's exit status; it is also left in RUN/exit_code, because a launcher may report its own.

Tested by `tests/distributed/test_faults.py`.
"""

import os
import shutil
from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path

from megavlm.system.files import write_atomically
from megavlm.system.harmless import harmless


class Exit(IntEnum):
    """Exit status of `megavlm train`. 1 is any other error, with a traceback."""

    DONE = 0
    """All steps are done."""
    MISTAKE = 2
    """The recipe, the data or the run folder is wrong: the same start would fail again."""
    DIVERGED = 70
    """Too many steps in a row were skipped."""
    LOST = 71
    """A process, its device or the network failed. Continue the run, but not for ever."""
    SUPERSEDED = 73
    """A newer start of the run owns its folder."""
    HUNG = 74
    """The watchdog ended a step that exceeded its budget. Continue the run."""
    INTERRUPTED = 75
    """SIGUSR1 or the time limit; there is a checkpoint. Continue the run."""
    STOPPED = 76
    """SIGTERM, Ctrl-C or RUN/stop; there is a checkpoint. Do not continue by yourself."""
    ABANDONED = 130
    """Ctrl-C twice: ended at once, nothing was saved. Do not continue by yourself."""


class RunEnded(Exception):
    """The run ends before its last step, on purpose.

    Args:
        code: The exit status.
        reason: For the log.
    """

    def __init__(self, code: Exit, reason: str):
        self.code = code
        self.reason = reason
        super().__init__(reason)


class NotSaved(OSError):
    """The last checkpoint of a run is missing: the run has not ended well.

    Args:
        why: What became of it.
    """

    def __init__(self, why: str):
        super().__init__(f"the last checkpoint could not be written: {why}\n  do:    make room, and start the run again: it resumes")


class LastWord:
    """How the last start of a run ended: in RUN/exit_code, and in the file that MEGAVLM_EXIT_FILE names. Not there while it runs.

    Args:
        run: The run folder; None if the recipe names none.
        environment: Where MEGAVLM_EXIT_FILE and the rank are.
    """

    def __init__(self, run: str | Path | None, environment: Mapping[str, str] = os.environ):
        named = environment.get("MEGAVLM_EXIT_FILE")
        self.files = [Path(named)] if named else []
        if run is not None and (own := Path(run) / "exit_code") not in self.files:
            self.files.append(own)
        self._is_first = environment.get("RANK", environment.get("SLURM_PROCID", "0")) == "0"

    def forget(self) -> None:
        """Remove what an earlier start has left, before anything can go wrong in this one."""
        if not self._is_first:
            return
        for file in self.files:
            with harmless(f"the exit status {file}"):
                if file.is_dir() and not file.is_symlink():
                    shutil.rmtree(file)
                else:
                    file.unlink(missing_ok=True)

    def leave(self, code: int) -> None:
        """Write the exit status, unless another rank was first. A run folder that was never made is not made for it."""
        for file in self.files:
            if file.parent.is_dir() and not file.exists():
                with harmless(f"the exit status {file}"):
                    write_atomically(file, f"{int(code)}\n")
