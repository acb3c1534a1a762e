"""How long a piece of work takes on a device. Tested by `tests/tools/test_gpu_check.py`."""

import statistics
import time
from collections.abc import Callable

import torch


def seconds_of(device: torch.device, work: Callable[[], object], repeats: int) -> float:
    """Median seconds of a piece of work, after three runs that warm up; by the device's own clock on CUDA."""
    for _ in range(3):
        work()
    if device.type != "cuda":
        return statistics.median(_host_seconds(work) for _ in range(repeats))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in events:
        begin.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events) / 1000


def _host_seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize()
