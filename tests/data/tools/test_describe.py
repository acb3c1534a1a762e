"""Tools that look at shards: problems by kind, valid sets without any, and no more held than is shown."""

import json
import tracemalloc
import warnings

import numpy as np
import pytest
from PIL import Image

from megavlm.cli.data import DataCommands
from megavlm.data.read.source import SourceConfig
from megavlm.data.tools.inspect import inspect
from megavlm.data.tools.lint import lint
from megavlm.errors import ConfigError
from tests.data.conftest import pair, write_shard
from tests.data.read.test_formats import png

OURS = SourceConfig(shards="none")


def test_problems_are_grouped_by_kind(tmp_path):
    samples = [(f"{i}", {"png": png()}) for i in range(298)] + [("x", {"png": png(), "txt": b"fine"}), ("y", {"txt": b"no image"})]
    write_shard(tmp_path / "a.tar", samples)
    report = lint([str(tmp_path / "a.tar")], SourceConfig(shards="none", format="img2dataset"))
    assert len(report.problems) == 299 and len(report.grouped()) == 2
    first, second = report.grouped()
    assert first.startswith("298 x ") and "\n  first: shard" in first and "a.tar, sample 0\n  do: " in first
    assert "the pair has no image" in second and "sample y" in second


def test_names_and_numbers_do_not_tell_kinds_apart(tmp_path):
    documents = [
        (str(i), {"json": {"task": "text", "segments": [{"image": f"img{i}", "loss": True}]}, f"other{i}.npy": b"x"}) for i in range(20)
    ]
    write_shard(tmp_path / "a.tar", documents)
    assert len(lint([str(tmp_path / "a.tar")], OURS).grouped()) == 1


def test_lines_of_several_files_are_no_duplicates(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(5)))
        (tmp_path / f"{name}.json").write_text(json.dumps([{"text": "one"}, {"text": "two"}]))
    for kind in ("jsonl", "json"):
        assert not lint([str(tmp_path / f"{name}.{kind}") for name in "ab"], SourceConfig(shards="none", format="text")).problems
    (tmp_path / "c.json").write_text(json.dumps([{"id": "x", "text": "one"}, {"id": "x", "text": "two"}]))
    assert len(lint([str(tmp_path / "c.json")], SourceConfig(shards="none", format="text")).problems) == 1
    for name in "de":
        write_shard(tmp_path / f"{name}.tar", [("same", pair("generation", 2))])
    assert len(lint([str(tmp_path / f"{name}.tar") for name in "de"], OURS).problems) == 1


def test_inspect_and_lint_let_images_go(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    """Images of 3 MB, a third of them in broken samples: what is held does not grow with their number."""
    Image.fromarray(np.zeros((1024, 1024, 3), np.uint8)).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes() + b"\0" * 1_000_000
    samples = [(str(i), pair("generation", 2) | {"img0.png": content} | ({"json": b"{"} if i % 3 == 0 else {})) for i in range(60)]
    write_shard(tmp_path / "a.tar", [(key, {k: v for k, v in members.items() if k != "img0.npy"}) for key, members in samples])
    for look in (lambda: inspect([str(tmp_path / "a.tar")], OURS, tmp_path / "sheet.png"), lambda: lint([str(tmp_path / "a.tar")], OURS)):
        tracemalloc.start()
        found = look()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 80e6
    assert len(found.problems) == 20
    text, has_images = inspect([str(tmp_path / "a.tar")], OURS, tmp_path / "sheet.png")
    assert has_images and "1024x1024: 40" in text and "20 x broken JSON" in text


@pytest.fixture
def built(tmp_path):
    (tmp_path / "photos").mkdir()
    for name in "ab":
        (tmp_path / "photos" / f"{name}.png").write_bytes(png())
        (tmp_path / "photos" / f"{name}.txt").write_text("some words " * 3)
    DataCommands().build(str(tmp_path / "photos"), str(tmp_path / "shards"))
    return str(tmp_path / "shards" / "000000.tar")


def test_every_tool_takes_the_format_from_the_index(built, tmp_path, capsys):
    data = DataCommands()
    data.lint(built)
    data.stats(built, out=str(tmp_path / "stats.png"))
    data.preview(built, out=str(tmp_path / "preview.png"))
    data.inspect(built, out=str(tmp_path / "sheet.png"))
    data.tokenizer(built, str(tmp_path / "text.model"), vocab_size=300)
    said = capsys.readouterr().out
    assert "2 samples, 0 problems" in said and '"samples": 2' in said and "preview.html, 0 problems" in said
    assert "trained on 2 texts of 2 samples, 0 of them left out" in said
    with pytest.raises(SystemExit):
        data.lint(built, format="megavlm")
    data.index(built, format="megavlm")
    with pytest.raises(SystemExit):
        data.lint(built)


def test_a_broken_text_file_has_its_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\n\ntw\xff\n")
    with warnings.catch_warnings(), pytest.raises(ConfigError, match="a.txt: line 3 is not UTF-8"):
        DataCommands().tokenizer(str(tmp_path / "a.txt"), str(tmp_path / "text.model"), vocab_size=300)
