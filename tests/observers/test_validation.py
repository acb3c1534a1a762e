"""Held-out losses: the same on any number of processes, kept with checkpoints, without any effect on what is trained."""

import json

import numpy as np
import pytest

from megavlm.data.pack.sources import make_sources
from megavlm.errors import ConfigError
from megavlm.evaluation.held_out import encode_held_out, read_held_out
from megavlm.evaluation.understanding import sample_losses
from megavlm.parts.trained import load_trained
from megavlm.routing.tasks import TASKS
from megavlm.runs.checkpoints import locate
from tests.distributed.ranks import run_ranks
from tests.observers.failing import run_with


def settings(digits_folder, **changes):
    sources = {task: {"shards": f"{digits_folder}/{task}-test-00.tar"} for task in ("understanding", "generation")}
    return {
        "validation": {"sources": sources, "every_steps": 1, "max_samples": 30},
        "checkpoint": {"every_steps": 1, "keep_best": 1, "best_metric": "validation/loss"},
        "optimizer.num_steps": 3,
        **changes,
    }


def metrics_of(run):
    return json.loads((locate(run)[1] / "manifest.json").read_text())["metrics"]


def test_held_out_losses_change_nothing_and_are_right(make_config, digits_folder, tmp_path):
    plain = make_config({"optimizer.num_steps": 3}, tmp_path / "plain")
    watched = make_config(settings(digits_folder), tmp_path / "watched")
    results = run_ranks(2, run_with, {"plain": (plain, ""), "watched": (watched, "")}, timeout_s=280)
    for result in results:
        assert all(value.equal(result["watched"]["weights"][name]) for name, value in result["plain"]["weights"].items())
    assert "held out: loss" in results[0]["watched"]["log"]
    found = metrics_of(tmp_path / "watched")
    model, parts = load_trained(tmp_path / "watched")
    total = 0.0
    for source in make_sources(parts.config.validation.sources):
        encoded = encode_held_out(read_held_out(source, 30), parts.encoder, 10**6)
        losses = sample_losses(model.backbone, encoded, model.costing, device=model.device)
        labels = sum(sample.has_loss.sum() for sample in encoded)
        assert len(encoded) == 30 and np.isclose(found[f"validation/{source.name}"], losses.sum() / labels, rtol=1e-5)
        assert found[f"validation_by_source/{source.name}/{source.name}"] == found[f"validation/{source.name}"]
        total += parts.config.loss.task_weights[source.name] * losses.sum() / labels
    assert np.isclose(found["validation/loss"], total, rtol=1e-5) and len(TASKS) == 3


def test_the_best_checkpoint_was_measured(make_config, digits_folder):
    with pytest.raises(ConfigError, match="make checkpoint.every_steps .1. a multiple of validation.every_steps .2."):
        make_config(settings(digits_folder, **{"validation.every_steps": 2}))
    with pytest.raises(ConfigError, match="this run reports no 'validation/loss'"):
        make_config({"checkpoint": {"keep_best": 1, "best_metric": "validation/loss"}})
