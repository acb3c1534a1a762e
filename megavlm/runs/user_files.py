"""Copies of the user's Python files in the run folder: a run can be judged elsewhere. Tested by `tests/routing/test_user_policy.py`."""

import zlib
from collections.abc import Iterable
from pathlib import Path

from megavlm.runs.folder import RunFolder
from megavlm.system.files import copy_atomically


def keep_user_files(folder: RunFolder, names: Iterable[str]) -> None:
    """Copy the files among some names of modules; modules that Python finds by themselves stay where they are.

    Args:
        folder: Of the run.
        names: ``file.py`` or ``module``.
    """
    for name in names:
        if name.endswith(".py") and Path(name).resolve() != copy_of(folder, name).resolve():
            folder.modules.mkdir(parents=True, exist_ok=True)
            copy_atomically(Path(name), copy_of(folder, name))


def kept_name(folder: RunFolder, name: str) -> str:
    """The name under which a module is imported for a run that was trained with it: its copy, if there is one."""
    copy = copy_of(folder, name)
    return str(copy) if name.endswith(".py") and copy.is_file() else name


def copy_of(folder: RunFolder, name: str) -> Path:
    """Files of the same name in two folders have copies of two names."""
    path = Path(name)
    if path.parent == folder.modules:
        return path
    return folder.modules / f"{path.stem}-{zlib.crc32(name.encode()):08x}.py"
