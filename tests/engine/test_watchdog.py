"""The watchdog's clock and its report."""

import json
import shutil
import subprocess
import sys
import time

import pytest

from megavlm.engine.guard import FaultConfig
from megavlm.engine.watchdog import GRACE_S, POLL_S, Watchdog, describe_hang
from megavlm.engine.zero import EngineConfig
from megavlm.runs.exits import Exit, LastWord


def make_dog(run, codes, rank=0, faults=None, engine=None, **options):
    faults = {"step_budget_s": 100, "steady_step_budget_factor": 2} if faults is None else faults
    return Watchdog(
        run / "hangs",
        rank,
        1,
        faults=FaultConfig(**faults),
        engine=EngineConfig(**(engine or {})),
        last_word=LastWord(run, {}),
        end=codes.append,
        **options,
    )


def test_a_step_over_budget_is_reported_with_stage_and_stacks(tmp_path):
    codes = []
    dog = make_dog(tmp_path, codes, least_budget_s=1)
    dog.begin_step(4)
    dog.end_step()  # a fast step: the budget is now the least
    dog.begin_step(5)
    dog.enter("backward")
    deadline = time.monotonic() + 60
    while not codes and time.monotonic() < deadline:
        time.sleep(0.1)
    dog.stop()
    assert codes == [Exit.HUNG] and (tmp_path / "exit_code").read_text() == f"{int(Exit.HUNG)}\n"
    here = tmp_path / "hangs" / "step-00000006"
    assert json.loads((here / "rank-0.json").read_text())["stage"] == "backward"
    assert "test_a_step_over_budget" in (here / "rank-0.txt").read_text()


def test_one_that_notices_makes_all_write(tmp_path):
    codes = []
    dog = make_dog(tmp_path, codes, rank=1)
    dog.begin_step(0)
    here = tmp_path / "hangs" / "step-00000001"
    here.mkdir()
    (here / "noticed").touch()
    dog._thread.join(3 * POLL_S)
    assert codes == [], "a step that has hardly begun is not looked after: hundreds of ranks would ask the file system all the time"
    dog._step_begin_s -= 60  # of a budget of 100
    dog._thread.join(60)
    dog.stop()
    assert codes == [Exit.HUNG] and (here / "rank-1.txt").stat().st_size > 100


def test_fast_steps_are_left_alone(tmp_path):
    codes = []
    dog = make_dog(tmp_path, codes)
    for step in range(3):
        dog.begin_step(step)
        dog.end_step()
    dog.stop()
    assert codes == [] and not list((tmp_path / "hangs").iterdir()) and not (tmp_path / "exit_code").exists()


def test_a_full_disk_does_not_keep_it_from_ending_the_step(tmp_path):
    codes = []
    dog = make_dog(tmp_path, codes, least_budget_s=1)
    shutil.rmtree(tmp_path / "hangs")
    (tmp_path / "hangs").touch()
    dog.begin_step(0)
    dog.end_step()
    dog._thread.join(60)
    assert codes == [Exit.HUNG] and (tmp_path / "exit_code").read_text() == f"{int(Exit.HUNG)}\n"


@pytest.mark.parametrize(("faults", "engine"), [({}, {}), ({"step_budget_s": 5000}, {}), ({}, {"timeout_s": 600, "step_timeout_s": 300})])
def test_the_watchdog_is_always_faster_than_the_collectives(tmp_path, faults, engine):
    """With the defaults, and whatever a recipe says, an old one with the former defaults included."""
    config = EngineConfig(**engine)
    dog = make_dog(tmp_path, [], faults=faults, engine=engine)
    assert dog._budget_s + GRACE_S < config.timeout_s
    dog._durations_s.append(10_000.0)
    dog.end_step()
    assert dog._budget_s + GRACE_S < config.step_timeout_s
    dog.stop()


STUCK = """
import ctypes, sys
from pathlib import Path
from megavlm.engine import watchdog
from megavlm.engine.guard import FaultConfig
from megavlm.engine.zero import EngineConfig
from megavlm.runs.exits import LastWord
watchdog.STUCK_S = 1.0
run = Path(sys.argv[1])
dog = watchdog.Watchdog(run / "hangs", 0, 1, faults=FaultConfig(step_budget_s=1), engine=EngineConfig(), last_word=LastWord(run))
dog.begin_step(0)
def stuck_here():
    ctypes.PyDLL(None).usleep(60_000_000)  # holds the interpreter
stuck_here()
"""


def test_a_rank_that_holds_the_interpreter_is_ended_with_its_stacks(tmp_path):
    begin_s = time.monotonic()
    done = subprocess.run([sys.executable, "-c", STUCK, str(tmp_path)], timeout=50, check=False)
    assert done.returncode == 1 and time.monotonic() - begin_s < 45
    assert "stuck_here" in (tmp_path / "hangs" / "stuck-rank-0.txt").read_text()


def test_a_rank_without_an_answer_is_named(tmp_path):
    entries = {0: {"host": "a", "stage": "backward", "seconds": 61.0}, 2: {"host": "b", "stage": "data", "seconds": 62.0}}
    text = describe_hang(5, 60, entries, 3, here=tmp_path)
    assert "step 6 exceeds its budget of 60 s" in text
    assert "rank 0 on a: in stage 'backward' for 61 s" in text and "rank 2 on b: in stage 'data'" in text
    assert "rank 1: no answer" in text
