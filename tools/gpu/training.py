"""Real trainings for the check: shards that need no download, the recipe `digits`, and `megavlm train`'s own trainer.

Tested by `tests/tools/test_gpu_check.py`.
"""

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from webdataset.writer import TarWriter

from megavlm.config import RunConfig, load_config
from megavlm.data.read.sample import Record, Segment
from megavlm.image_tokenizers.pixel import PixelTokenizer
from megavlm.launch.train import make_trainer
from megavlm.system.world import World
from megavlm.training.trainer import Trainer
from megavlm.vocabulary import train_text_model
from tools.gpu.context import Context

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NUM_SAMPLES, NUM_STEPS, SAVE_EVERY = 400, 20, 10
"""Samples of each task; steps of a training, and between its checkpoints."""
TOKENIZER = PixelTokenizer(levels=17, height=8, width=8)


def write_shards(folder: Path) -> Path:
    """Ten patterns of 8 x 8 grey levels with noise, to be read and to be drawn, and a text model; nothing if they are there."""
    if (folder / "text.model").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    rng, texts = np.random.default_rng(0), []
    patterns = rng.integers(0, 17, (10, 8, 8))
    for task in ("understanding", "generation"):
        with TarWriter(str(folder / f"{task}.tar"), encoder=False, mtime=0) as writer:
            for number in range(NUM_SAMPLES):
                label = int(rng.integers(10))
                codes_hw = (patterns[label] + rng.integers(-2, 3, (8, 8))).clip(0, 16)
                request = Segment(text=f"a picture of {WORDS[label]}")
                question = (Segment(text="Which number is this?"), Segment(text=WORDS[label], loss=True))
                image = Segment(image="img0", loss=task == "generation")
                segments = (request, image) if task == "generation" else (image, *question)
                texts += [segment.text for segment in segments if segment.text]
                png = io.BytesIO()
                Image.fromarray(TOKENIZER.decode(codes_hw[None])[0, ..., 0]).save(png, "PNG")
                record = Record(task=task, segments=segments)
                document = record.model_dump_json(exclude_defaults=True).encode()
                writer.write({"__key__": f"{number:04d}", "json": document, "img0.png": png.getvalue()})
    train_text_model(texts, folder / "text.model", vocab_size=400)
    return folder


def recipe(context: Context, run_dir: Path, overrides: dict[str, Any] | None = None) -> RunConfig:
    """The recipe `digits` on those shards: a small model, everything reported in every step."""
    shards, width = write_shards(context.folder / "shards"), context.sizes.engine_width
    settings = {
        "run_dir": str(run_dir),
        "vocabulary.text_model": str(shards / "text.model"),
        "data.sources": {task: {"shards": str(shards / f"{task}.tar")} for task in ("understanding", "generation")},
        "evaluation.shards": [str(shards / f"{task}.tar") for task in ("understanding", "generation")],
        "model.architecture.hidden_size": width,
        "model.architecture.intermediate_size": 3 * width,
        "model.architecture.num_attention_heads": width // 32,
        "model.architecture.num_key_value_heads": width // 32,
        "data.num_lanes": 2,
        "data.pack_tokens": 680,
        "optimizer.num_steps": NUM_STEPS,
        "optimizer.warmup_steps": 4,
        "routing.dense_finish_fraction": 0.0,
        "checkpoint.every_steps": SAVE_EVERY,
        "monitor.log_every_steps": 1,
        "monitor.sample_every_steps": NUM_STEPS,
        "monitor.sample_prompts": [f"a picture of {word}" for word in WORDS],
    }
    return load_config("digits", settings | (overrides or {}))


def train(world: World, config: RunConfig, before: Callable[[Trainer], None] | None = None) -> dict[str, Any]:
    """Train to the end.

    Args:
        world: The process.
        config: The recipe.
        before: Gets the trainer before its first step.

    Returns:
        ``losses`` of each step: understanding and generation; ``skipped`` steps after each; the parameters at the end.
    """
    trainer = make_trainer(config, world)
    found: dict[str, Any] = {"first": trainer.step, "losses": [], "skipped": []}
    show = trainer.board.scalars

    def scalars(values, step: int) -> None:
        if "optimizer/gradient_norm" in values:
            found["losses"].append([values.get(f"loss/{task}", math.nan) for task in ("understanding", "generation")])
            found["skipped"].append(values["faults/skipped_steps"])
        show(values, step)

    trainer.board.scalars = scalars
    if before:
        before(trainer)
    trainer.run()
    found["weights"] = [part.detach().cpu().clone() for part in trainer.engine.optimizer.fp32_partitioned_groups_flat]
    found["parameters"] = sum(map(len, found["weights"]))
    return found


def largest_difference(first: list, second: list) -> float:
    """Between two curves or two sets of tensors; infinite where one is not a number."""
    pairs = [(torch.as_tensor(a).double(), torch.as_tensor(b).double()) for a, b in zip(first, second, strict=True)]
    differences = [float((a - b).abs().max()) if len(a) else 0.0 for a, b in pairs]
    worst = max(differences)
    return worst if all(difference == difference for difference in differences) else math.inf
