"""Signals and the clock, noted as wishes; `megavlm.engine.agreement` turns them into one decision of all ranks.

SIGUSR1, or the job's time limit draws near   save and end with `Exit.INTERRUPTED`: to be continued
SIGTERM                                       save and end with `Exit.STOPPED`
"""

import os
import signal
from enum import IntEnum


class Wish(IntEnum):
    """Weakest first; the strongest is granted."""

    NOTHING = 0
    SAVE = 1
    STOP = 2
    TERMINATE = 3
    INTERRUPT = 4


REASONS = {
    Wish.STOP: "the file RUN/stop was found",
    Wish.TERMINATE: "SIGTERM was received",
    Wish.INTERRUPT: "SIGUSR1 was received, or the job's time limit is near",
}

_noted = Wish.NOTHING


def listen() -> None:
    """Note SIGUSR1 and SIGTERM from now on instead of dying of them. As early as can be: starting takes a while."""
    for number, wish in ((signal.SIGUSR1, Wish.INTERRUPT), (signal.SIGTERM, Wish.TERMINATE)):
        signal.signal(number, lambda _number, _frame, wish=wish: _note(wish))


def noted() -> Wish:
    """The strongest wish that came by signal."""
    return _noted


def _note(wish: Wish) -> None:
    global _noted
    _noted = max(_noted, wish)


def end_time_of_job(environment=os.environ) -> float | None:
    """When the job will be killed, in seconds since the epoch: MEGAVLM_END_TIME, which the sbatch script sets, or
    SLURM's own."""
    value = environment.get("MEGAVLM_END_TIME") or environment.get("SLURM_JOB_END_TIME")
    return float(value) if value else None
