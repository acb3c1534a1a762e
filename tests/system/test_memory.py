"""Memory that was freed is the system's again, although blocks beside it are still in use."""

import platform
import subprocess
import sys

import pytest

SCRIPT = """
from contextlib import nullcontext
from megavlm.system.memory import freed_memory_given_back, resident_bytes

def grown():
    before = resident_bytes()
    blocks = [bytearray(b"x") * (4 << 20) for _ in range(40)]
    for number in range(0, 40, 2):
        blocks[number] = None
    return (resident_bytes() - before) >> 20

grown()  # glibc has seen large blocks now, and would keep the next ones
with {context}():
    print(grown())
"""


def megabytes_left(context: str) -> int:
    """Of 160 MB of which every other block was freed."""
    shown = subprocess.run([sys.executable, "-c", SCRIPT.format(context=context)], capture_output=True, text=True, check=True)
    return int(shown.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_freed_memory_is_given_back(monkeypatch):
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    assert megabytes_left("freed_memory_given_back") < 100
    assert megabytes_left("nullcontext") > 120, "otherwise this test shows nothing"
