"""The most that devices can do, for model FLOPs utilisation. Tested by `tests/monitor/test_peaks.py`."""

import re
from collections.abc import Mapping

import torch

PEAK_TFLOPS = {
    # NVIDIA's data sheets: tensor cores, bfloat16, dense. Where a sheet gives the figure with sparsity only, half of it.
    "A10": 125.0,
    "A30": 165.0,
    "A40": 149.7,
    "A100": 312.0,
    "A800": 312.0,
    "L4": 121.0,
    "L40": 181.0,
    "L40S": 362.0,
    "H100": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H800": 989.0,
    "H20": 148.0,
    "H200": 989.0,
    "H200 NVL": 835.0,
    "GH200": 989.0,
    "B200": 2250.0,
    "GB200": 2500.0,
    # AMD's data sheets, dense
    "MI250X": 383.0,
    "MI300X": 1307.0,
}
"""Words of a device's name → TFLOP/s in bfloat16."""


def peak_tflops_of(name: str) -> float | None:
    """The peak of a device in bfloat16; None if it is not known.

    Args:
        name: As the driver says it, such as "NVIDIA H100 80GB HBM3".
    """
    words = set(re.split(r"[^A-Za-z0-9]+", name))
    known = [key for key in PEAK_TFLOPS if words.issuperset(key.split())]
    return PEAK_TFLOPS[max(known, key=len)] if known else None


def peak_tflops_here(device: torch.device, dtype: torch.dtype) -> float | None:
    """The peak of this process's device; None if the table does not say it.

    Args:
        device: CPUs are not in the table.
        dtype: Of the matrix products; the table says that of bfloat16 only.
    """
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    return peak_tflops_of(torch.cuda.get_device_name(device))


def peak_flops_per_s(device: torch.device) -> float | None:
    """The same in FLOP/s, for bfloat16."""
    peak = peak_tflops_here(device, torch.bfloat16)
    return peak * 1e12 if peak else None


def utilisation(values: Mapping[str, float], peak_tflops: float | None) -> dict[str, float]:
    """Model FLOPs utilisation (MFU) as TensorBoard tag → share of the peak; empty if the peak is not known.

    Executed: with the route, and with what the backward pass computes again. Dense-equivalent: what the same packs would take without a
    route, nothing of it computed again; with a route it can exceed 1.

    Args:
        values: A report's throughput.
        peak_tflops: Of all devices together.
    """
    if peak_tflops is None:
        return {}
    executed = values["throughput/executed_tflops_per_s"] + values["throughput/recomputed_tflops_per_s"]
    return {
        "throughput/executed_mfu": executed / peak_tflops,
        "throughput/dense_equivalent_mfu": values["throughput/dense_equivalent_tflops_per_s"] / peak_tflops,
    }


def described(values: Mapping[str, float]) -> str:
    """The utilisation of a report for the log; nothing where it is not known."""
    if "throughput/executed_mfu" not in values:
        return ""
    return f"  MFU {values['throughput/executed_mfu']:.1%} (dense-equivalent {values['throughput/dense_equivalent_mfu']:.1%})"
