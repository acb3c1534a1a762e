#!/usr/bin/env python
"""What each compiled function saves, and what the engine adds to a step.

    python tools/bench_step.py                  # writes docs/results/bench_step.json, prints markdown
    python tools/bench_step.py --only=parts --width=1024

*Parts*: forward and backward pass of a packed micro-batch with and without each compiled function, in turn in one process; every time
is divided by its neighbour's of the same turn. *Engine*: whole steps of `Trainer.run` with two processes, data included, cut into stages by
the clock of `megavlm.monitor.phases`, without a profiler. Its own share is what lies outside forward, backward, optimizer and collectives.

Tested by `tests/tools/test_bench_step.py`.
"""

import json
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import fire
import torch
from bench_routing import VOCABULARY, make_samples, policies
from bench_train import SIZES, _free_port, _names
from bench_train_data import FOREVER_S, Job, recipe, write_samples

from megavlm.costs import ModelShape
from megavlm.data.pack.pack import Costing, build_pack
from megavlm.model.backbone import Backbone, make_causal_lm
from megavlm.model.fusion import PARTS, Part
from megavlm.monitor.phases import OWN, Phases
from megavlm.parts.resolve import resolve
from megavlm.routing.phases import Phases as RoutingPhases
from megavlm.runs.folder import RunFolder
from megavlm.system import world as distributed
from megavlm.training.observers import Observer, Training
from megavlm.training.trainer import Trainer

WARM_UP = 2
"""Turns and steps that are not counted."""
KEEP_RATIO = 0.3
"""Of the route, as in `tools/bench_train.py`."""
CHOICES: dict[str, tuple[Part, ...]] = {"nothing": (), **{part: (part,) for part in PARTS}, "all": PARTS}


def measure_parts(width: int, num_layers: int, pack_tokens: int, repeats: int) -> dict[str, dict[str, float]]:
    """Time with each part compiled as a share of the time without."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    architecture = {
        "model_type": "qwen3",
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": num_layers,
        "num_attention_heads": max(1, width // 64),
        "num_key_value_heads": max(1, width // 64),
        "head_dim": 64,
    }
    phases = RoutingPhases.always(*policies(num_layers)["dense"], num_layers)
    samples = make_samples(pack_tokens, 7)
    ways, first_s, times = {}, {}, {name: [] for name in CHOICES}
    for name, compiled in CHOICES.items():
        torch.manual_seed(0)
        causal_lm = make_causal_lm(architecture, VOCABULARY)
        pack = build_pack(samples, Costing(phases, ModelShape.of(causal_lm.config)), num_sources=1, lane=0, step=0, seed=0).to(device)
        backbone = Backbone(causal_lm, phases, num_sources=1, max_labels=pack_tokens, chunk_rows=pack_tokens, compiled=compiled)
        ways[name] = backbone.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32), pack
        first_s[name] = _seconds(*ways[name])
    for turn in range(repeats + WARM_UP):
        for name, way in ways.items():
            seconds = _seconds(*way)
            if turn >= WARM_UP:
                times[name].append(seconds)
    return {
        name: {
            "time_share": statistics.median(ours / plain for ours, plain in zip(times[name], times["nothing"])),
            "seconds": statistics.median(times[name]),
            "first_step_s": first_s[name],
        }
        for name in CHOICES
    }


def _seconds(backbone: Backbone, pack) -> float:
    """Of a forward and backward pass, with the device's work done."""
    begin_s = time.perf_counter()
    backbone(pack).sum().backward()
    backbone.zero_grad()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin_s


class Clock(Observer):
    """Cuts the steps after the first ones into stages."""

    name = "clock"

    def attach(self, training: Training) -> None:
        self.training = training

    def after_step(self, num_steps: int) -> None:
        if num_steps == WARM_UP:
            self.phases = Phases(self.training.world.device)
            self.training.watchdog.listeners.append(self.phases.enter)
            # to the end of the process
            self.phases.waits_counted().__enter__()
        elif num_steps == self.training.parts.config.optimizer.num_steps:
            self.phases.leave()
            self.training.watchdog.listeners.remove(self.phases.enter)


def _rank(place: dict[str, str], job: Job, num_steps: int, connection) -> None:
    os.environ |= place
    torch.set_num_threads(job.threads)
    world = distributed.start(FOREVER_S)
    config = recipe(job)
    config = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"num_steps": num_steps, "warmup_steps": 0})})
    clock = Clock()
    Trainer(resolve(config, RunFolder(config.run_dir), world), world, [clock]).run()
    connection.send(clock.phases.seconds)


def measure_engine(size: str, arm: str, steps: int, ranks: int) -> dict[str, Any]:
    """Seconds and shares of a step of an arm of `tools/bench_train.py`, by stage, over all ranks."""
    width, num_layers, pack_tokens, packs_per_rank, _ = SIZES[size]
    with tempfile.TemporaryDirectory() as folder:
        write_samples(Path(folder), "mixed")
        job = Job(
            arm=arm,
            folder=folder,
            width=width,
            num_layers=num_layers,
            pack_tokens=pack_tokens,
            packs_per_rank=packs_per_rank,
            ranks=ranks,
            steps_per_turn=0,
            keep_ratio=KEEP_RATIO,
            threads=max(1, len(os.sched_getaffinity(0)) // ranks),
            deepspeed="zero3_small",
        )
        context, place = multiprocessing.get_context("spawn"), {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        ends = []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            of_rank = place | {"WORLD_SIZE": str(ranks), "RANK": str(rank), "LOCAL_RANK": str(rank)}
            context.Process(target=_rank, args=(of_rank, job, WARM_UP + steps, theirs), daemon=True).start()
            theirs.close()
            ends.append(ours)
        of_ranks = [end.recv() for end in ends]
    total_s = sum(sum(seconds.values()) for seconds in of_ranks)
    of_rows = {row: sum(seconds[row] for seconds in of_ranks) for row in of_ranks[0]}
    shares = {row: seconds / total_s for row, seconds in of_rows.items()}
    return {
        "steps": steps,
        "ranks": ranks,
        "step_s": total_s / ranks / steps,
        "seconds": {row: seconds / ranks / steps for row, seconds in of_rows.items()},
        "shares": shares,
        "outside": shares[OWN] + shares["data"],
    }


def bench(
    only: str | tuple[str, ...] = "parts,engine",
    width: int = 512,
    num_layers: int = 4,
    pack_tokens: int = 2048,
    repeats: int = 9,
    sizes: str | tuple[str, ...] = "15M,50M",
    arms: str | tuple[str, ...] = "dense,route",
    steps: int = 5,
    ranks: int = 2,
    out: str = "docs/results/bench_step.json",
):
    """Measure and print.

    Args:
        only: Sections, separated by commas; the others are taken over from OUT.
        width: D of the model whose parts are measured.
        num_layers: Its layers.
        pack_tokens: Tokens of its micro-batch.
        repeats: Turns.
        sizes: Models of `tools/bench_train.py`, for the engine.
        arms: Its arms: dense, route.
        steps: Steps of the engine.
        ranks: Its processes.
        out: File to write.
    """
    path = Path(out)
    result = json.loads(path.read_text()) if path.exists() else {}
    if "parts" in _names(only):
        result["parts"] = measure_parts(width, num_layers, pack_tokens, repeats)
    if "engine" in _names(only):
        measured = {size: {arm: measure_engine(size, arm, steps, ranks) for arm in _names(arms)} for size in _names(sizes)}
        result["engine"] = result.get("engine", {}) | measured
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    if "parts" in result:
        print("| compiled | time of forward and backward pass | first step |\n|---|---|---|")
        for name, row in result["parts"].items():
            print(f"| {name} | {row['time_share']:.0%} | {row['first_step_s']:.1f} s |")
    for size, found in result.get("engine", {}).items():
        print(f"\n| {size} |", " | ".join(f"{arm}, {row['step_s']:.2f} s | share" for arm, row in found.items()), "|")
        print("|---" * (1 + 2 * len(found)) + "|")
        for stage in next(iter(found.values()))["shares"]:
            print(f"| {stage} |", " | ".join(f"{row['seconds'][stage]:.3f} s | {row['shares'][stage]:.2%}" for row in found.values()), "|")


if __name__ == "__main__":
    fire.Fire(bench)
