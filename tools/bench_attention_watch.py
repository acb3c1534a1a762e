#!/usr/bin/env python
"""The cost of watching attention: time of a watched training step over that of a plain one.

    python tools/bench_attention_watch.py --out docs/results/attention_watch.json
    torchrun --standalone --nproc-per-node 8 tools/bench_attention_watch.py --width=2048 --layers=16 --pack_tokens=8192     # GPUs

Real training steps of one ZeRO-3 engine (the digits, scaled up to the grid; forward, backward, optimizer), watched and plain in turn, so
that other work of the machine hits both alike. A watched step looks at the first pack of each rank, as `monitor.attention_every_steps`
does. The ratio is the median over pairs of neighbouring steps; the share at every n steps is (ratio - 1) / n.
"""

import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import fire
import numpy as np
import torch

from megavlm.benchmarks import digits
from megavlm.config import load_config
from megavlm.launch.train import make_trainer
from megavlm.observers.instruments import Instruments
from megavlm.system import world as distributed
from megavlm.training.trainer import Trainer


def bench(width: int = 256, layers: int = 8, pack_tokens: int = 4096, grid: int = 16, packs: int = 2, pairs: int = 15, out: str = ""):
    """Measure, print, and write JSON if ``out`` is given.

    Args:
        width: Of the residual stream.
        layers: Of the model.
        pack_tokens: Per pack.
        grid: Codes per side of each image.
        packs: Per rank and step.
        pairs: Pairs of steps that are compared, after three that are not.
        out: JSON to write.
    """
    world = distributed.start(timeout_s=600)
    (folder,) = world.gather(tempfile.mkdtemp() if world.is_main else None)[:1]
    folder = Path(folder)
    if world.is_main:
        digits.write(folder / "data")
    world.barrier()
    trainer = make_trainer(_config(folder, width, layers, pack_tokens, grid, packs * world.size), world)
    instruments = trainer.observers[0]
    assert isinstance(instruments, Instruments)
    seconds = {"plain": [], "watched": []}
    for pair in range(pairs + 3):
        for kind in ("plain", "watched") if pair % 2 else ("watched", "plain"):
            every = 1 if kind == "watched" else None
            instruments.config = trainer.parts.config.monitor.model_copy(update={"attention_every_steps": every})
            taken_s = _step(trainer, world)
            if pair >= 3:
                seconds[kind].append(taken_s)
    trainer.watchdog.stop()
    if world.is_main:
        ratios = [w / p for w, p in zip(seconds["watched"], seconds["plain"])]
        ratio = statistics.median(ratios)
        result = {
            "watched_over_plain": ratio,
            "quartiles": np.quantile(ratios, [0.25, 0.75]).tolist(),
            "share_at_every": {n: (ratio - 1) / n for n in (10, 50, 100)},
            "plain_step_s": statistics.median(seconds["plain"]),
            "width": width,
            "layers": layers,
            "pack_tokens": pack_tokens,
            "image_tokens": grid * grid,
            "packs_per_rank": packs,
            "world_size": world.size,
            "device": torch.cuda.get_device_name() if world.device.type == "cuda" else "cpu",
            "pairs": pairs,
        }
        print(json.dumps(result, indent=2))
        if out:
            Path(out).parent.mkdir(parents=True, exist_ok=True)
            Path(out).write_text(json.dumps(result, indent=2) + "\n")
        trainer.board.close()
        shutil.rmtree(folder)
    distributed.stop()


def _step(trainer: Trainer, world) -> float:
    """Seconds of a step and its report."""
    world.barrier()
    begin = time.perf_counter()
    norm = trainer.train_step(trainer.step)
    assert norm is not None  # nobody stops this run
    float(norm)
    trainer.step += 1
    trainer.observers[0].after_step(trainer.step)
    world.barrier()
    return time.perf_counter() - begin


def _config(folder: Path, width: int, layers: int, pack_tokens: int, grid: int, num_lanes: int):
    architecture = {"model_type": "qwen3", "hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
    architecture |= {"num_attention_heads": max(1, width // 64), "num_key_value_heads": max(1, width // 256), "head_dim": 64}
    sources = {t: {"shards": f"{folder}/data/{t}-train-{{00..07}}.tar"} for t in ("understanding", "generation")}
    return load_config(
        "digits",
        {
            "run_dir": str(folder / "run"),
            "vocabulary.text_model": str(folder / "data" / "text.model"),
            "vocabulary.image_tokenizer": {"kind": "pixel", "levels": 17, "height": grid, "width": grid},
            "model.architecture": architecture | {"max_position_embeddings": 4 * grid * grid},
            "data.sources": sources,
            "data.num_lanes": num_lanes,
            "data.pack_tokens": pack_tokens,
            "optimizer.num_steps": 10_000,
            "monitor.sample_every_steps": None,
        },
    )


if __name__ == "__main__":
    fire.Fire(bench)
