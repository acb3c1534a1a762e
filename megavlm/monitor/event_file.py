"""A TensorBoard event file that survives a full disk.

TensorBoard's own writer hands records to a thread, which dies of the first failure and raises later, elsewhere. Here every record is
written at once. One that did not fit is taken back, so that what follows can be read.

Tested by `tests/distributed/test_full_disk.py`.
"""

import io
import itertools
import os
import time
from contextlib import suppress
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue] (protobuf makes it when imported)
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue] (protobuf makes it when imported)
from tensorboard.summary.writer.record_writer import RecordWriter

_numbers = itertools.count()


class EventFile:
    """A new file in a folder of event files.

    Args:
        folder: Where ``tensorboard --logdir`` looks.
        first_step: What earlier files show from this step on is taken back; None takes nothing back.

    Raises:
        OSError: If it cannot be written; it is not there then.
    """

    def __init__(self, folder: Path, first_step: int | None):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"events.out.tfevents.{int(time.time()):010d}.{os.uname().nodename}.{os.getpid()}.{next(_numbers)}"
        self._file = path.open("xb", buffering=0)
        self._end = 0
        try:
            self._add(Event(file_version="brain.Event:2"))
            if first_step is not None:
                self._add(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))
        except OSError:
            self.close()
            path.unlink(missing_ok=True)
            raise

    def add(self, summary: Summary, step: int) -> None:
        """Write a number or pictures.

        Raises:
            OSError: If that fails; it may be tried again.
        """
        self._add(Event(step=step, summary=summary))

    def close(self) -> None:
        self._file.close()

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        left = record.getbuffer()
        try:
            self._file.seek(self._end)
            while left:
                left = left[self._file.write(left) :]
        except OSError:
            with suppress(OSError):
                self._file.truncate(self._end)
            raise
        self._end = self._file.tell()
