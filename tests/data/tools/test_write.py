"""`megavlm data build`: nothing from outside the folder, every problem at once with its place, and the format kept beside the shard."""

import json
import os

import pytest

from megavlm.data.read.index import SUFFIX, format_of, read_index, write_index
from megavlm.data.read.source import SourceConfig
from megavlm.data.tools.lint import Report, lint, read_samples
from megavlm.data.tools.write import build_shards
from megavlm.errors import ConfigError, DataError, MegavlmError
from tests.data.read.test_formats import png


@pytest.fixture
def folder(tmp_path):
    """Two captioned images, one of them in a folder below, and secrets outside."""
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    for name in ("photos/a", "photos/deep/b", "secret"):
        (tmp_path / f"{name}.png").write_bytes(png())
        (tmp_path / f"{name}.txt").write_text("words")
    return tmp_path / "photos"


def write_lines(path, *lines) -> None:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))


def ours(*images):
    return {"task": "understanding", "segments": [*({"image": name} for name in images), {"text": "a", "loss": True}]}


def llava(*images):
    turns = [{"from": "human", "value": "<image>" * len(images) + " which?"}, {"from": "gpt", "value": "Red."}]
    return {"image": list(images), "conversations": turns}


def built(source, tmp_path, **settings):
    written = build_shards(source, tmp_path / "out", 1, **settings)
    return [str(tmp_path / "out" / name) for name in written]


def test_a_folder_of_pairs(folder, tmp_path):
    (folder / "._a.png").write_bytes(b"what macOS keeps")
    urls = built(folder, tmp_path)
    assert len(urls) == 2 and {read_index(url).sample_format for url in urls} == {"img2dataset"}
    assert not lint(urls, SourceConfig(shards="none", format=format_of(urls, None))).problems


def qa(*images):
    return {"image": list(images), "question": "Which?", "answer": "Red."}


@pytest.mark.parametrize(("record", "sample_format"), [(ours, "megavlm"), (llava, "llava"), (qa, "qa")])
def test_a_file_of_records(folder, tmp_path, record, sample_format):
    write_lines(folder / "a.jsonl", record("a.png", "deep/b.png"), "", record("a.png"))
    urls = built(folder / "a.jsonl", tmp_path)
    assert len(urls) == 2 and {read_index(url).sample_format for url in urls} == {sample_format}
    assert not lint(urls, SourceConfig(shards="none", format=format_of(urls, None))).problems


@pytest.mark.parametrize("record", [ours, llava])
@pytest.mark.parametrize(
    "name",
    ["../secret.png", "deep/../../secret.png", "{folder}/../secret.png", "{folder}/a.png/../../secret.png", "link.png", "links/secret.png"],
)
def test_no_image_from_outside(folder, tmp_path, record, name):
    os.symlink(folder.parent / "secret.png", folder / "link.png")
    os.symlink(folder.parent, folder / "links")
    write_lines(folder / "a.jsonl", "", record("a.png"), record(name.format(folder=folder)))
    with pytest.raises(DataError, match="lies outside of") as caught:
        built(folder / "a.jsonl", tmp_path)
    assert caught.value.key == "line 3" and caught.value.shard.endswith("a.jsonl")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["png", "txt"])
def test_no_pair_from_outside(folder, tmp_path, kind):
    (folder / f"a.{kind}").unlink()
    os.symlink(folder.parent / f"secret.{kind}", folder / f"a.{kind}")
    with pytest.raises(DataError, match="lies outside of") as caught:
        built(folder, tmp_path)
    assert caught.value.key == "a.png"


def test_all_problems_at_once(folder, tmp_path):
    for i in range(298):
        (folder / "deep" / f"{i:03d}.png").write_bytes(png())
    (folder / "empty.png").write_bytes(png())
    (folder / "empty.txt").write_text(" ")
    with pytest.raises(DataError) as caught:
        built(folder, tmp_path)
    assert "298 x the image has no caption\n  first: shard" in str(caught.value) and "deep/000.png" in str(caught.value)
    assert "the pair has no caption" in str(caught.value) and "299 problems; nothing was written" in str(caught.value)
    assert not (tmp_path / "out").exists()


HOSTILE = [
    "{",
    "[]",
    "5",
    "null",
    '{"segments": 5}',
    '{"conversations": 5}',
    json.dumps(ours("missing.png")),
    json.dumps(ours("deep")),
    json.dumps(ours("pipe.png")),
    json.dumps(ours("loop.png")),
    json.dumps(ours("a.gif")),
    json.dumps(ours("a.txt")),
    json.dumps(ours("a\0.png")),
    json.dumps(ours("a" * 5000 + ".png")),
    json.dumps({"segments": [{"image": 5}]}),
    json.dumps({"segments": [{"image": ["a.png"]}]}),
    json.dumps({"task": "text", "segments": [{"text": "nothing to learn"}]}),
    json.dumps({"task": "text", "segments": [{"text": "\ud800", "loss": True}]}),
    '{"task": "text", "segments": ' + "[" * 100_000,
    '{"task": "text", "meta": {"n": ' + "9" * 5000 + '}, "segments": [{"text": "a", "loss": true}]}',
    json.dumps({**llava("a.png"), "image": 5}),
    json.dumps({**llava("a.png"), "image": {"a": 1}}),
    json.dumps({**llava("a.png"), "image": ["a.png", "a.png"]}),
    json.dumps({"image": "a.png", "conversations": [{"from": "gpt"}]}),
]


@pytest.mark.parametrize("line", HOSTILE, ids=range(len(HOSTILE)))
def test_lines_that_are_no_samples(folder, tmp_path, line):
    os.mkfifo(folder / "pipe.png")
    os.symlink("loop.png", folder / "loop.png")
    write_lines(folder / "a.jsonl", ours("a.png") if "segments" in line else llava("a.png"), "", "  ", line)
    with pytest.raises(DataError) as caught:
        built(folder / "a.jsonl", tmp_path)
    assert caught.value.key == "line 4" and caught.value.shard.endswith("a.jsonl")


def test_formats_are_not_mixed(folder, tmp_path):
    write_lines(folder / "a.jsonl", ours("a.png"), llava("a.png"))
    with pytest.raises(DataError, match=r"mixes formats: megavlm \(line 1\), llava \(line 2\)"):
        built(folder / "a.jsonl", tmp_path)


def test_captions_in_lines(folder, tmp_path):
    write_lines(folder / "a.jsonl", {"image": "a.png", "caption": "one"}, {"image": "deep/b.png", "caption": "two", "url": "x"})
    urls = built(folder / "a.jsonl", tmp_path)
    assert {read_index(url).sample_format for url in urls} == {"img2dataset"}
    assert not lint(urls, SourceConfig(shards="none", format=format_of(urls, None))).problems


def test_what_is_wrong_with_many_lines_is_said_once(folder, tmp_path):
    write_lines(folder / "a.jsonl", qa("a.png"), *({"image": "a.png", "title": f"no {i}"} for i in range(298)))
    with pytest.raises(DataError, match="298 x the names") as caught:
        built(folder / "a.jsonl", tmp_path)
    assert "first: shard" in str(caught.value) and "line 2" in str(caught.value) and str(caught.value).count("title") == 1


# --- what is held out


def test_a_picture_is_held_out_everywhere(tmp_path):
    """Of captions and questions about the same pictures the same pictures are kept apart, and nothing is lost."""
    (tmp_path / "photos").mkdir()
    for i in range(40):
        (tmp_path / "photos" / f"{i:02d}.png").write_bytes(png(i))
        (tmp_path / "photos" / f"{i:02d}.txt").write_text(f"number {i}")
    write_lines(tmp_path / "a.jsonl", *(qa(f"photos/{i:02d}.png") for i in range(40) for _ in range(2)))
    parts = {}
    for source in ("photos", "a.jsonl"):
        written = build_shards(tmp_path / source, tmp_path / f"{source}-out", 1000, held_out=0.25)
        assert set(written) == {"000000.tar", "held-out/000000.tar"} and sum(written.values()) == (40 if source == "photos" else 80)
        for name in written:
            samples = read_samples([str(tmp_path / f"{source}-out" / name)], SourceConfig(shards="none", format=FORMAT[source]), Report())
            parts[source, name] = {int(image[0, 0, 0]) for sample in samples for image in sample.images.values()}
    assert parts["photos", "held-out/000000.tar"] == parts["a.jsonl", "held-out/000000.tar"]
    assert 4 <= len(parts["photos", "held-out/000000.tar"]) <= 16
    assert parts["photos", "000000.tar"] | parts["photos", "held-out/000000.tar"] == set(range(40))


FORMAT = {"photos": "img2dataset", "a.jsonl": "qa"}


def test_no_part_is_empty(folder, tmp_path):
    with pytest.raises(MegavlmError, match="of 2 samples would be held out"):
        built(folder, tmp_path, held_out=1e-9)


# --- the format in the index


def test_indexes_know_the_format(folder, tmp_path, caplog):
    first, second = built(folder, tmp_path)
    assert format_of([first, second], None) == "img2dataset"
    assert format_of([first, second], "llava", "data.sources.a") == "llava"
    assert "data.sources.a: the index of" in caplog.text and "says format img2dataset; llava is taken" in caplog.text
    # counting again keeps what is known
    assert write_index(tmp_path / "out" / "000000.tar").sample_format == "img2dataset"
    write_index(tmp_path / "out" / "000001.tar", "text")
    with pytest.raises(ConfigError, match="different formats") as caught:
        format_of([first, second], None)
    assert first in str(caught.value) and second in str(caught.value)


def test_indexes_without_a_format_are_read(folder, tmp_path):
    first, second = built(folder, tmp_path)
    index = json.loads((tmp_path / "out" / f"000000.tar{SUFFIX}").read_text())
    del index["sample_format"]
    (tmp_path / "out" / f"000000.tar{SUFFIX}").write_text(json.dumps(index))
    assert read_index(first).samples == 1 and format_of([first], None) == "img2dataset", "as its first sample looks"
    assert format_of([first, second], None) == "img2dataset"


def test_recipes_take_the_format_from_the_index(folder, tmp_path, make_factory):
    urls = built(folder, tmp_path)
    lane = make_factory({"a": {"shards": urls, "epochs": 1}}, num_lanes=1, pack_tokens=400)(0)
    assert sum(len(pack.keys) for pack, _ in lane) == 2
