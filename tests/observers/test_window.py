"""What a run shows in TensorBoard, read from its event files: layout, texts, drawings with prompts, routes, attention, errors, CSV."""

import csv
import re

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from megavlm.benchmarks.digits import QUESTIONS, WORDS
from tests.distributed.ranks import run_ranks
from tests.observers.failing import run_with

SETTINGS = {
    "optimizer.num_steps": 2,
    "optimizer.warmup_steps": 1,
    "routing.dense_finish_fraction": 0.5,
    "monitor.sample_every_steps": 1,
    "monitor.sample_prompts": ["a handwritten two"],
    "monitor.attention_every_steps": 1,
    "monitor.writers": ["tensorboard", "csv"],
}


@pytest.fixture(scope="module")
def shown(make_config_once):
    """A run of two steps with everything on, and an observer that fails in the second one."""
    config = make_config_once(SETTINGS)
    (result,) = run_ranks(1, run_with, {"run": (config, "in a backward pass")})
    return config, EventAccumulator(f"{config.run_dir}/tensorboard", size_guidance={"tensors": 0, "images": 0}).Reload(), result["run"]


def texts(events, tag: str) -> dict[int, str]:
    return {event.step: event.tensor_proto.string_val[0].decode() for event in events.Tensors(f"{tag}/text_summary")}


def test_the_layout_begins_with_the_losses_and_every_tag_has_a_place(shown):
    _config, events, _ = shown
    (event,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    assert [category.title[2:] for category in layout.category] == ["quality", "speed", "balance", "data", "health"]
    assert layout.category[0].chart[0].title == "loss per task"
    patterns = [tag for category in layout.category for chart in category.chart for tag in chart.multiline.tag]
    tags = events.Tags()["scalars"]
    wanted = [tag for tag in tags if not tag.startswith(("attention_", "totals/", "throughput/samples"))]
    assert len(wanted) > 15 and not [tag for tag in wanted if not any(re.search(pattern, tag) for pattern in patterns)]
    assert "memory/host_gib" in tags and "checkpoint/stall_s" in tags


def test_pictures_and_answers_come_with_their_steps(shown):
    _config, events, _ = shown
    for tag in ("samples", "route", "attention/shares", "attention/heads"):
        assert [event.step for event in events.Images(tag)] == [1, 2], tag
        assert events.Images(tag)[0].width >= 150, "a picture with words, not bare pixels"
    answers = texts(events, "answers")
    assert sorted(answers) == [1, 2]
    rows = answers[2].splitlines()
    assert rows[0] == "| question | right | answer |" and len(rows) > 3
    for row in rows[2:]:
        _, question, right, _answer, _ = (cell.strip(" `") for cell in row.split("|"))
        assert question in QUESTIONS and right in WORDS


def test_it_is_said_where_a_phase_begins(shown):
    _config, events, _ = shown
    said = texts(events, "phases")
    assert sorted(said) == [1, 2] and said[2] == "phase 2 of 2, steps 2 to 2: everything is kept"
    assert [event.value for event in events.Scalars("routing/phase")] == [1, 2]


def test_errors_are_there_at_their_step(shown):
    _config, events, result = shown
    assert result["step"] == 2
    (told,) = texts(events, "log/warnings_and_errors").items()
    assert told[0] == 2 and "all ranks, with gradients left behind" in told[1] and "ERROR" in told[1]


def test_csv_has_the_same_numbers(shown):
    config, events, _ = shown
    with open(f"{config.run_dir}/scalars.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    found = {(int(row["step"]), row["tag"]): float(row["value"]) for row in rows}
    assert len(found) == len(rows) > 30
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            assert found.pop((event.step, tag)) == pytest.approx(event.value, rel=1e-5), tag
    assert not found
