"""`--profile`: the trace of the chosen steps, the table, and a run that is none the worse for it."""

import gzip
import io
import json
import logging

import pytest
import torch
from torch import distributed

from megavlm.cli import main as cli
from megavlm.errors import ConfigError
from megavlm.launch.train import make_trainer
from megavlm.monitor.phases import OWN, ROWS, Phases
from tests.distributed.ranks import run_ranks
from tests.distributed.work import weights

ON = {"profile.enabled": True, "monitor.log_every_steps": 1}


def run_until(world, config, last_step: int) -> dict:
    """Run a recipe as `megavlm train` does, and end it after a step, which is saved."""
    text = io.StringIO()
    logging.getLogger().addHandler(logging.StreamHandler(text))
    logging.getLogger().setLevel(logging.INFO)
    trainer = make_trainer(config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"num_steps": last_step})}), world)
    first = trainer.step
    trainer.run()
    return {"first": first, "weights": weights(trainer.engine), "log": text.getvalue()}


def in_turn(world, jobs: list) -> list[dict]:
    return [run_until(world, *job) for job in jobs]


def refuse(world, config) -> str:
    with pytest.raises(ConfigError) as caught:
        make_trainer(config, world)
    return str(caught.value)


def events(path) -> set[str]:
    with gzip.open(path, "rt") as file:
        return {event["name"] for event in json.load(file)["traceEvents"] if "name" in event}


def test_chosen_steps_and_ranks_are_traced_and_nothing_that_is_trained_changes(make_config, tmp_path):
    plain = make_config({"optimizer.min_lr_ratio": 1.0}, tmp_path / "plain")
    watched, watched_on = (
        make_config(ON | {"optimizer.min_lr_ratio": 1.0, "profile.steps": steps, "profile.ranks": [1]}, tmp_path / "watched")
        for steps in ([2], [2, 5])
    )
    by_default = make_config(ON | {"optimizer.min_lr_ratio": 1.0}, tmp_path / "default")
    # the second start in a folder goes on after step 3
    jobs = [(plain, 3), (plain, 6), (watched, 3), (watched_on, 6), (by_default, 6)]
    results = run_ranks(2, in_turn, jobs, timeout_s=280)
    for result in results:
        assert [job["first"] for job in result] == [0, 3, 0, 3, 0]
        for name, value in result[1]["weights"].items():
            assert value.equal(result[3]["weights"][name]), name
    assert "where step 2 went on rank 1: " in results[0][2]["log"] and "where step 5 went on rank 1: " in results[0][3]["log"]
    assert sorted(path.name for path in (tmp_path / "watched" / "profile").iterdir()) == [
        f"step-{step:08d}-rank-1.{kind}" for step in (2, 5) for kind in ("json.gz", "txt")
    ]
    traces = sorted((tmp_path / "default" / "profile").glob("*.json.gz"))
    assert [path.name for path in traces] == [f"step-{step:08d}-rank-0.json.gz" for step in (3, 4)]
    for path in traces:
        names = events(path)
        assert {"data", "forward", "backward", "optimizer", "report", "waiting in collectives", "aten::mm"} <= names
        rows = path.with_name(path.name.replace("json.gz", "txt")).read_text().splitlines()
        assert [row[2:27].strip() for row in rows[1:]] == [*ROWS.values(), OWN]
        seconds = [float(row[27:].split()[0]) for row in rows[1:]]
        assert min(seconds) >= 0 and seconds[0] > 0
        assert sum(seconds) == pytest.approx(float(rows[0].split(": ")[1].split()[0]), abs=1e-3)
    assert not (tmp_path / "plain" / "profile").exists()


def test_a_stage_pays_for_itself_only():
    phases = Phases(torch.device("cpu"))
    phases.enter("forward")
    phases.enter("a step's drawings")
    phases.leave()
    before = dict(phases.seconds)
    assert before["forward"] > 0 and before[OWN] > 0 and before["backward"] == before["data"] == 0
    wait = distributed.Work.wait
    with phases.waits_counted():
        assert distributed.Work.wait is not wait
    assert distributed.Work.wait is wait
    assert phases.table("step 3").splitlines()[0].startswith("step 3: 0.")


def test_what_cannot_be_traced_is_refused(make_config, tmp_path):
    with pytest.raises(ConfigError, match=r"profile.steps: there is no step 7 among 6"):
        make_config({"profile.steps": [2, 7]})
    with pytest.raises(ConfigError, match="Did you mean profile.enabled?"):
        make_config({"profile.enable": True})
    (said,) = run_ranks(1, refuse, make_config({"profile.enabled": True, "profile.ranks": [0, 1]}, tmp_path / "run"))
    assert "profile.ranks: there is no rank 1 among 1 processes" in said


def test_the_flag_is_a_setting(monkeypatch):
    seen = []
    monkeypatch.setattr("megavlm.launch.train.train", lambda recipe, overrides: seen.append(overrides))
    cli.Commands().train("digits", profile=True, **{"profile.steps": [2]})
    cli.Commands().train("digits", run_dir="runs/mine")
    assert seen == [{"profile.steps": [2], "profile.enabled": True}, {"run_dir": "runs/mine"}]
