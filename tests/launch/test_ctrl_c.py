"""Ctrl-C on real runs: once saves and says so, twice ends at once; alone, under torchrun, and before the first step."""

import re
import signal
import subprocess
import sys
import time

import pytest

from megavlm.config import save_config
from megavlm.runs.exits import Exit
from megavlm.runs.manifest import complete_checkpoints, step_of
from megavlm.runs.status import describe_status

TIMEOUT_S = 150


class Started:
    """A run in processes of its own; what it prints goes to a file."""

    def __init__(self, config, folder, *launcher):
        recipe = folder / "recipe.yaml"
        save_config(config, recipe)
        self.output = folder / "output.txt"
        command = [sys.executable, *launcher, "-m", "megavlm", "train", str(recipe)]
        with self.output.open("w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)

    def until(self, words: str) -> None:
        """Wait until it has printed something."""
        deadline_s = time.monotonic() + TIMEOUT_S
        while words not in self.output.read_text():
            assert time.monotonic() < deadline_s and self.process.poll() is None, self.output.read_text()
            time.sleep(0.05)

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def end(self) -> str:
        """What it printed, once it has ended."""
        self.status = self.process.wait(TIMEOUT_S)
        return self.output.read_text()


@pytest.fixture
def start(make_config, tmp_path):
    """``start(*launcher)``: a run with far too many steps."""
    started = []

    def start_one(*launcher):
        config = make_config({"optimizer.num_steps": 100_000, "checkpoint.every_steps": 100_000})
        started.append(Started(config, tmp_path, *launcher))
        return started[-1]

    yield start_one
    for run in started:
        run.process.kill()


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


@pytest.mark.parametrize("launcher", [(), pytest.param(TORCHRUN, marks=pytest.mark.slow)], ids=["alone", "torchrun"])
def test_once_saves_and_ends_with_a_word(start, tmp_path, launcher):
    run = start(*launcher)
    run.until("step 3/")
    run.interrupt()
    text = run.end()
    (saved,) = complete_checkpoints(tmp_path / "run" / "checkpoints")
    assert f"Ctrl-C was pressed: ended after step {step_of(saved)} of 100000; it is saved in {saved}" in text
    assert "give the same command again to go on" in text
    assert (tmp_path / "run" / "exit_code").read_text() == f"{int(Exit.STOPPED)}\n"
    assert describe_status(tmp_path / "run").splitlines()[0].endswith("stopped on request")
    if not launcher:
        assert run.status == Exit.STOPPED and "Traceback" not in text


def test_before_the_first_step_there_is_nothing_to_save(start, tmp_path):
    run = start()
    until_it_listens(run.process.pid)
    run.interrupt()
    text = run.end()
    assert run.status == Exit.STOPPED and "ended after step 0 of 100000; no step is complete, so there is nothing to save" in text
    assert "Traceback" not in text and not complete_checkpoints(tmp_path / "run" / "checkpoints")


@pytest.mark.parametrize("launcher", [(), pytest.param(TORCHRUN, marks=pytest.mark.slow)], ids=["alone", "torchrun"])
def test_twice_ends_at_once(start, tmp_path, launcher):
    run = start(*launcher)
    until_it_listens(*([run.process.pid] if not launcher else children(run)))
    run.interrupt()
    run.until("press it again")
    run.interrupt()
    text = run.end()
    assert "Ctrl-C again: ended at once, nothing is saved" in text
    assert not complete_checkpoints(tmp_path / "run" / "checkpoints")
    if not launcher:
        assert run.status == Exit.ABANDONED


def children(run) -> list[int]:
    """The ranks that torchrun has started."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while len(found := subprocess.run(["pgrep", "-P", str(run.process.pid)], capture_output=True, text=True).stdout.split()) < 2:
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    return [int(pid) for pid in found]


def until_it_listens(*pids: int) -> None:
    """Wait until processes catch SIGUSR1, as the interpreter does not by itself."""
    deadline_s = time.monotonic() + TIMEOUT_S
    for pid in pids:
        while not caught_signals(pid) >> (signal.SIGUSR1 - 1) & 1:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)


def caught_signals(pid: int) -> int:
    """The kernel's bit mask."""
    with open(f"/proc/{pid}/status") as file:
        return int(re.search(r"SigCgt:\s*(\w+)", file.read())[1], 16)
