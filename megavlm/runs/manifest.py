"""What is on disk: complete checkpoints, what is wrong with one, which ones stay. Needs neither torch nor processes.

A folder ``step-XXXXXXXX`` with a ``manifest.json`` is complete, because it got that name in one rename after
everything in it was on the disk. It loses the name in one rename too, before anything in it is removed. Names that
begin with a dot are being written or removed. A folder of that name without its manifest is damaged; other names are
the user's own, and are left alone.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

from megavlm.errors import MegavlmError
from megavlm.system.files import DamagedFile, read_json, sha256, sync_folder

ENTRIES = {"step": int, "world_size": int, "metrics": dict, "seconds": (int, float), "files": dict}
"""What a manifest holds."""


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def is_checkpoint_name(name: str) -> bool:
    """Whether megavlm has given this name, or may give it: not ``step-00000004-backup`` nor ``step-4``."""
    digits = re.fullmatch(r"step-([0-9]{8,})", name)
    return digits is not None and folder_name(int(digits[1])) == name


def step_of(path: Path) -> int:
    """The step of a checkpoint, by its name; of a copy that has another name, by its manifest."""
    return int(path.name.removeprefix("step-")) if is_checkpoint_name(path.name) else read_manifest(path)["step"]


def checkpoints_in(folder: Path) -> list[Path]:
    """All checkpoints of a run, oldest first, also those that have lost their manifest.

    Raises:
        MegavlmError: If the folder cannot be read.
    """
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise MegavlmError(f"{folder} cannot be read: {error.strerror}\n  do:    mend the file system or its permissions") from error
    return sorted((folder / name for name in names if is_checkpoint_name(name)), key=step_of)


def complete_checkpoints(folder: Path) -> list[Path]:
    """All complete checkpoints of a run, oldest first. What is latest is found by looking, never trusted to a pointer."""
    return [path for path in checkpoints_in(folder) if os.path.lexists(path / "manifest.json")]


def set_aside(folder: Path) -> list[Path]:
    """The checkpoints of a run that were damaged when it was resumed from an older one."""
    return sorted(folder.glob("damaged-step-*"))


def read_manifest(path: Path) -> dict:
    """``{"step", "world_size", "metrics", "seconds", "files": {name: {"bytes", "sha256"}}}`` of a checkpoint.

    Raises:
        MegavlmError: If it is not the manifest that was written, or is another checkpoint's.
    """
    try:
        manifest = read_json(path / "manifest.json")
    except DamagedFile as error:
        missing = not os.path.lexists(path / "manifest.json")
        raise _no_manifest(f"{path}/manifest.json is missing" if missing else error.what) from error
    # the manifest vouches for the other files, and its own last entry for the manifest
    given = manifest.pop("sha256", None)
    whole = all(isinstance(manifest.get(name), kind) for name, kind in ENTRIES.items() if name in manifest)
    if given != digest_of_manifest(manifest) or not whole:
        raise _no_manifest(f"{path}/manifest.json is damaged")
    if is_checkpoint_name(path.name) and folder_name(manifest["step"]) != path.name:
        raise _no_manifest(f"{path}/manifest.json is damaged: it is that of step {manifest['step']}")
    return manifest


def _no_manifest(what: str) -> MegavlmError:
    return MegavlmError(f"{what}\n  do:    use another checkpoint, `megavlm checkpoint list` shows them")


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
    except MegavlmError as error:
        return [str(error).split("\n")[0].removeprefix(f"{path}/")]
    problems = []
    for name, entry in list(files.items())[part::num_parts]:
        file = path / name
        try:
            if not file.is_file():
                problems.append(f"{name} is missing")
            elif file.stat().st_size != entry["bytes"]:
                problems.append(f"{name} has {file.stat().st_size} bytes instead of {entry['bytes']}")
            elif sha256(file) != entry["sha256"]:
                problems.append(f"{name} has another SHA-256 than when it was written")
        except OSError as error:
            problems.append(f"{name} cannot be read: {error.strerror}")
    return problems


def remove(path: Path) -> None:
    """Remove a checkpoint so that a process killed meanwhile leaves nothing that looks complete."""
    hidden = path.with_name(f".removing-{path.name}-{os.getpid()}")
    path.rename(hidden)
    sync_folder(path.parent)
    if hidden.is_dir() and not hidden.is_symlink():
        shutil.rmtree(hidden)
    else:
        hidden.unlink()


def remove_leftovers(folder: Path) -> None:
    """Remove what cut-off saves and removals have left. Only for the one process that owns the folder."""
    for pattern in (".writing-*", ".removing-*"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)
