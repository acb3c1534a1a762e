"""The one place where what a reader raises becomes a data error that says where and what to do.

Pillow, numpy, JSON, tars, tokenizers and users' formats raise whatever they stumble over. Lanes, lint, the data tools, indexes, the
mixture and evaluation read through `reading_shard` and `reading_sample`, so each of them names the same place.

Tested by `tests/data/read/test_found.py`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from megavlm.errors import DataError, MegavlmError


@contextmanager
def reading_shard(source: str, url: str) -> Iterator[None]:
    """Around everything that opens or reads a shard.

    Raises:
        DataError: With source and shard, for whatever was raised inside.
    """
    with _place(source, url):
        try:
            yield
        except MegavlmError:
            raise
        except Exception as error:
            raise DataError(f"the shard is unreadable or cut short: {_described(error)}", "copy or write it again") from error


@contextmanager
def reading_sample(source: str, url: str, key: str) -> Iterator[None]:
    """Around everything that parses or encodes a sample.

    Raises:
        DataError: With source, shard and key, for whatever was raised inside. Other errors that a user is meant to read pass.
    """
    with _place(source, url, key):
        try:
            yield
        except MegavlmError:
            raise
        except Exception as error:
            raise DataError(f"the sample cannot be read: {_described(error)}", "correct or remove the sample") from error


@contextmanager
def _place(source: str, url: str, key: str = "") -> Iterator[None]:
    try:
        yield
    except DataError as error:
        # what is known already is nearer
        error.source, error.shard, error.key = error.source or source, error.shard or url, error.key or key
        raise


def _described(error: Exception) -> str:
    """Errors of the operating system and of readers say what they are; of others the name of their type says more."""
    known = isinstance(error, (OSError, EOFError)) or type(error).__module__ in ("tarfile", "zlib", "lzma")
    return str(error) if known and str(error) else f"{type(error).__name__}: {error}"
