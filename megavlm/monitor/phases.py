"""Where the time of a step goes: seconds by stage, with waiting for other ranks apart. Tested by `tests/observers/test_profile.py`."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import torch
from pydantic import Field
from torch import distributed
from torch.profiler import record_function

from megavlm.settings import Count, Positive, Settings, Switch


class ProfileConfig(Settings):
    """Traces of single steps, and where their time went. They change nothing that is trained."""

    enabled: Switch = False
    """Whether steps are traced, into `RUN/profile/`. The flag `--profile` of `megavlm train` sets it."""
    steps: Annotated[list[Positive], Field(min_length=1, max_length=100)] | None = None
    """Numbers of the steps, counted from 1. By default the third and the fourth step of this start: the first ones warm up."""
    ranks: Annotated[list[Count], Field(min_length=1, max_length=100)] = [0]
    """Ranks that write a trace."""


ROWS = {
    "forward": "forward",
    "backward": "backward",
    "optimizer": "optimizer",
    "data": "data",
    "collectives": "waiting in collectives",
}
"""Stage → what the table calls it. All other stages are the engine's own."""
OWN = "own overhead"


class Phases:
    """A clock that is told which stage begins; its stages are ranges of the trace, too.

    Args:
        device: It is waited for when a stage begins, so that no stage pays for the one before.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds = dict.fromkeys([*ROWS.values(), OWN], 0.0)
        self._row = OWN
        self._range = record_function(OWN)
        self._begin_s = time.perf_counter()
        self._range.__enter__()

    def enter(self, stage: str) -> None:
        """A stage begins, and the one before it ends."""
        self.leave()
        self._row = ROWS.get(stage, OWN)
        self._range = record_function(stage)
        self._range.__enter__()

    def leave(self) -> None:
        """The last stage ends."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self._range.__exit__(None, None, None)
        now_s = time.perf_counter()
        self.seconds[self._row] += now_s - self._begin_s
        self._begin_s = now_s

    @contextmanager
    def waits_counted(self) -> Iterator[None]:
        """Inside, what this thread waits for other ranks is taken from the stages and counted apart."""
        wait, thread = distributed.Work.wait, threading.get_ident()

        def timed(*args, **named):
            if threading.get_ident() != thread:
                return wait(*args, **named)
            begin_s = time.perf_counter()
            with record_function(ROWS["collectives"]):
                try:
                    return wait(*args, **named)
                finally:
                    seconds = time.perf_counter() - begin_s
                    self.seconds[self._row] -= seconds
                    self.seconds[ROWS["collectives"]] += seconds

        distributed.Work.wait = timed
        try:
            yield
        finally:
            distributed.Work.wait = wait

    def table(self, title: str) -> str:
        """The seconds and shares as lines of text."""
        total_s = sum(self.seconds.values())
        rows = [f"  {row:<24} {seconds:9.4f} s {seconds / total_s:6.1%}" for row, seconds in self.seconds.items()]
        return "\n".join([f"{title}: {total_s:.4f} s", *rows])
