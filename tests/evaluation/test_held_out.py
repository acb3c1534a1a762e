"""Held-out samples judged without a benchmark: losses, answers one by one, drawings; formats by the look of the shards."""

import json

import pytest
import torch
from PIL import Image

from megavlm.data.pack.sources import make_sources
from megavlm.errors import ConfigError, DataError
from megavlm.evaluation.evaluate import evaluate
from megavlm.evaluation.held_out import ValidationConfig, encode_held_out, read_held_out
from megavlm.evaluation.trained import TrainedModel
from megavlm.parts.parts import Parts
from megavlm.runs.folder import RunFolder


@pytest.fixture
def untrained(make_config, tmp_path):
    """A model with random weights, as if it were the checkpoint of a run."""

    def make(overrides):
        parts = Parts(make_config({"evaluation.benchmark": None, "evaluation.shards": None, "evaluation.num_drawings": 3} | overrides))
        torch.manual_seed(0)
        folder = RunFolder(tmp_path / "run")
        folder.path.mkdir()
        return parts, TrainedModel(
            folder=folder,
            checkpoint=folder.checkpoints / "step-00000001",
            backbone=parts.make_backbone().eval(),
            encoder=parts.encoder,
            costing=parts.inference_costing,
            device=torch.device("cpu"),
            config=parts.config.evaluation,
            seed=0,
        )

    return make


def sources(digits_folder):
    return {task: {"shards": f"{digits_folder}/{task}-test-00.tar"} for task in ("understanding", "generation")}


def test_held_out_samples_are_judged_without_a_class(untrained, digits_folder, tmp_path):
    lines = [{"question": "Which digit comes after two?", "answer": "three"}, {"question": "And then?", "answers": ["four", "four", "4"]}]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    held_out = {**sources(digits_folder), "words": {"shards": str(tmp_path / "own.jsonl")}}
    parts, model = untrained({"validation": {"sources": held_out, "max_samples": 12}})
    result = evaluate(model, parts.config.validation)
    assert result == json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert result["samples"] == {"understanding": 12, "generation": 12, "text": 2}
    assert set(result["losses"]) == {"understanding", "generation", "text"}
    answers = [json.loads(line) for line in (tmp_path / "run" / "answers.jsonl").read_text().splitlines()]
    asked = result["understanding"]["questions"]
    assert len(answers) == asked and answers[-1]["question"] == "And then?" and answers[-1]["expected"] == "four"
    assert result["understanding"]["exact_match"] == sum(answer["exact_match"] for answer in answers) / asked
    assert result["generation"]["drawings"] == 3 and Image.open(tmp_path / "run" / "drawings.png")


def test_shards_that_are_named_come_first(untrained, digits_folder):
    shard = f"{digits_folder}/understanding-test-00.tar"
    parts, model = untrained({"evaluation.shards": shard, "validation": {"sources": sources(digits_folder), "max_samples": 2}})
    result = evaluate(model, parts.config.validation)
    assert result["samples"] == {"understanding": 360} and "generation" not in result


def test_without_held_out_samples_there_is_a_word(untrained):
    parts, model = untrained({})
    with pytest.raises(ConfigError, match="no validation.sources, so there is nothing to judge with"):
        evaluate(model, parts.config.validation)


def test_broken_and_long_samples(untrained, tmp_path, caplog):
    (tmp_path / "a.jsonl").write_text('{"question": "a", "answer": "b"}\n{"question": "a"}\n')
    config = ValidationConfig(sources={"a": {"shards": str(tmp_path / "a.jsonl")}})
    (source,) = make_sources(config.sources)
    with pytest.raises(DataError, match="no text in 'answer'"):
        read_held_out(source, 10)
    samples = read_held_out(source, 1)
    parts, _ = untrained({})
    assert len(encode_held_out(samples, parts.encoder, 100)) == 1 and not encode_held_out(samples, parts.encoder, 3)
    assert "1 held-out samples are longer than a pack of 3 tokens" in caplog.text


def test_a_benchmark_in_a_file_of_ones_own(untrained, digits_folder, tmp_path):
    (tmp_path / "mine.py").write_text(
        "class Mine:\n"
        "    def __init__(self, samples, num_drawings, image_tokenizer):\n"
        "        self.questions, self.requests = samples[:4], ['a two'] * num_drawings\n"
        "    def judge(self, images):\n"
        "        return {'brightness': float(images.mean())}\n"
    )
    shard = f"{digits_folder}/understanding-test-00.tar"
    parts, model = untrained({"evaluation.shards": shard, "evaluation.benchmark": f"{tmp_path}/mine.py:Mine"})
    result = evaluate(model, parts.config.validation)
    assert result["generation"]["brightness"] > 0 and result["understanding"]["questions"] == 4
    with pytest.raises(ConfigError, match="evaluation.benchmark: there is no .*gone.py:Mine"):
        parts, model = untrained_again(model, parts, f"{tmp_path}/gone.py:Mine")
        evaluate(model, parts.config.validation)


def untrained_again(model, parts, benchmark):
    """The same model with another benchmark."""
    from dataclasses import replace

    return parts, replace(model, config=model.config.model_copy(update={"benchmark": benchmark}))
