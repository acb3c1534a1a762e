"""Section *profile*: where the time of a step goes. Kernels, launches, the share in which nothing ran on the device, and a trace.

Tested by `tests/tools/test_gpu_check.py`.
"""

import json
from functools import partial

from torch.profiler import ProfilerActivity, profile

from tools.gpu.context import Context, Item, Outcome
from tools.gpu.steps import Steps
from tools.gpu.timing import synchronize
from tools.gpu.trace import summarize, write_small

ROUTES = ("dense", "shared_bypass")
MOST_IDLE = 0.3
"""More is a step that waits for its host."""


def items(context: Context) -> dict[str, Item]:
    return {f"{model}": partial(trace_steps, context, model) for model in reversed(context.sizes.models)}


def trace_steps(context: Context, model: str) -> Outcome:
    """One step of each route under the profiler, after two that warm up."""
    steps = Steps(context, model, next(iter(context.sizes.vocabularies)))
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if context.is_cuda else [])]
    result, failures = {}, []
    for route in ROUTES:
        for _ in range(2):
            steps.step(route)
        synchronize(context.device)
        with profile(activities=activities, acc_events=True) as found:
            steps.step(route)
            synchronize(context.device)
        raw = context.folder / "trace.json"
        found.export_chrome_trace(str(raw))
        trace = json.loads(raw.read_text())
        raw.unlink()
        result[route] = summarize(trace["traceEvents"], context.is_cuda)
        name = f"trace-{model}-{route}.json.gz"
        result[route]["left_out_of_trace"] = write_small(trace, context.out / name)
        result[route]["trace"] = name
        if context.is_cuda and result[route]["idle_share"] > MOST_IDLE:
            failures.append(f"{route}: nothing ran on the device in {result[route]['idle_share']:.0%} of a step")
    steps.close()
    return Outcome(result, failures)
