"""`ask`, `generate` and `batch` as a user types them, on a run and on its export."""

import json
import sys

import pytest
from PIL import Image

from megavlm.cli import main as cli


def megavlm(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["megavlm", *map(str, arguments)])
    cli.main()


def refused(monkeypatch, capsys, *arguments):
    with pytest.raises(SystemExit, match="2"):
        megavlm(monkeypatch, *arguments)
    err = capsys.readouterr().err
    assert "do:" in err and "Traceback" not in err
    return err


def test_ask_the_run_and_its_export(run, exported, images, monkeypatch, capsys):
    words = [images / "0.png", images / "1.png", "Which digits?", "2024"]
    megavlm(monkeypatch, "ask", run, *words, "--max_tokens=4")
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 2 and "cut after 4 tokens" in said.err
    megavlm(monkeypatch, "ask", exported, *words, "--max_tokens=4")
    assert capsys.readouterr().out == said.out
    megavlm(monkeypatch, "ask", run, *words, "--max_tokens=4", "--temperature=90", "--seed=1")
    assert capsys.readouterr().out != said.out


def test_generate_from_images_with_the_run_and_its_export(run, exported, images, tmp_path, monkeypatch, capsys):
    for number, source in enumerate((run, exported)):
        megavlm(monkeypatch, "generate", source, images / "0.png", "thinner", "--num=2", "--out", tmp_path / f"grid{number}.png")
    assert "2 drawings of '0.png thinner'" in capsys.readouterr().out
    assert (tmp_path / "grid0.png").read_bytes() == (tmp_path / "grid1.png").read_bytes()


def test_a_batch(run, images, tmp_path, monkeypatch, capsys):
    lines = [
        {"id": 7, "question": "Which digit is this?", "image": "0.png", "answer": "seven"},
        {"prompt": "a handwritten seven"},
        {"prompt": "thinner", "images": ["0.png", "1.png"]},
        {"prompt": "x", "question": "y"},
        {"question": "Which?", "image": "broken.png"},
        {"question": "Which digit?", "image": "1.png"},
    ]
    (images / "requests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    megavlm(monkeypatch, "batch", run, images / "requests.jsonl", tmp_path / "out", "--num=2", "--max_tokens=3")
    assert "2 answers, 4 pictures; 2 lines left out" in capsys.readouterr().out
    index = [json.loads(line) for line in (tmp_path / "out" / "index.jsonl").read_text().splitlines()]
    assert [entry["where"] for entry in index] == ["line 1", "line 2", "line 3", "line 6"]
    assert index[0]["request"] == lines[0] and isinstance(index[0]["answer"], str)
    names = [name for entry in index for name in entry.get("pictures", [])]
    assert len(set(names)) == 4 and all(Image.open(tmp_path / "out" / name).size == (8, 8) for name in names)
    assert "exists already" in refused(monkeypatch, capsys, "batch", run, images / "requests.jsonl", tmp_path / "out")
    (images / "empty.jsonl").write_text("\n")
    assert "nothing could be asked" in refused(monkeypatch, capsys, "batch", run, images / "empty.jsonl", tmp_path / "other")


def test_mistakes_are_said(run, images, tmp_path, monkeypatch, capsys):
    assert "is not a run folder" in refused(monkeypatch, capsys, "ask", tmp_path, "Hello?")
    assert "no question behind" in refused(monkeypatch, capsys, "ask", run, images / "0.png")
    assert "cannot be read as an image" in refused(monkeypatch, capsys, "ask", run, images / "broken.png", "What?")
    assert "nothing to draw" in refused(monkeypatch, capsys, "generate", run)
    assert "the model is made for 256" in refused(monkeypatch, capsys, "generate", run, "a " * 300)
    assert "is a number" in refused(monkeypatch, capsys, "ask", run, "Hello?", "--temperature=warm")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").write_text((run / "config.yaml").read_text())
    assert "has no complete checkpoint" in refused(monkeypatch, capsys, "ask", tmp_path / "begun", "Hello?")
