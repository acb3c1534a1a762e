"""What a run folder refuses before anything is trained."""

import pytest
import torch

from megavlm.errors import ConfigError
from megavlm.parts.resolve import resolve
from megavlm.runs.folder import RunFolder
from megavlm.system.world import World


def test_sources_that_all_end_are_refused(make_config, tmp_path):
    """Their lanes end at different steps, and a rank without packs would leave the others waiting."""
    config = make_config({}, tmp_path / "run")
    ending = {name: source.model_copy(update={"epochs": 2}) for name, source in config.data.sources.items()}
    config = config.model_copy(update={"data": config.data.model_copy(update={"sources": ending})})
    with pytest.raises(ConfigError, match="every source ends"):
        resolve(config, RunFolder(config.run_dir), World(0, 1, 0, torch.device("cpu")))


def test_a_run_folder_that_cannot_be_made_is_named(make_config, tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(ConfigError, match=f"{tmp_path / 'run'}: File exists"):
        resolve(make_config({}, tmp_path / "run"), RunFolder(str(tmp_path / "run")), World(0, 1, 0, torch.device("cpu")))
