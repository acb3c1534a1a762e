"""The errors that a user is meant to read: each says what is wrong, where, and what to do about it. Tested by `tests/test_config.py`."""

MAX_SHOWN = 2000
"""Characters of a problem, or of a name, that are shown: what a sample holds may be long."""


class MegavlmError(Exception):
    """Base of all errors caused by what the user gave us; the command line prints it without a traceback."""


class ConfigError(MegavlmError):
    """A recipe or an override is wrong. Carries every mistake found, one per line."""


class LostProcess(MegavlmError):
    """A process that this one depends on is gone; the run can go on from its newest checkpoint."""


class DataError(MegavlmError):
    """A sample or a shard is wrong.

    Args:
        what: The problem, in words.
        remedy: What the user can do.
        source: Name of the source in the recipe, where known.
        shard: URL of the shard.
        key: WebDataset key of the sample, where known.
    """

    def __init__(self, what: str, remedy: str, source: str = "", shard: str = "", key: str = ""):  # noqa: PLR0917 (exceptions travel between processes by their places)
        self.what = what
        self.remedy = remedy
        self.source = source
        self.shard = shard
        self.key = key
        super().__init__(what, remedy, source, shard, key)

    def __str__(self) -> str:
        place = ", ".join(
            f"{name} {value}" for name, value in (("source", self.source), ("shard", self.shard), ("sample", self.key)) if value
        )
        return f"{_printable(self.what)}\n  where: {_printable(place)}\n  do:    {self.remedy}"


def _printable(text: str) -> str:
    """What any terminal and any log can show: names and contents of samples are anything, half characters and control codes included."""
    if len(text) > MAX_SHOWN:
        text = f"{text[:MAX_SHOWN]}… ({len(text)} characters)"
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
