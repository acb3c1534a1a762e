"""How a run ends. The code is the process's exit status; rank 0 also leaves it in RUN/exit_code, because a launcher
may report its own."""

from enum import IntEnum


class Exit(IntEnum):
    """Exit status of `megavlm train`. 1 is any other error, with a traceback."""

    DONE = 0
    """All steps are done."""
    MISTAKE = 2
    """The recipe, the data or the run folder is wrong: the same start would fail again."""
    DIVERGED = 70
    """Too many steps in a row were skipped."""
    SUPERSEDED = 73
    """A newer start of the run owns its folder."""
    HUNG = 74
    """The watchdog ended a step that exceeded its budget. Continue the run."""
    INTERRUPTED = 75
    """SIGUSR1 or the time limit; there is a checkpoint. Continue the run."""
    STOPPED = 76
    """SIGTERM or RUN/stop; there is a checkpoint. Do not continue by yourself."""


class RunEnded(Exception):
    """The run ends before its last step, on purpose.

    Args:
        code: The exit status.
        reason: For the log.
    """

    def __init__(self, code: Exit, reason: str):
        self.code, self.reason = code, reason
        super().__init__(reason)
