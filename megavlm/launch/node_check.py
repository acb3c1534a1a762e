"""Looks at one node before the first step: can it see the run, is its clock right, do its GPUs compute, and are they free?

    python -m megavlm.launch.node_check FOLDER --gpus 8 --now SECONDS

The SLURM script starts it once on every node. A node that is well leaves a file FOLDER/NODE; one that is not says why, or cannot.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

FREE_TEMPORARY_MIB = 64
CLOCKS_APART_S = 120
"""The end of the job is a time of the day."""
FREE_GPU_MEMORY = 0.9
"""A process of an earlier job that was not cleared away holds more than a tenth."""


def problems(num_gpus: int, now_s: float) -> Iterator[str]:
    """What is wrong with this node, one sentence each.

    Args:
        num_gpus: GPUs that a node of the job has.
        now_s: Seconds since the epoch on the first node, a moment ago.
    """
    apart_s = abs(time.time() - now_s)
    if apart_s > CLOCKS_APART_S:
        yield f"its clock differs by {apart_s:.0f} s"
    temporary = tempfile.gettempdir()
    if (free_mib := shutil.disk_usage(temporary).free / 2**20) < FREE_TEMPORARY_MIB:
        yield f"{temporary} has only {free_mib:.0f} MiB left"
    if num_gpus:
        yield from gpu_problems(num_gpus)


def gpu_problems(num_gpus: int) -> Iterator[str]:
    """What is wrong with the GPUs: missing, occupied, computing wrongly, or with memory errors that nothing corrects."""
    import torch

    if (found := torch.cuda.device_count()) < num_gpus:
        yield f"{found} of {num_gpus} GPUs can be used"
    for number in range(min(found, num_gpus)):
        try:
            free, total = torch.cuda.mem_get_info(number)
            if free < FREE_GPU_MEMORY * total:
                yield f"GPU {number}: another process holds {(total - free) / 2**30:.1f} GiB"
            ones = torch.ones(2048, 2048, device=f"cuda:{number}", dtype=torch.bfloat16)
            if not bool((ones @ ones == 2048).all()):
                yield f"GPU {number} computes wrongly"
        except RuntimeError as error:
            yield f"GPU {number}: {str(error).splitlines()[0]}"
    yield from _memory_errors()


def _memory_errors() -> Iterator[str]:
    query = ["nvidia-smi", "--query-gpu=index,ecc.errors.uncorrected.volatile.total", "--format=csv,noheader"]
    if not shutil.which(query[0]):
        return
    for line in subprocess.run(query, capture_output=True, text=True, timeout=60, check=False).stdout.splitlines():
        number, _, errors = line.partition(", ")
        if errors.strip().isdigit() and int(errors):
            yield f"GPU {number}: {errors.strip()} memory errors since the node started"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("--now", type=float, default=time.time())
    given = parser.parse_args()
    node = os.environ.get("SLURMD_NODENAME", os.uname().nodename)
    if found := list(problems(given.gpus, given.now)):
        print(f"{node} is not well: {'; '.join(found)}", file=sys.stderr)
        sys.exit(1)
    try:
        (given.folder / node).touch()
    except OSError as error:
        print(f"{node} is not well: it cannot write to {given.folder}: {error.strerror}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
