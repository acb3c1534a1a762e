"""What data sheets promise. Tested by `tests/tools/test_gpu_check.py`."""

import torch

BFLOAT16_PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "B200": 2250e12,
}
"""Part of a device's name → dense bfloat16 FLOP/s by its data sheet; the first that fits."""


def peak_flops_per_s(device: torch.device) -> float | None:
    """The data sheet's dense bfloat16 FLOP/s; None if the device is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in BFLOAT16_PEAKS.items() if part in name), None)
