"""P11: killed at random moments; `tools/kill_runs.py` does it 50 times, here it is a few."""

import pytest

from tools.kill_runs import kill_again_and_again


@pytest.mark.timeout(600)
def test_whatever_moment_it_is_killed_at_nothing_is_lost(tmp_path):
    counts = kill_again_and_again(tmp_path, kills=4, world_size=2, hidden_size=64, seed=3)
    assert counts["kills"] == 4 and counts["checkpoints_reported"] > 0
