"""Formats read without conversion, and what happens to samples longer than a pack."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from megavlm.data.read import formats
from megavlm.data.read.sample import Coordinates, Record, Segment
from megavlm.data.read.shards import read_shard
from megavlm.data.read.source import SourceConfig
from megavlm.errors import ConfigError, DataError
from megavlm.routing.tasks import Task
from tests.data.conftest import ids, npy, write_shard


def png(value=0) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (8, 8), (value, value, value)).save(content, "PNG")
    return content.getvalue()


def parse(members, index=0, seed=0, **source):
    encoded = {k: v if isinstance(v, bytes) else json.dumps(v).encode() for k, v in members.items()}
    return formats.parse("key", encoded, SourceConfig(shards="none", **source), Coordinates(0, 0, 0, index), seed=seed)


def own(key, members, source, rng):
    """A format of a user's own: named in recipes as tests.data.read.test_formats:own."""
    return Record(task="text", segments=(Segment(text=members["words"].decode(), loss=True),)), {}


def test_pairs_go_both_ways_by_a_seeded_coin():
    members = {"png": png(), "txt": b" a grey square \n", "json": {"caption": "unused", "width": 8}}
    tasks = [parse(members, index, format="img2dataset", generation_ratio=0.3).task for index in range(400)]
    assert 0.22 < np.mean([task == "generation" for task in tasks]) < 0.38
    assert tasks == [parse(members, index, format="img2dataset", generation_ratio=0.3).task for index in range(400)]
    drawn = parse(members, format="img2dataset", generation_ratio=1)
    assert [(s.text, s.loss) for s in drawn.segments] == [("a grey square", False), (None, True)]
    read = parse({"png": png(), "json": {"caption": "c"}}, format="img2dataset", generation_ratio=0, caption_requests=["What?"])
    assert [(s.text, s.loss) for s in read.segments] == [(None, False), ("What?", False), ("c", True)]


TURNS = [
    {"from": "human", "value": "<image>\nWhich colour?"},
    {"from": "gpt", "value": "Red."},
    {"from": "human", "value": "And <image> this one?"},
    {"from": "gpt", "value": "Blue."},
]


def test_llava_from_a_list_with_a_folder_of_images(tmp_path, make_factory):
    (tmp_path / "im").mkdir()
    for i in range(2):
        (tmp_path / "im" / f"{i}.png").write_bytes(png(200 * i))
    documents = [{"id": f"d{i}", "image": ["im/0.png", "im/1.png"], "conversations": TURNS} for i in range(4)]
    (tmp_path / "a.json").write_text(json.dumps(documents))
    assert [key for key, _ in read_shard(str(tmp_path / "a.json"))] == ["d0", "d1", "d2", "d3"]
    sample = parse({"json": documents[0]}, format="llava", image_root=str(tmp_path))
    assert [s.image or s.text for s in sample.segments] == ["img0", "Which colour?", "Red.", "And", "img1", "this one?", "Blue."]
    assert [s.loss for s in sample.segments] == [False, False, True, False, False, False, True]
    assert sample.images["img1"][0, 0].tolist() == [200, 200, 200]
    sources = {"a": {"shards": str(tmp_path / "a.json"), "format": "llava", "image_root": str(tmp_path), "epochs": 1}}
    lane = make_factory(sources, num_lanes=1, pack_tokens=400)(0)
    assert sorted(i[3] for pack, _ in lane for i in ids(pack)) == [0, 1, 2, 3]


def test_a_document_without_a_name_is_known_by_its_number(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"id": "me"}, {"id": ""}, {"id": None}, {"id": 0}, {}, 7]))
    assert [key for key, _ in read_shard(str(tmp_path / "a.json"))] == ["me", "00000001", "00000002", "0", "00000004", "00000005"]


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd"])
def test_llava_images_outside_of_the_folder_are_refused(tmp_path, name):
    (tmp_path / "secret.png").write_bytes(png())
    (tmp_path / "root").mkdir()
    with pytest.raises(DataError, match="outside of image_root"):
        parse({"json": {"image": name, "conversations": TURNS[:2]}}, format="llava", image_root=str(tmp_path / "root"))


def test_interleaved_documents_hold_both_tasks(make_factory, tmp_path):
    document = {"texts": ["one", None, "two", None, None], "images": [None, "img0", None, "img1.npy", "img2"]}
    members = {"json": document, **{f"img{i}.npy": npy([[i]]) for i in range(3)}}
    write_shard(tmp_path / "a.tar", [(str(i), members) for i in range(30)])
    sources = {"a": {"shards": str(tmp_path / "a.tar"), "format": "interleaved", "epochs": 1}}
    factory = make_factory(sources, num_lanes=1)
    lane = factory(0)
    next(lane)
    assert any({span.task for span in sample.spans} == {Task.UNDERSTANDING, Task.GENERATION} for sample in lane.waiting)


def test_text_lines_and_a_users_own_format(tmp_path, make_factory):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(5)))
    write_shard(tmp_path / "b.tar", [(str(i), {"words": b"some words"}) for i in range(5)])
    sources = {
        "lines": {"shards": str(tmp_path / "a.jsonl"), "format": "text", "epochs": 1},
        "own": {"shards": str(tmp_path / "b.tar"), "format": "tests.data.read.test_formats:own", "epochs": 1},
    }
    lane = make_factory(sources, num_lanes=1)(0)
    assert sorted((i[0], i[3]) for pack, _ in lane for i in ids(pack)) == [(s, i) for s in range(2) for i in range(5)]
    with pytest.raises(ConfigError, match="there is no format 'nothing'"):
        make_factory({"a": {"shards": str(tmp_path / "b.tar"), "format": "nothing"}})


# --- longer than a pack


@pytest.fixture
def over_long(tmp_path):
    """One source with three samples of over 60 tokens and one short one."""
    image = [[1] * 4] * 4
    segments = [{"image": "img0"}, {"text": "zero " * 60}, {"text": "one", "loss": True}, {"image": "img1"}, {"text": "two", "loss": True}]
    long = {"json": {"task": "understanding", "segments": segments}, "img0.npy": npy(image), "img1.npy": npy(image)}
    segments = [{"image": "img0"}, {"text": "one", "loss": True}, {"image": "img1"}, {"text": "zero " * 20, "loss": True}]
    several = {"json": {"task": "understanding", "segments": segments}, "img0.npy": npy(image), "img1.npy": npy(image)}
    short = {"json": {"task": "text", "segments": [{"text": "one", "loss": True}]}}
    write_shard(tmp_path / "a.tar", [("0", long), ("1", short), ("2", several), ("3", long)])
    return {"a": {"shards": str(tmp_path / "a.tar"), "epochs": 1}}


def counts(packs):
    return {name: count for name, count in packs[-1][1]["counts"].items() if count}


def test_over_long_samples_are_skipped_and_counted(make_factory, over_long):
    packs = list(make_factory(over_long, num_lanes=1, pack_tokens=50, over_long="skip")(0))
    assert counts(packs) == {"skipped": 3} and [i[3] for pack, _ in packs for i in ids(pack)] == [1]


def test_over_long_texts_are_truncated_and_counted(make_factory, over_long):
    packs = list(make_factory(over_long, num_lanes=1, pack_tokens=50, over_long="truncate_text")(0))
    assert counts(packs) == {"truncated": 3}
    assert sorted(i[3] for pack, _ in packs for i in ids(pack)) == [0, 1, 2, 3]
    assert all(pack.num_tokens <= 50 for pack, _ in packs)


def test_documents_are_split_before_images_and_pieces_resume(make_factory, over_long):
    factory = make_factory(over_long, num_lanes=1, pack_tokens=50, over_long="split_images", max_errors=2)
    packs = list(factory(0))
    assert counts(packs) == {"errors": 2, "split": 1}, "a single text that is too long cannot be split"
    seen = [i for pack, _ in packs for i in ids(pack)]
    assert sorted(i[3:] for i in seen) == [(1, 0), (2, 0), (2, 1)]
    rest = [i for pack, _ in factory(0, packs[0][1]) for i in ids(pack)]
    assert seen == ids(packs[0][0]) + rest


def test_over_long_samples_are_errors_by_default(make_factory, over_long):
    with pytest.raises(DataError, match="a pack at most 50"):
        list(make_factory(over_long, num_lanes=1, pack_tokens=50)(0))


# --- questions with answers


def test_questions_with_answers():
    sample = parse({"json": {"image": "x/a.png", "question": " Which? ", "answer": "Red. "}, "img0.png": png()}, format="qa")
    assert [(s.image, s.text, s.loss) for s in sample.segments] == [("img0", None, False), (None, "Which?", False), (None, "Red.", True)]
    assert sample.task == "understanding" and sample.meta == {"answer": "Red."}
    several = {"question": "How many?", "answers": ["2", "two", "two"], "choices": ["two", "three"]}
    sample = parse({"json": several}, format="qa")
    assert sample.task == "text" and sample.segments[-1].text == "two" and sample.meta["choices"] == ["two", "three"]


@pytest.mark.parametrize("wrong", [{"answer": "a"}, {"question": "a"}, {"question": "a", "answer": 3}, {"question": "", "answer": "a"}])
def test_questions_that_are_none(wrong):
    with pytest.raises(DataError, match="the sample has no text in '(question|answer)'"):
        parse({"json": wrong}, format="qa")


def test_questions_from_lines_with_a_folder_of_images(tmp_path):
    (tmp_path / "a.png").write_bytes(png(5))
    sample = parse({"json": {"image": "a.png", "question": "Which?", "answer": "Grey"}}, format="qa", image_root=str(tmp_path))
    assert sample.images["img0"][0, 0, 0] == 5


def test_a_format_in_a_file_of_ones_own(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from megavlm.data.read.sample import Record, Segment\n"
        "def words(key, members, source, rng):\n"
        '    return Record(task="text", segments=(Segment(text=members["words"].decode(), loss=True),)), {}\n'
    )
    assert parse({"words": b"mine"}, format=f"{tmp_path}/mine.py:words").segments[0].text == "mine"
    with pytest.raises(ConfigError, match=r"gone.py:words cannot be imported: FileNotFoundError"):
        parse({"words": b"mine"}, format=f"{tmp_path}/gone.py:words")
