"""`megavlm submit`: a recipe becomes an sbatch script in the run folder, readable and editable, and a job.

The templates lie in ``slurm/``: ``train.sbatch`` for one run, ``study.sbatch`` for an array of them, and ``body.sh``,
which both include. ``@{name}`` is a place to fill in; ``@@`` is an ``@``.
"""

import shlex
import shutil
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from megavlm.config import RunConfig, load_config, save_config
from megavlm.data.pack.loader import lanes_of
from megavlm.errors import ConfigError, MegavlmError
from megavlm.launch.job import Job, check_line
from megavlm.system.files import PROJECT, write_atomically

TEMPLATES = PROJECT / "slurm"


class SbatchTemplate(string.Template):
    """Shell text keeps its dollars."""

    delimiter = "@"
    pattern = r"@(?:(?P<escaped>@)|\{(?P<braced>[a-z_]+)\}|(?P<named>(?!))|(?P<invalid>(?!)))"  # pyright: ignore[reportAssignmentType] (`string.Template` takes a text and compiles it)


def submit(recipe: str, overrides: dict[str, Any], job: Job, study: str | None = None, *, dry_run: bool = False) -> str:
    """Render a script and submit it.

    Args:
        recipe: Path of a recipe, or the name of one that ships with megavlm.
        overrides: Settings to change.
        job: What to ask for.
        study: A YAML file with a list of mappings of overrides: an array job, one run each, in folders below ``run_dir``.
        dry_run: Leave it at the rendering.

    Returns:
        What to show to the user.

    Raises:
        ConfigError: If the recipe is wrong, or the processes cannot share the lanes.
        MegavlmError: If SLURM refuses the job.
    """
    config = _checked(load_config(recipe, overrides), job)
    run = Path(config.run_dir)
    (run / "slurm").mkdir(parents=True, exist_ok=True)
    values = {"name": shlex.quote(run.name), "output": shlex.quote(str(run / "slurm").replace("%", "%%"))}
    if study is None:
        what, template = f"Trains {recipe} in {run}", "train.sbatch"
        _write_recipe(config, run)
    else:
        folders = [_write_recipe(c, Path(c.run_dir)) for c in read_study(recipe, overrides, Path(study), job)]
        write_atomically(run / "slurm" / "runs.txt", "\n".join(map(str, folders)) + "\n")
        what, template = f"Trains the {len(folders)} runs of {study} in {run}", "study.sbatch"
        values["array"] = f"0-{len(folders) - 1}"
    script = run / "slurm" / template
    container, inside = job.container_words()
    values |= {
        "what": what,
        "script": _quoted(script),
        "run": _quoted(run),
        "recipe": _quoted(run / "slurm" / "recipe.yaml"),
        "nodes": job.nodes,
        "tasks_per_node": job.tasks_per_node,
        "cpus_per_task": job.cpus_per_task,
        "options": job.option_lines(),
        "max_restarts": job.max_restarts,
        "node_failure_wait_s": job.node_failure_wait_s,
        "setup": job.setup_lines(),
        "gpus_per_node": job.gpus_per_node,
        "srun_options": job.srun_line(),
        "network": job.network_lines(),
        "check": "check_nodes" if job.node_check else "",
        "container": container,
        # an image has its own interpreter
        "python": f"{inside}python" if job.container_image else _quoted(Path(sys.executable)),
        "arguments": f' --data.cache_dir="{job.cache}"' if job.cache else "",
    }
    values["body"] = SbatchTemplate((TEMPLATES / "body.sh").read_text()).substitute(values).rstrip()
    source = Path(job.template) if job.template else TEMPLATES / template
    try:
        write_atomically(script, SbatchTemplate(source.read_text()).substitute(values))
    except KeyError as error:
        raise ConfigError(
            f"{source} has @{{{error.args[0]}}}, which nothing fills in\n  do:    use one of {', '.join(sorted(values))}"
        ) from error
    recipe_file = run / "slurm" / "recipe.yaml"
    if dry_run:
        alone = "" if study or job.nodes > 1 else f"\nwithout SLURM, on one node:  {job.torchrun(recipe_file)}"
        return f"{script.read_text()}\nwritten to {script}, not submitted{alone}"
    if not shutil.which("sbatch"):
        raise MegavlmError(
            f"sbatch is not installed here; the script is {script}\n"
            f"  do:    submit it on a login node; or train on one node without SLURM: {job.torchrun(recipe_file)}"
        )
    done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, check=False, text=True)
    if done.returncode:
        raise MegavlmError(f"SLURM refuses {script}: {done.stderr.strip()}\n  do:    correct the options")
    number = done.stdout.strip().split(";")[0]
    write_atomically(run / "slurm" / f"{number}.job", number + "\n")
    return f"job {number}: {script}\n  megavlm status {run}\n  tensorboard --logdir {run / 'tensorboard'}"


def read_study(recipe: str, overrides: dict[str, Any], file: Path, job: Job) -> list[RunConfig]:
    """The configurations of a study's runs; each is named by ``name`` or its number.

    Raises:
        ConfigError: If the file is not a list of mappings, or two runs would share a folder.
    """
    try:
        runs = yaml.safe_load(file.read_text()) if file.is_file() else None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is no YAML: {error}\n  do:    correct it") from error
    if not isinstance(runs, list) or not runs or not all(isinstance(run, dict) for run in runs):
        raise ConfigError(
            f"{file} is not a study\n"
            "  do:    write a YAML list of mappings of overrides: - {name: dense, routing.understanding: {policy: dense}}"
        )
    names = [str(run.get("name", f"run-{number:03d}")) for number, run in enumerate(runs)]
    # each is a folder below the run's, and its own
    if wrong := [name for name in names if names.count(name) > 1 or name in ("", ".", "..", "slurm") or "/" in name]:
        raise ConfigError(f"{file}: {wrong[0]!r} is no name for one run alone\n  do:    give each run a name of its own, without slashes")
    base = Path(load_config(recipe, overrides).run_dir)
    changes = [
        {key: value for key, value in run.items() if key != "name"} | {"run_dir": str(base / name)} for run, name in zip(runs, names)
    ]
    return [_checked(load_config(recipe, overrides | changed), job) for changed in changes]


def _write_recipe(config: RunConfig, run: Path) -> Path:
    (run / "slurm").mkdir(parents=True, exist_ok=True)
    save_config(config, run / "slurm" / "recipe.yaml")
    return run


def _checked(config: RunConfig, job: Job) -> RunConfig:
    """With absolute paths, for the job may start elsewhere; refused now rather than when it has waited for a day."""
    job.check(config.engine.stop_margin_s)
    lanes_of(0, job.nodes * job.tasks_per_node, config.data.num_lanes)
    run = str(Path(config.run_dir).resolve())
    check_line("run_dir", run)
    if "\\" in run:
        raise ConfigError(f"run_dir: {run} has a backslash, and SLURM writes no output there\n  do:    choose another folder")
    return config.model_copy(update={"run_dir": run})


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
