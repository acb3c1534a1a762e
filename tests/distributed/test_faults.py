"""Injected faults with real ZeRO-3 processes: NaN in one rank's gradient, a hung rank, signals to one rank only."""

import json

import pytest

from megavlm.cli.main import main
from megavlm.runs.exits import Exit
from megavlm.training.forensics import replay
from tests.distributed.fault_work import hang, inject_nan, stop_by_signal, stop_by_touching, stop_with_a_full_disk
from tests.distributed.ranks import run_ranks
from tests.distributed.work import train


def test_nan_in_one_ranks_gradient_skips_the_step_on_all(make_config, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    config = make_config({"optimizer.num_steps": 5, "checkpoint.every_steps": 2, "checkpoint.keep_last": 3}, run)
    results = run_ranks(2, inject_nan, config, [2])
    for result in results:
        assert result["ended"] == "done" and result["skipped"] == [3]
        unchanged = [name for name, value in result["weights"][2].items() if value.equal(result["weights"][3][name])]
        assert len(unchanged) == len(result["weights"][2]), "weights and moments are those of before the step"
        assert not all(value.equal(result["weights"][4][name]) for name, value in result["weights"][3].items())
        assert result["group_steps"] == {"decay": 4, "no_decay": 4}, "the counters do not count the skipped step"
    assert "step 3 was skipped: not finite" in results[0]["log"]
    (report,) = (run / "forensics").iterdir()
    content = json.loads(report.read_text())
    trained = sorted((lane, ids) for result in results for lane, ids in result["ids"][2])
    assert [(p["lane"], [tuple(s[:-1]) for s in p["samples"]]) for p in content["packs"]] == trained

    monkeypatch.setattr("sys.argv", ["megavlm", "replay", str(run)])
    main()
    again = json.loads(capsys.readouterr().out)
    assert again["step"] == 3 and again["weights"] == "step-00000002" and len(again["packs"]) == 4
    for pack in again["packs"]:
        # the NaN was ours, not the data's
        assert 0 < pack["gradient_norm"] < 1e3 and not pack["gradients_not_finite"] and pack["samples"]
    # run alone, the four packs have the losses that they had in the run
    assert {task for pack in again["packs"] for task in pack["loss"]} == {"understanding", "generation"}


def test_the_guard_begins_anew_with_the_dense_finish(make_config, tmp_path):
    """Few tokens, then all of them: the loss jumps. Ten such steps in a row once ended a run."""
    settings = {"optimizer.num_steps": 6, "checkpoint.every_steps": 2, "routing.dense_finish_fraction": 0.5}
    run_ranks(1, train, make_config(settings, tmp_path / "run"), 4)
    states = [json.loads((path / "state.json").read_text()) for path in sorted((tmp_path / "run" / "checkpoints").glob("step-*"))]
    assert [state["guard"]["count"] for state in states] == [2, 1], "after step 2 of the route, after step 1 of the finish"


def test_replay_finds_the_module_that_is_not_finite(make_config, tmp_path, monkeypatch):
    from megavlm.model.backbone import Backbone

    config = make_config({"optimizer.num_steps": 4, "checkpoint.every_steps": 2}, tmp_path / "run")
    run_ranks(1, inject_nan, config, [2])
    original = Backbone.hidden_states

    def broken(self, pack, observe):
        self.causal_lm.model.layers[2].mlp.down_proj.weight.data[0, 0] = float("nan")
        return original(self, pack, observe)

    monkeypatch.setattr(Backbone, "hidden_states", broken)
    packs = replay(tmp_path / "run")["packs"]
    assert packs[0]["modules_not_finite"][0] == "causal_lm.model.layers.2.mlp.down_proj"


def test_too_many_skipped_steps_in_a_row_end_the_run(make_config, tmp_path):
    config = make_config({"optimizer.num_steps": 20, "faults.max_skipped_in_a_row": 3}, tmp_path / "run")
    results = run_ranks(2, inject_nan, config, range(4, 20))
    for result in results:
        assert result["code"] == Exit.DIVERGED and "3 steps in a row were skipped" in result["ended"]
        assert result["skipped"] == [5, 6, 7]


def test_a_hung_rank_is_named_with_the_stacks_of_all(make_config, tmp_path):
    config = make_config({"optimizer.num_steps": 3}, tmp_path / "run")
    results = run_ranks(2, hang, config)
    assert [result["codes"] for result in results] == [[Exit.HUNG]] * 2
    here = tmp_path / "run" / "hangs" / "step-00000003"
    stages = [json.loads((here / f"rank-{rank}.json").read_text())["stage"] for rank in range(2)]
    assert stages == ["wait for the ranks' data", "data"]
    assert "sleep_here" in (here / "rank-1.txt").read_text() and "sleep_here" not in (here / "rank-0.txt").read_text()
    assert "rank 1 on" in results[0]["log"] and "in stage 'data'" in results[0]["log"]
    # the note for the other rank is out of the way of the next start, whose watchdogs look for one
    run_ranks(2, train, config, 3)
    (kept,) = (tmp_path / "run" / "hangs").glob("step-*")
    assert kept.name.startswith("step-00000003-")


@pytest.mark.parametrize(("name", "code"), [("SIGUSR1", Exit.INTERRUPTED), ("SIGTERM", Exit.STOPPED)])
def test_a_signal_to_one_rank_stops_all_between_micro_batches(make_config, tmp_path, name, code):
    """And the step that was given up half-way is done again as if nothing had been."""
    settings = {"optimizer.num_steps": 5, "data.num_lanes": 8}
    config = make_config(settings | {"checkpoint.every_steps": 100}, tmp_path / "run")
    results = run_ranks(2, stop_by_signal, config, name)
    assert [result["code"] for result in results] == [code] * 2
    assert [result["packs_of_last_step"] for result in results] == [2, 2], "after the second of four micro-batches"
    resumed = run_ranks(2, train, config, 5)
    whole = run_ranks(2, train, make_config(settings, tmp_path / "whole"), 5)
    assert resumed[0]["first"] == 2
    for rank in range(2):
        assert resumed[rank]["ids"] == whole[rank]["ids"][2:]
        for key, value in whole[rank]["weights"].items():
            assert value.equal(resumed[rank]["weights"][key]), key


def test_touching_save_and_stop(make_config, tmp_path):
    config = make_config({"optimizer.num_steps": 50, "checkpoint.every_steps": 100}, tmp_path / "run")
    results = run_ranks(2, stop_by_touching, config)
    assert [result["code"] for result in results] == [Exit.STOPPED] * 2
    steps = [path.name for path in sorted((tmp_path / "run" / "checkpoints").glob("step-*"))]
    assert steps == ["step-00000004", f"step-{results[0]['step']:08d}"] and results[0]["step"] < 50
    assert not (tmp_path / "run" / "save").exists() and not (tmp_path / "run" / "stop").exists()


def test_a_stop_whose_last_save_fails_is_an_error(make_config, tmp_path):
    """Who stops a run counts on its checkpoint: status 1 instead of the one of a stop, and the older checkpoint is still there."""
    config = make_config({"optimizer.num_steps": 50, "checkpoint.every_steps": 2}, tmp_path / "run")
    (result,) = run_ranks(1, stop_with_a_full_disk, config)
    assert "the last checkpoint could not be written" in result["error"]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")] == ["step-00000002"]
