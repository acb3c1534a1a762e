"""A node that is not well is named and left out, before anything is trained: SLURM's commands are stand-ins that do what they would."""

import os
import subprocess
import sys
import time

import pytest
import torch

from megavlm.launch import node_check
from megavlm.launch.job import Job
from megavlm.launch.submit import submit

STANDINS = {
    # the check, once per node; then the training
    "srun": """
if [[ "$*" == *node_check* ]]; then
    for node in node1 node2; do
        [[ " $SICK " == *" $node "* ]] || SLURMD_NODENAME=$node "${@:5}"
    done
else
    echo train >>"$CALLS"
fi
exit 0
""",
    "timeout": 'shift; exec "$@"',
    "scontrol": 'case "$1$2" in showhostnames) printf "node1\\nnode2\\n";; requeue*) echo requeue >>"$CALLS"; kill -TERM $PPID;; esac',
    "squeue": "echo N/A",
    "sbatch": 'echo "$@" >>"$CALLS"; [ -z "$REFUSED" ] && echo "8;cluster"',
}


@pytest.fixture
def run_script(digits_folder, tmp_path):
    for name, text in STANDINS.items():
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!/bin/bash\n{text}\n")
        file.chmod(0o755)
    run = tmp_path / "a run"
    submit(
        "digits",
        {"run_dir": str(run), "vocabulary.text_model": str(digits_folder / "text.model")},
        Job(nodes=2, gpus_per_node=0),
        dry_run=True,
    )

    def call(**variables: str):
        calls = tmp_path / "calls"
        calls.write_text("")
        environment = os.environ | {
            "CALLS": str(calls),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_PER_TASK": "1",
            "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
            **variables,
        }
        command = ["bash", str(run / "slurm" / "train.sbatch")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        return done.returncode, calls.read_text().splitlines(), done.stdout + done.stderr

    return call, run / "slurm"


def test_nodes_that_are_well_train(run_script):
    call, folder = run_script
    _, calls, text = call()
    assert calls == ["train"], text
    assert not (folder / "bad-nodes.txt").exists() and sorted(p.name for p in (folder / "nodes-7-0").iterdir()) == ["node1", "node2"]


def test_another_job_takes_over_without_a_node_that_is_not_well(run_script):
    call, folder = run_script
    code, calls, text = call(SICK="node2")
    assert code == 0 and calls == [f"--parsable --exclude=node2 {folder}/train.sbatch"], text
    assert (folder / "bad-nodes.txt").read_text() == "node2\n" and (folder / "8.job").exists()
    # what was found before stays out
    (folder / "nodes-7-0" / "node1").unlink()
    assert call(SICK="node1", SLURM_ARRAY_TASK_ID="3")[1] == [f"--parsable --exclude=node1,node2 --array=3 {folder}/train.sbatch"]


def test_where_no_job_can_be_submitted_the_user_is_told_how(run_script):
    code, calls, text = run_script[0](SICK="node2", REFUSED="1")
    assert code == 1 and "train" not in calls and "sbatch --exclude=node2" in text


def test_if_no_node_passes_the_check_itself_is_wrong(run_script):
    code, calls, text = run_script[0](SICK="node1 node2")
    assert (code, calls) == (1, []) and "--node-check=False" in text


def num_gpus() -> int:
    return torch.cuda.device_count()


def test_the_check_says_what_is_wrong(tmp_path, monkeypatch):
    assert list(node_check.problems(0, time.time())) == []
    assert "clock differs by 500 s" in next(node_check.problems(0, time.time() - 500))
    assert f"of {num_gpus() + 1} GPUs can be used" in next(node_check.problems(num_gpus() + 1, time.time()))
    monkeypatch.setattr(node_check, "FREE_TEMPORARY_MIB", 2**40)
    assert "MiB left" in next(node_check.problems(0, time.time()))


def test_a_node_that_cannot_write_leaves_no_file(tmp_path):
    command = [sys.executable, "-m", "megavlm.launch.node_check"]
    environment = os.environ | {"SLURMD_NODENAME": "node9"}
    gone = subprocess.run([*command, str(tmp_path / "gone")], env=environment, capture_output=True, text=True, check=False)
    assert gone.returncode == 1 and "node9 is not well: it cannot write" in gone.stderr
    assert subprocess.run([*command, str(tmp_path)], env=environment, check=False).returncode == 0
    assert (tmp_path / "node9").exists()
