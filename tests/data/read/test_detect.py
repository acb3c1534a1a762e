"""What nobody has to say: the format of a shard, by its first sample."""

import json

import pytest

from megavlm.data.read.detect import detected
from megavlm.data.read.index import format_of, read_index, write_index


@pytest.mark.parametrize(
    ("members", "sample_format"),
    [
        ({"json": {"task": "text", "segments": []}}, "megavlm"),
        ({"json": {"conversations": []}, "img0.png": ""}, "llava"),
        ({"json": {"question": "a", "answer": "b"}, "img0.png": ""}, "qa"),
        ({"json": {"texts": [], "images": []}}, "interleaved"),
        ({"jpg": "", "txt": "a"}, "img2dataset"),
        ({"jpg": "", "json": {"caption": "a"}}, "img2dataset"),
        ({"json": {"text": "a"}}, "text"),
        ({"txt": "a"}, "text"),
        ({"json": {"title": "a"}}, None),
        ({"json": "no JSON {"}, None),
        ({"json": "[1]"}, None),
        ({}, None),
    ],
)
def test_a_sample_looks_like_its_format(members, sample_format):
    encoded = {name: (value if isinstance(value, str) else json.dumps(value)).encode() for name, value in members.items()}
    assert detected(encoded) == sample_format


def test_lines_are_questions_and_the_index_keeps_it(tmp_path):
    url = str(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    assert format_of([url], None) == "qa" and format_of([url], "text") == "text"
    write_index(tmp_path / "a.jsonl")
    assert read_index(url).sample_format == "qa"


def test_what_cannot_be_read_is_told_when_it_is_read(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"no tar at all")
    assert format_of([str(tmp_path / "a.tar")], None) == "megavlm"
