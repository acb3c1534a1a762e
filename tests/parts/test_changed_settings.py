"""A start in a folder that holds a run: every changed setting holds, or is refused by its name."""

import shutil

import pytest
import torch

from megavlm.errors import ConfigError
from megavlm.parts import resolve as resolving
from megavlm.runs.folder import RunFolder
from megavlm.system.world import World
from megavlm.vocabulary import train_text_model

WORLD = World(0, 1, 0, torch.device("cpu"))


@pytest.fixture
def begun(make_config, tmp_path, digits_folder, monkeypatch):
    """A folder in which a run has begun and has a checkpoint: ``start(overrides)`` starts it again."""
    folder = RunFolder(tmp_path / "run")
    shutil.copyfile(digits_folder / "text.model", tmp_path / "text.model")

    def start(overrides=None):
        config = make_config({"vocabulary.text_model": str(tmp_path / "text.model")} | (overrides or {}), folder.path)
        return resolving.resolve(config, folder, WORLD)

    resolving.keep(start().config, folder)
    monkeypatch.setattr(resolving, "checkpoints_in", lambda checkpoints: ["step-00000003"])
    return start


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"data.num_lanes": 2}, {"vocabulary.image_tokenizer.levels": 9}, {"vocabulary.text_model": "other"}]
)
def test_settings_that_cannot_change_are_refused_by_name(begun, digits_folder, tmp_path, change):
    shutil.copyfile(digits_folder / "text.model", tmp_path / "other.model")
    change = {name: str(tmp_path / "other.model") if value == "other" else value for name, value in change.items()}
    with pytest.raises(ConfigError, match=f"{next(iter(change))}: "):
        begun(change)


def test_another_text_model_at_the_same_path_is_refused(begun, tmp_path):
    kept = (tmp_path / "run" / "text.model").read_bytes()
    train_text_model(["other words"] * 20, tmp_path / "text.model", 300)
    with pytest.raises(ConfigError, match="vocabulary.text_model: .* is no longer the model"):
        begun()
    assert (tmp_path / "run" / "text.model").read_bytes() == kept


@pytest.mark.parametrize("change", [{"data.pack_tokens": 170}, {"data.over_long": "skip"}, {"data.unconditional_ratio": 1.0}])
def test_the_mixture_is_found_again_for_other_packs(begun, change):
    before, after = begun().mixture, begun(change).mixture
    assert ("unconditional_ratio" in str(change)) == (before != after)


def test_other_settings_keep_what_was_found(begun):
    assert begun({"data.look_ahead_samples": 3, "data.fill": 0.5, "optimizer.num_steps": 9}).mixture == begun().mixture


@pytest.mark.parametrize(
    ("change", "is_said"),
    [
        ({"routing.dense_finish_fraction": 0.5}, True),
        ({}, False),
        ({"routing.dense_finish_fraction": 0.5, "data.pack_rows": 250}, False),
        ({"routing.dense_finish_fraction": 0.5, "routing.warmup_fraction": 0.5}, False),
    ],
)
def test_what_the_dense_finish_will_hold_is_said_at_the_start(begun, caplog, change, is_said):
    begun(change)
    assert ("from step 3 on everything is kept, and packs hold 1." in caplog.text) == is_said
