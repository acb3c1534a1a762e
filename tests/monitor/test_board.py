"""TensorBoard reads what was written, whatever the disk did in between."""

import logging
import os

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megavlm.monitor.board import Board
from tests.system.full_disk import fill, small_disk


def shown(folder) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_numbers_images_and_what_a_resumed_run_takes_back(tmp_path):
    board = Board(tmp_path, 1, True)
    for step in (1, 2, 3):
        board.scalars({"loss/generation": step / 2, "time/step_s": 1.0}, step)
    board.images("samples", np.zeros((2, 4, 4, 3), np.uint8), 3)
    board.close()
    again = Board(tmp_path, 3, True)
    again.scalars({"loss/generation": 9.0}, 3)
    again.close()
    Board(tmp_path / "other rank", 1, False).scalars({"a": 1.0}, 1)
    assert shown(tmp_path)["loss/generation"] == [(1, 0.5), (2, 1.0), (3, 9.0)]
    assert EventAccumulator(str(tmp_path)).Reload().Images("samples") == [] and not (tmp_path / "other rank").exists()


def test_a_full_disk_takes_nothing_but_what_did_not_fit(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    with small_disk(tmp_path / "disk", 1) as disk:
        board = Board(disk / "tensorboard", 1, True)
        board.scalars({"a": 1.0}, 1)
        filling = fill(disk)
        for step in range(2, 300):
            board.scalars({"a": float(step)}, step)
        late = Board(disk / "late", 1, True)
        late.scalars({"a": 1.0}, 1)
        assert [record.message.count("No space left") for record in caplog.records] == [1, 1], "told once each"
        filling.unlink()
        board.scalars({"a": 300.0}, 300)
        late.scalars({"a": 2.0}, 2)
        seen = shown(disk / "tensorboard")["a"]
        assert seen[0] == (1, 1.0) and seen[-1] == (300, 300.0) and seen[:-1] == [(s, float(s)) for s in range(1, len(seen))]
        assert shown(disk / "late")["a"] == [(2, 2.0)] and len(os.listdir(disk / "late")) == 1
        board.close()
        late.close()
