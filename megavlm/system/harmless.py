"""What is written beside checkpoints never ends a run: pictures, TensorBoard, tables, status, reports of faults.

Tested by `tests/system/test_files.py`.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)

_failing: dict[str, str] = {}


@contextmanager
def harmless(what: str) -> Iterator[None]:
    """Errors in here are logged with place and remedy, and the caller continues.

    It does not matter whether the disk is full or a library fails. A failure is reported once, until writing succeeds again. Use it only
    for what one process does by itself: a rank that leaves a collective early holds up all others.

    Args:
        what: What is being written, and where.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError):
            remedy = "make room, or mend the file system or its permissions; it is tried again"
        else:
            remedy = "report this with what was to be written"
        words = f"{type(error).__name__}: {error}"
        if _failing.get(what) != words:
            log.warning("%s could not be written, and is left out: %s\n  do:    %s", what, words, remedy)
        _failing[what] = words
    else:
        if _failing.pop(what, None):
            log.info("%s can be written again", what)
