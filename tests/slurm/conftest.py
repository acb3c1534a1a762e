"""A cluster of 4 nodes for the whole session, and runs submitted to it with `megavlm submit`."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from megavlm.runs.manifest import complete_checkpoints, step_of
from tests.conftest import TINY
from tests.slurm.cluster import Cluster, Unavailable

NUM_STEPS = 90
TIMEOUT_S = 240
"""For one thing to happen; generous, for the machine may be busy."""


@pytest.fixture(scope="session")
def cluster():
    """Four real nodes. Installs SLURM if need be; skips where that cannot be done."""
    cluster = Cluster()
    try:
        cluster.install()
        cluster.start(4)
    except Unavailable as reason:
        pytest.skip(f"no SLURM here: {reason}")
    yield cluster
    cluster.stop()


class SubmittedRun:
    """A run on the cluster.

    Args:
        cluster: Where.
        recipe: Path of the recipe.
        folder: The run folder.
    """

    def __init__(self, cluster: Cluster, recipe: Path, folder: Path):
        self.cluster, self.recipe, self.folder, self.job = cluster, recipe, folder, ""

    def submit(self, nodes: int, *options: str, expect: int = 0) -> str:
        """`megavlm submit`, one process per node; returns what it prints."""
        command = [sys.executable, "-m", "megavlm", "submit", str(self.recipe), f"--run_dir={self.folder}"]
        command += [f"--nodes={nodes}", "--gpus-per-node=0", "--cpus-per-task=1", "--setup=export OMP_NUM_THREADS=1"]
        environment = self.cluster.environment | {"PYTHONPATH": os.getcwd()}
        done = subprocess.run([*command, *options], env=environment, capture_output=True, text=True)
        assert done.returncode == expect, done.stdout + done.stderr
        self.job = done.stdout.split()[1].rstrip(":") if done.stdout.startswith("job ") else ""
        return done.stdout + done.stderr

    def until(self, condition, what: str):
        """Wait until ``condition()`` is true; returns it."""
        deadline_s = time.monotonic() + TIMEOUT_S
        while not (result := condition()):
            assert time.monotonic() < deadline_s, f"{what} does not happen\n{self.field('JobState')}\n{self.log()}"
            assert self.field("JobState") not in ("FAILED", "TIMEOUT") or "FAILED" in what, self.log()
            time.sleep(0.3)
        return result

    def until_state(self, state: str) -> None:
        self.until(lambda: self.field("JobState") == state, f"state {state}")

    def until_step(self, more_than: int) -> int:
        """Wait for a checkpoint of a later step than this."""
        return self.until(lambda: self.newest_step() > more_than and self.newest_step(), f"a step after {more_than}")

    def until_resumed(self, times: int) -> None:
        """Wait until the run has gone on from a checkpoint so many times, and has written another one."""
        self.until(lambda: self.log().count("resuming after step") == times, f"going on for the {times}. time")
        self.until_step(self.newest_step())

    def field(self, name: str) -> str:
        """A field of `scontrol show job`."""
        words = self.cluster.ask("scontrol", "show", "job", self.job).split()
        return next(word.split("=", 1)[1] for word in words if word.startswith(name + "="))

    def newest_step(self) -> int:
        """Of the complete checkpoints; 0 if there is none."""
        return max((step_of(path) for path in complete_checkpoints(self.folder / "checkpoints")), default=0)

    def nodes(self) -> list[str]:
        return self.cluster.ask("scontrol", "show", "hostnames", self.field("NodeList")).split()

    def log(self) -> str:
        return "\n".join(path.read_text() for path in sorted((self.folder / "slurm").glob("*.out")))

    def data(self) -> tuple[int, dict, dict]:
        """Step, digests of all data trained on, and lane states of the newest checkpoint."""
        state = json.loads((complete_checkpoints(self.folder / "checkpoints")[-1] / "state.json").read_text())
        digests = {lane: digest for rank in state["ranks"] for lane, digest in rank["digests"].items()}
        return state["step"], digests, state["lanes"]


@pytest.fixture(scope="session")
def make_run(cluster, digits_folder, tmp_path_factory):
    """``make_run(name)``: a run that is not submitted yet."""
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "digits.yaml").write_text((Path(__file__).parents[2] / "megavlm/recipes/digits.yaml").read_text())
    tree = yaml.safe_load((folder / "digits.yaml").read_text())
    settings = TINY | {
        "vocabulary.text_model": str(digits_folder / "text.model"),
        "data.sources": {task: {"shards": f"{digits_folder}/{task}-train-{{00..07}}.tar"} for task in ("understanding", "generation")},
        "optimizer.num_steps": NUM_STEPS,
        "checkpoint.every_steps": 10,
        "checkpoint.keep_last": 3,
        "monitor.log_every_steps": 10,
    }
    for path, value in settings.items():
        *parents, leaf = path.split(".")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[leaf] = value
    (folder / "digits.yaml").write_text(yaml.safe_dump(tree))
    return lambda name: SubmittedRun(cluster, folder / "digits.yaml", folder / name)


@pytest.fixture(scope="session")
def undisturbed(make_run):
    """A run on 2 nodes that nothing happened to."""
    run = make_run("undisturbed")
    run.submit(2)
    run.until_state("COMPLETED")
    assert run.newest_step() == NUM_STEPS
    return run
