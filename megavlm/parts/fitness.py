"""What only a start can know: whether the model, the lanes and the data of a recipe fit this machine and each other. Said before the first
step, and before anything of that size is allocated."""

import torch

from megavlm.config import RunConfig
from megavlm.errors import ConfigError
from megavlm.model.attention import fits_fused
from megavlm.model.sizes import parameter_sizes
from megavlm.parts.parts import Parts
from megavlm.routing.plan import WIDEST_HEAD
from megavlm.system.memory import allow_open_files, check_memory, machine_bytes
from megavlm.system.world import OTHER_FILES, SOCKETS_PER_RANK

MOST_LANES = 512
"""Most lanes of one process; it runs as many packs in one step."""
DRAWN_BYTES, TRAINING_BYTES = 8, 20
"""Bytes of a parameter: while it is drawn and divided, one after the other; then its weight, master copy, gradient and two moments, which
the processes share."""
TOKEN_BYTES, SAMPLE_BYTES = 32, 2048
"""Rough bytes of the look-ahead, per token and per sample."""


def check_lanes(config: RunConfig, world_size: int) -> None:
    """Whether one process can run its lanes.

    Raises:
        ConfigError: If they are too many for a step, or for the files that a process may open.
    """
    num_lanes = config.data.num_lanes // world_size
    if num_lanes > MOST_LANES:
        raise ConfigError(
            f"data.num_lanes: each of {world_size} processes would run {num_lanes} packs per step, {MOST_LANES} at most are sensible\n"
            "  do:    lower data.num_lanes, or start more processes"
        )
    # a shard of every source, a connection to every other process in each group, and some for what else is open
    number = num_lanes * len(config.data.sources) + SOCKETS_PER_RANK * world_size + OTHER_FILES
    allow_open_files(number, "data.num_lanes", "lower data.num_lanes")


def check_model(parts: Parts, world_size: int) -> None:
    """Whether the model can be made, and trained by so many processes.

    Raises:
        ConfigError: With the memory that it needs.
    """
    sizes = parameter_sizes(parts.model_configuration)
    what = f"model.architecture: {sum(sizes):,} parameters, a process of {world_size}"
    remedy = "give a smaller model.architecture, or start more processes"
    shared_bytes, on_host_bytes = sum(sizes) * TRAINING_BYTES / world_size, max(sizes) * DRAWN_BYTES
    if parts.device.type == "cuda":
        check_memory(shared_bytes, torch.cuda.get_device_properties(parts.device).total_memory, what, remedy)
    else:
        on_host_bytes += shared_bytes
    check_memory(on_host_bytes, machine_bytes(), what, remedy)


def check_heads(parts: Parts) -> None:
    """Whether the device's attention takes the model's heads. (What `merge` adds to them is checked with the policies.)

    Raises:
        ConfigError: If the fused kernel, which half precision on CUDA needs, does not.
    """
    config, width = parts.config, parts.shape.head_width
    if parts.device.type == "cuda" and config.model.is_bfloat16("cuda") and not fits_fused(width):
        raise ConfigError(
            f"model.architecture: heads are {width} wide; the fused attention on CUDA takes multiples of 8 up to {WIDEST_HEAD}\n"
            "  do:    change head_dim or the number of heads; or set model.dtype to float32, which is slow"
        )


def check_look_ahead(parts: Parts, world_size: int) -> None:
    """Whether the samples that lanes hold to choose from fit into the memory.

    Raises:
        ConfigError: With the memory that they need.
    """
    config = parts.config
    tokens = sum(source.mean_tokens for source in parts.mixture.values()) / len(parts.mixture)
    num_samples = config.data.look_ahead_samples * config.data.num_lanes // world_size
    check_memory(
        num_samples * (tokens * TOKEN_BYTES + SAMPLE_BYTES),
        machine_bytes(),
        f"data.look_ahead_samples: holding {num_samples:,} samples in each process",
        "lower data.look_ahead_samples or data.num_lanes, or start more processes",
    )
