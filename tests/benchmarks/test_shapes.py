"""Scenes are seeded and compositional, answers are exact, and the judge sees what was drawn."""

from collections import Counter

import numpy as np
import pytest

from megavlm.benchmarks.shapes import (
    HELD_OUT,
    NUMBERS,
    RELATIONS,
    prompt,
    question,
    record,
    render,
    satisfies,
    scene,
    see,
    write,
)
from megavlm.data.tools.lint import lint


def kinds(shapes):
    return {(shape.color, shape.form) for shape in shapes}


@pytest.mark.parametrize("pixels", [32, 64, 128, 256])
def test_the_judge_sees_exactly_what_is_drawn(pixels):
    for number in range(150):
        shapes = scene(0, "test", number)
        seen = see(render(shapes, pixels))
        assert Counter((s.color, s.form, s.size) for s in seen) == Counter((s.color, s.form, s.size) for s in shapes), number
        for shape in shapes:
            found = next(s for s in seen if s.name == shape.name)
            assert abs(found.x - shape.x) < 1 / pixels and abs(found.y - shape.y) < 1 / pixels


def test_held_out_compositions_are_held_out():
    assert all(not kinds(scene(0, "train", n)) & HELD_OUT for n in range(300))
    assert all(kinds(scene(0, "test", n)) & HELD_OUT for n in range(300))
    assert all(not kinds(scene(0, "seen", n)) & HELD_OUT for n in range(300)) and scene(0, "seen", 0) != scene(0, "train", 0)
    assert 0.3 < np.mean([bool(kinds(scene(0, "images", n)) & HELD_OUT) for n in range(300)]) < 0.5, "no more and no less than others"
    assert {len(scene(0, "train", n)) for n in range(100)} == {1, 2, 3, 4}


def test_drawings_are_judged_by_their_prompt():
    rng, num_relations = np.random.default_rng(0), 0
    for number in range(200):
        shapes = scene(0, "train", number)
        asked = prompt(shapes, rng)
        image = render(shapes, 64)
        assert satisfies(image, asked)["all"], asked
        assert not satisfies(render(shapes[1:], 64), asked)["all"], "a shape is missing"
        assert not satisfies(render(scene(0, "test", number), 64), asked)["all"], "another scene"
        if asked.relation:
            num_relations += 1
            mirrored = image[:, ::-1] if "of" in asked.relation[1] else image[::-1]
            assert not satisfies(mirrored, asked)["relation"]
    assert num_relations > 50
    assert not satisfies(rng.integers(0, 256, (64, 64, 3)).astype(np.uint8), asked)["all"]


def test_answers_are_exact():
    rng, asked = np.random.default_rng(0), Counter()
    for number in range(600):
        shapes = scene(0, "train", number)
        text, answer, choices, kind = question(shapes, rng)
        assert answer in choices
        words = text.rstrip("?").split()
        asked[kind] += 1
        names = {shape.name: shape for shape in shapes}
        if kind == "count":
            form = words[2].removesuffix("es") if words[2] == "crosses" else words[2].removesuffix("s")
            assert NUMBERS.index(answer) == sum(form in ("shape", shape.form) for shape in shapes)
        elif kind == "color":
            assert {shape.color for shape in shapes if shape.form == words[-1]} == {answer}
        elif kind == "existence":
            assert (answer == "yes") == (" ".join(words[-2:]) in names)
        else:
            first, second = names[" ".join(words[2:4])], names[" ".join(words[-2:])]
            assert (answer == "yes") == RELATIONS[" ".join(words[4:-3])](first, second)
    assert min(asked.values()) > 50


def test_shards_are_the_same_every_time_and_a_longer_set_begins_with_a_shorter(tmp_path):
    from megavlm.data.read.source import SourceConfig

    first = write(tmp_path / "a", 32, 30, 10, samples_per_shard=20)
    write(tmp_path / "b", 32, 50, 10, samples_per_shard=20)
    assert first == {f"{t}-train-000{i}.tar": n for t in ("understanding", "generation") for i, n in ((0, 20), (1, 10))} | {
        f"{t}-{split}-0000.tar": 10 for t in ("understanding", "generation") for split in ("seen", "test")
    } | {"images-train-0000.tar": 20, "images-train-0001.tar": 10}
    for task in ("understanding", "generation"):
        assert (tmp_path / "a" / f"{task}-train-0000.tar").read_bytes() == (tmp_path / "b" / f"{task}-train-0000.tar").read_bytes()
    report = lint([str(p) for p in sorted((tmp_path / "a").glob("understanding-*.tar"))], SourceConfig(shards="none"))
    assert report.num_samples == 50 and not report.problems
    assert record(1, "train", "generation", 0) != record(0, "train", "generation", 0)
