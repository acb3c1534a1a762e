"""Section *go*: five minutes that say whether the rest is worth its time.

What the machine is; one dense comparison with the CPU; a matrix product; a few steps through DeepSpeed, whose loss must fall.
Tested by `tests/tools/test_gpu_check.py`.
"""

import os
import platform
from functools import partial

import torch

from megavlm.monitor.peaks import peak_flops_per_s
from tools.gpu import ceilings, parity
from tools.gpu.context import Context, Item, Outcome
from tools.gpu.steps import Steps

NUM_STEPS = 8


def items(context: Context) -> dict[str, Item]:
    first = next(iter(context.sizes.models))
    return {
        "machine": partial(machine, context),
        "parity of dense": partial(parity.compare, context, "dense", 64, grouped=True),
        "matrix products": partial(ceilings.products, context, first),
        "steps": partial(steps, context, first),
    }


def machine(context: Context) -> Outcome:
    """What there is: anything missing is named here, before it costs time elsewhere."""
    found = {
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        "system": platform.platform(),
        "peak_flops_per_s": peak_flops_per_s(context.device),
    }
    failures = []
    if context.is_cuda:
        properties = torch.cuda.get_device_properties(context.device)
        found |= {"name": properties.name, "memory_of_device_gib": properties.total_memory / 2**30, "cuda": torch.version.cuda}
        found |= {"capability": torch.cuda.get_device_capability(context.device)}
        if not torch.cuda.is_bf16_supported():
            failures.append("the device has no bfloat16")
    return Outcome(found, failures)


def steps(context: Context, model: str) -> Outcome:
    """A few steps on the same packs: the loss must fall."""
    work = Steps(context, model, next(iter(context.sizes.vocabularies)))
    losses = [float(work.step("dense")) for _ in range(NUM_STEPS)]
    routed = [float(work.step("random_ltd")) for _ in range(2)]
    work.close()
    failures = [] if losses[-1] < losses[0] else [f"the loss went from {losses[0]:.3f} to {losses[-1]:.3f}"]
    if not all(loss < float("inf") for loss in losses + routed):
        failures.append("a loss is not finite")
    return Outcome({"losses": losses, "routed": routed}, failures)
