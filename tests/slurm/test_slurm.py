"""Runs on a real SLURM cluster: whatever happens to the job, it comes back and trains on the same data."""

import subprocess
import sys

import pytest

from megavlm.config import load_config
from megavlm.parts.parts import Parts
from megavlm.runs.manifest import complete_checkpoints
from megavlm.training.forensics import chain
from tests.slurm.conftest import NUM_STEPS

pytestmark = pytest.mark.timeout(900)


def test_a_job_survives_requeueing_preemption_and_a_crashed_node(cluster, make_run, undisturbed):
    run = make_run("disturbed")
    run.submit(2)
    run.until_step(0)
    cluster.ask("scontrol", "requeue", run.job)
    run.until_resumed(1)

    urgent = cluster.ask("sbatch", "--parsable", "--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 2")
    run.until_resumed(2)
    assert f"JobId={urgent.strip()} " in cluster.ask("scontrol", "show", "job", urgent.strip())
    assert "SIGTERM was received: ended after step" in run.log(), "preempted with a checkpoint"

    victim = run.nodes()[-1]
    cluster.crash(victim)
    try:
        run.until_resumed(3)
    finally:
        cluster.boot(victim)
    assert "Node failure" in run.log() or "NODE FAILURE" in run.log()
    run.until_state("COMPLETED")
    assert run.log().count("resuming after step") == 3
    assert run.data() == undisturbed.data()
    status = subprocess.run(
        [sys.executable, "-m", "megavlm", "status", str(run.folder)],
        env=cluster.environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for words in (
        "state            done",
        f"step             {NUM_STEPS} of {NUM_STEPS}, 2 processes",
        f"last checkpoint  step-{NUM_STEPS:08d}",
        "queue            COMPLETED",
        "restarts         3",
    ):
        assert words in status, status


def test_the_time_limit_ends_in_a_requeued_job_that_goes_on(make_run):
    run = make_run("limited")
    # a minute is the shortest limit; the run ends well before it
    run.submit(2, "--time=1", "--warning-s=0", "--engine.stop_margin_s=20", "--optimizer.num_steps=100000")
    run.until_resumed(1)
    assert "the job's time limit is near: ended after step" in run.log()
    (run.folder / "stop").touch()
    run.until_state("COMPLETED")
    assert "stop was found: ended after step" in run.log()
    # any number of steps may have been done: ask the lanes themselves what they hold up to there
    config = load_config(str(run.folder / "config.yaml"))
    step, digests, _ = run.data()
    for number in range(config.data.num_lanes):
        digest, lane = "", Parts(config).make_lane(number)
        for _ in range(step):
            digest = chain(digest, next(lane)[0])
        assert digests[str(number)] == digest


def test_a_cancelled_job_on_4_nodes_leaves_a_checkpoint_from_which_2_nodes_finish(make_run, undisturbed):
    run = make_run("four-then-two")
    run.submit(4)
    run.until_step(0)
    run.cluster.ask("scancel", run.job)
    run.until_state("CANCELLED")
    run.until(lambda: "SIGTERM was received: ended after step" in run.log(), "the last word")
    last = run.newest_step()
    assert f"SIGTERM was received: ended after step {last} of" in run.log() and 0 < last < NUM_STEPS
    run.submit(2)
    run.until_state("COMPLETED")
    assert f"resuming after step {last}" in run.log()
    assert run.data() == undisturbed.data()


def test_a_failing_job_is_not_requeued(make_run):
    run = make_run("failing")
    assert "not submitted" in run.submit(2, "--dry-run")
    recipe = run.folder / "slurm" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("num_lanes", "num_lains"))
    run.job = run.cluster.ask("sbatch", "--parsable", str(run.folder / "slurm" / "train.sbatch")).strip()
    run.until(lambda: run.field("JobState") == "FAILED", "state FAILED")
    assert run.field("Restarts") == "0" and run.field("ExitCode") == "2:0"
    assert "Did you mean data.num_lanes?" in run.log()


def test_a_study_is_an_array_job(make_run, tmp_path):
    run = make_run("study")
    study = tmp_path / "study.yaml"
    study.write_text("- {name: first, seed: 1}\n- {name: second, seed: 2}\n")
    run.submit(1, f"--array={study}", "--optimizer.num_steps=3")
    for name in ("first", "second"):
        checkpoints = run.folder / name / "checkpoints"
        run.until(lambda here=checkpoints: complete_checkpoints(here), f"the checkpoint of {name}")
        assert (run.folder / name / "slurm" / "recipe.yaml").is_file()


def test_another_job_takes_over_without_a_node_that_is_not_well(make_run, undisturbed):
    run = make_run("sick-node")
    run.submit(2, "--dry-run")
    run.job = run.cluster.ask("sbatch", "--hold", "--parsable", str(run.folder / "slurm" / "train.sbatch")).strip()
    # the first node that SLURM gives cannot leave its file
    sick = run.folder / "slurm" / f"nodes-{run.job}-0" / "node1"
    sick.parent.mkdir()
    sick.symlink_to(run.folder / "gone" / "file")
    run.cluster.ask("scontrol", "release", run.job)
    run.until_state("COMPLETED")
    assert "node1 is not well: it cannot write" in run.log() and "takes over" in run.log() and run.newest_step() == 0
    run.job = next(path.stem for path in (run.folder / "slurm").glob("*.job"))
    run.until_state("COMPLETED")
    assert "node1" not in run.nodes() and run.data() == undisturbed.data()
    # rank 1 has a log of its own
    assert [path.name for path in (run.folder / "slurm" / f"ranks-{run.job}-0").iterdir()] == ["rank-1.txt"]
