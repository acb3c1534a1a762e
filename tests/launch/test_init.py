"""`megavlm init` writes a recipe that is checked without a mistake; `recipe check` finds what is wrong with recipes and data."""

import json
import sys

import pytest

from megavlm.cli import main as cli
from megavlm.cli.recipes import _divided
from megavlm.config import load_config
from megavlm.data.tools.write import build_shards
from megavlm.vocabulary import train_text_model
from tests.data.read.test_formats import png


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Captions and questions about twenty pictures as shards, some of them held out, and a text model."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "pictures").mkdir()
    lines = []
    for i in range(20):
        (folder / "pictures" / f"{i}.png").write_bytes(png(10 * i))
        (folder / "pictures" / f"{i}.txt").write_text(f"a grey square of level {i}")
        lines.append(json.dumps({"image": f"pictures/{i}.png", "question": "Which level?", "answer": str(i)}) + "\n")
    (folder / "questions.jsonl").write_text("".join(lines))
    build_shards(folder / "pictures", folder / "captions", 6, held_out=0.3)
    build_shards(folder / "questions.jsonl", folder / "questions", 100, held_out=0.3)
    train_text_model((f"a grey square of level {i} Which level?" for i in range(20)), folder / "text.model", 300)
    return folder


def megavlm(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["megavlm", *map(str, arguments)])
    cli.main()


def test_a_recipe_from_flags_is_checked_shown_and_read(monkeypatch, folder, tmp_path, capsys):
    recipe = tmp_path / "mine.yaml"
    data, text = f"--data={folder}/captions,{folder}/questions", f"--text_model={folder}/text.model"
    megavlm(monkeypatch, "init", recipe, data, text, "--image_tokenizer=pixel:4x4", "--steps=50", f"--run_dir={tmp_path}/run")
    out = capsys.readouterr().out
    assert "captions:" in out and "of the format qa" in out
    config = load_config(str(recipe))
    assert set(config.data.sources) == set(config.validation.sources) == {"captions", "questions"}
    assert config.optimizer.num_steps == 50 and config.checkpoint.best_metric == "validation/loss"
    assert config.monitor.sample_prompts and config.vocabulary.image_tokenizer.height == 4
    megavlm(monkeypatch, "recipe", "check", recipe)
    out = capsys.readouterr().out
    assert "nothing is wrong" in out and "data.sources.questions: 1 shards" in out and "validation.sources.captions" in out
    assert "images would be squashed" not in out, "8 x 8 pixels keep their proportions at 4 x 4"
    megavlm(monkeypatch, "recipe", "check", recipe, "--vocabulary.image_tokenizer.width=8")
    assert "images would be squashed" in capsys.readouterr().out
    megavlm(monkeypatch, "recipe", "show", recipe)
    assert "data.num_lanes: 4" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        megavlm(monkeypatch, "init", recipe, data, text)
    assert "exists already" in capsys.readouterr().err


def test_without_a_terminal_what_is_missing_is_named(monkeypatch, folder, tmp_path, capsys):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        megavlm(monkeypatch, "init", tmp_path / "a.yaml")
    assert "init: data is missing" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        megavlm(monkeypatch, "init", tmp_path / "a.yaml", f"--data={folder}/captions")
    assert "init: text_model is missing" in capsys.readouterr().err and not (tmp_path / "a.yaml").exists()


def test_in_a_terminal_it_asks(monkeypatch, folder, tmp_path, capsys):
    answers = iter([f"{folder}/captions", "", f"{folder}/text.model", "pixel:4x4", "30", ""])
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda question: next(answers))
    megavlm(monkeypatch, "init", tmp_path / "asked.yaml")
    config = load_config(str(tmp_path / "asked.yaml"))
    assert config.optimizer.num_steps == 30 and config.run_dir == "runs/asked" and list(config.data.sources) == ["captions"]


def test_a_check_finds_all_mistakes(monkeypatch, folder, tmp_path, capsys):
    recipe = tmp_path / "mine.yaml"
    megavlm(monkeypatch, "init", recipe, f"--data={folder}/captions", f"--text_model={folder}/text.model", "--image_tokenizer=pixel:4x4")
    capsys.readouterr()
    with pytest.raises(SystemExit, match="1"):
        megavlm(
            *(monkeypatch, "recipe", "check", recipe, "--data.pack_tokens=20", "--init_from=gone"),
            "--validation.sources={a: {shards: gone.tar}}",
            "--checkpoint.keep_best=0",
        )
    out = capsys.readouterr().out
    assert "init_from: there is no folder gone" in out and "the shard does not exist" in out and "samples" in out
    assert "tokens" in out and " x " in out, "samples that are too long are one kind of problem"
    assert "3 kinds of problems" in out


def test_commas_divide_outside_of_braces():
    assert _divided("a/{0,1}.tar, b,c") == ["a/{0,1}.tar", "b", "c"]


def test_inspect_and_lint_count_what_is_cut(monkeypatch, folder, tmp_path, capsys):
    recipe = tmp_path / "mine.yaml"
    megavlm(monkeypatch, "init", recipe, f"--data={folder}/captions", f"--text_model={folder}/text.model", "--image_tokenizer=pixel:4x8")
    for command in (["inspect", f"--out={tmp_path}/a.png"], ["lint"]):
        capsys.readouterr()
        megavlm(monkeypatch, "data", *command, f"{folder}/captions/000000.tar", f"--recipe={recipe}")
        assert "6 of 6 images would be squashed" in capsys.readouterr().out


def test_llava_with_a_folder_of_images_is_linted(monkeypatch, folder, tmp_path, capsys):
    turns = [{"from": "human", "value": "<image> Which?"}, {"from": "gpt", "value": "Grey."}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": "0.png", "conversations": turns}) + "\n")
    megavlm(monkeypatch, "data", "lint", tmp_path / "a.jsonl", f"--image_root={folder}/pictures")
    assert "1 samples, 0 problems" in capsys.readouterr().out
