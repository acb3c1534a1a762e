"""The commands of `megavlm checkpoint`: list, verify and prune, even while the run is in progress. And which checkpoint a path means.

Tested by `tests/cli/test_runs.py`.
"""

import logging
import os
import time
from pathlib import Path

from megavlm.errors import MegavlmError
from megavlm.runs.folder import RunFolder
from megavlm.runs.manifest import (
    checkpoints_in,
    complete_checkpoints,
    is_checkpoint_name,
    read_manifest,
    remove,
    set_aside,
    step_of,
    verify,
)
from megavlm.runs.retention import CheckpointConfig
from megavlm.system.progress import columns

log = logging.getLogger(__name__)


def run_of(path: str | Path) -> tuple[RunFolder, Path | None]:
    """The run folder that a path means, and the checkpoint in it that the path names, if it names one."""
    path = Path(path)
    return (RunFolder(path.absolute().parent.parent), path) if _is_checkpoint(path) else (RunFolder(path), None)


def locate(path: str | Path) -> tuple[RunFolder, Path]:
    """The run folder and the checkpoint that a path means: the one that it names, or a run's newest complete one.

    Raises:
        MegavlmError: If there is none.
    """
    folder, named = run_of(path)
    if named:
        return folder, named
    check_run(folder)
    complete = complete_checkpoints(folder.checkpoints)
    if not complete:
        raise none_there(folder.path)
    for newer in checkpoints_in(folder.checkpoints):
        if step_of(newer) > step_of(complete[-1]):
            log.warning("%s has lost its manifest.json and is not taken, but %s", newer, complete[-1].name)
    return folder, complete[-1]


def check_run(folder: RunFolder) -> None:
    """
    Raises:
        MegavlmError: If no run has begun in the folder.
    """
    if not os.path.lexists(folder.config_file):
        raise MegavlmError(f"{folder.path} is not a run folder: it has no config.yaml\n  do:    train a recipe first")


def find(path: Path) -> list[Path]:
    """The checkpoints that a path means, damaged ones as well: of a run folder, or itself.

    Raises:
        MegavlmError: If there are none.
    """
    if _is_checkpoint(path):
        return [path]
    found = checkpoints_in(path / "checkpoints")
    if not found:
        raise none_there(path)
    return found


def _is_checkpoint(path: Path) -> bool:
    """Whether a path is one checkpoint rather than a run: it has a manifest, or had one."""
    return (path / "manifest.json").is_file() or (is_checkpoint_name(path.name) and path.absolute().parent.name == "checkpoints")


def none_there(path: Path) -> MegavlmError:
    """The error for a path that has no checkpoint; says so if damaged ones were set aside."""
    remedy = "name a run folder with a checkpoint, or a checkpoint in one"
    if damaged := set_aside(path / "checkpoints"):
        remedy = f"bring one back from a copy: {', '.join(each.name for each in damaged)} cannot be used"
    return MegavlmError(f"{path} has no complete checkpoint\n  do:    {remedy}")


def table(run: Path) -> str:
    """One line per checkpoint, oldest first, and those that were set aside."""
    lines = [f"{'checkpoint':<16} {'size':>10} {'ranks':>6} {'saved in':>9} {'written':<17} metrics"]
    for path in find(run):
        try:
            manifest = read_manifest(path)
        except MegavlmError as error:
            lines.append(f"{path.name:<16} {str(error).splitlines()[0].removeprefix(f'{path}/')}")
            continue
        megabytes = sum(entry["bytes"] for entry in manifest["files"].values()) / 1e6
        written = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
        metrics = "  ".join(f"{tag} {x:.4g}" for tag, x in manifest["metrics"].items() if tag.startswith("loss/"))
        line = f"{path.name:<16} {megabytes:7.1f} MB {manifest['world_size']:>6} {manifest['seconds']:7.1f} s {written:<17}"
        fits = len(line) + 1 + len(metrics) <= columns()
        lines += [f"{line} {metrics}"] if fits else [line, f"{'':<16} {metrics}"]
    return "\n".join([*lines, *(f"{path.name} was damaged and set aside" for path in set_aside(run / "checkpoints"))])


def verify_all(path: Path) -> tuple[list[str], bool]:
    """A line per checkpoint, and one per problem; whether there is none."""
    lines, sound = [], True
    for checkpoint in find(path):
        problems = verify(checkpoint)
        lines.append(f"{checkpoint}: {'damaged' if problems else 'intact'}")
        lines += [f"  {problem}" for problem in problems]
        sound &= not problems
    return lines, sound


def prune(run: Path, rule: CheckpointConfig, dry_run: bool) -> list[Path]:
    """Remove what a retention rule does not keep; returns what went."""
    if rule.keep_last < 1:
        raise MegavlmError("keep_last must be at least 1\n  do:    remove the run folder if you want none of its checkpoints")
    if rule.keep_best and rule.best_metric is None:
        raise MegavlmError(
            "the recipe names no checkpoint.best_metric, so none is the best\n  do:    leave out --keep-best, or look at `checkpoint list`"
        )
    complete = complete_checkpoints(run / "checkpoints")
    if not complete:
        raise none_there(run)
    doomed = rule.doomed(complete)
    for path in doomed if not dry_run else []:
        remove(path)
    return doomed
