"""What a trace of torch's profiler says: which kernels, how many launches, how long nothing ran.

Tested by `tests/tools/test_gpu_check.py`.
"""

import gzip
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
ON_HOST = ("cpu_op",)
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
LARGEST_BYTES = 15 * 2**20
LEAST_IMPORTANT = (("python_function",), ("ac2g", "fwdbwd"), ("cuda_runtime", "cuda_driver"), ("cpu_op", "user_annotation"))
"""Categories that are left out, one after another, until a trace is small enough."""


def summarize(events: list[dict[str, Any]], is_cuda: bool, most: int = 30) -> dict[str, Any]:
    """The kernels that took most time (on a CPU: the operators), launches, and the share of time in which none ran."""
    wanted = ON_DEVICE if is_cuda else ON_HOST
    spans = [event for event in events if event.get("ph") == "X" and event.get("cat") in wanted]
    totals: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for event in spans:
        totals[event["name"][:120]][0] += 1
        totals[event["name"][:120]][1] += event["dur"] / 1000
    longest = sorted(totals.items(), key=lambda pair: -pair[1][1])[:most]
    busy_us, whole_us = union([(event["ts"], event["ts"] + event["dur"]) for event in spans])
    return {
        "kernels": [{"name": name, "count": count, "ms": round(ms, 3)} for name, (count, ms) in longest],
        "kinds": len(totals),
        "launches": sum(event.get("name") in LAUNCHES for event in events),
        "busy_ms": busy_us / 1000,
        "whole_ms": whole_us / 1000,
        "idle_share": 1 - busy_us / whole_us if whole_us else None,
    }


def union(spans: list[tuple[float, float]]) -> tuple[float, float]:
    """How long at least one of these spans lasted, and from the first beginning to the last end."""
    if not spans:
        return 0.0, 0.0
    busy, reached = 0.0, min(begin for begin, _ in spans)
    first = reached
    for begin, end in sorted(spans):
        busy += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return busy, reached - first


def write_small(trace: dict[str, Any], path: Path, largest: int = LARGEST_BYTES) -> list[str]:
    """Write a trace, compressed, in at most so many bytes.

    Returns:
        The categories that had to be left out.
    """
    left_out: list[str] = []
    for categories in ((), *LEAST_IMPORTANT):
        left_out += categories
        trace["traceEvents"] = [event for event in trace["traceEvents"] if event.get("cat") not in categories]
        data = gzip.compress(json.dumps(trace).encode(), 6)
        if len(data) <= largest:
            break
    else:  # kernels alone are too many: the first of them
        share = largest / len(data)
        trace["traceEvents"] = trace["traceEvents"][: int(0.9 * share * len(trace["traceEvents"]))]
        left_out.append("the end")
        data = gzip.compress(json.dumps(trace).encode(), 6)
    path.write_bytes(data)
    return left_out
