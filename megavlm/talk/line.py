"""Requests of many threads, one after another on one model. Tested by `tests/talk/test_endpoint.py`.

A request runs to its end in a thread of its own, and its steps wait in a queue: a slow reader holds up nobody. One whose reader has gone
ends with its next step.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from threading import Event
from typing import NamedTuple, TypeVar

Step = TypeVar("Step")


class _End(NamedTuple):
    error: BaseException | None


class Line:
    """Runs one request at a time, in the order in which they came."""

    def __init__(self):
        self._worker = ThreadPoolExecutor(1, "model")
        self._closed = Event()

    def run(self, request: Callable[[], Iterator[Step]]) -> Iterator[Step]:
        """The steps of a request. What it raises is raised here."""
        steps: SimpleQueue[Step | _End] = SimpleQueue()
        gone = Event()

        def work() -> None:
            error = None
            try:
                for step in request() if not gone.is_set() else ():
                    steps.put(step)
                    if gone.is_set() or self._closed.is_set():
                        break
            except BaseException as raised:  # goes on in the thread that asked
                error = raised
            steps.put(_End(error))

        self._worker.submit(work)
        try:
            while not isinstance(step := steps.get(), _End):
                yield step
        finally:
            gone.set()
        if step.error:
            raise step.error

    def close(self) -> None:
        """End after the step that runs now; requests that wait are not begun."""
        self._closed.set()
        self._worker.shutdown(wait=False, cancel_futures=True)
