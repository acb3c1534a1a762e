"""A trained run, judged: understanding on held-out samples, generation by the benchmark's judge."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megavlm import build
from megavlm.data.sample import Coordinates, Sample, parse_sample
from megavlm.data.shards import expand_shards, read_shard
from megavlm.data.tokenize import check_codes
from megavlm.engine.checkpoint import load_weights
from megavlm.engine.run import RunFolder
from megavlm.errors import ConfigError
from megavlm.evaluation.benchmark import find_benchmark
from megavlm.evaluation.sampling import draw_images
from megavlm.evaluation.understanding import scored_right, task_losses, written_right
from megavlm.model.backbone import Backbone
from megavlm.monitor.pictures import save_grid
from megavlm.randomness import Purpose, integer_seed

log = logging.getLogger(__name__)


class TrainedModel:
    """The weights of a run's newest checkpoint in this one process.

    Args:
        run: The run folder.
        overrides: Settings to change, as on the command line.
    """

    def __init__(self, run: str | Path, overrides: dict[str, Any] | None = None):
        self.folder = RunFolder(run)
        self.config, self.checkpoint = self.folder.load(overrides)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.encoder = build.build_encoder(self.config, 0.0, self.device)
        self.image_tokenizer = self.encoder.image_tokenizer
        causal_lm = build.build_causal_lm(self.config, self.encoder.vocabulary)
        self.backbone: Backbone = build.build_backbone(self.config, causal_lm)
        load_weights(self.checkpoint, self.backbone)
        self.backbone.to(self.device).eval()
        self.costing = build.inference_costing(self.config, causal_lm.config)

    def draw(self, prompts: list[str]):
        """Codes ``[len(prompts), h, w]``, sampled as the recipe's ``evaluation`` says."""
        settings = self.config.evaluation
        seed = integer_seed(self.config.seed, Purpose.DRAWING)
        sampling = (settings.temperature, settings.top_k, settings.guidance)
        return draw_images(self.backbone, self.encoder, prompts, self.costing, self.device, seed, *sampling)


def evaluate(run: str | Path, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
    """Judge the newest checkpoint of a run; writes ``evaluation.json`` and ``drawings.png`` into the run folder."""
    model = TrainedModel(run, overrides)
    settings = model.config.evaluation
    if settings.benchmark is None or settings.shards is None:
        raise ConfigError(
            "evaluation.benchmark and evaluation.shards are not set, so there is nothing to judge with\n"
            "  do:    add --evaluation.benchmark=digits --evaluation.shards=data/digits/understanding-test-00.tar"
        )
    urls = expand_shards("evaluation", settings.shards)
    check_codes(urls, model.image_tokenizer)
    samples = [
        parse_sample(key, members, Coordinates(0, 0, shard, index))
        for shard, url in enumerate(urls)
        for index, (key, members) in enumerate(read_shard(url))
    ]
    benchmark = find_benchmark(settings.benchmark)(samples, settings.num_drawings, model.image_tokenizer)
    losses = task_losses(model.backbone, samples, model.encoder, model.costing, model.device)
    understanding = judge_answers(model, benchmark.questions)
    log.info("drawing %d images", len(benchmark.requests))
    drawn = model.image_tokenizer.decode(model.draw(benchmark.requests))
    result = {
        "checkpoint": model.checkpoint.name,
        "route": settings.route,
        "losses": losses,
        "understanding": understanding,
        "generation": {
            "drawings": len(benchmark.requests),
            **benchmark.judge(drawn),
            "temperature": settings.temperature,
            "top_k": settings.top_k,
            "guidance": settings.guidance,
        },
    }
    model.folder.evaluation.write_text(json.dumps(result, indent=2))
    shown = min(50, len(benchmark.requests))
    save_grid(
        drawn[:shown],
        benchmark.requests[:shown],
        model.folder.path / "drawings.png",
        title=f"drawn by {run}, {model.checkpoint.name}",
    )
    return result


def judge_answers(model: TrainedModel, questions: list[Sample]) -> dict[str, Any]:
    """Shares of right answers, by scoring the choices and by writing freely; also by split and kind of question, where samples tell."""
    parts = (model.backbone, questions, model.encoder, model.costing, model.device)
    log.info("scoring the answers to %d questions", len(questions))
    scored = scored_right(*parts)
    log.info("answering them freely")
    written = written_right(*parts)

    def shares(chosen: np.ndarray) -> dict[str, float]:
        return {
            "questions": int(chosen.sum()),
            "accuracy_by_scoring": float(scored[chosen].mean()),
            "accuracy_by_free_generation": float(written[chosen].mean()),
        }

    result = shares(np.ones(len(questions), bool))
    splits = np.array([sample.meta.get("split", "") for sample in questions])
    kinds = np.array([sample.meta.get("kind", "") for sample in questions])
    if any(splits):
        result["by_split"] = {
            str(split): shares(splits == split)
            | {str(kind): shares((splits == split) & (kinds == kind)) for kind in np.unique(kinds[splits == split]) if kind}
            for split in np.unique(splits)
        }
    return result
