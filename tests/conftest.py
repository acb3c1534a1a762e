"""Shared fixtures: the real digits on disk, and a recipe small enough to train in seconds."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from megavlm.benchmarks import digits
from megavlm.config import load_config
from megavlm.parts.parts import Parts
from megavlm.system.world import PLACE, without_place

torch.set_num_threads(1)

TINY = {
    "model.architecture": {
        "model_type": "qwen3",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
    },
    "data.pack_tokens": 340,
    "data.look_ahead_samples": 12,
    "data.num_lanes": 4,
    "loss.chunk_rows": 128,
    "optimizer.num_steps": 6,
    "optimizer.warmup_steps": 2,
    "routing.dense_finish_fraction": 0.0,
    "monitor.sample_every_steps": None,
    "monitor.log_every_steps": 1,
    "checkpoint.every_steps": 3,
    "engine.timeout_s": 60,
}


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory):
    """Shards and text model of the benchmark `digits`."""
    folder = tmp_path_factory.mktemp("digits")
    digits.write(folder)
    return folder


@pytest.fixture
def make_config(digits_folder, tmp_path):
    """``make_config(overrides)``: the quickstart recipe, tiny, on the shards of ``digits_folder``."""
    return _config_maker(digits_folder, tmp_path)


@pytest.fixture(scope="module")
def make_config_once(digits_folder, tmp_path_factory):
    """``make_config`` for a run that the tests of a module share."""
    return _config_maker(digits_folder, tmp_path_factory.mktemp("shared"))


def _config_maker(digits_folder, folder):
    def make(overrides=None, run_dir=folder / "run"):
        sources = {task: {"shards": f"{digits_folder}/{task}-train-{{00..07}}.tar"} for task in ("understanding", "generation")}
        places = {
            "run_dir": str(run_dir),
            "vocabulary.text_model": str(digits_folder / "text.model"),
            "data.sources": sources,
            "evaluation.shards": [f"{digits_folder}/{task}-test-00.tar" for task in ("understanding", "generation")],
        }
        return load_config("digits", places | TINY | (overrides or {}))

    return make


@pytest.fixture
def make_packs(make_config):
    """``make_packs(overrides, num)``: packs of lane 0, and a backbone in float64 to run them on."""

    def make(overrides=None, num=1):
        config = Parts(make_config(overrides)).with_mixture().config
        torch.manual_seed(0)
        causal_lm = Parts(config).make_causal_lm()
        lane = Parts(config).make_lane(0)
        return [next(lane)[0] for _ in range(num)], Parts(config).make_backbone(causal_lm).double()

    return make


@pytest.fixture(autouse=True)
def _no_place_left_behind():
    """A test that joins a world in this process would give its address to every process that a later test starts."""
    before = without_place(os.environ)
    yield
    left = {name: value for name, value in os.environ.items() if name not in before and name in PLACE}
    for name in left:
        del os.environ[name]
    assert not left, f"this test joined a world in the tests' own process: {left}"
