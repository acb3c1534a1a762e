"""What is in some shards: a table and a contact sheet."""

import io
from collections import Counter
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from megavlm.data.tools.describe import contact_sheet
from megavlm.data.tools.lint import Report, read_samples

SHEET_SAMPLES = 40


def inspect(urls: list[str], source, out: Path) -> tuple[str, bool]:
    """Read shards to their end and describe them.

    Args:
        urls: The shards.
        source: A `SourceConfig`, for the format of the samples.
        out: Contact sheet to write (PNG).

    Returns:
        A table of what each shard holds and the problems found, one per line; whether there were images for the sheet.
    """
    table = Table("shard", "samples", "tasks", "images", "sizes", "characters", "problems")
    problems, shown = [], []
    for url in urls:
        found = Report()
        samples = list(read_samples([url], source, found))
        problems += found.problems
        shown += samples[: max(0, SHEET_SAMPLES - len(shown))]
        images = [image for sample in samples for image in sample.images.values()]
        characters = [sum(len(segment.text or "") for segment in sample.segments) for sample in samples]
        table.add_row(
            url.rsplit("/", 1)[-1],
            str(len(samples)),
            _counts(sample.task for sample in samples),
            str(len(images)),
            _counts(f"{im.shape[1]}x{im.shape[0]}" + (" codes" if im.dtype == np.int64 else "") for im in images),
            f"{np.mean(characters):.0f} on average" if characters else "",
            str(len(found.problems)),
        )
    text = io.StringIO()
    Console(file=text, width=140).print(table)
    return text.getvalue() + "".join(f"{problem}\n" for problem in problems), contact_sheet(shown, out)


def _counts(values) -> str:
    return ", ".join(f"{value}: {count}" for value, count in Counter(values).most_common(4))
