"""A trained run, judged: understanding on held-out samples, generation by the benchmark's judge."""

import json
import logging
from pathlib import Path
from typing import Any

import torch

from megavlm import build
from megavlm.benchmarks import digits
from megavlm.data.sample import Coordinates, parse_sample
from megavlm.data.shards import expand_shards, read_shard
from megavlm.engine.checkpoint import load_weights
from megavlm.engine.run import RunFolder
from megavlm.errors import ConfigError
from megavlm.evaluation.sampling import draw_images
from megavlm.evaluation.understanding import generated_accuracy, scored_accuracy
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
        self.encoder = build.build_encoder(self.config, unconditional_ratio=0.0)
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
    samples = [
        parse_sample(key, members, Coordinates(0, 0, shard, index))
        for shard, url in enumerate(expand_shards("evaluation", settings.shards))
        for index, (key, members) in enumerate(read_shard(url))
    ]
    log.info("scoring the answers to %d questions", len(samples))
    scored = scored_accuracy(model.backbone, samples, model.encoder, model.costing, model.device)
    log.info("answering them freely")
    generated = generated_accuracy(model.backbone, samples, model.encoder, model.costing, model.device)
    log.info("drawing %d images", settings.num_drawings)
    requests, labels = digits.prompts(settings.num_drawings)
    drawn = model.image_tokenizer.decode(model.draw(requests))
    # the judge looks at pixels, whatever the model's own codes are
    codes, judge = digits.TOKENIZER.encode(drawn), digits.Judge()
    result = {
        "checkpoint": model.checkpoint.name,
        "route": settings.route,
        "understanding": {
            "questions": len(samples),
            "accuracy_by_scoring": scored,
            "accuracy_by_free_generation": generated,
        },
        "generation": {
            "drawings": settings.num_drawings,
            "accuracy_by_judge": judge.accuracy(codes, labels),
            "judge_accuracy_on_held_out_real_digits": judge.accuracy_on_real(),
            "frechet_distance": judge.distance(codes),
            "frechet_distance_of_real_training_digits": judge.distance_of_real(),
            "temperature": settings.temperature,
            "top_k": settings.top_k,
            "guidance": settings.guidance,
        },
    }
    model.folder.evaluation.write_text(json.dumps(result, indent=2))
    shown = min(50, len(requests))
    save_grid(
        drawn[:shown],
        requests[:shown],
        model.folder.path / "drawings.png",
        title=f"drawn by {run}, {model.checkpoint.name}",
    )
    return result
