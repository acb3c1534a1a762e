"""A disk that is really full does not end a run: no file of any size can be written, and everything is tried."""

import pytest

from megavlm.runs.manifest import complete_checkpoints, verify
from megavlm.system.files import read_json
from tests.distributed.full_disk_work import train_through_a_full_disk
from tests.distributed.ranks import run_ranks
from tests.system.full_disk import small_disk

SETTINGS = {
    "optimizer.num_steps": 6,
    "checkpoint.every_steps": 1,
    "data.num_lanes": 1,
}
WATCHED = {"monitor.sample_every_steps": 4, "monitor.sample_prompts": ["a seven"], "monitor.attention_every_steps": 2}


@pytest.mark.timeout(600)
def test_a_run_goes_on_while_the_disk_is_full_and_saves_again_when_there_is_room(make_config, tmp_path):
    with small_disk(tmp_path / "disk", 16) as disk:
        run = disk / "run"
        (full,) = run_ranks(1, train_through_a_full_disk, make_config(SETTINGS | WATCHED, run), str(disk), timeout_s=300)
        log = full["log"]
        assert full["newest"] == "step-00000002", "nothing could be saved in between"
        for step in (3, 4):
            assert f"the checkpoint of step {step} could not be written" in log
        for what in ("status.json", "stragglers.txt", "tensorboard", "drawings of step 4", "forensics", "environment", "exit status"):
            told = [line for line in log.splitlines() if "could not be written, and is left out" in line and what in line]
            assert told and all("No space left" in line for line in told), f"{what}: {told}"
            assert len(set(told)) == len(told), "each is told once"
        assert "No space left" in log and "Traceback" not in log
        checkpoints = complete_checkpoints(run / "checkpoints")
        assert [path.name for path in checkpoints] == ["step-00000005", "step-00000006"]
        assert all(verify(path) == [] for path in checkpoints)
        status = read_json(run / "status.json")
        assert status["state"] == "done" and status["step"] == 6 and not list(run.rglob(".*-[0-9]*"))
        assert "done: 6 steps" in (run / "log.txt").read_text()
    assert full["unknown_tags"] == [], "every metric of a checkpoint can be named as best_metric"
    (undisturbed,) = run_ranks(1, train_through_a_full_disk, make_config(SETTINGS, tmp_path / "undisturbed"), None, timeout_s=300)
    different = [name for name, value in undisturbed["weights"].items() if not value.equal(full["weights"][name])]
    assert not different, different
