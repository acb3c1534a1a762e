"""The command line as a user types it: in this process where that is enough, as a process where launchers matter."""

import json
import os
import subprocess
import sys

import pytest

from megavlm.cli import main as cli
from tests.conftest import TINY


def megavlm(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["megavlm", *map(str, arguments)])
    cli.main()


def test_digits_are_written_once(monkeypatch, digits_folder, tmp_path, capsys):
    megavlm(monkeypatch, "data", "digits", tmp_path / "out")
    assert "18 shards with 3594 samples" in capsys.readouterr().out
    first = (tmp_path / "out" / "generation-train-00.tar").read_bytes()
    assert first == (digits_folder / "generation-train-00.tar").read_bytes(), "the same bytes every time"
    with pytest.raises(SystemExit, match="2"):
        megavlm(monkeypatch, "data", "digits", tmp_path / "out")
    assert "already holds shards" in capsys.readouterr().err


def test_the_deepspeed_launchers_own_argument_is_no_command(monkeypatch, digits_folder, capsys):
    megavlm(monkeypatch, "--local_rank=1", "data", "lint", digits_folder / "generation-test-00.tar")
    assert "360 samples, 0 problems" in capsys.readouterr().out


def test_lint_stats_and_preview(monkeypatch, digits_folder, tmp_path, capsys):
    broken = tmp_path / "broken.tar"
    broken.write_bytes((digits_folder / "generation-test-00.tar").read_bytes()[:50_000])
    good = f"{digits_folder}/understanding-train-{{00..01}}.tar"
    megavlm(monkeypatch, "data", "lint", good)
    assert "360 samples, 0 problems" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="1"):
        megavlm(monkeypatch, "data", "lint", broken)
    out = capsys.readouterr().out
    assert "cut short" in out and str(broken) in out and "1 problems" in out
    megavlm(monkeypatch, "data", "stats", good, "--out", tmp_path / "stats.png")
    found = json.loads(capsys.readouterr().out)
    assert found["samples"] == 360 and found["images"] == {"8x8": 360} and found["tasks"] == {"understanding": 360}
    text = f"--vocabulary.text_model={digits_folder / 'text.model'}"
    megavlm(monkeypatch, "data", "stats", good, "--recipe=digits", text, "--out", tmp_path / "ids.png")
    ids = json.loads(capsys.readouterr().out)["ids"]
    assert (
        ids["image codes"] == ids["image codes"] | {"tokens": 360 * 64, "ids": 17, "ids_used": 17} and ids["image codes"]["perplexity"] < 17
    )
    assert ids["special"]["tokens"] == 360 * 4 and ids["special"]["ids_used"] == 4 and ids["special"]["perplexity"] == 4.0
    assert (tmp_path / "ids.png").stat().st_size > (tmp_path / "stats.png").stat().st_size
    megavlm(monkeypatch, "data", "preview", good, "--out", tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000 and (tmp_path / "stats.png").stat().st_size > 5000
    page = (tmp_path / "a.html").read_text()
    assert page.count("<section>") == 40 and page.count("data:image/png") == 40


def test_text_alone_has_no_contact_sheet(monkeypatch, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "one line"}\n')
    for command in ("preview", "inspect"):
        megavlm(monkeypatch, "data", command, tmp_path / "a.jsonl", "--format=text", "--out", tmp_path / f"{command}.png")
        assert "no images" in capsys.readouterr().out
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a.jsonl", "preview.html"]


def test_a_text_model_stays_until_there_is_another(monkeypatch, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "t.model").write_text("the old one")
    with pytest.raises(SystemExit, match="2"):
        megavlm(monkeypatch, "data", "tokenizer", tmp_path / "empty.txt", tmp_path / "t.model")
    assert "no text model can be trained" in capsys.readouterr().err and (tmp_path / "t.model").read_text() == "the old one"


def test_build_tokenizer_and_index(monkeypatch, tmp_path, capsys):
    from PIL import Image

    for i in range(5):
        Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"a square of red number {i}")
    megavlm(monkeypatch, "data", "build", tmp_path, tmp_path / "out", "--samples_per_shard=2")
    assert "3 shards with 5 samples" in capsys.readouterr().out
    assert len(list((tmp_path / "out").glob("*.tar.index.json"))) == 3
    shards = f"{tmp_path}/out/{{000000..000002}}.tar"
    megavlm(monkeypatch, "data", "lint", shards, "--format=img2dataset")
    megavlm(monkeypatch, "data", "tokenizer", shards, tmp_path / "t.model", "--vocab_size=300", "--format=img2dataset")
    assert "5 samples, 0 problems" in capsys.readouterr().out and (tmp_path / "t.model").is_file()
    lines = [
        {"id": "x", "image": "0.png", "conversations": [{"from": "human", "value": "<image>\nColour?"}, {"from": "gpt", "value": "red"}]}
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    megavlm(monkeypatch, "data", "build", tmp_path / "a.jsonl", tmp_path / "llava")
    megavlm(monkeypatch, "data", "lint", tmp_path / "llava" / "000000.tar", "--format=llava")
    assert "1 samples, 0 problems" in capsys.readouterr().out


def test_simulate_compares_the_packers(monkeypatch, digits_folder, tmp_path, capsys):
    sources = {t: {"shards": f"{digits_folder}/{t}-train-{{00..07}}.tar"} for t in ("understanding", "generation")}
    places = {"vocabulary.text_model": str(digits_folder / "text.model"), "data.sources": sources}
    arguments = [f"--{name}={json.dumps(value)}" for name, value in places.items()]
    sizes = ["--lanes=3", "--steps=12", "--first_step=4", "--processes=1", "--out", tmp_path / "s.png"]
    megavlm(monkeypatch, "data", "simulate", "digits", *sizes, *arguments)
    found = json.loads(capsys.readouterr().out)
    written = json.loads((tmp_path / "s.json").read_text())
    assert written.pop("title") == "3 lanes, steps 4 to 12, digits" and written == found and (tmp_path / "s.png").stat().st_size > 5000
    assert found["megavlm"]["total"]["mean"] <= found["first_come"]["total"]["mean"]
    with pytest.raises(SystemExit, match="2"):
        megavlm(monkeypatch, "data", "simulate", "--lanes=3", "--data.fill=0.9")
    assert "there is no recipe to change data.fill in" in capsys.readouterr().err


def test_a_text_model_from_a_text_file(monkeypatch, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("a red square\n\na blue circle left of a red square\n" * 30)
    megavlm(monkeypatch, "data", "tokenizer", tmp_path / "a.txt", tmp_path / "t.model", "--vocab_size=300")
    assert "trained on 60 texts of 1 files" in capsys.readouterr().out
    from megavlm.vocabulary import Vocabulary

    vocabulary = Vocabulary(tmp_path / "t.model", 8)
    assert vocabulary.decode_text(vocabulary.encode_text("a blue square")) == "a blue square"


def test_inspect_shows_samples_problems_and_a_contact_sheet(monkeypatch, digits_folder, tmp_path, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    broken = tmp_path / "broken.tar"
    broken.write_bytes((digits_folder / "generation-test-00.tar").read_bytes()[:50_000])
    megavlm(monkeypatch, "data", "inspect", f"{digits_folder}/understanding-train-{{00..01}}.tar", "--out", tmp_path / "a.png")
    out = capsys.readouterr().out
    assert out.count("understanding: 180") == 2 and "8x8: 180" in out
    megavlm(monkeypatch, "data", "inspect", broken, "--out", tmp_path / "b.png")
    assert "cut short" in capsys.readouterr().out
    assert (tmp_path / "a.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "digits", "--optimizer.num_stepz=3"], "Did you mean optimizer.num_steps?"),
        (["train", "digits", "--optimizer.num_steps=many"], "optimizer.num_steps: Input should be a valid integer"),
        (["train", "nothing"], "no file nothing"),
        (["evaluate", "/nowhere"], "/nowhere is not a run folder"),
        (["data", "lint", "/nowhere.tar"], "the shard does not exist"),
    ],
)
def test_mistakes_end_with_a_message_and_status_2(monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        megavlm(monkeypatch, *arguments)
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err


def test_doctor(monkeypatch, capsys):
    megavlm(monkeypatch, "doctor")
    out = capsys.readouterr().out
    assert "deepspeed" in out and "CPU cores" in out


def tiny(digits_folder, run_dir):
    sources = {t: {"shards": f"{digits_folder}/{t}-train-{{00..07}}.tar"} for t in ("understanding", "generation")}
    settings = TINY | {
        "run_dir": run_dir,
        "vocabulary.text_model": digits_folder / "text.model",
        "data.sources": sources,
        "monitor.sample_every_steps": 6,
        "evaluation.shards": digits_folder / "understanding-test-00.tar",
        "evaluation.num_drawings": 20,
    }
    return [f"--{name}={json.dumps(value, default=str)}" for name, value in settings.items()]


def launch(*command, status=0):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_train_under_torchrun_resume_evaluate_and_generate(digits_folder, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "megavlm"]
    launch(*torchrun, "train", "digits", *tiny(digits_folder, run))
    kept = {path.name for path in (run / "checkpoints").glob("step-*")}
    assert kept == {"step-00000003", "step-00000006"}
    for name in ("config.yaml", "text.model", "log.txt", "samples/step-00000006.png"):
        assert (run / name).is_file(), name
    tags = scalars(run)
    for tag in (
        "loss/understanding",
        "loss/generation",
        "optimizer/learning_rate",
        "optimizer/gradient_norm",
        "throughput/tokens_per_s",
        "routing/flops_share",
        "balance/planned_max_over_mean",
        "data/truncated",
        "kept_tokens/understanding/stage_0_layers_0-0",
    ):
        assert tag in tags, tags
    assert any(tag.startswith("kept_tokens/understanding/stage_0_layers_0-") for tag in tags), tags
    # alone, on another world size, and to a later end
    log = launch("megavlm", "train", "digits", *tiny(digits_folder, run), "--optimizer.num_steps=8")
    assert "resuming after step 6" in log and "optimizer.num_steps: 6 -> 8" in log and "step 8/8" in log
    assert "untested" not in log, "DeepSpeed knows our optimizer"

    megavlm(monkeypatch, "evaluate", run)
    result = json.loads((run / "evaluation.json").read_text())
    assert result == json.loads(capsys.readouterr().out) and result["checkpoint"] == "step-00000008"
    assert result["generation"]["judge_accuracy_on_held_out_real_digits"] > 0.97
    megavlm(monkeypatch, "generate", run, "a handwritten seven", "--out", tmp_path / "grid.png", "--num=3")
    assert (tmp_path / "grid.png").stat().st_size > 1000

    log = launch("megavlm", "train", "digits", *tiny(digits_folder, run), "--data.num_lanes=8", status=2)
    assert "data.num_lanes: 4 -> 8" in log


def scalars(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert {"samples", "route"} <= {*events.Tags()["images"]}
    return events.Tags()["scalars"]


def test_ctrl_c_is_a_word_and_no_traceback(monkeypatch, capsys):
    def interrupted(_self):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.Commands, "doctor", interrupted)
    monkeypatch.setattr("sys.argv", ["megavlm", "doctor"])
    with pytest.raises(SystemExit, match="130"):
        cli.main()
    assert capsys.readouterr().err.splitlines()[-1].startswith("megavlm: ended by Ctrl-C; nothing was written")
