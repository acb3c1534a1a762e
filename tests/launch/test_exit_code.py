"""RUN/exit_code always says how the last start ended, whatever an earlier one has left."""

import json
import os
import subprocess

import pytest

from megavlm.errors import ConfigError, MegavlmError
from megavlm.launch import train as launch
from megavlm.runs.exits import Exit, LastWord
from tests.distributed.ranks import run_ranks


@pytest.mark.parametrize(
    "wrong",
    [
        {"optimizer.num_steps": -1},
        {"no_such_setting": 1},
        {"optimizer.learning_rate": "[1"},
        {"model": "nothing"},
        {},  # the shards are missing: found out only when the parts are made
    ],
)
def test_a_refused_start_overwrites_what_an_earlier_one_left(tmp_path, monkeypatch, wrong):
    run, elsewhere = tmp_path / "run", tmp_path / "word"
    run.mkdir()
    monkeypatch.setenv("MEGAVLM_EXIT_FILE", str(elsewhere))
    for file in (run / "exit_code", elsewhere):
        file.write_text("75\n")
    monkeypatch.setattr(launch.signals, "listen", lambda _end: None)
    if not wrong:
        with pytest.raises(AssertionError, match="the shard does not exist"):
            run_ranks(1, train_in_a_rank, {"run_dir": str(run)}, str(elsewhere))
    else:
        with pytest.raises(MegavlmError):
            launch.train("digits", {"run_dir": str(run)} | wrong)
    assert (run / "exit_code").read_text() == elsewhere.read_text() == f"{int(Exit.MISTAKE)}\n"


def train_in_a_rank(world, overrides, exit_file):
    os.environ["MEGAVLM_EXIT_FILE"] = exit_file
    from megavlm.system import world as distributed

    distributed.start = lambda timeout_s: world
    launch.train("digits", overrides)


def test_a_recipe_that_is_none(tmp_path, monkeypatch):
    """The run folder is known if the command line or the recipe names it."""
    monkeypatch.setattr(launch.signals, "listen", lambda _end: None)
    monkeypatch.delenv("MEGAVLM_EXIT_FILE", raising=False)
    (tmp_path / "recipe.yaml").write_text(f"run_dir: {tmp_path}\nmodel: 3\n")
    (tmp_path / "broken.yaml").write_text("run_dir: [\n")
    for recipe, overrides in (
        ("recipe.yaml", {}),
        ("broken.yaml", {"run_dir": str(tmp_path)}),
        ("missing.yaml", {"run_dir": str(tmp_path)}),
    ):
        (tmp_path / "exit_code").write_text("75\n")
        with pytest.raises(ConfigError):
            launch.train(str(tmp_path / recipe), overrides)
        assert (tmp_path / "exit_code").read_text() == "2\n", recipe


def test_only_the_first_rank_forgets_and_whoever_is_first_is_heard(tmp_path):
    (tmp_path / "exit_code").mkdir()
    LastWord(tmp_path, {"RANK": "1"}).forget()
    assert (tmp_path / "exit_code").is_dir()
    LastWord(tmp_path, {"SLURM_PROCID": "0"}).forget()
    assert not (tmp_path / "exit_code").exists()
    LastWord(tmp_path, {"RANK": "1"}).leave(1)
    LastWord(tmp_path, {"RANK": "0"}).leave(2)
    assert (tmp_path / "exit_code").read_text() == "1\n"
    LastWord(tmp_path / "never made", {}).leave(2)
    assert not (tmp_path / "never made").exists()


def test_a_damaged_record_of_starts_begins_anew(tmp_path, caplog):
    file = tmp_path / "environment.json"
    for damage in ("", "{", '{"a": 1}'):
        file.write_text(damage)
        launch._keep_environment(file, 1)
        assert len(json.loads(file.read_text())) == 1 and "environment.json is damaged" in caplog.text
    launch._keep_environment(file, 1)
    assert len(json.loads(file.read_text())) == 2


def test_a_start_is_recorded_with_its_packages_and_commit(tmp_path):
    launch._keep_environment(tmp_path / "environment.json", 1)
    (entry,) = json.loads((tmp_path / "environment.json").read_text())
    assert entry["packages"]["torch"] == entry["versions"]["torch"] and len(entry["packages"]) > 20
    assert launch._commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=b"]
    for command in (["init", "-q"], ["add", "environment.json"], ["commit", "-qm", "one"]):
        subprocess.run([*git, *command], check=True)
    commit = launch._commit(tmp_path)
    assert commit and len(commit) == 40
    (tmp_path / "environment.json").write_text("another")
    assert launch._commit(tmp_path) == f"{commit}+"
