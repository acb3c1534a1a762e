"""Held-out samples of one's own: which they are, and what a model makes of them. No class has to be written.

Tested by `tests/evaluation/test_held_out.py`.
"""

import json
import logging
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

from megavlm.data.pack.encode import EncodedSample, Encoder
from megavlm.data.pack.overlong import encode_within
from megavlm.data.pack.sources import Source
from megavlm.data.read.sample import Sample
from megavlm.data.read.source import SourceConfig
from megavlm.data.tools.lint import Report, read_samples
from megavlm.errors import DataError
from megavlm.evaluation.sampling import answer
from megavlm.evaluation.sets.vqa import exact_match
from megavlm.evaluation.trained import TrainedModel
from megavlm.evaluation.understanding import task_losses
from megavlm.settings import Name, Positive, Settings
from megavlm.system.files import write_atomically

log = logging.getLogger(__name__)

MOST_ANSWER_TOKENS = 64


class ValidationConfig(Settings):
    """Held-out samples: their losses while a run trains, and what `megavlm evaluate` judges where no benchmark is named."""

    sources: dict[Name, SourceConfig] = {}
    """Name → source, as in `data.sources`; `weight`, `repeat` and `epochs` mean nothing here. Without any there is no validation."""
    every_steps: Positive = 500
    """Steps between measurements; one is always made at the end."""
    max_samples: Positive = 512
    """The first samples of each source that are taken."""


def read_held_out(source: Source, max_samples: int | None) -> list[Sample]:
    """The first samples of a source, or all.

    Raises:
        DataError: If one of them is broken, or there is none.
    """
    report = Report()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        samples = list(islice(read_samples(list(source.urls), source.config, report), max_samples))
    if report.problems:
        raise report.problems[0]
    if not samples:
        raise DataError("there is no held-out sample", "name shards that hold some", f"validation.{source.name}", source.urls[0])
    return samples


def encode_held_out(samples: Iterable[Sample], encoder: Encoder, most_tokens: int) -> list[EncodedSample]:
    """The samples that fit into a pack; what does not is said once."""
    encoded, num_left_out = [], 0
    for sample in samples:
        pieces, _ = encode_within(sample, encoder, most_tokens, "skip")
        encoded += pieces
        num_left_out += not pieces
    if num_left_out:
        log.warning("%d held-out samples are longer than a pack of %d tokens, and left out", num_left_out, most_tokens)
    return encoded


def judge_held_out(model: TrainedModel, samples: Sequence[Sample]) -> tuple[dict[str, Any], list[str]]:
    """Losses by task; exact match of what the model answers where samples have an ``answer``; every answer goes to RUN/answers.jsonl.

    Returns:
        The figures, and the requests of the first samples that are drawn.
    """
    result: dict[str, Any] = {
        "samples": dict(Counter(sample.task for sample in samples)),
        "losses": task_losses(model.backbone, samples, model.encoder, model.costing, **_where(model)),
    }
    if asked := [sample for sample in samples if isinstance(sample.meta.get("answer"), str)]:
        verdicts = _answers(model, asked)
        result["understanding"] = {"questions": len(verdicts), "exact_match": sum(v["exact_match"] for v in verdicts) / len(verdicts)}
        lines = "".join(json.dumps(verdict, ensure_ascii=False) + "\n" for verdict in verdicts)
        write_atomically(model.folder.path / "answers.jsonl", lines)
    drawn = (sample for sample in samples if sample.task == "generation" and sample.segments[-1].image is not None)
    requests = [_text_of(sample) for sample in drawn]
    return result, [request for request in requests if request][: model.config.num_drawings]


def _answers(model: TrainedModel, asked: list[Sample]) -> list[dict[str, Any]]:
    log.info("answering %d held-out questions", len(asked))
    longest = max(len(model.encoder.vocabulary.encode_text(sample.meta["answer"])) for sample in asked)
    prompts = [model.encoder(sample).prompt() for sample in asked]
    most = min(longest + 4, MOST_ANSWER_TOKENS)
    answers = answer(model.backbone, model.encoder, prompts, model.costing, max_tokens=most, **_where(model))
    return [
        {
            "sample": sample.key,
            "question": _text_of(sample),
            "expected": sample.meta["answer"],
            "answer": given,
            "exact_match": exact_match(given, [sample.meta["answer"]]),
        }
        for sample, given in zip(asked, answers)
    ]


def _where(model: TrainedModel) -> dict[str, Any]:
    return {"device": model.device, "batch_tokens": model.config.batch_tokens}


def _text_of(sample: Sample) -> str:
    """The text that a model is given."""
    return " ".join(segment.text for segment in sample.segments if segment.text and not segment.loss)
