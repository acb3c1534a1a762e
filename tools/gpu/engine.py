"""Section *engine*: does `megavlm train` do on this device what it does on a CPU?

Twenty real steps against a float32 curve that another process makes on the CPU meanwhile; a resume; a step that is not a number; a drawing.
Tested by `tests/tools/test_gpu_check.py`.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch

from megavlm.training.trainer import Trainer
from tools.gpu.context import Context, Item, Outcome
from tools.gpu.record import ROOT
from tools.gpu.steps import world
from tools.gpu.training import NUM_STEPS, SAVE_EVERY, largest_difference, recipe, train, write_shards

FLOAT32_ERROR, BFLOAT16_ERROR = 2e-3, 1e-1
"""Largest difference of a loss from the CPU's curve. Rounding grows over twenty steps of training."""
BAD_STEP = 7


def items(context: Context) -> dict[str, Item]:
    return {
        "float32 curve and resume": partial(curve, context, "float32"),
        "bfloat16 curve and drawing": partial(curve, context, "bfloat16"),
        "a step that is not a number": partial(bad_step, context),
    }


def curve(context: Context, dtype: str) -> Outcome:
    """Twenty steps, saved half-way; the same again from there on; the curve of the CPU beside it."""
    reference = CurveOnCpu(context)
    folder = context.folder / f"engine-{dtype}"
    shutil.rmtree(folder, ignore_errors=True)
    whole = train(world(), recipe(context, folder, {"model.dtype": dtype}))
    failures = [] if len(whole["losses"]) == NUM_STEPS else [f"{len(whole['losses'])} of {NUM_STEPS} steps were reported"]
    again = resume(context, folder, dtype)
    expected = reference.losses()
    error = largest_difference(whole["losses"], expected)
    limit = FLOAT32_ERROR if dtype == "float32" else BFLOAT16_ERROR
    if not error <= limit:
        failures.append(f"a loss is {error:.2g} from the CPU's curve, more than {limit}")
    if not whole["losses"][-1][1] < whole["losses"][0][1]:
        failures.append("the loss does not fall")
    resumed = {
        "from_step": again["first"],
        "largest_difference_of_a_loss": largest_difference(whole["losses"][SAVE_EVERY:], again["losses"]),
        "largest_difference_of_a_weight": largest_difference(whole["weights"], again["weights"]),
    }
    resumed["is_bit_identical"] = resumed["largest_difference_of_a_weight"] == 0
    if again["first"] != SAVE_EVERY:
        failures.append(f"the resume went on from step {again['first']}, not {SAVE_EVERY}")
    if not context.is_cuda and not resumed["is_bit_identical"]:
        failures.append("the resume is not bit-identical")
    # on CUDA atomic additions round as they come; it is stated, and must stay as small as the curve's error
    if not resumed["largest_difference_of_a_loss"] <= limit:
        failures.append(f"after the resume a loss is {resumed['largest_difference_of_a_loss']:.2g} off")
    drawings = sorted((folder / "samples").glob("*.png"))
    if not drawings:
        failures.append("nothing was drawn")
    else:
        shutil.copy(drawings[-1], context.out / f"drawings-{dtype}.png")
    result = {"losses": whole["losses"], "expected": expected, "largest_error": error, "resume": resumed, "parameters": whole["parameters"]}
    return Outcome(result, failures)


def resume(context: Context, folder: Path, dtype: str) -> dict:
    """Train the second half again, from the checkpoint of the first."""
    copy = folder.with_name(f"{folder.name}-again")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("tensorboard", "samples"))
    shutil.rmtree(copy / "checkpoints" / f"step-{NUM_STEPS:08d}")
    return train(world(), recipe(context, copy, {"model.dtype": dtype}))


class CurveOnCpu:
    """The CPU's curve, made by another process while the device works; made once."""

    def __init__(self, context: Context):
        self.file = context.folder / "curve.json"
        self.process = None
        if not self.file.exists():
            write_shards(context.folder / "shards")
            shutil.rmtree(context.folder / "curve-on-cpu", ignore_errors=True)
            environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
            environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
            arguments = [str(context.folder), str(context.sizes.engine_width), str(self.file)]
            self.log = (context.folder / "curve.log").open("w")
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tools.gpu.curve", *arguments], cwd=ROOT, env=environment, stdout=self.log, stderr=self.log
            )

    def losses(self) -> list[list[float]]:
        if self.process and self.process.wait(timeout=200):
            raise RuntimeError("the curve on the CPU failed: " + (Path(self.log.name)).read_text()[-3000:])
        return json.loads(self.file.read_text())


def bad_step(context: Context) -> Outcome:
    """One step whose loss is not a number: it is skipped, said, and the training goes on."""
    folder = context.folder / "engine-bad-step"
    shutil.rmtree(folder, ignore_errors=True)
    before: dict[str, list[torch.Tensor]] = {}

    def spoil(trainer: Trainer) -> None:
        take, factors = trainer.train_step, trainer._loss_factors

        def spoilt(step: int):
            weights = trainer.engine.optimizer.fp32_partitioned_groups_flat
            if step == BAD_STEP:
                before["weights"] = [part.detach().clone() for part in weights]
                trainer._loss_factors = lambda totals: factors(totals) * math.nan
            norm = take(step)
            if step == BAD_STEP:
                trainer._loss_factors = factors
                before["after"] = [part.detach().clone() for part in weights]
            return norm

        trainer.train_step = spoilt

    found = train(world(), recipe(context, folder), spoil)
    failures = []
    if found["skipped"][-1] != 1:
        failures.append(f"{found['skipped'][-1]:.0f} steps were skipped, not one")
    if largest_difference(before["weights"], before["after"]) != 0:
        failures.append("the bad step changed weights")
    if not all(math.isfinite(loss) for losses in found["losses"][BAD_STEP + 1 :] for loss in losses):
        failures.append("losses after the bad step are not finite")
    if not any((folder / "forensics").glob("*")):
        failures.append("no report of the bad step was written")
    return Outcome({"losses": found["losses"], "skipped": found["skipped"][-1]}, failures)
