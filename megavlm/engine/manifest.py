"""What is on disk: complete checkpoints, what is wrong with one, which ones stay. Needs neither torch nor processes.

A folder ``step-XXXXXXXX`` with a ``manifest.json`` is complete, because it got that name in one rename after
everything in it was on the disk. It loses the name in one rename too, before anything in it is removed. Names that
begin with a dot are being written or removed.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megavlm.errors import MegavlmError


@dataclass(frozen=True)
class Retention:
    """Which complete checkpoints stay."""

    keep_last: int
    """The newest so many."""
    keep_every_steps: int | None = None
    """And every one whose step is a multiple of this, for ever."""
    keep_best: int = 0
    """And the best so many by ``metric``."""
    metric: str = ""
    """A TensorBoard tag that was reported before the save."""
    mode: str = "min"
    """Whether small (``min``) or large (``max``) is good."""

    def doomed(self, checkpoints: Sequence[Path]) -> list[Path]:
        """Those of ``checkpoints`` (oldest first) that may go."""
        staying = set(checkpoints[-self.keep_last :])
        if self.keep_every_steps:
            staying |= {path for path in checkpoints if step_of(path) % self.keep_every_steps == 0}
        if self.keep_best:
            rated = [(read_manifest(path)["metrics"].get(self.metric), path) for path in checkpoints]
            rated = sorted((value, path) for value, path in rated if value is not None)
            # of equal ones the newest
            best = rated[-self.keep_best :] if self.mode == "max" else sorted(rated, key=_small_then_new)[: self.keep_best]
            staying |= {path for _, path in best}
        return [path for path in checkpoints if path not in staying]


def _small_then_new(pair: tuple[float, Path]) -> tuple[float, int]:
    return pair[0], -step_of(pair[1])


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def complete_checkpoints(folder: Path) -> list[Path]:
    """All complete checkpoints of a run, oldest first. What is latest is found by looking, never trusted to a pointer."""
    return sorted((manifest.parent for manifest in folder.glob("step-*/manifest.json")), key=step_of)


def read_manifest(path: Path) -> dict:
    """``{"step", "world_size", "metrics", "seconds", "files": {name: {"bytes", "sha256"}}}`` of a checkpoint.

    Raises:
        MegavlmError: If it is not the manifest that was written.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        # the manifest vouches for the other files, and its own last entry for the manifest
        given = manifest.pop("sha256")
        if given == digest_of_manifest(manifest):
            return manifest
    except (ValueError, KeyError, AttributeError, OSError):
        pass
    raise MegavlmError(f"{path}/manifest.json is damaged\n  do:    use another checkpoint, `megavlm checkpoint list` shows them")


def digest_of_manifest(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def verify(path: Path, part: int = 0, num_parts: int = 1) -> list[str]:
    """What is wrong with a checkpoint, one line per file; empty if nothing is.

    Args:
        path: The checkpoint.
        part: Read only every ``num_parts``-th file, from this one on, so that many processes can share the work.
        num_parts: How many share it.
    """
    try:
        files = read_manifest(path)["files"]
    except MegavlmError:
        return ["manifest.json is damaged"]
    problems = []
    for name, entry in list(files.items())[part::num_parts]:
        file = path / name
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif file.stat().st_size != entry["bytes"]:
            problems.append(f"{name} has {file.stat().st_size} bytes instead of {entry['bytes']}")
        elif sha256(file) != entry["sha256"]:
            problems.append(f"{name} has another SHA-256 than when it was written")
    return problems


def remove(path: Path) -> None:
    """Remove a checkpoint so that a process killed meanwhile leaves nothing that looks complete."""
    hidden = path.with_name(f".removing-{path.name}-{os.getpid()}")
    path.rename(hidden)
    sync_folder(path.parent)
    shutil.rmtree(hidden)


def remove_leftovers(folder: Path) -> None:
    """Remove what cut-off saves and removals have left. Only for the one process that owns the folder."""
    for pattern in (".writing-*", ".removing-*"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_synced(path: Path, text: str) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_atomically(path: Path, text: str) -> None:
    """Replace a file so that readers see the old or the new text, never a part."""
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
