"""The benchmark shapes from scenes to judgement, with a model and a tokenizer of a few steps: what is reported, not how good it is."""

import json

import pytest

from megavlm.benchmarks import shapes
from megavlm.config import load_config
from megavlm.data.read.source import SourceConfig
from megavlm.data.tools.images import read_images
from megavlm.data.tools.tokenize import encode_shard, encode_shards
from megavlm.errors import ConfigError
from megavlm.evaluation.evaluate import evaluate
from megavlm.evaluation.held_out import ValidationConfig
from megavlm.image_tokenizers.vq import VQTokenizer
from megavlm.image_tokenizers.vq_training import Plan, train_tokenizer
from megavlm.parts.trained import load_trained
from tests.conftest import TINY
from tests.distributed.ranks import run_ranks
from tests.distributed.work import train


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    shapes.write(folder, 32, 60, 24, samples_per_shard=60)
    plan = Plan(codebook_size=16, height=4, width=4, steps=4, channels=32)
    train_tokenizer(read_images([str(folder / "images-train-0000.tar")], SourceConfig(shards="none")), folder / "vq", plan)
    tokenizer = VQTokenizer(folder / "vq", 4, 4)
    encode_shards([], folder / "codes", tokenizer, 1, devices=["cpu"])  # the manifest
    for task in ("understanding", "generation"):
        for split in ("train", "seen", "test"):
            name = f"{task}-{split}-0000.tar"
            encode_shard(str(folder / name), folder / "codes" / name, tokenizer)
    return folder


def test_report_by_split_kind_and_number_of_shapes(data, tmp_path):
    settings = {
        "run_dir": str(tmp_path / "run"),
        "vocabulary.text_model": str(data / "text.model"),
        "vocabulary.image_tokenizer": {"kind": "vq", "path": str(data / "vq"), "height": 4, "width": 4},
        "data.sources": {task: {"shards": f"{data}/codes/{task}-train-0000.tar"} for task in ("understanding", "generation")},
        "evaluation.shards": f"{data}/codes/{{understanding,generation}}-{{seen,test}}-0000.tar",
        "evaluation.num_drawings": 40,
        "optimizer.num_steps": 1,
        "optimizer.warmup_steps": 1,
        "checkpoint.every_steps": 1,
    }
    run_ranks(1, train, load_config("shapes", TINY | settings), 1)
    model, _ = load_trained(tmp_path / "run")
    found = evaluate(model, ValidationConfig())
    assert found == json.loads((tmp_path / "run" / "evaluation.json").read_text())
    # the paths that a study reads, as for digits
    numbers = (
        found["understanding"]["accuracy_by_scoring"],
        found["generation"]["accuracy_by_judge"],
        found["generation"]["frechet_distance"],
    )
    assert all(isinstance(number, float) for number in numbers) and {"understanding", "generation"} == set(found["losses"])
    assert all(0 < loss < 10 for loss in found["losses"].values())
    reads, draws = found["understanding"], found["generation"]
    assert reads["questions"] == 48 and draws["drawings"] == 40
    for split in ("seen", "test"):
        kinds = {name: value["questions"] for name, value in reads["by_split"][split].items() if isinstance(value, dict)}
        assert sum(kinds.values()) == reads["by_split"][split]["questions"] == 24
        assert set(kinds) <= {"count", "color", "relation", "existence"} and len(kinds) > 2
        judged = draws["by_split"][split]
        assert (
            judged["drawings"] == 20
            and 0 <= judged["accuracy_by_judge"] <= judged["shapes"] <= 1
            and set(judged["accuracy_by_number_of_shapes"]) <= set("1234")
        )
        assert judged["ceiling"]["frechet_distance_of_real_images"] < judged["frechet_distance"]
    assert (tmp_path / "run" / "drawings.png").stat().st_size > 5000
    # the tokenizer belongs to the run
    (data / "vq" / "config.json").rename(data / "vq" / "other.json")
    with pytest.raises(ConfigError, match="holds no config.json"):
        evaluate(load_trained(tmp_path / "run")[0])
    (data / "vq" / "other.json").rename(data / "vq" / "config.json")
