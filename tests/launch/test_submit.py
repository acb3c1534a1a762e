"""The rendered script: what was asked for is in it, and bash can read it."""

import subprocess
import sys

import pytest
import yaml

from megavlm.cli.main import main


@pytest.fixture
def submit(make_config, tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(make_config().model_dump(mode="json")))

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["megavlm", "submit", str(recipe), "--dry-run", *arguments])
        main()
        return capsys.readouterr().out

    return call


def lines_of(path):
    checked = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    return path.read_text().splitlines()


def test_what_was_asked_for_is_in_the_script(submit, tmp_path):
    options = "--nodes=2 --gpus-per-node=2 --partition=gpu --time=1-00:00:00 --account=me --modules=cuda/12,nccl"
    out = submit(*options.split(), "--container-image=/images/a b.sqsh", "--sbatch-options=--constraint=h100 --exclusive")
    lines = lines_of(tmp_path / "run" / "slurm" / "train.sbatch")
    for line in (
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=2",
        "#SBATCH --gpus-per-node=2",
        "#SBATCH --partition=gpu",
        "#SBATCH --time=1-00:00:00",
        "#SBATCH --account=me",
        "#SBATCH --constraint=h100",
        "#SBATCH --exclusive",
        "#SBATCH --signal=USR1@120",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        "module load cuda/12 nccl",
    ):
        assert line in lines, line
    text = "\n".join(lines)
    assert "--container-image='/images/a b.sqsh' " in text and "python -m megavlm train" in text
    assert "--kill-on-bad-exit=1" in text and "not submitted" in out and "@{" not in text


def test_without_slurm_a_single_node_is_told_the_torchrun_command(submit):
    assert "torchrun --standalone --nproc-per-node 4 -m megavlm train" in submit("--nodes=1", "--gpus-per-node=4")


def test_processes_that_cannot_share_the_lanes_are_refused_before_the_queue(submit):
    with pytest.raises(SystemExit, match="2"):
        submit("--nodes=3", "--gpus-per-node=1")


def test_a_study_has_a_recipe_per_run(submit, tmp_path):
    study = tmp_path / "study.yaml"
    study.write_text("- {name: slow, optimizer.learning_rate: 1.0e-4}\n- {seed: 5}\n")
    submit("--nodes=1", "--gpus-per-node=1", f"--array={study}")
    run = tmp_path / "run"
    assert "#SBATCH --array=0-1" in lines_of(run / "slurm" / "study.sbatch")
    assert (run / "slurm" / "runs.txt").read_text().split() == [str(run / "slow"), str(run / "run-001")]
    slow = yaml.safe_load((run / "slow" / "slurm" / "recipe.yaml").read_text())
    assert slow["optimizer"]["learning_rate"] == 1e-4 and slow["run_dir"] == str(run / "slow")
    study.write_text("name: not a list")
    with pytest.raises(SystemExit, match="2"):
        submit("--nodes=1", "--gpus-per-node=1", f"--array={study}")


@pytest.mark.parametrize(
    ("study", "message"),
    [
        ("- {name: a}\n- {name: a}", "'a' is no name for one run alone"),
        ("- {name: ../a}", "'../a' is no name for one run alone"),
        ("- {name: [", "is no YAML"),
    ],
)
def test_a_wrong_study_is_refused(submit, tmp_path, capsys, study, message):
    (tmp_path / "study.yaml").write_text(study)
    with pytest.raises(SystemExit, match="2"):
        submit("--nodes=1", "--gpus-per-node=1", f"--array={tmp_path / 'study.yaml'}")
    assert message in capsys.readouterr().err


def test_modules_without_versions_and_a_template_of_ones_own(submit, tmp_path, capsys):
    template = tmp_path / "mine.sbatch"
    template.write_text("#!/bin/bash\n@{setup}\n")
    submit("--nodes=1", "--gpus-per-node=1", "--modules=cuda,nccl", f"--template={template}")
    assert "module load cuda nccl" in lines_of(tmp_path / "run" / "slurm" / "train.sbatch")
    template.write_text("@{colour}")
    with pytest.raises(SystemExit, match="2"):
        submit("--nodes=1", "--gpus-per-node=1", f"--template={template}")
    assert "@{colour}, which nothing fills in" in capsys.readouterr().err
