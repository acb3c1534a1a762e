"""What stays, what goes, and who may write: no processes needed."""

import errno
import json
import os

import pytest

from megavlm.runs import manifest
from megavlm.runs.manifest import complete_checkpoints, verify
from megavlm.runs.ownership import Ownership, Superseded
from megavlm.runs.retention import CheckpointConfig
from megavlm.system.files import DamagedFile


def make(folder, step, files=None, **metrics):
    path = folder / manifest.folder_name(step)
    path.mkdir(parents=True)
    content = {"step": step, "metrics": metrics, "files": files or {}}
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
        assert [problem[:24] for problem in verify(path)] == ["manifest.json is damaged"], place


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


@pytest.mark.parametrize(
    "name", ["step-00000004-backup", "step-4", "step-", "step-000000004", "step-0000000x", "step-٠٠٠٠٠٠٠٤", "step-00000004 "]
)
def test_other_names_are_the_users_own(tmp_path, name):
    make(tmp_path, 2)
    make(tmp_path, 4)
    (tmp_path / manifest.folder_name(4)).rename(tmp_path / name)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-00000002"]
    assert manifest.step_of(tmp_path / name) == 4, "by its manifest"


@pytest.mark.parametrize("content", ["[]", "", "null", '"x"', "{}", '{"sha256": "x"}', "[" * 10**5, "\0"])
def test_a_manifest_that_is_none_is_damage(tmp_path, content):
    make(tmp_path, 4)
    (tmp_path / "step-00000004" / "manifest.json").write_text(content)
    (problem,) = verify(tmp_path / "step-00000004")
    assert problem.startswith("manifest.json is damaged")


def test_what_cannot_be_read_is_damage(tmp_path, monkeypatch):
    """Root reads everything, so the file system's answer is ours here."""
    make(tmp_path, 4, files={"state.json": {"bytes": 2, "sha256": "x"}})
    path = tmp_path / "step-00000004"
    (path / "state.json").write_text("{}")

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(manifest, "sha256", fail)
    assert verify(path) == ["state.json cannot be read: Input/output error"]
    (path / "state.json").unlink()
    (path / "state.json").symlink_to("state.json")
    assert verify(path) == ["state.json is missing"]
    (path / "manifest.json").unlink()
    assert verify(path) == ["manifest.json is missing"]
    (path / "manifest.json").mkdir()
    assert verify(path) == ["manifest.json is damaged: it is no file"]


def test_another_steps_manifest_is_damage(tmp_path):
    make(tmp_path, 2)
    make(tmp_path, 4)
    (tmp_path / "step-00000004" / "manifest.json").write_bytes((tmp_path / "step-00000002" / "manifest.json").read_bytes())
    assert verify(tmp_path / "step-00000004") == ["manifest.json is damaged: it is that of step 2"]


def test_a_damaged_manifest_is_kept_and_hinders_no_rule(tmp_path):
    """It may be the best; and none that is not a number is."""
    for step, loss in zip((10, 20, 30, 40, 50), (1.0, float("nan"), 2.0, 3.0, 4.0)):
        make(tmp_path, step, loss=loss)
    (tmp_path / "step-00000010" / "manifest.json").write_text("")
    rule = CheckpointConfig(keep_last=1, keep_best=1, best_metric="loss")
    assert [manifest.step_of(path) for path in rule.doomed(complete_checkpoints(tmp_path))] == [20, 40]


@pytest.mark.parametrize("content", ["", "[]", "{", '{"job": 1}', '{"job": "7", "restart": "2", "token": "x"}'])
def test_a_damaged_owner_is_told_and_replaced(tmp_path, caplog, content):
    (tmp_path / "owner.json").write_text(content)
    mine = Ownership(tmp_path, {})
    mine.check()
    assert "owner.json is damaged" in caplog.text
    for damage in (lambda: (tmp_path / "owner.json").write_text(content), (tmp_path / "owner.json").unlink):
        damage()
        mine.check()
        mine.check()
    Ownership(tmp_path, {})
    with pytest.raises(Superseded):
        mine.check()
    (tmp_path / "owner.json").unlink()
    (tmp_path / "owner.json").symlink_to("owner.json")
    with pytest.raises(DamagedFile, match="cannot be read"):  # it may be another's
        mine.check()
