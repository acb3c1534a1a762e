"""What stays, what goes, and who may write: no processes needed."""

import json
import os

import pytest

from megavlm.runs import manifest
from megavlm.runs.manifest import complete_checkpoints, verify
from megavlm.runs.ownership import Ownership, Superseded
from megavlm.runs.retention import CheckpointConfig


def make(folder, step, **metrics):
    path = folder / manifest.folder_name(step)
    path.mkdir(parents=True)
    content = {"step": step, "metrics": metrics, "files": {}}
    (path / "manifest.json").write_text(json.dumps(content | {"sha256": manifest.digest_of_manifest(content)}))


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        (CheckpointConfig(keep_last=1), [60]),
        (CheckpointConfig(keep_last=2), [50, 60]),
        (CheckpointConfig(keep_last=1, keep_every_steps=20), [20, 40, 60]),
        (CheckpointConfig(keep_last=1, keep_best=1, best_metric="loss"), [40, 60]),
        (CheckpointConfig(keep_last=1, keep_best=2, best_metric="loss"), [30, 40, 60]),
        (CheckpointConfig(keep_last=1, keep_best=1, best_metric="loss", best_mode="max"), [10, 60]),
        (CheckpointConfig(keep_last=1, keep_best=3, best_metric="other"), [60]),
    ],
)
def test_retention(tmp_path, rule, kept):
    for step, loss in zip((10, 20, 30, 40, 50), (9.0, 3.0, 2.0, 1.0, 5.0)):
        make(tmp_path, step, loss=loss)
    make(tmp_path, 60)  # saved before its first report: not rated
    for path in rule.doomed(complete_checkpoints(tmp_path)):
        manifest.remove(path)
    assert [manifest.step_of(path) for path in complete_checkpoints(tmp_path)] == kept
    assert not list(tmp_path.glob(".*"))


def test_a_removal_that_was_cut_off_leaves_nothing_that_looks_complete(tmp_path, monkeypatch):
    make(tmp_path, 10)
    monkeypatch.setattr(manifest.shutil, "rmtree", lambda _path: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        manifest.remove(tmp_path / "step-00000010")
    monkeypatch.undo()
    assert complete_checkpoints(tmp_path) == [] and len(list(tmp_path.glob(".removing-*"))) == 1
    manifest.remove_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())


def test_every_single_flipped_bit_of_a_manifest_is_noticed(tmp_path):
    make(tmp_path, 10, loss=1.5)
    path = tmp_path / "step-00000010"
    content = (path / "manifest.json").read_bytes()
    assert verify(path) == []
    for place in range(len(content)):
        (path / "manifest.json").write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert verify(path) == ["manifest.json is damaged"], place


def test_the_old_writer_is_fenced_off_by_a_restart(tmp_path):
    old = Ownership(tmp_path, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"})
    old.check()
    new = Ownership(tmp_path, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"})
    new.check()
    with pytest.raises(Superseded, match="job 7, restart 2"):
        old.check()
    with pytest.raises(Superseded):  # an old start that comes late
        Ownership(tmp_path, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"})
    new.check()
    Ownership(tmp_path, {}).check()  # somebody starts it by hand
    with pytest.raises(Superseded):
        new.check()
    assert os.listdir(tmp_path) == ["owner.json"]
