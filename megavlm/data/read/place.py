"""The one place where what a reader raises becomes a data error that says where and what to do.

Pillow, numpy, JSON, tars, tokenizers and users' formats raise whatever they stumble over. Lanes, lint, the data tools, indexes, the
mixture and evaluation read through `reading_shard` and `reading_sample`, so each of them names the same place.

Tested by `tests/data/read/test_found.py`.
"""

from megavlm.errors import DataError, MegavlmError


class _Reading:
    """A class, not a generator: it is entered for every sample."""

    what, remedy = "", ""

    def __init__(self, source: str, url: str, key: str = ""):
        self.source = source
        self.url = url
        self.key = key

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind, error: BaseException | None, _traceback) -> None:
        if not isinstance(error, Exception) or (isinstance(error, MegavlmError) and not isinstance(error, DataError)):
            return
        if isinstance(error, DataError):
            # what is known already is nearer
            error.source, error.shard, error.key = error.source or self.source, error.shard or self.url, error.key or self.key
            return
        raise DataError(f"{self.what}: {_described(error)}", self.remedy, self.source, self.url, self.key) from error


class reading_shard(_Reading):
    """Around everything that opens or reads a shard.

    Raises:
        DataError: With source and shard, for whatever was raised inside.
    """

    what, remedy = "the shard is unreadable or cut short", "copy or write it again"


class reading_sample(_Reading):
    """Around everything that parses or encodes a sample.

    Raises:
        DataError: With source, shard and key, for whatever was raised inside. Other errors that a user is meant to read pass.
    """

    what, remedy = "the sample cannot be read", "correct or remove the sample"


def _described(error: Exception) -> str:
    """Errors of the operating system and of readers say what they are; of others the name of their type says more."""
    known = isinstance(error, (OSError, EOFError)) or type(error).__module__ in ("tarfile", "zlib", "lzma")
    return str(error) if known and str(error) else f"{type(error).__name__}: {error}"
