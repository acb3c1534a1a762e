"""ZeRO-3's sizes for a model: what stays whole on every rank, how far is fetched ahead, how large buckets are.

Where a file of `ds_configs/` says "auto". On CUDA everything stays whole if that takes little of the device's memory: one gather per step
instead of two per micro-batch. Sources: DeepSpeed's configuration of stage 3, and `docs/performance.md`.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

log = logging.getLogger(__name__)

ON_CPU = {
    "reduce_bucket_size": 50_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
}
"""The names, and the sizes without a device whose memory is known."""
WHOLE_SHARE = 0.15
"""Of the device's memory, that whole parameters may take: the rest is for activations, and for this rank's part of the states."""
LARGEST_BUCKET = 500_000_000
FURTHEST_AHEAD = 200_000_000


def with_sizes(document: dict[str, Any], make: Callable[[], nn.Module], device: torch.device) -> dict[str, Any]:
    """DeepSpeed's configuration with a number for every "auto".

    Args:
        document: With what the recipe adds.
        make: Makes the model; called without memory for its weights.
        device: Where the model is to be.
    """
    if "auto" not in document["zero_optimization"].values():
        return document
    with torch.device("meta"):
        numels = [parameter.numel() for parameter in make().parameters()]
    memory_bytes = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    element_bytes = 2 if document["bf16"]["enabled"] else 4
    return document | {
        "zero_optimization": fill_in(document["zero_optimization"], numels, memory_bytes=memory_bytes, element_bytes=element_bytes)
    }


def fill_in(zero: dict[str, Any], numels: list[int], *, memory_bytes: int | None, element_bytes: int) -> dict[str, Any]:
    """``zero_optimization`` with a number for every "auto".

    Args:
        zero: Of the file.
        numels: Elements of each parameter.
        memory_bytes: Of the device; None on CPU.
        element_bytes: Of a parameter as the forward pass reads it.
    """
    sizes = ON_CPU if memory_bytes is None else _for_device(numels, memory_bytes, element_bytes)
    open_sizes = {name: size for name, size in sizes.items() if zero.get(name) == "auto"}
    if open_sizes:
        log.info("ZeRO-3 for %.1fM parameters: %s", sum(numels) / 1e6, ", ".join(f"{name} {size:.3g}" for name, size in open_sizes.items()))
    return zero | open_sizes


def _for_device(numels: list[int], memory_bytes: int, element_bytes: int) -> dict[str, int]:
    total, largest = sum(numels), max(numels)
    stays_whole = total * element_bytes <= WHOLE_SHARE * memory_bytes
    # what is in use counts as live: where all stays whole, nothing is to be freed
    live = max(total, ON_CPU["stage3_max_live_parameters"]) if stays_whole else ON_CPU["stage3_max_live_parameters"]
    return {
        # a bucket must hold the largest parameter, or that goes alone
        "reduce_bucket_size": max(largest, min(total, LARGEST_BUCKET)),
        "stage3_prefetch_bucket_size": max(largest, min(total, FURTHEST_AHEAD)),
        "stage3_param_persistence_threshold": largest if stays_whole else ON_CPU["stage3_param_persistence_threshold"],
        "stage3_max_live_parameters": live,
        "stage3_max_reuse_distance": live,
    }
