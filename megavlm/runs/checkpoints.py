"""What `megavlm checkpoint` does: list, verify and prune, on a run that may be going on."""

import time
from pathlib import Path

from megavlm.errors import MegavlmError
from megavlm.runs.manifest import complete_checkpoints, read_manifest, remove, verify
from megavlm.runs.retention import CheckpointConfig


def find(path: Path) -> list[Path]:
    """The complete checkpoints that a path means: of a run folder, or itself.

    Raises:
        MegavlmError: If there are none.
    """
    if (path / "manifest.json").is_file():
        return [path]
    found = complete_checkpoints(path / "checkpoints")
    if not found:
        raise MegavlmError(f"{path} has no complete checkpoint\n  do:    name a run folder or a checkpoint in one")
    return found


def table(run: Path) -> str:
    """One line per complete checkpoint, oldest first."""
    lines = [f"{'checkpoint':<16} {'size':>10} {'ranks':>6} {'saved in':>9} {'written':<17} metrics"]
    for path in find(run):
        try:
            manifest = read_manifest(path)
        except MegavlmError:
            lines.append(f"{path.name:<16} its manifest is damaged")
            continue
        megabytes = sum(entry["bytes"] for entry in manifest["files"].values()) / 1e6
        written = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
        metrics = "  ".join(f"{tag} {x:.4g}" for tag, x in manifest["metrics"].items() if tag.startswith("loss/"))
        lines.append(
            f"{path.name:<16} {megabytes:7.1f} MB {manifest['world_size']:>6} {manifest['seconds']:7.1f} s {written:<17} {metrics}"
        )
    return "\n".join(lines)


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
    doomed = rule.doomed(find(run))
    for path in doomed if not dry_run else []:
        remove(path)
    return doomed
