"""The processes of a study's arms, each in a process group of its own: the terminal's Ctrl-C reaches them only through us, once.

So an arm that is training saves and ends, and is not killed.
"""

import logging
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NoReturn

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ENDED = 130


class Children:
    """Those that run at the moment; threads start them and wait for them."""

    def __init__(self):
        self._running: set[subprocess.Popen] = set()
        self._is_ending = False

    def run(self, command: list[str], **options) -> int:
        """Run a command to its end; its status, `ENDED` if no further one is to begin.

        Args:
            command: The program and its arguments.
            options: For `subprocess.Popen`.
        """
        if self._is_ending:
            return ENDED
        with subprocess.Popen(command, process_group=0, **options) as process:
            self._running.add(process)
            if self._is_ending:  # it came in between
                process.send_signal(signal.SIGINT)
            status = process.wait()
            self._running.discard(process)
            return status

    @contextmanager
    def ended_by_signals(self, pool: ThreadPoolExecutor) -> Iterator[None]:
        """Ctrl-C, SIGTERM and SIGHUP begin nothing further, and pass Ctrl-C on; so does a second one, at which training ends at once.

        Args:
            pool: Its threads run the commands.

        Raises:
            KeyboardInterrupt: When all have ended.
        """

        def interrupt(_number, _frame) -> NoReturn:
            raise KeyboardInterrupt

        before = {number: signal.signal(number, interrupt) for number in SIGNALS}
        try:
            yield
        except KeyboardInterrupt:
            for number in SIGNALS:
                signal.signal(number, lambda _number, _frame: self._pass_on())
            log.warning("what is running saves and ends; Ctrl-C again ends it at once")
            self._is_ending = True
            self._pass_on()
            pool.shutdown(cancel_futures=True)
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _pass_on(self) -> None:
        for process in [*self._running]:
            process.send_signal(signal.SIGINT)
