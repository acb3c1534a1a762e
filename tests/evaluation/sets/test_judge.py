"""A real run judged on small sets from files, through the command line."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from megavlm.benchmarks import digits
from megavlm.cli import main as cli
from megavlm.config import load_config
from megavlm.errors import ConfigError, MegavlmError
from megavlm.evaluation.sets.entries import BadEntries, find_function
from megavlm.evaluation.sets.judge import Judge
from megavlm.evaluation.sets.vqa import VqaScore, read_questions
from megavlm.parts.trained import load_trained
from tests.conftest import TINY
from tests.distributed.ranks import run_ranks
from tests.distributed.work import train
from tests.evaluation.test_sampling import AlwaysSays

HERE = "tests.evaluation.sets.test_judge"
_judge = None


def detect_digit(image):
    """The digit that an SVM sees in a drawing."""
    global _judge
    _judge = _judge or digits.Judge()
    codes = digits.TOKENIZER.encode(image[None]).reshape(1, -1)
    return [{"class": digits.WORDS[int(_judge._machine.predict(codes)[0])], "box": [0, 0, 8, 8]}]


def pixels(images):
    return images[..., 0].reshape(len(images), -1)[:, 20:30]


def words_in(texts):
    return [[1.0 + (word in text) for word in digits.WORDS] for text in texts]


@pytest.fixture(scope="module")
def run(digits_folder, tmp_path_factory):
    """A run folder after one step."""
    folder = tmp_path_factory.mktemp("run")
    sources = {t: {"shards": f"{digits_folder}/{t}-train-{{00..07}}.tar"} for t in ("understanding", "generation")}
    places = {"run_dir": str(folder), "vocabulary.text_model": str(digits_folder / "text.model"), "data.sources": sources}
    run_ranks(1, train, load_config("digits", places | TINY | {"checkpoint.every_steps": 1}), 1)
    return folder


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number, codes in enumerate(digits.load("test").codes[:5]):
        Image.fromarray(digits.TOKENIZER.decode(codes[None])[0]).save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes(b"no image")
    return folder


def megavlm(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["megavlm", "judge", *map(str, arguments)])
    cli.main()
    return json.loads(capsys.readouterr().out)


def write_lines(path, entries):
    path.write_text("".join((e if isinstance(e, str) else json.dumps(e)) + "\n" for e in entries))
    return path


def test_vqa_files_by_a_model_that_always_says_seven(run, images, tmp_path):
    model = load_trained(run)[0]
    (piece,) = model.encoder.vocabulary.encode_text("seven")
    model.backbone.causal_lm.lm_head = AlwaysSays(piece, model.encoder.vocabulary.size)
    asked = [{"question_id": 10 + i, "image_id": i, "question": "Which digit?"} for i in range(5)] + [{"question_id": 99, "image_id": 0}]
    ten = {10: ["seven"] * 10, 11: ["7"] * 2 + ["one"] * 8, 12: ["one"] * 10, 13: ["Seven."] + ["two"] * 9}
    notes = [{"question_id": n, "answers": [{"answer": a} for a in answers], "answer_type": "number"} for n, answers in ten.items()]
    (tmp_path / "questions.json").write_text(json.dumps({"questions": asked, "data_subtype": "val"}))
    (tmp_path / "annotations.json").write_text(json.dumps({"annotations": notes}))
    bad = BadEntries(tmp_path / "questions.json", 10)
    items = read_questions(bad.file, tmp_path / "annotations.json", "{:d}.png", "{question}", bad=bad)
    result = Judge(model, "vqa", bad, 3, options={}).read(items, images, 1, VqaScore())
    # "7", "seven" and "Seven." are one answer: 10, 2, none and 1 of ten people agree
    figures = result["figures"]
    assert figures["vqa_score"] == pytest.approx((1 + 0.6 + 0 + 0.3) / 4) and figures["exact_match"] == 1 / 4
    assert result["judged"] == 4 and {b["where"] for b in result["bad_entries"]} == {"question 14", "question 99"}
    assert read_questions(bad.file, tmp_path / "annotations.json", "", "{question}", bad=bad)[1].image == "COCO_val_000000000001.jpg"


def test_plain_questions_with_bad_entries_are_counted_and_named(run, images, tmp_path, monkeypatch, capsys):
    questions = [{"image": f"{i}.png", "question": "Which digit is this?", "answer": "zero"} for i in range(5)]
    broken = ["{", {"image": "0.png", "question": "?"}, {"image": "9.png", "question": "?", "answer": "x"}]
    broken += [{"image": "broken.png", "question": "?", "answers": ["x"]}]
    file = write_lines(tmp_path / "set.json", questions[:2] + broken + questions[2:])
    command = ["vqa", run, file, f"--images={images}", "--batch_size=2", "--max_tokens=2"]
    shown = megavlm(monkeypatch, capsys, *command)
    assert shown["judged"] == 5 and shown["bad"] == 4 and shown["figures"]["vqa_score"] is None
    written = json.loads((run / "judged" / "vqa-set.json").read_text())
    assert [entry["where"] for entry in written["bad_entries"]] == ["line 3", "line 4", "line 5", "line 6"]
    for entry, what in zip(written["bad_entries"], ("broken JSON", "at least 1 item", "No such file", "cannot be read as an image")):
        assert what in entry["what"], entry
    lines = [json.loads(line) for line in (run / "judged" / "vqa-set.jsonl").read_text().splitlines()]
    assert [line["where"] for line in lines] == [f"line {n}" for n in (1, 2, 7, 8, 9)]
    assert megavlm(monkeypatch, capsys, *command) == shown, "the same every time"
    with pytest.raises(SystemExit):
        megavlm(monkeypatch, capsys, *command, "--max_bad=3")
    assert "more than 3 bad entries; the last one, line 6" in capsys.readouterr().err


def test_gqa_form(tmp_path):
    file = tmp_path / "gqa.json"
    file.write_text(json.dumps({"07": {"imageId": "23", "question": "Red?", "answer": "no", "isBalanced": True}}))
    (item,) = read_questions(file, None, "{}.jpg", "{question} One word.", bad=BadEntries(file, 0))
    assert (item.where, item.prompt, item.truth, item.image) == ("entry 07", "Red? One word.", ["no"], "23.jpg")


def test_yes_no_and_captions(run, images, tmp_path, monkeypatch, capsys):
    entries = [{"image": f"{i}.png", "text": "Is there a zero?", "label": "yes" if i % 2 else "no"} for i in range(5)]
    shown = megavlm(monkeypatch, capsys, "yesno", run, write_lines(tmp_path / "pope.json", entries), "--images", images, "--max_tokens=1")
    assert shown["figures"]["questions"] == 5 and 0 <= shown["figures"]["accuracy"] <= 1
    captions = [{"image": f"images/{i}.png", "captions": ["a seven", "the digit seven"]} for i in range(5)]
    shown = megavlm(monkeypatch, capsys, "captions", run, write_lines(tmp_path / "c.jsonl", captions), "--max_tokens=3")
    assert shown["judged"] == 5 and set(shown["figures"]) == {"cider_d", "bleu_4"}


def test_drawings_by_detector_fid_and_clip(run, tmp_path, monkeypatch, capsys):
    requests = [{"prompt": f"a handwritten {word}", "include": [{"class": word}], "tag": "single_object"} for word in digits.WORDS]
    file = write_lines(tmp_path / "g.jsonl", requests)
    command = ["geneval", run, file, f"--detector={HERE}:detect_digit", "--num=2", "--batch_size=7"]
    shown = megavlm(monkeypatch, capsys, *command)
    lines = [json.loads(line) for line in (run / "judged" / "geneval-g.jsonl").read_text().splitlines()]
    assert shown["judged"] == len(lines) == 20 and shown["figures"]["overall"] == np.mean([line["right"] for line in lines])
    assert [line["prompt"] for line in lines[:3]] == ["a handwritten zero"] * 2 + ["a handwritten one"]
    assert (run / "judged" / "geneval-g.png").stat().st_size > 3000
    assert megavlm(monkeypatch, capsys, *command) == shown, "the same every time"

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(digits.prompts(20)[0]))
    real = digits.TOKENIZER.decode(digits.load("train").codes)
    np.save(tmp_path / "real.npy", pixels(real))
    shown = megavlm(monkeypatch, capsys, "fid", run, prompts, f"--real={tmp_path}/real.npy", f"--features={HERE}:pixels")
    assert shown["judged"] == 20 and shown["figures"]["fid"] > 0 and shown["figures"]["feature_width"] == 10
    options = [f"--image_features={HERE}:pixels", f"--text_features={HERE}:words_in"]
    shown = megavlm(monkeypatch, capsys, "clip", run, prompts, *options)
    assert -100 <= shown["figures"]["cosine_x100"] <= 100


def test_a_function_of_a_file_of_ones_own(tmp_path):
    (tmp_path / "mine.py").write_text("def double(x):\n    return 2 * x\n")
    assert find_function(f"{tmp_path}/mine.py:double", "--features")(4) == 8
    with pytest.raises(ConfigError, match="--features: .*has no attribute"):
        find_function(f"{tmp_path}/mine.py:triple", "--features")


def test_a_set_without_anything_to_judge(run, tmp_path):
    file = write_lines(tmp_path / "empty.jsonl", [])
    with pytest.raises(MegavlmError, match="nothing could be judged"):
        Judge(load_trained(run)[0], "vqa", BadEntries(file, 0), 4, options={}).read([], tmp_path, 1, VqaScore())
