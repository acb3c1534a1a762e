"""Files: where those that ship with megavlm are, how small ones are written and read again."""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from megavlm.errors import ConfigError, MegavlmError

_PACKAGE = Path(__file__).parents[1]
RECIPES = _PACKAGE / "recipes"


def _project() -> Path:
    """The checkout; or `share/megavlm` beside the `lib` or folder that pip installed into, whatever `sys.prefix` says.

    They differ where pip has been given --user or --target, and on systems that install below /usr/local.
    """
    above = _PACKAGE.parents
    places = [above[0], *(folder / "share" / "megavlm" for folder in above)]
    return next((place for place in places if (place / "ds_configs").is_dir()), Path(sys.prefix) / "share" / "megavlm")


PROJECT = _project()
"""Where `ds_configs/` and `slurm/` are: in the checkout, or where the installation put them."""


class DamagedFile(MegavlmError):
    """A small file that was written whole is not what was written, or cannot be read.

    Args:
        what: The file and what is wrong with it, for those who go on without it.
    """

    def __init__(self, what: str):
        self.what = what
        super().__init__(what)

    def __str__(self) -> str:
        return f"{self.what}\n  do:    bring it back from a copy, or remove it"


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_to_write(path: Path, mode: str = "w") -> IO[str]:
    """Open a text file of a run folder, ``"w"`` or ``"a"``, whatever has taken its name since.

    Raises:
        OSError: If it cannot be opened; also of a pipe, which would wait for a reader for ever.
    """
    return open(path, mode, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK, 0o666))


def write_synced(path: Path, content: str | bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file so that readers, and a start after a crash, see the old or the new content, never a part.

    Every small file that is read again is written this way.
    """
    temporary = _beside(path)
    try:
        write_synced(temporary, content)
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)  # a full disk: what was there stays
        raise
    sync_folder(path.parent)


def write_if_new(path: Path, content: str | bytes) -> None:
    """As `write_atomically`; a file that holds this already is left alone, for there may be no room for another."""
    content = content.encode() if isinstance(content, str) else content
    if not path.is_file() or path.read_bytes() != content:
        write_atomically(path, content)


def copy_atomically(source: Path, target: Path) -> None:
    """Copy a small file; one that is the same already is left alone."""
    write_if_new(target, source.read_bytes())


@contextmanager
def folder_written_atomically(path: Path) -> Iterator[Path]:
    """A new folder to write into; it gets its name when all that is in it is on the disk."""
    temporary = _beside(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            sync_folder(file)
        sync_folder(temporary)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(path.parent)


def read_small(path: Path) -> str:
    """The text of a small file that megavlm has written.

    Raises:
        DamagedFile: If it cannot be read, is no file, or is no text.
    """
    try:
        if path.exists() and not path.is_file():  # to open a pipe would wait for ever
            raise DamagedFile(f"{path} is damaged: it is no file")
        return path.read_text()
    except OSError as error:
        raise DamagedFile(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DamagedFile(f"{path} is damaged: it is no text") from error


def read_json(path: Path, kind: type = dict) -> Any:
    """The content of a small JSON file that megavlm has written.

    Args:
        path: The file.
        kind: What it must hold.

    Raises:
        DamagedFile: If it cannot be read or holds something else.
    """
    text = read_small(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{path} is damaged: {'it is no JSON' if text.strip() else 'it is empty'}") from error
    if not isinstance(content, kind):
        raise DamagedFile(f"{path} is damaged: it holds no {kind.__name__}")
    return content


def sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}-{os.getpid()}")


def find_resource(folder: str, name: str, suffix: str) -> Path:
    """The file that ``name`` means: a path, or the stem of a file that ships with megavlm in ``folder``."""
    shipped = (RECIPES.parent if folder.startswith("recipes") else PROJECT) / folder
    candidates = [Path(name), shipped / f"{name}{suffix}"]
    for path in candidates:
        if os.path.isfile(path):  # also of a name that no file can have
            return path
    known = ", ".join(sorted(path.stem for path in shipped.glob(f"*{suffix}")))
    raise ConfigError(f"no file {name[:200]}, and {folder} has none of that name\n  do:    give a path or one of: {known}")
