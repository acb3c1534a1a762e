"""A trained run, judged: understanding on held-out samples, generation by the benchmark's judge.

Tested by `tests/evaluation/test_evaluate_shapes.py`.
"""

import json
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np

from megavlm.data.read.place import reading_sample
from megavlm.data.read.sample import Coordinates, Sample, parse_sample
from megavlm.data.read.shards import expand_shards, read_shard
from megavlm.data.tools.tokenize import check_codes
from megavlm.errors import ConfigError
from megavlm.evaluation.benchmark import find_benchmark
from megavlm.evaluation.trained import TrainedModel
from megavlm.evaluation.understanding import scored_right, task_losses, written_right
from megavlm.monitor.board import Board
from megavlm.runs.manifest import step_of
from megavlm.system.files import write_atomically
from megavlm.system.harmless import harmless
from megavlm.system.pictures import save_grid

log = logging.getLogger(__name__)


def evaluate(model: TrainedModel) -> dict[str, Any]:
    """Judge a trained run; writes ``evaluation.json`` and ``drawings.png`` into the run folder."""
    config = model.config
    if config.benchmark is None or config.shards is None:
        raise ConfigError(
            "evaluation.benchmark and evaluation.shards are not set, so there is nothing to judge with\n"
            "  do:    add --evaluation.benchmark=digits --evaluation.shards=data/digits/understanding-test-00.tar"
        )
    urls = expand_shards("evaluation", config.shards)
    check_codes(urls, model.image_tokenizer)
    samples = []
    for shard, url in enumerate(urls):
        for index, (key, members) in enumerate(read_shard(url)):
            with reading_sample("", url, key):
                samples.append(parse_sample(key, members, Coordinates(0, 0, shard, index)))
    benchmark = find_benchmark(config.benchmark)(samples, config.num_drawings, model.image_tokenizer)
    where = {"device": model.device, "batch_tokens": config.batch_tokens}
    losses = task_losses(model.backbone, samples, model.encoder, model.costing, **where)
    understanding = judge_answers(model, benchmark.questions)
    log.info("drawing %d images", len(benchmark.requests))
    drawn = model.image_tokenizer.decode(model.draw(benchmark.requests))
    result = {
        "checkpoint": model.checkpoint.name,
        "route": config.route,
        "losses": losses,
        "understanding": understanding,
        "generation": {
            "drawings": len(benchmark.requests),
            **benchmark.judge(drawn),
            "temperature": config.temperature,
            "top_k": config.top_k,
            "guidance": config.guidance,
        },
    }
    write_atomically(model.folder.evaluation, json.dumps(result, indent=2))
    board = Board(model.folder.tensorboard / "evaluation", None, writes=True)
    board.scalars(dict(numbers_in(result, "evaluation")), step_of(model.checkpoint))
    shown = min(50, len(benchmark.requests))
    picture = model.folder.path / "drawings.png"
    with harmless(f"the picture {picture}"):
        save_grid(drawn[:shown], benchmark.requests[:shown], picture, title=f"drawn by {model.folder.path}, {model.checkpoint.name}")
    board.picture("drawings", picture, step_of(model.checkpoint))
    board.close()
    return result


def numbers_in(tree: dict[str, Any], path: str) -> Iterator[tuple[str, float]]:
    """The numbers of a result with their tags."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from numbers_in(value, f"{path}/{name}")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{path}/{name}", float(value)


def judge_answers(model: TrainedModel, questions: list[Sample]) -> dict[str, Any]:
    """Shares of right answers, by scoring the choices and by writing freely; also by split and kind of question, where samples tell."""
    parts = (model.backbone, questions, model.encoder, model.costing)
    log.info("scoring the answers to %d questions", len(questions))
    where = {"device": model.device, "batch_tokens": model.config.batch_tokens}
    scored = scored_right(*parts, **where)
    log.info("answering them freely")
    written = written_right(*parts, **where)

    def shares(chosen: np.ndarray) -> dict[str, float]:
        return {
            "questions": int(chosen.sum()),
            "accuracy_by_scoring": float(scored[chosen].mean()),
            "accuracy_by_free_generation": float(written[chosen].mean()),
        }

    result: dict[str, Any] = shares(np.ones(len(questions), bool))
    splits = np.array([sample.meta.get("split", "") for sample in questions])
    kinds = np.array([sample.meta.get("kind", "") for sample in questions])
    if any(splits):
        result["by_split"] = {
            str(split): shares(splits == split)
            | {str(kind): shares((splits == split) & (kinds == kind)) for kind in np.unique(kinds[splits == split]) if kind}
            for split in np.unique(splits)
        }
    return result
