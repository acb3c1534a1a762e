"""How far long work has come: a bar with the time left on a terminal; elsewhere a line now and then; nothing where it is quiet.

    for shard in progress(shards, "index"):
        ...

Bars go to standard error; results on standard output can be piped away.
"""

import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar, cast

from tqdm import tqdm

log = logging.getLogger(__name__)

Item = TypeVar("Item")

LINE_EVERY_S = 30.0
"""Seconds between lines where there is no terminal."""
SHORTEST_S = 1.0
"""A bar appears after so many seconds, and shorter work has none."""

# no thread and no semaphore of its own: loaders fork, and a run may end without the interpreter's clean-up
tqdm.monitor_interval = 0
tqdm.set_lock(threading.RLock())

_quiet = False


def be_quiet() -> None:
    """No bars and no lines from now on in this process."""
    global _quiet
    _quiet = True


class Progress:
    """One long piece of work; a context that ends its bar.

    Args:
        what: What is done, a few words.
        total: How many units it has; None if that is not known.
        done: Units that are done already.
        lines: Whether lines stand in for the bar where there is no terminal; no where the work writes lines of its own.
    """

    def __init__(self, what: str, total: int | None, done: int = 0, lines: bool = True):
        self.what = what
        self.total = total
        self.done = self.first = done
        # of several processes that do the same, the first one tells
        silent = _quiet or os.environ.get("RANK", "0") != "0"
        self.lines = lines and not silent and not sys.stderr.isatty()
        self._begin_s = self._told_s = time.monotonic()
        hidden = silent or not sys.stderr.isatty()
        self._bar = tqdm(
            total=total, initial=done, desc=what, file=sys.stderr, disable=hidden, leave=False, dynamic_ncols=True, delay=SHORTEST_S
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_error) -> None:
        self.close()

    def advance(self, num: int = 1) -> None:
        """So many units more are done."""
        self.done += num
        self._bar.update(num)
        now_s = time.monotonic()
        if self.lines and now_s - self._told_s >= LINE_EVERY_S:
            self._told_s = now_s
            log.info("%s: %s", self.what, self._words(now_s - self._begin_s))

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()

    def _words(self, seconds: float) -> str:
        if self.total is None:
            return f"{self.done} done"
        left_s = (self.total - self.done) * seconds / max(1, self.done - self.first)
        return f"{self.done} of {self.total}, {tqdm.format_interval(left_s)} left"


def progress(items: Iterable[Item], what: str, total: int | None = None) -> Iterator[Item]:
    """The items, with a `Progress` that counts them.

    Args:
        items: What is worked on.
        what: What is done with them.
        total: How many there are, if they do not say.
    """
    if total is None and hasattr(items, "__len__"):
        total = len(cast(Sized, items))
    with Progress(what, total) as bar:
        for item in items:
            yield item
            bar.advance()


def columns() -> int:
    """Width of tables: that of the terminal, or 140 where there is none."""
    return shutil.get_terminal_size((140, 24)).columns


class Console(logging.Handler):
    """The log on standard error, above the bars."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            with tqdm.external_write_mode(sys.stderr):
                print(self.format(record), file=sys.stderr, flush=True)
        except OSError:  # whoever read it is gone
            self.handleError(record)

    def flush(self) -> None:
        """Take bars off the screen: the process may be about to end."""
        for bar in [*getattr(tqdm, "_instances", ())]:
            bar.clear()
