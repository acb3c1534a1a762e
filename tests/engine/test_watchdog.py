"""The watchdog's clock and its report."""

import json
import time

from megavlm.engine.guard import FaultConfig
from megavlm.engine.watchdog import Watchdog, describe_hang
from megavlm.runs.exits import Exit


def test_a_step_over_budget_is_reported_with_stage_and_stacks(tmp_path):
    codes = []
    dog = Watchdog(tmp_path, 0, 1, FaultConfig(step_budget_s=100, steady_step_budget_factor=2), end=codes.append, least_budget_s=1)
    dog.begin_step(4)
    dog.end_step()  # a fast step: the budget is now the least
    dog.begin_step(5)
    dog.enter("backward")
    deadline = time.monotonic() + 60
    while not codes and time.monotonic() < deadline:
        time.sleep(0.1)
    assert codes == [Exit.HUNG]
    here = tmp_path / "step-00000006"
    assert json.loads((here / "rank-0.json").read_text())["stage"] == "backward"
    assert "test_a_step_over_budget" in (here / "rank-0.txt").read_text()


def test_one_that_notices_makes_all_write(tmp_path):
    codes = []
    dog = Watchdog(tmp_path, 1, 1, FaultConfig(step_budget_s=1000, steady_step_budget_factor=2), end=codes.append)
    dog.begin_step(0)
    (tmp_path / "step-00000001").mkdir()
    (tmp_path / "step-00000001" / "noticed").touch()
    dog._thread.join(60)
    assert codes == [Exit.HUNG] and (tmp_path / "step-00000001" / "rank-1.txt").stat().st_size > 100


def test_fast_steps_are_left_alone(tmp_path):
    codes = []
    dog = Watchdog(tmp_path, 0, 1, FaultConfig(step_budget_s=100, steady_step_budget_factor=2), end=codes.append)
    for step in range(3):
        dog.begin_step(step)
        dog.end_step()
    dog.stop()
    assert codes == [] and not list(tmp_path.iterdir())


def test_a_rank_without_an_answer_is_named(tmp_path):
    entries = {0: {"host": "a", "stage": "backward", "seconds": 61.0}, 2: {"host": "b", "stage": "data", "seconds": 62.0}}
    text = describe_hang(5, 60, entries, 3, tmp_path)
    assert "step 6 exceeds its budget of 60 s" in text
    assert "rank 0 on a: in stage 'backward' for 61 s" in text and "rank 2 on b: in stage 'data'" in text
    assert "rank 1: no answer" in text
