"""How fast a device is: as `tools/calibrate.py` measured it, or as its data sheet and stated efficiencies say.

Tested by `tests/planner/test_plan.py`.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megavlm.errors import ConfigError
from megavlm.monitor.peaks import PEAK_TFLOPS

SHEETS = {
    # memory in GB, its bandwidth in TB/s, NVLink in one direction in GB/s (0: none)
    "A100": (80, 2.0, 300),
    "H100": (80, 3.35, 450),
    "H200": (141, 4.8, 450),
    "B200": (180, 8.0, 900),
    "L40S": (48, 0.864, 0),
}
"""NVIDIA's data sheets."""
PRODUCTS, ATTENTION, MOVED, COLLECTIVES = 0.65, 0.45, 0.75, 0.7
"""Shares of a data sheet's figures that are taken for reached."""
NETWORK_BYTES_PER_S = 50e9
"""Of a GPU between nodes: one 400 Gb/s adapter each."""
GPUS_PER_NODE = 8
HOST_S_PER_KERNEL = 6e-6
"""Until a kernel is launched from Python, autograd's share included: where kernels are shorter, the host decides."""
HOST_S_PER_LAYER, HOST_S_PER_LAYER_AND_RANK = 4e-3, 30e-6
"""ZeRO-3's hooks around a layer, both passes, and its loops over ranks: measured on a CPU with faked ranks."""
COLLECTIVE_S = 40e-6
"""Until a collective over many ranks begins to move."""


@dataclass(frozen=True)
class Curve:
    """A rate by places, such as sizes: measured at some, interpolated between in their logarithms, constant beyond."""

    points: Sequence[tuple[tuple[float, ...], float]]
    """(place, rate)."""

    def __call__(self, *place: float) -> float:
        if len(self.points) == 1:
            return self.points[0][1]
        logs = [
            (sum((math.log(max(a, 1)) - math.log(max(b, 1))) ** 2 for a, b in zip(place, known)), math.log(rate))
            for known, rate in self.points
        ]
        nearest = sorted(logs)[: 2 ** len(place)]
        weights = [1 / (distance + 1e-6) for distance, _ in nearest]
        return math.exp(sum(weight * log for weight, (_, log) in zip(weights, nearest)) / sum(weights))


@dataclass(frozen=True)
class Rates:
    """A device, and what connects it to others."""

    name: str
    origin: str
    """Where the rates come from, in words for the reader of a plan."""
    is_measured: bool
    memory_bytes: float
    peak_flops_per_s: float | None
    """Of matrix products in the precision of training, for utilisation; None if nobody says."""
    products: Curve
    """FLOP/s by rows, inner width and columns."""
    attention: Curve
    """FLOP/s by tokens of a sequence and columns of all heads."""
    moved: Curve
    """Bytes per second by the bytes that a kernel moves."""
    logits: Curve
    """The same for the cross-entropy's kernels, by logits."""
    optimizer_s_per_parameter: float
    host: "Host"
    collectives: "Collectives"


@dataclass(frozen=True)
class Host:
    """What Python, DeepSpeed's hooks and the trainer take beside the kernels."""

    step_s: float = 0.0
    pack_s: float = 0.0
    layer_s: float = 0.0
    """Of a layer, forward and backward pass of a pack."""
    layer_and_rank_s: float = 0.0
    byte_s: float = 0.0
    """Per byte of parameters and pack: gathered, let go, reduced."""
    kernel_s: float = 0.0
    runs_ahead: bool = False
    """The device works while the host goes on; on a CPU they are one."""
    base_bytes: float = 0.0
    """Of a process before it has a model."""


@dataclass(frozen=True)
class Collectives:
    """Between the processes."""

    bytes_per_s: float
    """Of a process, within a node."""
    between_nodes_bytes_per_s: float
    begin_s: float
    ranks_per_node: int = GPUS_PER_NODE

    def seconds(self, num_bytes: float, world_size: int) -> float:
        """Of a gather of so many bytes to every rank, or of their reduction to parts."""
        if world_size == 1:
            return 0.0
        rate = self.bytes_per_s if world_size <= self.ranks_per_node else min(self.bytes_per_s, self.between_nodes_bytes_per_s)
        return self.begin_s * math.log2(world_size) + num_bytes * (world_size - 1) / world_size / rate


def from_sheet(gpu: str) -> Rates:
    """The rates of a GPU that nobody measured.

    Args:
        gpu: Its name, of `SHEETS`, in any case.

    Raises:
        ConfigError: If there is no sheet of it.
    """
    name = gpu.upper()
    if name not in SHEETS:
        raise ConfigError(
            f"--gpu={gpu} is not among the data sheets here\n"
            f"  do:    give one of {', '.join(sheet.lower() for sheet in SHEETS)}, or --calibration with a file of tools/calibrate.py"
        )
    gigabytes, terabytes_per_s, nvlink = SHEETS[name]
    peak = PEAK_TFLOPS[name] * 1e12
    return Rates(
        name=name,
        origin=(
            f"extrapolated: the data sheet of {name} times {PRODUCTS:.0%} for matrix products, {ATTENTION:.0%} for attention, {MOVED:.0%}"
            f" for memory and {COLLECTIVES:.0%} for collectives, {NETWORK_BYTES_PER_S / 1e9:.0f} GB/s per GPU between nodes"
        ),
        is_measured=False,
        memory_bytes=gigabytes * 1e9,
        peak_flops_per_s=peak,
        products=Curve([((1.0, 1.0, 1.0), PRODUCTS * peak)]),
        attention=Curve([((1.0, 1.0), ATTENTION * peak)]),
        moved=Curve([((1.0,), MOVED * terabytes_per_s * 1e12)]),
        logits=Curve([((1.0,), MOVED * terabytes_per_s * 1e12)]),
        # reads weight, gradient and two moments, writes three of them and the weight for training; the norm reads once more
        optimizer_s_per_parameter=44 / (MOVED * terabytes_per_s * 1e12),
        host=Host(
            layer_s=HOST_S_PER_LAYER,
            layer_and_rank_s=HOST_S_PER_LAYER_AND_RANK,
            kernel_s=HOST_S_PER_KERNEL,
            runs_ahead=True,
            base_bytes=3e9,
        ),
        collectives=Collectives(
            bytes_per_s=COLLECTIVES * (nvlink or 25) * 1e9,
            # what a node's GPUs gather comes once, through all of its adapters
            between_nodes_bytes_per_s=COLLECTIVES * NETWORK_BYTES_PER_S * GPUS_PER_NODE,
            begin_s=COLLECTIVE_S,
        ),
    )


def from_file(path: Path) -> Rates:
    """The rates that `tools/calibrate.py` wrote.

    Raises:
        ConfigError: If it is no such file.
    """
    try:
        return from_document(json.loads(path.read_text()), str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--calibration={path} is no calibration: {type(error).__name__}: {error}\n  do:    write one with tools/calibrate.py"
        ) from error


def from_document(document: dict[str, Any], name: str) -> Rates:
    """The rates of a calibration's document; ``name`` is what a plan calls it."""

    def curve(key: str) -> Curve:
        return Curve([(tuple(place), float(rate)) for place, rate in document[key]])

    return Rates(
        name=document["device"],
        origin=f"measured on {document['device']} with {document['world_size']} processes ({name})",
        is_measured=True,
        memory_bytes=float(document["memory_bytes"]),
        peak_flops_per_s=document["peak_flops_per_s"],
        products=curve("products"),
        attention=curve("attention"),
        moved=curve("moved"),
        logits=curve("logits"),
        optimizer_s_per_parameter=float(document["optimizer_s_per_parameter"]),
        host=Host(**document["host"]),
        collectives=Collectives(**document["collectives"]),
    )
