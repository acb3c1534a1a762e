"""The example of docs/write-a-policy.md works as it stands there."""

import re
from pathlib import Path

import pytest

from megavlm.config import save_config
from megavlm.errors import ConfigError
from megavlm.parts.parts import Parts
from megavlm.parts.trained import load_run_config
from megavlm.runs.folder import RunFolder
from megavlm.runs.user_files import copy_of, keep_user_files

PAGE = Path(__file__).parents[2] / "docs" / "write-a-policy.md"


@pytest.fixture
def module(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert len(code.splitlines()) < 40
    path = tmp_path / "barrel.py"
    path.write_text(code)
    return str(path)


def test_the_example_routes(module, make_packs):
    overrides = {
        "routing.modules": [module],
        "routing.understanding": {"policy": "barrel", "keep_ratio": 0.25},
        "routing.generation": {"policy": "dense"},
        "optimizer.num_steps": 100,
    }
    (pack,), backbone = make_packs(overrides)
    assert [(s.first_layer, s.end_layer) for s in pack.route.stages] == [(0, 1), (1, 3), (3, 4)]
    assert pack.kept_tokens[0, 0] == pack.image_tokens[0] / 4
    assert backbone(pack).sum().isfinite()


def test_the_example_routes_in_a_phase(module, make_config):
    phases = [{"fraction": 0.5, "understanding": {"policy": "barrel"}}, {"fraction": 0.5}]
    config = make_config({"routing": {"modules": [module], "phases": phases}})
    assert [plan.selectors[0] for plan in Parts(config).phases.plans] == ["centre", "random"]


def test_its_mistakes_are_reported_like_any_other(module, make_config):
    wrong = {"routing.modules": [module], "routing.understanding": {"policy": "barrel", "keep_ratoi": 0.3}}
    with pytest.raises(ConfigError, match="Did you mean routing.understanding.keep_ratio"):
        make_config(wrong)


def test_it_may_not_drop_what_the_model_draws(module, make_config):
    config = make_config({"routing.modules": [module], "routing.generation": {"policy": "barrel"}})
    with pytest.raises(ConfigError, match="barrel drops tokens before their loss"):
        _ = Parts(config).phases


def test_a_module_that_cannot_be_imported(make_config):
    with pytest.raises(ConfigError, match="nothing_there.py cannot be imported"):
        make_config({"routing.modules": ["nothing_there.py"]})


def test_a_run_keeps_the_file_and_is_read_without_it(module, make_config, tmp_path):
    config = make_config({"routing.modules": [module, "json"], "routing.understanding": {"policy": "barrel"}})
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    keep_user_files(folder, config.routing.modules)
    save_config(config, folder.config_file)
    Path(module).unlink()
    with pytest.raises(ConfigError, match="barrel.py cannot be imported"):
        make_config({"routing.modules": [str(tmp_path / "other" / "barrel.py")]})
    moved = folder.path.rename(tmp_path / "elsewhere")
    found = load_run_config(RunFolder(moved))
    assert found.routing.modules == [str(copy_of(RunFolder(moved), module)), "json"]
    assert found.routing.understanding.policy == "barrel" and len(list((moved / "modules").glob("*.py"))) == 1
    # a resume of the copy's own recipe keeps one copy
    keep_user_files(RunFolder(moved), found.routing.modules)
    assert len(list((moved / "modules").glob("*.py"))) == 1
