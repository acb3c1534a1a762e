"""The numbers of the report, on results that are known, and one tiny study from nothing."""

import json

import numpy as np
import pytest

from megavlm.cli.main import main
from megavlm.errors import MegavlmError
from megavlm.study.report import statements, summarize, write_report
from megavlm.study.results import Results
from megavlm.study.spec import Metric, StudyConfig
from megavlm.study.statistics import bootstrap, gain, retained


def test_the_interval_of_few_seeds_is_their_range_and_of_many_the_bootstraps_percentiles():
    found = bootstrap(np.mean, np.array([0.0, 1.0, 5.0]))
    assert (found.value, found.low, found.high) == (pytest.approx(2), 0.0, 5.0)
    values = np.random.default_rng(0).normal(size=40)
    found, error = bootstrap(np.mean, values), values.std() / np.sqrt(40)
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)


def test_one_seed_against_the_others_is_enough_to_leave_a_question_open():
    assert gain(np.array([-0.01, 0.5, 0.5]), np.zeros(3)).low < 0 < gain(np.array([0.01, 0.5, 0.5]), np.zeros(3)).low


def test_pairing_by_seed_removes_what_seeds_share():
    luck = np.array([-10.0, 0.0, 10.0])
    assert gain(luck + 1, luck) == gain(np.ones(3), np.zeros(3))
    found = retained(luck + 1, luck, luck + 2, luck)
    assert (found.value, found.low, found.high) == (0.5, 0.5, 0.5)


LABELS = ("labels_of_understanding", "labels_of_generation", "labels_of_text")


def results_of(make_study, quality: dict) -> Results:
    """``quality``: (policy, data) → values of the three seeds for (understanding, generation's distance)."""
    metrics = {"understanding": Metric(name="accuracy", path="u"), "generation": Metric(name="distance", path="g", better="low")}
    study = StudyConfig.model_validate(make_study(seeds=[0, 1, 2]).model_dump() | {
        "policies": {"dense": {}, "other": {}},
        "tasks": {task: {"sources": [task], "metrics": [metric]} for task, metric in metrics.items()},
    })  # fmt: skip
    totals = {"executed_flops": 1e15, "cpu_seconds": 60.0}
    runs = {
        (policy, data, seed): {"evaluation": {"u": u[seed], "g": g[seed]}, "totals": totals, "folder": f"{policy}-{data}-{seed}"}
        for (policy, data), (u, g) in quality.items() for seed in range(3)
    }  # fmt: skip
    return Results(study, runs)


def test_statements_say_no_more_than_the_intervals(make_study):
    none = [0.0, 0.0, 0.0]
    found = results_of(make_study, {
        ("dense", "joint"): ([0.9, 0.91, 0.92], [50, 60, 40]), ("dense", "understanding"): ([0.8, 0.8, 0.8], none),
        ("dense", "generation"): (none, [50, 50, 50]), ("other", "joint"): ([0.80, 0.81, 0.82], [20, 20, 20]),
        ("other", "understanding"): ([0.8, 0.8, 0.8], none), ("other", "generation"): (none, [50, 50, 50]),
    })  # fmt: skip
    summary = summarize(found)
    u = summary["policies"]["other"]["tasks"]["understanding"]["accuracy"]
    assert u["retained"].value == pytest.approx(0.01 / 0.11) and u["joint_minus_dense_joint"].value == pytest.approx(-0.1)
    # a lower distance is a gain
    assert summary["policies"]["other"]["tasks"]["generation"]["distance"]["synergy"].value == pytest.approx(30)
    lines = statements(summary)
    assert "Dense joint training helps understanding" in lines[0] and "keeps less than 95% of the synergy" in lines[1]
    assert "is below" in lines[1]
    assert "is open" in lines[2] and "retain" not in lines[3] and "synergy" not in lines[3] and "is above" in lines[3]


def test_only_seeds_that_are_complete_are_compared(make_study):
    quality = {(policy, data): ([0, 0, 0], [0, 0, 0]) for policy in ("dense", "other") for data in ("joint", "understanding", "generation")}
    found = results_of(make_study, quality)
    del found.runs["other", "joint", 1]
    assert (found.seeds("other"), found.seeds("dense")) == ([0, 2], [0, 1, 2])
    summary = summarize(found)
    assert (summary["policies"]["other"]["num_seeds"], summary["policies"]["dense"]["num_seeds"]) == (2, 3)
    assert not [line for line in statements(summary) if "other" in line], "two seeds are too few to claim anything"
    del found.runs["dense", "generation", 0]
    assert statements(summarize(found)) == ["With 2 complete seeds nothing is claimed; three are the least."]
    found.runs = {place: run for place, run in found.runs.items() if place[0] == "other"}
    with pytest.raises(MegavlmError, match="complete for no seed"):
        write_report(found, "megavlm study")


def with_lengths(make_study) -> Results:
    """A dense curve that is linear in the logarithm of the FLOPs, and a policy at 0.4 of them that is as good as dense at 0.6."""
    curve = {"dense_30": 0.3, "dense_50": 0.5, "dense": 1.0}
    none, luck = [0.0] * 3, np.array([0.0, 1.0, 2.0])
    quality = {(name, "joint"): (np.log(share) + luck, [50] * 3) for name, share in curve.items()}
    quality |= {(name, task): (none, none) for name in ("dense", "other") for task in ("understanding", "generation")}
    found = results_of(make_study, quality | {("other", "joint"): (np.log(0.6) + luck, [20] * 3)})
    found.study = found.study.model_copy(update={"dense_lengths": [0.5, 0.3], "study_dir": str(found.study.study_dir)})
    for (name, data, _), run in found.runs.items():
        share = curve.get(name, 0.4) if data == "joint" else 1.0
        run["totals"] = {"executed_flops": 1e15 * share, "cpu_seconds": 60.0 * min(1.0, 2 * share)} | dict.fromkeys(LABELS, 5.0)
    return found


def test_the_cost_to_equal_quality_is_read_from_the_dense_curve(make_study, tmp_path):
    found = with_lengths(make_study)
    entry = summarize(found)["policies"]["other"]["tasks"]
    reading, drawing = entry["understanding"]["accuracy"], entry["generation"]["distance"]
    assert reading["dense_flops_of_equal_quality"].value == pytest.approx(0.6)
    assert reading["worth_in_flops"].value == pytest.approx(1.5)
    assert reading["worth_in_flops"].low == pytest.approx(1.5), "what seeds share is no uncertainty"
    assert reading["worth_in_time"].value == pytest.approx(60 / 48), "dense at half the steps or more costs the whole time here"
    assert f"{drawing['worth_in_flops']:.1f}" == ">2.5 [>2.5, >2.5]", "no dense run draws as well"
    (tmp_path / "study").mkdir()
    text = write_report(found, "megavlm study known").read_text()
    assert "| other | understanding | accuracy | 40.0% | 60% [60%, 60%] | 1.50 [1.50, 1.50] |" in text
    assert "it is worth 1.50 [1.50, 1.50] times its FLOPs, more than dense training that costs as much" in text
    assert "also at 30%, 50% of the steps" in text and "| dense_30 |" in text
    assert (tmp_path / "study" / "report.png").stat().st_size > 20_000


def test_without_lengths_nothing_is_said_of_worth(make_study):
    found = with_lengths(make_study)
    found.study = found.study.model_copy(update={"dense_lengths": []})
    summary = summarize(found)
    assert summary["lengths"] == {} and "worth_in_flops" not in summary["policies"]["other"]["tasks"]["understanding"]["accuracy"]


def test_a_study_from_nothing_and_again(make_study, tmp_path, monkeypatch, capsys):
    study = make_study(policies={"dense": {}}, seeds=[0], overrides=make_study().overrides | {"optimizer.num_steps": 2})
    import yaml
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # a shell inside a job, or a process that has trained: the arms are worlds of their own all the same
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29417"}.items():
        monkeypatch.setenv(name, value)
    file = tmp_path / "study.yaml"
    assert yaml.safe_load(file.read_text())["overrides"]["optimizer.num_steps"] == 2
    for _ in range(2):
        monkeypatch.setattr("sys.argv", ["megavlm", "study", str(file), "--parallel", "2"])
        main()
        assert capsys.readouterr().out.strip().endswith(f"{study.study_dir}/report.md")
    folder = tmp_path / "study"
    text = (folder / "report.md").read_text()
    assert "| dense |" in text and "dense-joint-0" in text and (folder / "report.png").stat().st_size > 10_000
    report = json.loads((folder / "report.json").read_text())
    assert report["policies"]["dense"]["flops_share"]["value"] == 1.0
    (events,) = [EventAccumulator(str(run)).Reload() for run in (folder / "tensorboard").glob("dense-joint-0")]
    assert "_hparams_/session_start_info" in events.summary_metadata
    assert {"cost/PFLOPs", "cost/CPU minutes"} < {*events.Tags()["scalars"]}
    held_out = EventAccumulator(str(folder / "runs" / "dense-joint-0" / "tensorboard" / "evaluation")).Reload()
    assert [event.step for event in held_out.Scalars("evaluation/losses/understanding")] == [2], "at the step of the checkpoint"
    assert held_out.Tags()["images"] == ["drawings"]
    # trained and judged once, although the study was given twice
    assert (folder / "runs" / "dense-joint-0" / "study.log").read_text().count("megavlm train") == 1
    make_study(policies={"dense": {}}, seeds=[0], overrides=study.overrides | {"optimizer.num_steps": 1, "optimizer.warmup_steps": 1})
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "was begun with other settings" in capsys.readouterr().err
