"""What this machine can do, which versions are here, and what is missing. Tested by `tests/cli/test_main.py`."""

import importlib.metadata
import os
import platform
import shutil

import torch
from rich.table import Table

PACKAGES = (
    "torch",
    "deepspeed",
    "transformers",
    "webdataset",
    "sentencepiece",
    "tensorboard",
    "fire",
    "pydantic",
    "scikit-learn",
)


def examine() -> tuple[Table, list[str]]:
    """A table of findings, and the list of what is missing with its remedy."""
    table, missing = Table("what", "found", show_header=False), []
    table.add_row("python", platform.python_version())
    for package in PACKAGES:
        try:
            table.add_row(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            table.add_row(package, "missing")
            missing.append(f"{package}: pip install {package}")
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    table.add_row("CPU cores", str(len(os.sched_getaffinity(0))))
    table.add_row("memory", f"{memory_gib:.0f} GiB")
    table.add_row("free disk here", f"{shutil.disk_usage('.').free / 2**30:.0f} GiB")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            table.add_row(f"GPU {i}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
        table.add_row("training", "bfloat16, NCCL, fused variable-length attention")
    else:
        table.add_row("GPU", f"none that torch can use (CUDA in this build of torch: {torch.version.cuda or 'no'})")
        table.add_row("training", "float32, gloo, attention per sequence")
    if shutil.which("sbatch"):
        table.add_row("SLURM", "sbatch is here")
    else:
        table.add_row("SLURM", "no sbatch on the PATH (only needed to submit jobs)")
    if not (shutil.which("g++") or shutil.which("c++")):
        missing.append("a C++ compiler: DeepSpeed's CPU Adam for offloading is compiled at its first use")
    return table, missing
