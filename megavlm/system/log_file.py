"""``RUN/log.txt``: what is printed, in a file. A disk that is full does not end the run, nor fill the screen.

Tested by `tests/system/test_files.py`.
"""

import logging
import sys
from contextlib import suppress
from pathlib import Path


class LogFile(logging.FileHandler):
    """Writes the log to a file. Says so once, on standard error, when that fails, and goes on when it works again.

    Args:
        path: The file; lines are added.

    Raises:
        OSError: If it cannot be opened, or is no file.
    """

    def __init__(self, path: Path):
        if path.exists() and not path.is_file():  # to open a pipe would wait for ever
            raise OSError(0, "is no file", str(path))
        self._fails = False
        super().__init__(path)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._tell(error)
        else:
            self._fails = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        self._tell(error)

    def close(self) -> None:
        with suppress(OSError):
            super().close()

    def _tell(self, error: OSError) -> None:
        if self._fails:
            return
        self._fails = True
        with suppress(OSError):
            print(
                f"the log could not be written: {error.strerror}\n  where: {self.baseFilename}\n"
                "  do:    make room, or mend the file system; the run continues",
                file=sys.stderr,
            )
