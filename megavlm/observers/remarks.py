"""What went wrong, as text in TensorBoard at its step: skipped steps, and bad samples with source, shard and key.

It is read from ``RUN/log.txt``, where loaders' processes write as well.

Tested by `tests/observers/test_window.py`.
"""

import re

from megavlm.monitor.board import verbatim
from megavlm.system.harmless import harmless
from megavlm.training.observers import Observer, Training

RECORD = re.compile(r"(?m)^(?=\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ )")
BAD = re.compile(r"^\S+ \S+ (WARNING|ERROR|CRITICAL) ")
MOST_BYTES = 1 << 16
"""More than this between two steps is cut: a disk that fails a thousand times says the same each time."""


class Remarks(Observer):
    """Warnings and errors of the log since the last step."""

    name = "remarks"

    def attach(self, training: Training) -> None:
        self._board = training.board
        self._path = training.folder.log_file if training.world.is_main else None
        self._end = self._path.stat().st_size if self._path and self._path.is_file() else 0

    def after_step(self, num_steps: int) -> None:
        if self._path is None:
            return
        with harmless(f"remarks from {self._path}"):
            if not self._path.is_file() or self._path.stat().st_size <= self._end:
                return
            with self._path.open("rb") as file:
                file.seek(self._end)
                new = file.read(MOST_BYTES)
                self._end = file.seek(0, 2)
            bad = [record for record in RECORD.split(new.decode("utf-8", "replace")) if BAD.match(record)]
            if bad:
                self._board.text("log/warnings_and_errors", "\n\n".join(verbatim(record) for record in bad), num_steps)
