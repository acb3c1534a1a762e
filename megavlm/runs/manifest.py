"""What is on disk: complete checkpoints, what is wrong with one, which ones stay. Needs neither torch nor processes.

A folder ``step-XXXXXXXX`` with a ``manifest.json`` is complete, because it got that name in one rename after
everything in it was on the disk. It loses the name in one rename too, before anything in it is removed. Names that
begin with a dot are being written or removed.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

from megavlm.errors import MegavlmError
from megavlm.system.files import sha256, sync_folder


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
