"""Whole DeepSpeed steps on given packs, as the trainer takes them but without its loader. Tested by `tests/tools/test_gpu_check.py`.

Letters: G sums that the backbone gives.
"""

import json
import time
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from megavlm.costs import BACKWARD_FACTOR
from megavlm.data.pack.pack import Pack
from megavlm.engine.deepspeed_file import read_deepspeed_file
from megavlm.engine.guard import FaultConfig, Guard
from megavlm.engine.schedule import OptimizerConfig
from megavlm.engine.zero import EngineConfig, document_of, forget_gradients, gradient_norm, start_engine
from megavlm.engine.zero_sizes import with_sizes
from megavlm.model.fusion import PARTS
from megavlm.system import world as distributed
from megavlm.system.world import World
from tools.gpu.context import Context
from tools.gpu.models import DENSE, ROUTES, make_backbone, make_pack, make_samples, phases_of, uniform_lengths
from tools.gpu.timing import synchronize


@cache
def world() -> World:
    """The one process, joined once."""
    return distributed.start(timeout_s=300)


@dataclass(frozen=True)
class Variant:
    """What is other than usual."""

    backbone: dict[str, Any] = field(default_factory=dict)
    """Arguments of the backbone."""
    engine: dict[str, Any] = field(default_factory=dict)
    """Settings of the engine."""
    zero: dict[str, Any] = field(default_factory=dict)
    """DeepSpeed's ``zero_optimization``."""
    top: dict[str, Any] = field(default_factory=dict)
    """Other keys of DeepSpeed's file."""


class Steps:
    """An engine around a model that was made on the device, and packs for every route.

    Args:
        context: Where.
        model: Name of the model.
        ids: Name of the vocabulary.
        variant: What is other than usual.
    """

    def __init__(self, context: Context, model: str, ids: str, variant: Variant | None = None):
        variant = variant or Variant()
        sizes = context.sizes
        self.context = context
        self.world = world()
        vocabulary, dense = sizes.vocabularies[ids], phases_of((DENSE, DENSE), sizes.models[model].num_layers)
        compiled = PARTS if context.is_cuda else ()
        options = {"max_labels": sizes.pack_tokens, "chunk_rows": sizes.chunk_rows, "compiled": compiled} | variant.backbone
        backbone = make_backbone(sizes.models[model].architecture(), vocabulary, dense, context.device, **options)
        self.num_parameters = sum(parameter.numel() for parameter in backbone.parameters())
        self.guard = Guard(FaultConfig(), context.device)
        optimizer = OptimizerConfig(num_steps=100, learning_rate=1e-4)
        engine = EngineConfig(deepspeed=_deepspeed_file(context.folder, variant), **variant.engine)
        document = document_of(engine, optimizer, bfloat16=context.is_cuda, packs_per_rank=sizes.packs_per_step)
        document = with_sizes(document, lambda: backbone, context.device)
        self.engine = start_engine(backbone, self.guard, optimizer, document, leaf_modules=engine.has_leaf_modules(context.device.type))
        samples = make_samples(uniform_lengths(sizes.pack_tokens, sizes.image_side), sizes.image_side, vocabulary)
        self.packs: dict[str, Pack] = {}
        for route, policies in ROUTES.items():
            pack = make_pack(samples, phases_of(policies, sizes.models[model].num_layers), backbone)
            self.packs[route] = pack.pin_memory() if context.is_cuda else pack
        self.number = 0

    def step(self, route: str) -> torch.Tensor:
        """One optimizer step; its loss, on the device."""
        num_packs, total = self.context.sizes.packs_per_step, torch.zeros((), device=self.context.device)
        pack = self.packs[route]
        for number in range(num_packs):
            sums_G = self.engine(pack.to(self.context.device))
            loss = sums_G[:-1].sum() / (num_packs * len(pack.rows_M))
            total += loss.detach()
            self.engine.backward(loss, scale_wrt_gas=False)
            if number == num_packs - 1:
                self.guard.expect(total, partial(gradient_norm, self.engine))
            self.engine.step()
        forget_gradients(self.engine)
        self.guard.end_step(self.number, None)
        self.guard.settle()
        self.number += 1
        return total

    def flops(self, route: str) -> tuple[float, float]:
        """FLOPs of a step, forward and backward: with the route, and without one. What is computed again is not counted."""
        pack, passes = self.packs[route], self.context.sizes.packs_per_step * (1 + BACKWARD_FACTOR)
        return passes * float(pack.flops.sum()), passes * float(pack.dense_flops.sum())

    def measure(self, route: str) -> dict[str, float]:
        """Seconds of a step, and those that the host is at work for it; peak memory."""
        device, times, host_times = self.context.device, [], []
        losses = [float(self.step(route)) for _ in range(2)]
        if self.context.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(self.context.sizes.timed_steps):
            synchronize(device)
            begin = time.perf_counter()
            loss = self.step(route)
            host_times.append(time.perf_counter() - begin)
            synchronize(device)
            times.append(time.perf_counter() - begin)
            losses.append(float(loss))
        found = {"step_s": sorted(times)[len(times) // 2], "host_ms": 1000 * min(host_times), "loss": losses[-1]}
        if self.context.is_cuda:
            found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return found

    def close(self) -> None:
        """Give the memory back."""
        destroy = getattr(self.engine, "destroy", None)
        if destroy:
            destroy()
        del self.engine


def _deepspeed_file(folder: Path, variant: Variant) -> str:
    """``ds_configs/zero3.json`` with the variant's changes, as a file."""
    document = read_deepspeed_file("zero3")
    document["zero_optimization"] |= variant.zero
    path = folder / "deepspeed.json"
    path.write_text(json.dumps(document | variant.top))
    return str(path)
