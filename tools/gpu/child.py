"""One section in a process of its own: ``python -m tools.gpu.child JSON SECTION DEVICE SECONDS [PATTERN]``.

A process of its own, because an illegal access on a device leaves nothing behind that can be used. Tested by
`tests/tools/test_gpu_check.py`.
"""

import fnmatch
import gc
import importlib
import logging
import sys
import time
import traceback
from pathlib import Path

from tools.gpu.record import Record

DONE, OUT_OF_TIME, ANEW = 0, 10, 11
"""Exit statuses: every item is done; no time for another item; the device cannot be used any more in this process."""
LEAST_S = 5.0
"""With less time left no further item is begun."""
MOST_LEFT_OVER_BYTES = 4 * 2**30


def run_items(record: Record, section: str, items: dict, deadline: float, pattern: str = "*") -> int:
    """Try what is not done yet; every failure is noted with its traceback.

    Args:
        record: Where outcomes go.
        section: Name of the section.
        items: Name → what does it.
        deadline: `time.monotonic` at which to stop.
        pattern: Only items whose names match.

    Returns:
        An exit status.
    """
    for name, item in items.items():
        if record.is_done(section, name) or not fnmatch.fnmatch(name, pattern):
            continue
        if deadline - time.monotonic() < LEAST_S:
            return OUT_OF_TIME
        record.begin(section, name)
        print(f"{time.strftime('%T')} {section}: {name}", flush=True)
        begin = time.perf_counter()
        try:
            outcome = item()
            seconds = time.perf_counter() - begin
            record.end(section, name, seconds=seconds, result=outcome.result, failures=outcome.failures)
        except Exception as error:
            seconds, text = time.perf_counter() - begin, traceback.format_exc()
            print(text, flush=True)
            record.end(section, name, seconds=seconds, failures=[f"{type(error).__name__}: {error}"[:500]], traceback=text[-8000:])
            if "CUDA error" in text or "AcceleratorError" in text:
                return ANEW
        if _left_over_bytes() > MOST_LEFT_OVER_BYTES:  # of engines that something still holds
            return ANEW
    return DONE


def _left_over_bytes() -> int:
    """What is still taken on the device once all that can be given back is."""
    import torch

    gc.collect()
    if not torch.cuda.is_available():
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def main(file: str, section: str, kind: str, seconds: str, pattern: str = "*") -> int:
    deadline = time.monotonic() + float(seconds)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    import torch

    import megavlm.system.world  # noqa: F401 (tells DeepSpeed what it runs on)
    from tools.gpu.context import Context

    path = Path(file)
    record = Record(path)
    module = importlib.import_module(section if "." in section else f"tools.gpu.{section}")
    folder = path.parent / "work"
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda", 0) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    return run_items(record, section, module.items(Context(device, record, folder, path.parent)), deadline, pattern)


if __name__ == "__main__":
    status = main(*sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # not by way of the interpreter: threads of NCCL or of a loader may not end
    import os

    os._exit(status)
