"""Small files are whole or as they were; damaged ones are named; what is harmless is told and passed over."""

import errno
import json
import logging
import os
import re
from pathlib import Path

import pytest

from megavlm.system import files
from megavlm.system.files import DamagedFile, copy_atomically, folder_written_atomically, open_to_write, read_json, write_atomically
from megavlm.system.harmless import harmless
from megavlm.system.log_file import LogFile
from tests.system.full_disk import fill, small_disk


def test_a_file_is_the_old_or_the_new_one(tmp_path, monkeypatch):
    """Whatever step of writing fails, and nothing is left beside it."""
    file = tmp_path / "config.yaml"
    write_atomically(file, "old")

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("fsync", "open"):
        with monkeypatch.context() as patch:
            patch.setattr(files.os, name, fail)
            with pytest.raises(OSError):
                write_atomically(file, "new")
        assert file.read_text() in ("old", "new") and os.listdir(tmp_path) == ["config.yaml"]
    source = tmp_path / "source"
    source.write_bytes(b"\x00\xff")
    copy_atomically(source, file)
    written = file.stat().st_mtime_ns
    copy_atomically(source, file)
    assert file.read_bytes() == b"\x00\xff" and file.stat().st_mtime_ns == written, "what is the same stays untouched"


def test_a_folder_is_there_when_all_of_it_is(tmp_path):
    with pytest.raises(KeyError), folder_written_atomically(tmp_path / "out") as folder:
        (folder / "a").write_text("a")
        assert not (tmp_path / "out").exists()
        raise KeyError
    assert os.listdir(tmp_path) == []
    with folder_written_atomically(tmp_path / "out") as folder:
        (folder / "b" / "c").mkdir(parents=True)
        (folder / "b" / "c" / "d").write_text("d")
    assert (tmp_path / "out" / "b" / "c" / "d").read_text() == "d" and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b"3", b"\0" * 9, b'"x"', b"null"])
def test_a_damaged_file_is_named(tmp_path, content):
    file = tmp_path / "owner.json"
    file.write_bytes(content)
    with pytest.raises(DamagedFile, match="owner.json is damaged: .*\n  do:    bring it back"):
        read_json(file)


def test_what_is_no_file_is_named_and_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    for name, what in {"pipe": "it is no file", "folder": "it is no file", "loop": "cannot be read", "missing": "cannot be read"}.items():
        with pytest.raises(DamagedFile, match=f"{name} .*{what}"):
            read_json(tmp_path / name)
    with pytest.raises(OSError, match="is no file"):
        LogFile(tmp_path / "pipe")


def test_a_pipe_is_no_file_to_write_to(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for mode in ("w", "a"):
        with pytest.raises(OSError):
            open_to_write(tmp_path / "pipe", mode)
    for mode, content in (("w", "ab"), ("a", "abab"), ("w", "ab")):
        with open_to_write(tmp_path / "file", mode) as file:
            file.write("ab")
        assert (tmp_path / "file").read_text() == content


def test_a_full_disk_is_told_once_and_again_when_there_is_room(tmp_path, caplog, capsys):
    caplog.set_level(logging.INFO)
    with small_disk(tmp_path / "disk", 1) as disk:
        write_atomically(disk / "status.json", json.dumps({"step": 1}))
        handler = LogFile(disk / "log.txt")
        record = logging.LogRecord("a", logging.INFO, "", 0, "a line", None, None)
        handler.emit(record)
        filling = fill(disk)
        long = "x" * 100_000
        for _ in range(3):
            with harmless(f"the status {disk / 'status.json'}"):
                write_atomically(disk / "status.json", json.dumps({"step": 2, "long": long}))
            handler.emit(logging.LogRecord("a", logging.INFO, "", 0, long, None, None))
        told = [r.message for r in caplog.records]
        assert (
            len(told) == 1
            and "status.json could not be written" in told[0]
            and "No space left" in told[0]
            and "do:    make room" in told[0]
        )
        said = capsys.readouterr().err
        assert said.count("the log could not be written: No space left on device") == 1 and "Traceback" not in said
        assert read_json(disk / "status.json") == {"step": 1} and sorted(os.listdir(disk)) == ["filling", "log.txt", "status.json"]
        filling.unlink()
        with harmless(f"the status {disk / 'status.json'}"):
            write_atomically(disk / "status.json", json.dumps({"step": 3}))
        handler.emit(record)
        assert "can be written again" in caplog.records[-1].message and read_json(disk / "status.json") == {"step": 3}
        assert (disk / "log.txt").read_text().count("a line") == 2
        handler.close()


def test_harmless_passes_over_whatever_libraries_raise(caplog):
    for error in (ValueError("$"), OSError("no strerror"), MemoryError(), RecursionError()):
        with harmless(f"the picture {type(error)}"):
            raise error
    assert len(caplog.records) == 4
    with pytest.raises(KeyboardInterrupt), harmless("the picture"):
        raise KeyboardInterrupt


WITH_REASON = {
    "system/files.py": "the one place",
    "model/configuration.py": "a temporary folder",
    "monitor/event_file.py": "record by record",
    "data/tools/describe.py": "a page for people",
    "engine/watchdog.py": "stacks, straight from the interpreter",
    "talk/batch.py": "lines as they come, for people",
    "evaluation/sets/judge.py": "lines as they come; what is read again is the JSON beside them",
    "image_tokenizers/compressed.py": "in a folder that is written whole",
    "parts/export.py": "in a folder that is written whole",
    "data/tools/tokenize.py": "shards, renamed when they are whole",
    "engine/shards.py": "in a folder that is renamed when it is whole; hashed on its way",
}


def test_whatever_is_read_again_is_written_in_one_place():
    package = Path(files.__file__).parents[1]
    writes = re.compile(r"""\.write_text\(|\.write_bytes\(|open\([^)]*["'](w|x|wb|xb)["']|json\.dump\(|copyfile\(|copytree\(""")
    found = {str(file.relative_to(package)) for file in package.rglob("*.py") if writes.search(file.read_text())}
    assert found - set(WITH_REASON) == set(), "write it with megavlm.system.files"
