#!/usr/bin/env python
"""Measure this machine's rates for `megavlm plan --calibration`.

    python tools/calibrate.py digits --out calibration.json
    torchrun --standalone --nproc-per-node 2 tools/calibrate.py digits --out calibration.json

Matrix products at the model's shapes, attention by length, what other kernels move, the cross-entropy, the optimizer, collectives by size
where there are several processes, and, from short runs of the real trainer with tiny models, what Python and DeepSpeed take. All processes
measure at the same time, as they train. Tested by `tests/planner/test_plan_error.py`.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from scipy.optimize import nnls
from torch import distributed, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from megavlm.benchmarks import digits
from megavlm.config import RunConfig, load_config
from megavlm.launch.train import make_trainer
from megavlm.model import attention
from megavlm.model.configuration import read_configuration
from megavlm.monitor.peaks import peak_flops_per_s
from megavlm.parts.parts import Parts, situation_of
from megavlm.planner.load import average_load
from megavlm.planner.memory import memory_of
from megavlm.planner.model import Model
from megavlm.planner.rates import Host, from_document
from megavlm.planner.steptime import Setup, logit_traffic, step_time
from megavlm.routing.route import Sequences
from megavlm.system.memory import machine_bytes
from megavlm.system.world import World, start
from tools.gpu.timing import synchronize

PROBES = [(2, 32, 1), (6, 32, 1), (2, 32, 3), (2, 160, 1), (6, 160, 2)]
"""(layers, width, packs of each process) of the short runs."""
PROBE_TOKENS, PROBE_STEPS = 160, 9
TINY = 1e-12


class Clock:
    """Times pieces of work on a device.

    Args:
        world: The processes.
        seconds: About how long each piece of work is repeated.
        now: The clock: that of the wall, or the time that this process has computed, where others use the machine.
    """

    def __init__(self, world: World, seconds: float, now: Callable[[], float] = time.perf_counter):
        self.world = world
        self.seconds = seconds
        self.now = now

    def __call__(self, work: Callable[[], object]) -> float:
        """Median seconds of a call."""
        work()
        first = max(1e-6, self._one(work))
        return statistics.median(self._one(work) for _ in range(int(np.clip(self.seconds / first, 3, 200))))

    def _one(self, work: Callable[[], object]) -> float:
        synchronize(self.world.device)
        begin = self.now()
        work()
        synchronize(self.world.device)
        return self.now() - begin


def calibrate(
    world: World,
    models: Sequence[tuple[RunConfig, int]],
    folder: Path,
    *,
    seconds: float = 0.25,
    now: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """The document of a calibration. Called by all processes together.

    Args:
        world: The processes.
        models: Recipes whose models' shapes are measured, with the rows of their output heads.
        folder: For the short runs' files.
        seconds: About how long each figure is measured.
        now: The clock; see `Clock`.
    """
    clock, is_cuda = Clock(world, seconds, now), world.device.type == "cuda"
    write_digits(world, folder)
    base = base_bytes(world, folder)
    probes = [(probe_config(folder, "none", layers=2, width=width, lanes=1), models[0][1]) for width in sorted({p[1] for p in PROBES})]
    document: dict[str, Any] = {
        "device": torch.cuda.get_device_name(world.device) if is_cuda else "this CPU, one core per process",
        "world_size": world.size,
        "memory_bytes": torch.cuda.get_device_properties(world.device).total_memory if is_cuda else machine_bytes() / world.size,
        "peak_flops_per_s": peak_flops_per_s(world.device),
        "optimizer_s_per_parameter": optimizer(clock, world.device),
        "host": asdict(Host(runs_ahead=is_cuda, base_bytes=base)),
        "collectives": collectives(clock, world),
        "products": [],
        "attention": [],
        "moved": [],
        "logits": [],
    }
    for config, vocabulary_size in [*models, *probes]:
        described = read_configuration(config.model.architecture, vocabulary_size)
        model = Model(config, described, ((0, described.num_hidden_layers),), is_cuda)
        dtype, rows = torch.bfloat16 if model.is_bfloat16 else torch.float32, config.data.pack_tokens
        # several processes measure the same at the same time
        world.barrier()
        document["products"] += products(clock, model, dtype, rows)
        document["attention"] += attentions(clock, model, dtype, rows)
        document["logits"] += logits(clock, model, dtype)
        document["moved"] += moved(clock, model, dtype, rows, document=document)
    document["host"] |= host(clock, document, folder)
    return document


def products(clock: Clock, model: Model, dtype: torch.dtype, rows: int) -> list:
    """[[rows, inner width, columns], FLOP/s] of forward and backward pass."""
    shape = model.shape
    queries, keys = shape.num_heads * shape.head_width, shape.num_kv_heads * shape.head_width
    inside = [(n, shape.width, columns) for n in (rows // 8, rows // 2, rows) for columns in {queries, keys, shape.mlp_width}]
    chunk = min(rows, model.config.loss.chunk_rows)
    found = []
    for num_rows, inner, columns in [*inside, *((n, shape.width, shape.vocabulary_size) for n in (chunk // 4, chunk))]:
        layer = nn.Linear(inner, columns, bias=False, device=clock.world.device, dtype=dtype)
        x = torch.randn(num_rows, inner, device=clock.world.device, dtype=dtype, requires_grad=True)
        gradient = torch.randn(num_rows, columns, device=clock.world.device, dtype=dtype)
        seconds = clock(lambda layer=layer, x=x, gradient=gradient: layer(x).backward(gradient))
        found.append([[num_rows, inner, columns], 6 * num_rows * inner * columns / seconds])
    return found


def attentions(clock: Clock, model: Model, dtype: torch.dtype, rows: int) -> list:
    """[[tokens of a sequence, columns of all heads], FLOP/s] of forward and backward pass."""
    shape, found = model.shape, []
    for length in sorted({16, 64, 256, 1024, rows}):
        if length > rows:
            continue
        number = max(1, rows // length)
        sequences = Sequences.of(np.full(number, length)).map_tensors(lambda x: x.to(clock.world.device))
        heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
        q, k, v = (torch.randn(number * length, n, shape.head_width, device=clock.world.device, dtype=dtype) for n in heads)
        gradient = torch.randn(number * length, shape.num_heads, shape.head_width, device=clock.world.device, dtype=dtype)

        attend = partial(
            attention.packed_attention,
            q.requires_grad_(),
            k.requires_grad_(),
            v.requires_grad_(),
            sequences,
            scoring=attention.Scoring(1.0),
        )

        def work(attend=attend, gradient=gradient):
            attend().backward(gradient)

        found.append([[length, shape.num_heads * shape.head_width], 3 * number * shape.layer_flops_per_square * length**2 / clock(work)])
    return found


class _Sum:
    """In place of attention: every input counts, and nothing is computed that is counted elsewhere."""

    longest = 0

    def attend(self, q_KHd, k_KHd, v_KHd, _scale):
        groups = q_KHd.shape[1] // k_KHd.shape[1]
        return q_KHd + (k_KHd + v_KHd).repeat_interleave(groups, dim=1)


def moved(clock: Clock, model: Model, dtype: torch.dtype, rows: int, *, document: dict[str, Any]) -> list:
    """[[bytes of a kernel], bytes/s]: what a real layer takes beside its products."""
    rates = from_document(document | {"moved": [[[1], 1.0]]}, "")
    config = type(model.described).from_dict(model.described.to_dict() | {"num_hidden_layers": 1, "layer_types": None, "vocab_size": 8})
    stock = AutoModelForCausalLM.from_config(config, dtype=dtype).to(clock.world.device).model
    stock.config._attn_implementation = attention.NAME
    shape, found = model.shape, []
    queries, keys = shape.num_heads * shape.head_width, shape.num_kv_heads * shape.head_width
    matrices = [(queries, 2), (keys, 2), (shape.mlp_width, shape.mlp_matrices * shape.active_experts)]
    for number in (rows // 8, rows // 2, rows):
        x = torch.randn(1, number, shape.width, device=clock.world.device, dtype=dtype, requires_grad=True)
        rotary = stock.rotary_emb(x, torch.arange(number, device=clock.world.device)[None])
        gradient = torch.randn_like(x)

        def work(x=x, rotary=rotary, gradient=gradient):
            out = stock.layers[0](x, attention_mask=None, position_embeddings=rotary, use_cache=False, context=_Sum())
            (out[0] if isinstance(out, tuple) else out).backward(gradient.view_as(out[0] if isinstance(out, tuple) else out))

        flops = sum(
            6 * number * shape.width * columns * count / rates.products(number, shape.width, columns) for columns, count in matrices
        )
        whole = clock(work)
        rest = max(whole - flops, 0.05 * whole)
        found.append([[number * model.layer.moved_bytes / model.layer.num_kernels], number * model.layer.moved_bytes / rest])
    return found


def logits(clock: Clock, model: Model, dtype: torch.dtype) -> list:
    """[[logits], bytes/s] of the cross-entropy."""
    found, chunk = [], min(model.config.loss.chunk_rows, model.config.data.pack_tokens)
    for rows in (chunk // 4, chunk):
        x = torch.randn(rows, model.vocabulary_size, device=clock.world.device, dtype=dtype, requires_grad=True)
        targets = torch.randint(model.vocabulary_size, (rows,), device=clock.world.device)
        seconds = clock(lambda x=x, targets=targets: functional.cross_entropy(x.float(), targets, reduction="none").sum().backward())
        found.append([[x.numel()], logit_traffic(model.item_bytes, 0.0) * x.numel() / seconds])
    return found


def optimizer(clock: Clock, device: torch.device) -> float:
    """Seconds per parameter of AdamW."""
    flat = torch.randn(2_000_000, device=device, requires_grad=True)
    flat.grad = torch.randn_like(flat)
    return clock(torch.optim.AdamW([flat], fused=True).step) / flat.numel()


def collectives(clock: Clock, world: World) -> dict[str, float]:
    """A straight line through the gathers of several sizes."""
    if world.size == 1:
        return {"bytes_per_s": 1e12, "between_nodes_bytes_per_s": 1e12, "begin_s": 0.0, "ranks_per_node": 1}
    sizes, seconds = [2**16, 2**20, 2**23], []
    for size in sizes:
        part = torch.ones(size // 4 // world.size, device=world.device)
        whole = torch.empty(part.numel() * world.size, device=world.device)
        # the same number of calls on all ranks
        world.barrier()
        work = partial(distributed.all_gather_into_tensor, whole, part)
        seconds.append(statistics.median(clock._one(work) for _ in range(20)))
    moved_bytes = np.array(sizes) * (world.size - 1) / world.size
    begin, per_byte = nnls(np.stack([np.ones(3), moved_bytes], 1) / np.array(seconds)[:, None], np.ones(3))[0]
    rate = 1 / max(per_byte, TINY)
    return {"bytes_per_s": rate, "between_nodes_bytes_per_s": rate, "begin_s": begin / np.log2(world.size), "ranks_per_node": world.size}


def host(clock: Clock, document: dict[str, Any], folder: Path) -> dict[str, float]:
    """What the real trainer takes beyond its kernels: a fit to short runs of tiny models."""
    world, rows, seconds = clock.world, [], []
    for number, (layers, width, packs) in enumerate(PROBES):
        config = probe_config(folder, f"probe-{world.size}-{number}", layers=layers, width=width, lanes=packs * world.size)
        measured = measure_steps(world, config, PROBE_STEPS, clock.now)
        predicted, model = predict(config, document, world.size, measured["pack_build_s"])
        # what is left of noise alone must not decide the fit
        seconds.append(max(measured["step_s"] - predicted, 0.05 * measured["step_s"]))
        rows.append([1.0, packs, packs * layers, packs * model.num_parameters * model.item_bytes])
    matrix = np.array(rows)
    scale = matrix.max(0)
    weights = 1 / np.array(seconds)
    fit = nnls((matrix / scale) * weights[:, None], np.array(seconds) * weights)[0] / scale
    names = ("step_s", "pack_s", "layer_s", "byte_s")
    return dict(zip(names, map(float, fit)))


def base_bytes(world: World, folder: Path) -> float:
    """What a process holds beside a model: measured before anything else, with the smallest of them."""
    layers, width, packs = PROBES[0]
    config = probe_config(folder, f"base-{world.size}", layers=layers, width=width, lanes=packs * world.size)
    measured = measure_steps(world, config, 3)
    config, parts = measured["config"], Parts(measured["config"])
    model = Model(config, parts.model_configuration, tuple(parts.phases.bounds), world.device.type == "cuda")
    load = average_load(situation_of(config))
    return measured["peak_bytes"] - memory_of(model, load, world.size, base_bytes=0.0).total


def write_digits(world: World, folder: Path) -> None:
    """The data of the short runs, once."""
    if world.is_main and not (folder / "text.model").exists():
        digits.write(folder)
    world.barrier()


def probe_config(folder: Path, name: str, *, layers: int, width: int, lanes: int, **overrides: Any) -> RunConfig:
    """A run on the digits with a model of these sizes."""
    settings: dict[str, Any] = {
        "run_dir": str(folder / name),
        "vocabulary.text_model": str(folder / "text.model"),
        "data.sources": {task: {"shards": f"{folder}/{task}-train-{{00..07}}.tar"} for task in ("understanding", "generation")},
        "evaluation.shards": [f"{folder}/{task}-test-00.tar" for task in ("understanding", "generation")],
        "model.architecture.hidden_size": width,
        "model.architecture.intermediate_size": 3 * width,
        "model.architecture.num_hidden_layers": layers,
        "model.architecture.head_dim": max(8, width // 4),
        "data.num_lanes": lanes,
        "data.pack_tokens": PROBE_TOKENS,
        "routing.understanding": {"policy": "dense"},
        "routing.generation": {"policy": "dense"},
        "routing.dense_finish_fraction": 0.0,
        "optimizer.warmup_steps": 1,
        "monitor.sample_every_steps": None,
    }
    return load_config("digits", settings | overrides)


def measure_steps(world: World, config: RunConfig, num_steps: int, now: Callable[[], float] = time.perf_counter) -> dict[str, Any]:
    """Median seconds of a step of the real trainer, the slowest rank's; and the most memory that this process has held."""
    trainer = make_trainer(config, world)
    seconds = []
    for step in range(num_steps):
        world.barrier()
        begin = now()
        trainer.train_step(step)
        synchronize(world.device)
        seconds.append(now() - begin)
        trainer.step = step + 1
    resolved = trainer.parts.config
    lane = Parts(resolved).make_lane(0)
    marks = []
    for _ in range(4):
        next(lane)
        marks.append(now())
    trainer._close()
    slowest = np.max(world.gather(seconds), axis=0)
    peak = torch.cuda.max_memory_allocated() if world.device.type == "cuda" else _status("VmHWM")
    built = min(after - before for before, after in pairwise(marks))
    return {
        "step_s": float(np.median(slowest[2:])),
        "peak_bytes": float(max(world.gather(peak))),
        "pack_build_s": float(max(world.gather(built))),
        "config": resolved,
    }


def predict(config: RunConfig, document: dict[str, Any], world_size: int, pack_build_s: float) -> tuple[float, Model]:
    """Seconds of a step without what is not fitted yet."""
    parts = Parts(config)
    situation = situation_of(config)
    model = Model(config, parts.model_configuration, tuple(parts.phases.bounds), document["host"]["runs_ahead"])
    setup = Setup(from_document(document, ""), world_size, config.data.num_lanes / world_size, pack_build_s=pack_build_s)
    return step_time(model, average_load(situation), setup).total, model


def _status(name: str) -> int:
    """A figure of this process's memory, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="whose model's shapes are measured")
    parser.add_argument("--vocabulary", type=int, default=0, help="rows of the output head; by default those of the recipe's own files")
    parser.add_argument("--out", type=Path, default=Path("calibration.json"))
    given = parser.parse_args()
    world = start(timeout_s=600)
    if world.device.type == "cpu":
        torch.set_num_threads(1)
    config = load_config(given.recipe)
    size = given.vocabulary or Parts(config).vocabulary.size
    with tempfile.TemporaryDirectory() as folder:
        document = calibrate(world, [(config, size)], Path(world.on_main(lambda: folder)))
        world.barrier()
    if world.is_main:
        given.out.write_text(json.dumps(document, indent=1) + "\n")
        print(given.out)


if __name__ == "__main__":
    main()
