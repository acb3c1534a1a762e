"""Every problem of some shards, each with its shard and key. Reads to the end, executes nothing, and writes nothing.

Tested by `tests/data/tools/test_describe.py`.
"""

import logging
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from megavlm.data.read import formats
from megavlm.data.read.index import read_index
from megavlm.data.read.place import reading_sample
from megavlm.data.read.sample import Coordinates, Sample
from megavlm.data.read.shards import is_lines, read_shard
from megavlm.data.read.urls import WITHOUT_CACHE
from megavlm.errors import DataError
from megavlm.system.progress import Progress

log = logging.getLogger(__name__)


@dataclass
class Report:
    """What was found."""

    num_samples: int = 0
    """Samples read, good or bad."""
    problems: list[DataError] = field(default_factory=list)
    """One for each bad sample, broken shard and repeated key."""

    def add(self, error: DataError, shard: str, key: str = "") -> None:
        """Note a problem of a sample, or of a shard; whatever was being read is let go."""
        self.problems.append(DataError(error.what, error.remedy, error.source, shard, key or error.key))

    def grouped(self) -> list[str]:
        """A text for each kind of problem, in the order of their first ones; numbers and names do not tell kinds apart."""
        kinds: dict[tuple[str, str], list[DataError]] = {}
        for problem in self.problems:
            kinds.setdefault((PARTICULARS.sub("…", problem.what), PARTICULARS.sub("…", problem.remedy)), []).append(problem)
        return [_of_kind(problems) for problems in kinds.values()]


PARTICULARS = re.compile(r"'[^']*'|\"[^\"]*\"|\[[^\]]*\]|\d+")


def _of_kind(problems: list[DataError]) -> str:
    first = str(problems[0])
    return first if len(problems) == 1 else f"{len(problems)} x " + first.replace("\n  where: ", "\n  first: ", 1)


def read_samples(urls: list[str], source, report: Report, open_url=WITHOUT_CACHE) -> Iterator[Sample]:
    """The good samples of some shards; everything else goes into ``report``.

    Args:
        urls: The shards.
        source: A `SourceConfig`: the format and its options.
        report: Is filled.
        open_url: Opens shards.
    """
    indexes = [read_index(url) for url in urls]
    total = sum(index.samples for index in indexes if index) if all(indexes) else None
    with Progress("read samples", total) as bar:
        yield from _read(urls, source, report, open_url, bar=bar)


def _read(urls: list[str], source, report: Report, open_url, *, bar: Progress) -> Iterator[Sample]:
    keys: set[str] = set()
    for shard, url in enumerate(urls):
        # keys of lines and lists are their places, the same in every file
        if is_lines(url):
            keys = set()
        try:
            for index, (key, members) in enumerate(read_shard(url, "", open_url)):
                report.num_samples += 1
                bar.advance()
                if key in keys:
                    what = "the key was there before: samples cannot be told apart by it"
                    report.add(DataError(what, "give every sample a key of its own"), url, key)
                keys.add(key)
                try:
                    with reading_sample("", url, key):
                        sample = formats.parse(key, members, source, Coordinates(0, 0, shard, index), seed=0)
                except DataError as error:
                    report.add(error, url, key)
                    continue
                yield sample
        except DataError as error:
            report.add(error, url)


def lint(urls: list[str], source, check: Callable[[Sample], object] = lambda sample: None) -> Report:
    """Read shards to their end.

    Args:
        urls: The shards.
        source: A `SourceConfig`: the format and its options.
        check: Called with every good sample; may raise a DataError, such as `Encoder` does for codes outside the codebook.
    """
    report = Report()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for sample in read_samples(urls, source, report):
            try:
                with reading_sample("", urls[sample.coordinates.shard], sample.key):
                    check(sample)
            except DataError as error:
                report.add(error, urls[sample.coordinates.shard], sample.key)
    return report
