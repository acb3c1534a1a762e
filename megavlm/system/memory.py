"""What this machine can hold, so that what it cannot is refused before it is allocated; memory given back to it.

Tested by `tests/system/test_memory.py` and `tests/parts/test_fitness.py`.
"""

import ctypes
import os
import platform
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megavlm.errors import ConfigError

_LIMITS_OF_GROUP = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def machine_bytes() -> int:
    """Memory that this process may have: the machine's, or less where a container or a batch job is given less."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in _LIMITS_OF_GROUP:
        path = Path(name)
        if path.is_file() and (text := path.read_text().strip()).isdigit():
            limits.append(int(text))
    return min(limits)


def resident_bytes() -> int:
    """Memory that this process holds now, shared pages included."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def check_memory(needed_bytes: float, available_bytes: int, what: str, remedy: str) -> None:
    """Refuse what does not fit.

    Raises:
        ConfigError: With both sizes.
    """
    if needed_bytes > available_bytes:
        raise ConfigError(
            f"{what} needs {needed_bytes / 2**30:,.1f} GiB of memory, of {available_bytes / 2**30:,.1f} GiB that there are\n"
            f"  do:    {remedy}"
        )


def allow_open_files(number: int, what: str, remedy: str) -> None:
    """Let this process have so many files and connections open.

    Raises:
        ConfigError: If the machine does not allow it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if number <= soft:
        return
    if number > hard != resource.RLIM_INFINITY:
        raise ConfigError(
            f"{what} needs {number} files and connections open at once in one process, this machine allows {hard}\n"
            f"  do:    {remedy}, or raise the limit (`ulimit -n`)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, hard))


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""glibc's numbers of these settings, from malloc.h."""


@contextmanager
def freed_memory_given_back() -> Iterator[None]:
    """Within it large blocks go back to the system when they are freed, where the C library is glibc.

    It would keep blocks of up to 32 MiB between others that are still in use: as much as a model, where one is made tensor by tensor.
    Afterwards it keeps them again, as it does by itself once it has seen one of that size: steps use them again and again.
    """
    if platform.libc_ver()[0] != "glibc" or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_THRESHOLD, 1 << 20)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_TRIM_THRESHOLD, 64 << 20)
        libc.malloc_trim(0)
