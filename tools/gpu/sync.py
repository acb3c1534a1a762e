"""Section *sync*: in a whole step of the trainer, where does the host wait for the device?

On CUDA torch's own alarm tells, with the Python stack of every wait. A wait is ours if the innermost frame outside torch lies in megavlm:
that fails the section. DeepSpeed's own are listed. On a CPU, operations that would wait on a device are traced instead; those on tensors
that are the host's anyway are among them, so nothing is judged. Tested by `tests/tools/test_gpu_check.py`.
"""

import shutil
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import megavlm
from megavlm.launch.train import make_trainer
from tools.gpu.context import Context, Item, Outcome
from tools.gpu.steps import world
from tools.gpu.training import recipe

WARM_UP, NUM_STEPS = 3, 4
ROUTES = {
    "dense": {"routing.understanding": {"policy": "dense"}, "routing.generation": {"policy": "dense"}},
    "random_ltd": {},
    "question_attention": {"routing.understanding": {"policy": "pyramid", "selector": "question_attention"}},
    "mixture_of_depths": {f"routing.{task}": {"policy": "mixture_of_depths"} for task in ("understanding", "generation")},
}
WOULD_WAIT = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")
"""Operations that read values back, or whose sizes depend on values."""
PACKAGES = ("megavlm", "deepspeed", "transformers")
OURS, TORCH = Path(megavlm.__file__).parent, f"{Path(torch.__file__).parent}/"
Stacks = Counter[tuple[str, ...]]


def items(context: Context) -> dict[str, Item]:
    return {route: partial(watch_steps, context, route) for route in ROUTES}


def watch_steps(context: Context, route: str) -> Outcome:
    """The waits of a few steps of the trainer, after some that warm up; reports and checkpoints between steps are not watched."""
    folder = context.folder / f"sync-{route}"
    shutil.rmtree(folder, ignore_errors=True)
    trainer = make_trainer(recipe(context, folder, ROUTES[route]), world())
    stacks: Stacks = Counter()
    for step in range(WARM_UP + NUM_STEPS):
        if step < WARM_UP:
            trainer.train_step(step)
        else:
            with waits(context, stacks):
                trainer.train_step(step)
        trainer.step = step + 1
        trainer.guard.settle()
    trainer.checkpointer.close()
    trainer._close()
    rows = [{"whose": whose(stack), "per_step": count / NUM_STEPS, "stack": list(stack[-8:])} for stack, count in stacks.most_common()]
    totals = Counter()
    for row in rows:
        totals[row["whose"]] += row["per_step"]
    ours = [row for row in rows if row["whose"] == "megavlm" and context.is_cuda]
    failures = [f"{row['per_step']:g} waits per step at {row['stack'][-1]}" for row in ours]
    return Outcome({"per_step": dict(totals), "stacks": rows[:40], "is_judged": context.is_cuda}, failures)


@contextmanager
def waits(context: Context, stacks: Stacks) -> Iterator[None]:
    """Count the stacks of everything that makes the host wait."""
    if not context.is_cuda:
        with _WouldWait(stacks):
            yield
        return
    show, mode = warnings.showwarning, torch.cuda.get_sync_debug_mode()

    def hook(message, *_rest, **_named):
        if "synchroniz" in str(message):
            stacks[current_stack()] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = hook
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            warnings.showwarning = show


class _WouldWait(TorchDispatchMode):
    def __init__(self, stacks: Stacks):
        super().__init__()
        self.stacks = stacks

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(name in str(function) for name in WOULD_WAIT):
            self.stacks[current_stack()] += 1
        return function(*args, **(kwargs or {}))


def current_stack() -> tuple[str, ...]:
    """The Python stack without this file and without torch, the innermost frame last: ``file:line function``."""
    frames = [frame for frame in traceback.extract_stack() if frame.filename != __file__ and not frame.filename.startswith(TORCH)]
    return tuple(f"{_short(frame.filename)}:{frame.lineno} {frame.name}" for frame in frames)


def whose(stack: tuple[str, ...]) -> str:
    """The package of the innermost frame."""
    return next((package for package in PACKAGES if stack[-1].startswith(f"{package}/")), "other")


def _short(file: str) -> str:
    """The path from the package on; folders above it may have any names."""
    place = Path(file)
    for package in PACKAGES:
        root = OURS if package == "megavlm" else next((parent for parent in place.parents if parent.name == package), None)
        if root is not None and place.is_relative_to(root):
            return str(package / place.relative_to(root))
    return f".../{place.name}"
