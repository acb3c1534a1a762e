"""The rendered script: what was asked for is in it, and bash can read it."""

import re
import shlex
import subprocess
import sys
import textwrap

import pytest
import yaml

from megavlm.cli.main import main
from megavlm.cli.runs import RunCommands
from megavlm.launch.job import seconds_of
from megavlm.system.files import PROJECT


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


@pytest.mark.parametrize("name", ["a b", "ü ß", "it's", '50%j "quoted"', "# none"])
def test_any_run_folder_can_be_named(submit, tmp_path, name):
    run = tmp_path / name
    submit("--nodes=1", "--gpus-per-node=1", f"--run_dir={run}")
    lines = lines_of(run / "slurm" / "train.sbatch")
    words = [word for line in lines if line.startswith("#SBATCH") for word in shlex.split(line[8:])]
    directives = dict(word.split("=", 1) for word in words if "=" in word)
    assert directives["--job-name"] == name and directives["--output"] == f"{run}/slurm/%j.out".replace("50%j", "50%%j")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--time=2"], "is over before the run has begun"),
        (["--time=3"], "is over before the run has begun"),
        (["--time=0:30", "--warning-s=0", "--engine.stop_margin_s=60"], "engine.stop_margin_s = 60"),
        (["--time=10", "--warning-s=700"], "--warning-s=700"),
        (["--sbatch-options=--time=2"], "is over before the run has begun"),
        (["--sbatch-options=-t 2"], "is over before the run has begun"),
        (["--time=2h"], "days-hours"),
        (["--time=1:2:3:4"], "is no time limit"),
        (["--partition=gpu\nx"], "--partition"),
        (["--account=a\rb"], "--account"),
        (["--container-image=a\nb"], "--container-image"),
        (["--sbatch-options=--comment='open"], "close the quotes"),
        (['--cache=/a"b'], "--cache"),
        (["--run_dir=a\\b"], "backslash"),
    ],
)
def test_what_cannot_work_is_refused_before_the_queue(submit, capsys, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        submit("--nodes=1", "--gpus-per-node=1", *options)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("10", 600),
        ("1:30", 90),
        ("24:00:00", 86400),
        ("2-00", 172800),
        ("1-2:03", 93780),
        ("1-2:3:4", 93784),
        ("UNLIMITED", None),
        ("0", None),
    ],
)
def test_slurms_times(time, seconds):
    assert seconds_of(time) == seconds


def test_further_options_keep_their_values_and_quotes(submit, tmp_path):
    submit("--nodes=1", "--gpus-per-node=1", "--time=4", "--sbatch-options=--exclude node1 --comment='two words' --exclusive")
    lines = lines_of(tmp_path / "run" / "slurm" / "train.sbatch")
    for line in ("#SBATCH --exclude node1", "#SBATCH '--comment=two words'", "#SBATCH --exclusive", "#SBATCH --time=4"):
        assert line in lines, line


def commands_in_the_docs():
    texts = [path.read_text() for path in (PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md")))]
    texts.append(RunCommands.submit.__doc__)
    return [line.strip() for text in texts for line in text.splitlines() if line.strip().startswith("megavlm submit ")]


@pytest.mark.parametrize("command", dict.fromkeys(commands_in_the_docs()))
def test_the_docs_commands_work_as_they_stand(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    study = re.search(r"# study.yaml.*\n((?:    - .*\n)+)", (PROJECT / "docs" / "slurm.md").read_text())[1]
    (tmp_path / "study.yaml").write_text(textwrap.dedent(study))
    monkeypatch.setattr(sys, "argv", [*shlex.split(command), "--dry-run"])
    main()
    assert "not submitted" in capsys.readouterr().out


def test_the_docs_have_commands():
    assert len(commands_in_the_docs()) >= 4


def test_processes_on_gpus_are_bound_and_nccl_is_told(submit, tmp_path):
    submit("--nodes=2", "--gpus-per-node=2", "--container-image=/images/megavlm.sif")
    text = "\n".join(lines_of(tmp_path / "run" / "slurm" / "train.sbatch"))
    assert "--cpu-bind=cores --distribution=block:block --gpu-bind=none" in text
    assert text.count("apptainer exec --nv /images/megavlm.sif python -m megavlm") == 2 and "--container-image" not in text
    assert "export NCCL_DEBUG=${NCCL_DEBUG:-WARN}" in text and "--gpus 2" in text and "\ncheck_nodes\n" in text


def test_processes_on_cpus_need_none_of_that(submit, tmp_path):
    submit("--nodes=2", "--gpus-per-node=0", "--node-check=False", "--srun-options=--cpu-bind=none")
    text = "\n".join(lines_of(tmp_path / "run" / "slurm" / "train.sbatch"))
    assert " --cpu-bind=none " in text and "--gpu-bind" not in text and "NCCL_DEBUG=" not in text and "\ncheck_nodes\n" not in text


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
