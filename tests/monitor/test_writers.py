"""The same numbers elsewhere, through the real packages where they are installed."""

import importlib.util
import math
import struct
from collections.abc import Iterator

import pytest

from megavlm.errors import ConfigError
from megavlm.monitor import writers
from megavlm.monitor.board import Board
from megavlm.monitor.writers import CsvWriter, check_writers


def test_csv_takes_back_what_comes_again_and_a_line_that_was_cut(tmp_path):
    first = CsvWriter(tmp_path, 1)
    for step in (1, 2, 3):
        first.scalars({"loss/generation": step / 3, 'a "b", c': math.nan}, step)
    with first.path.open("a") as file:
        file.write("4,loss/gen")
    CsvWriter(tmp_path, 3).scalars({"loss/generation": 9.0}, 3)
    assert first.path.read_text().splitlines() == [
        "step,tag,value",
        f"1,loss/generation,{1 / 3!r}",
        '1,"a ""b"", c",nan',
        f"2,loss/generation,{2 / 3!r}",
        '2,"a ""b"", c",nan',
        "3,loss/generation,9.0",
    ]


def test_without_tensorboard_there_are_no_event_files(tmp_path):
    board = Board(tmp_path / "tensorboard", 1, True, ["csv"])
    board.scalars({"a": 1.0}, 1)
    board.text("t", "words", 1)
    board.close()
    assert not (tmp_path / "tensorboard").exists() and "1,a,1.0" in (tmp_path / "scalars.csv").read_text()


def test_a_writer_that_is_not_installed_is_refused_by_name(monkeypatch):
    check_writers(["tensorboard", "csv"])
    monkeypatch.setattr(writers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="monitor.writers: wandb and mlflow are not installed\n.*pip install wandb mlflow"):
        check_writers(["csv", "wandb", "mlflow"])


def two_starts(folder, name: str) -> None:
    for first in (1, 3):
        board = Board(folder / "tensorboard", first, True, [name])
        for step in (first, first + 1):
            board.scalars({"loss/generation": step / 4}, step)
        board.close()


@pytest.mark.skipif(importlib.util.find_spec("alembic") is None, reason="mlflow with its database is not installed")
def test_mlflow(tmp_path):
    from mlflow import MlflowClient  # pyright: ignore[reportMissingImports] (optional)

    two_starts(tmp_path, "mlflow")
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("megavlm").experiment_id])
    history = client.get_metric_history(run.info.run_id, "loss/generation")
    assert [(metric.step, metric.value) for metric in history] == [(step, step / 4) for step in (1, 2, 3, 4)]


def records_of(content: bytes) -> Iterator[bytes]:
    """The records of a W&B file: LevelDB's log format, in blocks of 32 KiB, behind a header of 7 bytes."""
    place, record = 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _crc, length, kind = struct.unpack_from("<IHB", content, place)
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_offline(tmp_path):
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportMissingImports] (optional)

    two_starts(tmp_path, "wandb")
    seen = {}
    for path in sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb")):
        for content in records_of(path.read_bytes()):
            record = Record.FromString(content)
            items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            if "loss/generation" in items:
                seen[int(items["_step"])] = float(items["loss/generation"])
    assert seen == {step: step / 4 for step in (1, 2, 3, 4)}
