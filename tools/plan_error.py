#!/usr/bin/env python
"""How wrong is the planner? Predicted against measured step time and peak memory on this machine.

    python tools/plan_error.py --processes 1 --out docs/results/plan_error_1.json
    python tools/plan_error.py --processes 2 --out docs/results/plan_error_2.json

Three sizes of a model, dense and with two routes, on the digits. The machine is calibrated first, at the models' shapes, by as many
processes; its short runs have other sizes than those that are judged. Every judged run has processes of its own. Prints a table.
"""

import argparse
import json
import multiprocessing
import os
import socket
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

SIZES = {"0.5M": (4, 96), "2.5M": (6, 176), "8M": (8, 272)}
"""Name → layers and width."""
ROUTES = {
    "dense": ({"policy": "dense"}, {"policy": "dense"}),
    "random_ltd": ({"policy": "random_ltd", "keep_ratio": 0.5}, {"policy": "random_ltd", "keep_ratio": 0.5}),
    "late_drop, tread": (
        {"policy": "late_drop", "after_layer": 2},
        {"policy": "tread", "keep_ratio": 0.25, "first_layer": 1, "end_layer": -1},
    ),
}
LANES, PACK_TOKENS, STEPS = 2, 640, 6


def config_of(folder: Path, name: str, size: str, route: str, overrides: dict[str, Any] | None = None):
    """The recipe of a judged run."""
    from tools.calibrate import probe_config

    layers, width = SIZES[size]
    understanding, generation = ROUTES[route]
    routed = {"routing.understanding": understanding, "routing.generation": generation, "data.pack_tokens": PACK_TOKENS}
    return probe_config(folder, name, layers=layers, width=width, lanes=LANES, **routed, **(overrides or {}))


def calibrated(world, folder: Path, sizes: list[str], seconds: float, cpu_time: bool) -> dict[str, Any]:
    """What one process of several measures: one calibration, at the shapes of all sizes."""
    from megavlm.parts.parts import Parts
    from tools.calibrate import calibrate, write_digits

    write_digits(world, folder)
    configs = [config_of(folder, "none", size, "dense") for size in sizes]
    return calibrate(world, [(config, Parts(config).vocabulary.size) for config in configs], folder, seconds=seconds, now=_clock(cpu_time))


def judged(world, folder: Path, name: str, size: str, route: str, *, cpu_time: bool) -> dict[str, Any]:
    """What one process of a judged run measures."""
    from tools.calibrate import measure_steps

    measured = measure_steps(world, config_of(folder, name, size, route), STEPS, _clock(cpu_time))
    return measured | {"config": measured["config"].model_dump(mode="json")}


def _clock(cpu_time: bool):
    return time.process_time if cpu_time else time.perf_counter


def predicted(document: dict[str, Any], measured: dict[str, Any], processes: int) -> tuple[float, float]:
    """Seconds of a step and bytes of a process, by the planner."""
    from megavlm.config import RunConfig
    from megavlm.planner.plan import Planner
    from megavlm.planner.rates import from_document

    config = RunConfig.model_validate(measured["config"])
    planner = Planner(config, from_document(document, "this run"), on_cuda=False, pack_build_s=measured["pack_build_s"])
    outlook = planner.outlook(processes)
    return outlook.time.total, outlook.memory.total


def run_ranks(function, processes: int, *arguments: Any) -> Any:
    """What rank 0 of so many processes returns."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "deepspeed", "megavlm.training.trainer", "tools.calibrate"])
    queue = context.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [context.Process(target=_rank, args=(queue, function, (rank, processes, port), arguments)) for rank in range(processes)]
    for process in ranks:
        process.start()
    found = queue.get(timeout=280)
    for process in ranks:
        process.join(20)
        process.kill()
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


def _rank(queue, function, place: tuple[int, int, int], arguments: tuple) -> None:
    import traceback

    import torch

    from megavlm.system.world import start

    names = dict(zip(("RANK", "WORLD_SIZE", "MASTER_PORT"), map(str, place)))
    os.environ |= names | {"LOCAL_RANK": names["RANK"], "MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    try:
        found = function(start(timeout_s=120), *arguments)
        if place[0] == 0:
            queue.put(found)
    except BaseException:
        queue.put(traceback.format_exc())
    queue.close()
    queue.join_thread()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--sizes", nargs="*", default=list(SIZES))
    parser.add_argument("--seconds", type=float, default=0.1, help="about how long each figure is measured")
    parser.add_argument("--cpu-time", action="store_true", help="time that processes compute, for a machine that others use")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder, number = Path(name), given.processes
        document = run_ranks(calibrated, number, folder, given.sizes, given.seconds, given.cpu_time)
        for size in given.sizes:
            for route in ROUTES:
                measured = run_ranks(partial(judged, cpu_time=given.cpu_time), number, folder, f"run-{size}-{route}", size, route)
                seconds, held = predicted(document, measured, number)
                rows.append({
                    "processes": number,
                    "size": size,
                    "route": route,
                    "predicted_s": seconds,
                    "measured_s": measured["step_s"],
                    "predicted_bytes": held,
                    "measured_bytes": measured["peak_bytes"],
                })  # fmt: skip
    print(table(rows))
    if given.out:
        given.out.write_text(json.dumps({"calibration": document, "rows": rows}, indent=1) + "\n")


def table(rows: list[dict[str, Any]]) -> str:
    """Predicted, measured, and the error, in Markdown."""
    lines = [
        "| processes | parameters | route | step: predicted | measured | error | memory: predicted | measured | error |",
        f"|{'---|' * 9}",
    ]
    for row in rows:
        time_error = row["predicted_s"] / row["measured_s"] - 1
        memory_error = row["predicted_bytes"] / row["measured_bytes"] - 1
        lines.append(
            f"| {row['processes']} | {row['size']} | {row['route']} | {row['predicted_s']:.3f} s | {row['measured_s']:.3f} s |"
            f" {time_error:+.0%} | {row['predicted_bytes'] / 1e6:.0f} MB | {row['measured_bytes'] / 1e6:.0f} MB | {memory_error:+.0%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
