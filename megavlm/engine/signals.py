"""Signals and the clock, noted as wishes; `megavlm.engine.agreement` turns them into one decision of all ranks.

SIGUSR1, or the job's time limit draws near   save and end with `Exit.INTERRUPTED`: to be continued
SIGTERM                                       save and end with `Exit.STOPPED`
SIGINT, which is Ctrl-C                       the same; a second one ends the process at once, with `Exit.ABANDONED`

torchrun hands the first Ctrl-C on as SIGINT, and makes SIGTERM of the second.
"""

import logging
import os
import signal
import socket
from collections.abc import Callable, Mapping
from enum import IntEnum
from threading import Thread
from typing import Any

log = logging.getLogger(__name__)


class Wish(IntEnum):
    """Weakest first; the strongest is granted."""

    NOTHING = 0
    SAVE = 1
    STOP = 2
    TERMINATE = 3
    QUIT = 4
    INTERRUPT = 5


REASONS = {
    Wish.STOP: "the file RUN/stop was found",
    Wish.TERMINATE: "SIGTERM was received",
    Wish.QUIT: "Ctrl-C was pressed",
    Wish.INTERRUPT: "SIGUSR1 was received, or the job's time limit is near",
}

WISHES = {signal.SIGUSR1: Wish.INTERRUPT, signal.SIGTERM: Wish.TERMINATE, signal.SIGINT: Wish.QUIT}

_noted = Wish.NOTHING


def listen(end_at_once: Callable[[], Any], environment: Mapping[str, str] = os.environ) -> None:
    """Note signals from now on instead of dying of them. As early as can be: starting takes a while.

    A thread notes them, so that a second Ctrl-C is heard while the main thread waits in C for other ranks, which never comes to Python.

    Args:
        end_at_once: Called at a second Ctrl-C.
        environment: Says whether torchrun has started this process.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    for number in WISHES:
        # the interpreter has to have a handler, which comes later than the thread
        signal.signal(number, lambda _number, _frame: None)
    signal.set_wakeup_fd(writer.detach(), warn_on_full_buffer=False)
    under_torchrun = "TORCHELASTIC_RUN_ID" in environment

    def hear() -> None:
        while numbers := reader.recv(64):
            for number in numbers:
                if number in WISHES:
                    _note(signal.Signals(number), under_torchrun, end_at_once)

    Thread(target=hear, name="signals", daemon=True).start()


def noted() -> Wish:
    """The strongest wish that came by signal."""
    return _noted


def _note(number: signal.Signals, under_torchrun: bool, end_at_once: Callable[[], Any]) -> None:
    global _noted
    again = number == signal.SIGINT or (under_torchrun and number == signal.SIGTERM)
    if again and _noted == Wish.QUIT:
        log.warning("Ctrl-C again: ended at once, nothing is saved; the newest checkpoint is intact")
        end_at_once()
        return
    if number == signal.SIGINT:
        log.info("Ctrl-C: the run saves and ends before its next micro-batch; press it again to end at once, without saving")
    _noted = max(_noted, WISHES[number])


def end_time_of_job(environment: Mapping[str, str] = os.environ) -> float | None:
    """When the job will be killed, in seconds since the epoch: MEGAVLM_END_TIME, which the sbatch script sets, or SLURM's own."""
    value = environment.get("MEGAVLM_END_TIME") or environment.get("SLURM_JOB_END_TIME")
    return float(value) if value else None
