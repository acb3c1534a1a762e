"""What the sbatch script does with the end of a run: SLURM's commands are stand-ins that write down how they are called."""

import os
import subprocess
import time

import pytest

from megavlm.launch.job import Job
from megavlm.launch.submit import submit

STANDINS = {
    # the run: leaves a word, or stacks of a stuck rank, and ends with a status
    "srun": 'echo srun >>"$CALLS"; [ -n "$WORD" ] && echo "$WORD" >"$RUN_FOLDER/exit_code"\n'
    '[ -n "$STACKS" ] && mkdir -p "$RUN_FOLDER/hangs" && sleep 0.02 && echo stack >"$RUN_FOLDER/hangs/stuck-rank-0.txt"\nexit $STATUS',
    "scontrol": 'case "$1" in requeue) echo requeue >>"$CALLS"; kill -TERM $PPID;; show) [ "$2" = hostnames ] && echo node1; true;; esac',
    "squeue": "echo N/A",
}


@pytest.fixture
def run_script(make_config, digits_folder, tmp_path, monkeypatch):
    """``run_script(status, word)``: the script's own status, and the commands that it called."""
    for name, text in STANDINS.items():
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!/bin/bash\n{text}\n")
        file.chmod(0o755)
    run = tmp_path / "a run"
    overrides = {"run_dir": str(run), "vocabulary.text_model": str(digits_folder / "text.model")}
    submit("digits", overrides, Job(gpus_per_node=0, node_failure_wait_s=0, node_check=False), dry_run=True)

    def call(status: int, word: str = "", stacks: str = "", times: int = 1):
        calls = tmp_path / "calls"
        calls.write_text("")
        variables = {"CALLS": calls, "RUN_FOLDER": run, "STATUS": status, "WORD": word, "STACKS": stacks}
        variables |= {
            "SLURM_JOB_ID": 7,
            "SLURM_JOB_NODELIST": "node1",
            "SLURM_CPUS_PER_TASK": 1,
            "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        }
        environment = os.environ | {name: str(value) for name, value in variables.items()}
        for _ in range(times):
            done = subprocess.run(
                ["bash", str(run / "slurm" / "train.sbatch")], env=environment, capture_output=True, text=True, timeout=60, check=False
            )
        return done.returncode, calls.read_text().split(), done.stdout

    return call


@pytest.mark.parametrize(
    ("status", "word"),
    [(0, "74"), (1, "71"), (137, "71"), (137, ""), (134, ""), (135, ""), (139, ""), (137, "75")],
)
def test_what_can_go_on_is_requeued(run_script, status, word):
    code, calls, text = run_script(status, word)
    assert (code, calls) == (0, ["srun", "requeue"]), text


@pytest.mark.parametrize(
    ("status", "word", "expected"),
    [(0, "0", 0), (1, "1", 1), (137, "1", 1), (137, "2", 2), (1, "", 1), (127, "", 127), (1, "70", 70), (130, "130", 130), (1, "73", 73)],
)
def test_an_error_is_not(run_script, status, word, expected):
    code, calls, text = run_script(status, word)
    assert (code, calls) == (expected, ["srun"]), text


def test_a_rank_that_was_stuck_in_c_is_requeued(run_script, tmp_path):
    assert run_script(1, stacks="yes")[1] == ["srun", "requeue"]
    time.sleep(0.02)
    assert run_script(1)[1] == ["srun"], "the stacks are an earlier start's"


def test_the_fourth_start_without_a_new_checkpoint_is_the_last(run_script):
    code, calls, text = run_script(137, times=4)
    assert calls.count("requeue") == 3 and code == 1 and "three restarts without a new checkpoint" in text
