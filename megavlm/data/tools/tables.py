"""Rows of Parquet and Arrow files, and of the folders that Hugging Face `datasets` saves: needs pyarrow, which nothing else here does.

Tested by `tests/data/tools/test_tables.py`.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megavlm.errors import DataError, MegavlmError

SUFFIXES = (".parquet", ".arrow")
SPLIT = re.compile(r"(.+)-\d{5}-of-\d{5}")
"""How the files of a split are named."""
ROWS_AT_ONCE = 64
"""Rows may hold whole images."""


def is_table(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def tables_of(source: Path) -> list[Path]:
    """The files of a table: itself, what a pattern (``train-*.parquet``) names, or all below a folder; none if it is something else.

    Raises:
        MegavlmError: If a folder holds more than one split.
    """
    if not source.is_dir():
        found = [source] if source.is_file() else sorted(source.parent.glob(source.name))
        return [path for path in found if is_table(path)]
    found = [path for path in sorted(source.rglob("*")) if is_table(path) and path.is_file() and not path.name.startswith("cache-")]
    splits = dict.fromkeys((path.parent, _split_of(path)) for path in found)
    if len(splits) > 1:
        names = ", ".join(str(folder / f"{split}-*" if split else folder) for folder, split in splits)
        raise MegavlmError(f"{source} holds several splits: {names}\n  do:    name one of them")
    return found


def _split_of(path: Path) -> str:
    match = SPLIT.fullmatch(path.stem)
    # what `save_to_disk` writes is called `data` in each
    return match[1] if match and match[1] != "data" else ""


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file, column -> value.

    Raises:
        DataError: If the file is damaged.
        MegavlmError: Without pyarrow.
    """
    try:
        import pyarrow
        from pyarrow import ipc, parquet
    except ImportError as error:
        raise MegavlmError("reading tables needs pyarrow, which is not installed\n  do:    pip install pyarrow") from error
    try:
        if path.suffix.lower() == ".parquet":
            with parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(ROWS_AT_ONCE):
                    yield from batch.to_pylist()
            return
        with pyarrow.memory_map(str(path)) as stream:
            for batch in ipc.open_stream(stream):
                for begin in range(0, batch.num_rows, ROWS_AT_ONCE):
                    yield from batch.slice(begin, ROWS_AT_ONCE).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"the table is damaged: {error}", "copy or write it again", shard=str(path)) from error
