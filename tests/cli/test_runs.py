"""`megavlm checkpoint` and `megavlm status` as a user types them, on a run that trained and ended."""

import sys

import pytest

from megavlm.cli import main as cli
from megavlm.runs.manifest import complete_checkpoints
from tests.distributed.ranks import run_ranks


def launch_run(world, config):
    from megavlm.launch.train import make_trainer

    make_trainer(config, world).run()


@pytest.fixture(scope="module")
def run(digits_folder, tmp_path_factory):
    from megavlm.config import load_config
    from tests.conftest import TINY

    folder = tmp_path_factory.mktemp("commands") / "run"
    sources = {t: {"shards": f"{digits_folder}/{t}-train-{{00..07}}.tar"} for t in ("understanding", "generation")}
    places = {"run_dir": str(folder), "vocabulary.text_model": str(digits_folder / "text.model"), "data.sources": sources}
    rule = {"checkpoint.every_steps": 1, "checkpoint.keep_last": 4, "optimizer.num_steps": 5}
    run_ranks(1, launch_run, load_config("digits", TINY | places | rule))
    return folder


def megavlm(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["megavlm", *map(str, arguments)])
    cli.main()
    return capsys.readouterr().out


def test_list_verify_and_prune(run, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    lines = megavlm(monkeypatch, capsys, "checkpoint", "list", run).splitlines()
    assert [line.split()[0] for line in lines[1:]] == [f"step-{step:08d}" for step in (2, 3, 4, 5)]
    assert "loss/generation" in lines[1]
    assert megavlm(monkeypatch, capsys, "checkpoint", "verify", run).count("intact") == 4
    newest = complete_checkpoints(run / "checkpoints")[-1]
    content = (newest / "state.json").read_bytes()
    (newest / "state.json").write_bytes(content[:-1])
    with pytest.raises(SystemExit, match="1"):
        megavlm(monkeypatch, capsys, "checkpoint", "verify", newest)
    out = capsys.readouterr().out
    assert "damaged" in out and f"state.json has {len(content) - 1} bytes instead of {len(content)}" in out
    (newest / "state.json").write_bytes(content)
    out = megavlm(monkeypatch, capsys, "checkpoint", "prune", run, "--keep-last=1", "--keep-every-steps=2", "--dry-run")
    assert out.count("would be removed") == 1 and "step-00000003" in out
    megavlm(monkeypatch, capsys, "checkpoint", "prune", run, "--keep-last=1", "--keep-every-steps=2")
    assert [path.name for path in complete_checkpoints(run / "checkpoints")] == ["step-00000002", "step-00000004", "step-00000005"]
    assert "nothing to remove" in megavlm(monkeypatch, capsys, "checkpoint", "prune", run)


def test_status(run, monkeypatch, capsys):
    out = megavlm(monkeypatch, capsys, "status", run)
    assert "5 of 5, 1 processes" in out and "last checkpoint  step-00000005" in out and "s per step" in out
    (run / "exit_code").write_text("75\n")
    assert "interrupted, to be continued" in megavlm(monkeypatch, capsys, "status", run)
    (run / "exit_code").write_text("1\n")
    assert "failed with exit status 1" in megavlm(monkeypatch, capsys, "status", run)
    (run / "exit_code").unlink()
    with pytest.raises(SystemExit, match="2"):
        megavlm(monkeypatch, capsys, "status", run / "nothing")


def test_the_run_left_its_times(run):
    table = (run / "stragglers.txt").read_text().splitlines()
    assert table[0].split() == ["rank", "host", "planned", "data", "compute", "probe", "verdict"] and len(table) == 2
