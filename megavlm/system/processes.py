"""Whether a process of this machine still lives, told apart from a later one that got its number.

Tested by `tests/runs/test_status.py`.
"""

import os
from pathlib import Path

_PROC = Path("/proc")


def identity_of(pid: int) -> str | None:
    """A text that no other process of this machine ever has; None of a process that is gone, or where the system cannot say."""
    try:
        # the name in the second field may hold anything, brackets too
        fields = (_PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
        state, started = fields[0], fields[19]
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
    except (OSError, IndexError):
        return None
    return None if state in "ZX" else f"{boot} {started}"


def is_alive(pid: int, identity: str | None) -> bool:
    """Whether a process of this machine lives.

    Args:
        pid: Its number.
        identity: What `identity_of` said while it lived; None if that is not known: whatever has its number is taken for it.
    """
    if pid <= 0:
        return False
    if _PROC.is_dir():
        found = identity_of(pid)
        return found is not None and identity in (None, found)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
