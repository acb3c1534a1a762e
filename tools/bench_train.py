#!/usr/bin/env python
"""The whole training step of megavlm beside `transformers.Trainer`, both under DeepSpeed ZeRO-3: same model, samples, machine, in one run.

    python tools/bench_train.py --sizes=15M --minutes=6       # two processes on a CPU
    python tools/bench_train.py --sizes=50M --minutes=8
    python tools/bench_train.py --sizes=0.9B --ranks=1        # on GPUs, one process each

Arms: megavlm dense and with a route; `transformers.Trainer` with its DeepSpeed integration and padded batches, the same grouped by length,
the same with `DataCollatorWithFlattening`. Regimes: samples of mixed lengths, and samples of one length, where packing gains nothing.

Same weights at the start (their held-out loss is compared), same AdamW, learning rate, clipping, precision and DeepSpeed file, and as many
real tokens per step as come closest. Each arm has processes of its own. They stay and take turns: while one arm trains, the others wait. A
turn is some whole steps of the public loop, data included. Figures are medians over rounds without the first, and ratios are of the same
round. The held-out loss is not on the clock.

Flattened batches use flash attention where it is installed. Without it transformers gives `sdpa` a mask over all pairs of the batch, made
from the positions: exact (a test compares it with single samples), and it computes the masked pairs too.

Trainer's batches have a fixed number of samples, so their tokens vary. Grouped by length, its sampler begins with the longest samples: a
short run sees larger batches there than in the mean, which favours that arm.

Arms that OUT.json has are not run again. The tokens are those of digits: a vocabulary of some 400 ids, so that Trainer, which makes logits
of all tokens, pays little for them.
"""

import json
import multiprocessing
import os
import platform
import shutil
import socket
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import fire
import torch
from bench_train_data import NAMES, REGIMES, Job, write_samples

SIZES = {
    # width, layers, tokens of a micro-batch, micro-batches of a rank in a step, steps of a turn
    "tiny": (64, 3, 768, 1, 1),
    "15M": (384, 8, 2048, 1, 1),
    "50M": (576, 12, 1024, 1, 1),
    "0.9B": (2048, 16, 16384, 2, 10),
}
LEAST_ROUNDS = 3
"""The first warms up."""


class Arm:
    """The processes of one arm.

    Args:
        job: What they do.
    """

    def __init__(self, job: Job):
        # on CPUs from a parent that has imported everything; CUDA does not survive a fork
        context = multiprocessing.get_context("spawn") if torch.cuda.is_available() else multiprocessing.get_context("forkserver")
        if not torch.cuda.is_available():
            context.set_forkserver_preload(["bench_train_arms", "deepspeed", "accelerate", "transformers", "megavlm.training.trainer"])
        import bench_train_arms

        shutil.rmtree(Path(job.folder) / job.arm, ignore_errors=True)
        job.log.unlink(missing_ok=True)
        self.job = job
        self.connections, self.processes = [], []
        place = {"WORLD_SIZE": str(job.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        for rank in range(job.ranks):
            ours, theirs = context.Pipe()
            of_rank = place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = context.Process(target=bench_train_arms.rank_main, args=(theirs, job, of_rank), daemon=True)
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def ask(self, order: str) -> list[Any]:
        """Give an order to all ranks, and wait for their answers."""
        for connection in self.connections:
            connection.send(order)
        return self.answers()

    def answers(self) -> list[Any]:
        found = []
        for connection in self.connections:
            try:
                found.append(connection.recv())
            except EOFError:
                raise SystemExit(f"a process of {self.job.arm} is gone; see {self.job.log}") from None
            if isinstance(found[-1], str):
                raise SystemExit(f"{self.job.arm} failed; see also {self.job.log}\n{found[-1]}")
        return found

    def turn(self) -> dict[str, float]:
        """A turn, over all ranks."""
        return together(self.ask("go"))

    def end(self) -> None:
        for connection in self.connections:
            connection.send("end")
        for process in self.processes:
            process.join()


def together(ranks: list[dict[str, float]]) -> dict[str, float]:
    """What ranks did: counts are sums, time and memory the largest."""
    largest = ("seconds", "peak_bytes", "steps", "loss")
    return {name: (max if name in largest else sum)(rank[name] for rank in ranks) for name in ranks[0]}


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def run_regime(jobs: dict[str, Job], until_s: float) -> dict[str, dict]:
    """Rounds of turns until the clock says ``until_s``; arm → its measurements."""
    arms = {name: Arm(job) for name, job in jobs.items()}
    begins = {name: together(arm.answers())["loss"] for name, arm in arms.items()}
    if max(begins.values()) - min(begins.values()) > 1e-3:
        raise SystemExit(f"the arms do not begin with the same weights: held-out losses are {begins}")
    peak = sum(next(iter(arms.values())).ask("ceiling"))
    session, turns, longest_s = time.time(), {name: [] for name in arms}, 0.0
    while len(turns[next(iter(arms))]) < LEAST_ROUNDS or time.monotonic() + longest_s < until_s:
        begin_s = time.monotonic()
        for name, arm in arms.items():
            turns[name].append(arm.turn())
        longest_s = max(longest_s, time.monotonic() - begin_s)
        print(f"round {len(turns[name])}:", *(f"{name} {t[-1]['tokens'] / t[-1]['seconds']:.0f} tokens/s" for name, t in turns.items()))
    for arm in arms.values():
        arm.end()
    common = {"session": session, "ceiling_flops_per_s": peak}
    return {name: common | {"first_loss": begins[name], "turns": turns[name]} for name in arms}


def summarize(arms: dict[str, dict]) -> dict[str, dict[str, float | None]]:
    """The figures of a regime, by arm. The held-out loss is the lowest that every arm reached."""
    target = max(min(turn["loss"] for turn in arm["turns"]) for arm in arms.values())
    found = {}
    for name, arm in arms.items():
        rounds = arm["turns"][1:]
        found[name] = {
            "tokens_per_s": _median(turn["tokens"] / turn["seconds"] for turn in rounds),
            "samples_per_s": _median(turn["samples"] / turn["seconds"] for turn in rounds),
            "over_padded": _ratio(arm, arms.get("padded"), "tokens"),
            "dense_over_this": _ratio(arms["dense"], arm, "tokens") if "dense" in arms else float("nan"),
            "tokens_per_step": statistics.mean(turn["tokens"] / turn["steps"] for turn in rounds),
            "padding": 1 - sum(turn["tokens"] for turn in rounds) / sum(turn["positions"] for turn in rounds),
            "mfu_dense_equivalent": _median(3 * turn["dense_flops"] / turn["seconds"] / arm["ceiling_flops_per_s"] for turn in rounds),
            "mfu_executed": _median(3 * turn["executed_flops"] / turn["seconds"] / arm["ceiling_flops_per_s"] for turn in rounds),
            "peak_gib": max(turn["peak_bytes"] for turn in rounds) / 2**30,
            "target_loss": target,
            "seconds_to_loss": _seconds_to(target, arm),
        }
    if {"dense", "route"} <= arms.keys():
        flops = sum(turn["executed_flops"] for turn in arms["route"]["turns"]) / sum(turn["dense_flops"] for turn in arms["route"]["turns"])
        left = 1 / _ratio(arms["route"], arms["dense"], "dense_flops")
        found["route"] |= {"flops_left": flops, "time_left": left, "realised_saving": (1 - left) / (1 - flops)}
    return found


def _median(values) -> float:
    return statistics.median(values)


def _ratio(arm: dict, base: dict | None, what: str) -> float:
    """The median over rounds of one arm's rate over another's in the same round; NaN without one."""
    if base is None:
        return float("nan")
    rates = [[turn[what] / turn["seconds"] for turn in one["turns"][1:]] for one in (arm, base)]
    return _median(a / b for a, b in zip(*rates))


def _seconds_to(target: float, arm: dict) -> float:
    """Seconds of training until the held-out loss, between two turns on a straight line."""
    seconds, before = 0.0, arm["first_loss"]
    for turn in arm["turns"]:
        if turn["loss"] <= target:
            return seconds + turn["seconds"] * (before - target) / max(before - turn["loss"], 1e-9)
        seconds, before = seconds + turn["seconds"], turn["loss"]
    raise AssertionError("the target is a loss that every arm has reached")


def table(size: str, regime: str, arms: dict[str, dict]) -> str:
    """The figures of a regime as markdown."""
    rows = summarize(arms)
    target = next(iter(rows.values()))["target_loss"]
    lines = [
        f"{size}, {regime} lengths ({REGIMES[regime]}); {len(next(iter(arms.values()))['turns']) - 1} rounds",
        "",
        "| | tokens/s | over padded | megavlm dense over this | samples/s | padding | tokens per step | MFU, executed"
        f" | peak GiB per process | s to loss {target:.2f} |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        cells = [
            f"{row['tokens_per_s']:,.0f}",
            f"{row['over_padded']:.2f}",
            f"{row['dense_over_this']:.2f}",
            f"{row['samples_per_s']:.1f}",
            f"{row['padding']:.0%}",
            f"{row['tokens_per_step']:,.0f}",
            f"{row['mfu_dense_equivalent']:.0%}, {row['mfu_executed']:.0%}",
            f"{row['peak_gib']:.2f}",
            f"{row['seconds_to_loss']:.0f}",
        ]
        lines.append(f"| {NAMES[name]} | {' | '.join(cells)} |")
    if "flops_left" in rows.get("route", {}):
        route = rows["route"]
        lines += [
            "",
            f"The route leaves {route['flops_left']:.1%} of the FLOPs by formula and {route['time_left']:.1%} of the time of the whole"
            f" step: {route['realised_saving']:.2f} of the theoretical saving.",
        ]
    if len({arm["session"] for arm in arms.values()}) > 1:
        lines += ["", "Not all of these arms ran side by side: some were taken over from an earlier session."]
    return "\n".join(lines)


def plot(result: dict, path: Path) -> None:
    """Bars of tokens/s over padded batches, and held-out loss by seconds of training, for every regime."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [(size, regime, arms) for size, regimes in result["sizes"].items() for regime, arms in regimes.items()]
    figure, axes = pyplot.subplots(len(shown), 2, figsize=(11, 2.6 * len(shown)), layout="constrained", squeeze=False)
    for (bars, curves), (size, regime, arms) in zip(axes, shown):
        for number, (name, row) in enumerate(summarize(arms).items()):
            bars.bar_label(bars.barh(NAMES[name], row["over_padded"], color=f"C{number}"), fmt="%.2f", fontsize=8)
            seconds = [0.0]
            for turn in arms[name]["turns"]:
                seconds.append(seconds[-1] + turn["seconds"])
            losses = [arms[name]["first_loss"], *(turn["loss"] for turn in arms[name]["turns"])]
            curves.plot(seconds, losses, marker=".", color=f"C{number}")
        bars.invert_yaxis()
        bars.margins(x=0.12)
        bars.set_title(f"{size}, {regime} lengths: tokens/s over padded batches", fontsize=9)
        curves.set(xlabel="seconds of training", ylabel="held-out loss")
        bars.tick_params(labelsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def bench(
    sizes: str = "15M",
    regimes: str = "mixed,uniform",
    arms: str = ",".join(NAMES),
    minutes: float = 6.0,
    ranks: int = 2,
    keep_ratio: float = 0.3,
    deepspeed: str = "zero3_small",
    out: str = "docs/results/bench_train",
    figure: str = "docs/images/bench_train.png",
    folder: str = "runs/bench_train",
):
    """Measure the arms that OUT.json lacks, and show all of it.

    Args:
        sizes: Of the model, by number of parameters, separated by commas: 15M, 50M, 0.9B, tiny.
        regimes: Separated by commas: mixed, uniform.
        arms: Separated by commas: dense, route, padded, grouped, flattened.
        minutes: For each size, over all regimes; at least three rounds are done.
        ranks: Processes of an arm; on a CPU they share the cores.
        keep_ratio: Of the route: images' tokens that go through its middle layers.
        deepspeed: File in ds_configs/, for all arms.
        out: Results, without extension.
        figure: Where the figure goes.
        folder: Samples, run folders and logs.
    """
    path = Path(out).with_suffix(".json")
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"sizes": {}}
    has_cuda = torch.cuda.is_available()
    result |= {
        "command": f"python tools/bench_train.py --sizes={sizes} --minutes={minutes:g} --ranks={ranks} --keep_ratio={keep_ratio}",
        "machine": torch.cuda.get_device_name() if has_cuda else f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "versions": {name: _version(name) for name in ("torch", "deepspeed", "transformers", "accelerate")},
    }
    for size in _names(sizes):
        width, num_layers, pack_tokens, packs_per_rank, steps_per_turn = SIZES[size]
        begin_s = time.monotonic()
        for number, regime in enumerate(_names(regimes), 1):
            done = result["sizes"].setdefault(size, {}).setdefault(regime, {})
            place = Path(folder) / size / regime
            if not (place / "text.model").exists():
                write_samples(place, regime)
            job = Job(
                arm="",
                folder=str(place),
                width=width,
                num_layers=num_layers,
                pack_tokens=pack_tokens,
                packs_per_rank=packs_per_rank,
                ranks=ranks,
                steps_per_turn=steps_per_turn,
                keep_ratio=keep_ratio,
                threads=max(1, len(os.sched_getaffinity(0)) // ranks),
                deepspeed=deepspeed,
            )
            jobs = {name: replace(job, arm=name) for name in _names(arms) if name not in done}
            if jobs:
                done |= run_regime(jobs, begin_s + 60 * minutes * number / len(_names(regimes)))
            result["sizes"][size][regime] = {name: done[name] for name in NAMES if name in done}
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(result, indent=1))
    for size, of_regimes in result["sizes"].items():
        for regime, of_arms in of_regimes.items():
            print("\n" + table(size, regime, of_arms))
    plot(result, Path(figure))


def _names(text: str | tuple[str, ...]) -> list[str]:
    return list(text) if isinstance(text, tuple) else [name.strip() for name in text.split(",")]


def _version(name: str) -> str:
    from importlib.metadata import version

    return version(name)


if __name__ == "__main__":
    fire.Fire(bench)
