"""A trained run, judged: understanding on held-out samples, generation by the benchmark's judge.

Tested by `tests/evaluation/test_evaluate_shapes.py`.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megavlm.data.pack.sources import Source
from megavlm.data.read.index import format_of
from megavlm.data.read.sample import Sample
from megavlm.data.read.shards import expand_shards
from megavlm.data.read.source import SourceConfig
from megavlm.data.tools.tokenize import check_codes
from megavlm.errors import ConfigError
from megavlm.evaluation.benchmark import find_benchmark
from megavlm.evaluation.held_out import ValidationConfig, judge_held_out, read_held_out
from megavlm.evaluation.trained import TrainedModel
from megavlm.evaluation.understanding import scored_right, task_losses, written_right
from megavlm.monitor.board import Board
from megavlm.runs.manifest import step_of
from megavlm.system.files import write_atomically
from megavlm.system.harmless import harmless
from megavlm.system.pictures import save_grid

log = logging.getLogger(__name__)


def evaluate(model: TrainedModel, validation: ValidationConfig) -> dict[str, Any]:
    """Judge a trained run; writes ``evaluation.json`` and ``drawings.png`` into the run folder.

    With a benchmark by its questions and judge. Without one by `judge_held_out`, on ``evaluation.shards`` or else on the samples that the
    run was validated with.

    Args:
        model: The run.
        validation: Its held-out samples.
    """
    config = model.config
    samples = samples_to_judge(model, validation)
    result: dict[str, Any] = {"checkpoint": model.checkpoint.name, "route": config.route}
    benchmark = None
    if config.benchmark is None:
        judged, requests = judge_held_out(model, samples)
        result |= judged
    else:
        benchmark = find_benchmark(config.benchmark)(samples, config.num_drawings, model.image_tokenizer)
        requests = benchmark.requests
        result["losses"] = task_losses(
            model.backbone, samples, model.encoder, model.costing, device=model.device, batch_tokens=config.batch_tokens
        )
        result["understanding"] = judge_answers(model, benchmark.questions)
    if requests and model.image_tokenizer.has_decoder:
        log.info("drawing %d images", len(requests))
        drawn = model.image_tokenizer.decode(model.draw(requests))
        settings = {"temperature": config.temperature, "top_k": config.top_k, "guidance": config.guidance}
        settings |= {"guidance_route": config.guidance_route} if config.guidance_route else {}
        result["generation"] = {"drawings": len(requests), **(benchmark.judge(drawn) if benchmark else {}), **settings}
        _show(drawn, requests, model)
    write_atomically(model.folder.evaluation, json.dumps(result, indent=2))
    board = Board(model.folder.tensorboard / "evaluation", None, writes=True)
    board.scalars(dict(numbers_in(result, "evaluation")), step_of(model.checkpoint))
    if "generation" in result:
        board.picture("drawings", _picture_of(model), step_of(model.checkpoint))
    board.close()
    return result


def samples_to_judge(model: TrainedModel, validation: ValidationConfig) -> list[Sample]:
    """The held-out samples of ``evaluation.shards``, or else of a run's validation.

    Raises:
        ConfigError: If there are none.
    """
    config = model.config
    given = {"evaluation": SourceConfig(shards=config.shards)} if config.shards is not None else validation.sources
    if not given or (config.benchmark is not None and config.shards is None):
        raise ConfigError(
            "evaluation.shards is not set, and there are no validation.sources, so there is nothing to judge with\n"
            "  do:    name held-out shards: --evaluation.shards=data/mine/held-out/000000.tar; with a benchmark also"
            " --evaluation.benchmark=digits"
        )
    return [sample for name, source in given.items() for sample in _samples(name, source, model, validation.max_samples)]


def _samples(name: str, source: SourceConfig, model: TrainedModel, max_samples: int) -> list[Sample]:
    """All samples of ``evaluation.shards``, or the first of a held-out source; each shard may be of another format."""
    urls, found = expand_shards(name, source.shards), []
    check_codes(urls, model.image_tokenizer)
    for url in urls:
        most = None if model.config.shards is not None else max_samples - len(found)
        if most != 0:
            of_url = Source(name, (url,), source.model_copy(update={"format": format_of([url], source.format)}))
            found += read_held_out(of_url, most)
    return found


def _show(drawn: np.ndarray, requests: list[str], model: TrainedModel) -> None:
    shown = min(50, len(requests))
    picture = _picture_of(model)
    with harmless(f"the picture {picture}"):
        save_grid(drawn[:shown], requests[:shown], picture, title=f"drawn by {model.folder.path}, {model.checkpoint.name}")


def _picture_of(model: TrainedModel) -> Path:
    return model.folder.path / "drawings.png"


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
