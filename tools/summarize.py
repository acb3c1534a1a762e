#!/usr/bin/env python
"""What a run has achieved and where to look:  python tools/summarize.py runs/digits"""

import json

import fire
from rich import print as show
from rich.table import Table

from megavlm.runs.folder import RunFolder


def summarize(run: str):
    """Print a summary of an evaluated run."""
    folder = RunFolder(run)
    evaluation = json.loads(folder.evaluation.read_text())
    speed = json.loads((folder.path / "speed.json").read_text())
    reads, draws = evaluation["understanding"], evaluation["generation"]
    table = Table("", "model", "real digits", title=f"{run}, {evaluation['checkpoint']}")
    table.add_row("reads: right answer scored highest", f"{reads['accuracy_by_scoring']:.1%}", "")
    table.add_row("reads: right answer written freely", f"{reads['accuracy_by_free_generation']:.1%}", "")
    real = draws["judge_accuracy_on_held_out_real_digits"]
    table.add_row("draws: judge recognises the digit", f"{draws['accuracy_by_judge']:.1%}", f"{real:.1%}")
    distance = draws["frechet_distance_of_real_training_digits"]
    table.add_row("draws: Fréchet distance, lower is closer", f"{draws['frechet_distance']:.0f}", f"{distance:.0f}")
    table.add_row("the route's share of dense FLOPs", f"{speed['flops_share']:.1%}", "")
    table.add_row("the route's share of dense time", f"{speed['time_share']:.1%}", "")
    show(table)
    show(f"drawings     {folder.path}/drawings.png, and how they got there: {folder.samples}/")
    show(f"curves       tensorboard --logdir {folder.tensorboard}")
    show(f"everything   {folder.path}/: config.yaml, log.txt, evaluation.json, speed.json, checkpoints/")
    show(f'draw more    .venv/bin/megavlm generate {run} "a handwritten seven" --out grid.png')


if __name__ == "__main__":
    fire.Fire(summarize)
