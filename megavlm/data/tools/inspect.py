"""What is in some shards: a table and a contact sheet. Samples are read one at a time, and only a few thumbnails are kept.

Tested by `tests/data/tools/test_describe.py`.
"""

import io
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from megavlm.data.read.sample import Sample
from megavlm.data.tools.describe import thumbnail, write_sheet
from megavlm.data.tools.lint import Report, read_samples
from megavlm.system.progress import columns

SHEET_SAMPLES = 40


@dataclass
class _Found:
    """What one shard holds."""

    samples: int = 0
    images: int = 0
    characters: int = 0
    tasks: Counter = field(default_factory=Counter)
    sizes: Counter = field(default_factory=Counter)

    def add(self, sample: Sample) -> None:
        self.samples += 1
        self.images += len(sample.images)
        self.characters += sum(len(segment.text or "") for segment in sample.segments)
        self.tasks[sample.task] += 1
        self.sizes.update(f"{im.shape[1]}x{im.shape[0]}" + (" codes" if im.dtype == np.int64 else "") for im in sample.images.values())


def inspect(urls: list[str], source, out: Path, look: Callable[[Sample], None] | None = None) -> tuple[str, bool]:
    """Read shards to their end and describe them.

    Args:
        urls: The shards.
        source: A `SourceConfig`, for the format of the samples.
        out: Contact sheet to write (PNG).
        look: Called with every good sample.

    Returns:
        A table of what each shard holds and the kinds of problems found; whether there were images for the sheet.
    """
    table = Table("shard", "samples", "tasks", "images", "sizes", "characters", "problems")
    report, thumbnails, num_shown = Report(), [], 0
    for url in urls:
        found, num_before = _Found(), len(report.problems)
        for sample in read_samples([url], source, report):
            found.add(sample)
            if look:
                look(sample)
            num_shown += 1
            if num_shown <= SHEET_SAMPLES and sample.images:
                thumbnails.append(thumbnail(sample))
        table.add_row(
            url.rsplit("/", 1)[-1],
            str(found.samples),
            _most_common(found.tasks),
            str(found.images),
            _most_common(found.sizes),
            f"{found.characters / found.samples:.0f} on average" if found.samples else "",
            str(len(report.problems) - num_before),
        )
    text = io.StringIO()
    Console(file=text, width=columns()).print(table)
    return text.getvalue() + "".join(f"{problem}\n" for problem in report.grouped()), write_sheet(thumbnails, out)


def _most_common(counter: Counter) -> str:
    return ", ".join(f"{value}: {count}" for value, count in counter.most_common(4))
