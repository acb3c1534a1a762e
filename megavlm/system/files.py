"""Files: where those that ship with megavlm are, and how small ones are written."""

import hashlib
import os
import sys
from pathlib import Path

from megavlm.errors import ConfigError

_PACKAGE = Path(__file__).parents[1]
RECIPES = _PACKAGE / "recipes"
PROJECT = _PACKAGE.parent if (_PACKAGE.parent / "ds_configs").is_dir() else Path(sys.prefix) / "share" / "megavlm"
"""Where `ds_configs/` and `slurm/` are: in the checkout, or where the installation put them."""


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
    """Replace a file so that readers, and a start after a crash, see the old or the new text, never a part.

    Everything small that a run reads again is written this way.
    """
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        write_synced(temporary, text)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)  # a full disk: what was there stays
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find_resource(folder: str, name: str, suffix: str) -> Path:
    """The file that ``name`` means: a path, or the stem of a file that ships with megavlm in ``folder``."""
    shipped = (RECIPES.parent if folder.startswith("recipes") else PROJECT) / folder
    candidates = [Path(name), shipped / f"{name}{suffix}"]
    for path in candidates:
        if path.is_file():
            return path
    known = ", ".join(sorted(path.stem for path in shipped.glob(f"*{suffix}")))
    raise ConfigError(f"no file {name}, and {folder} has none of that name\n  do:    give a path or one of: {known}")
