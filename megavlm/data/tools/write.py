"""Building shards: from a folder of images with captions, from JSON lines, from tables.

Everything is checked before anything is written, so that all problems are reported at once and no shards are left half-way.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from pydantic import ValidationError
from webdataset.writer import TarWriter

from megavlm.data.read.formats import find_format
from megavlm.data.read.index import write_index
from megavlm.data.read.sample import IMAGE_TYPES
from megavlm.data.read.source import SourceConfig
from megavlm.data.tools.drafts import Draft, read_drafts
from megavlm.data.tools.lint import Report
from megavlm.data.tools.tables import tables_of
from megavlm.errors import DataError, MegavlmError
from megavlm.system.progress import progress

HELD_OUT = "held-out"
"""Folder of the shards that are not trained on, in that of the others."""


def build_shards(
    source: Path, out: Path, samples_per_shard: int, image_root: Path | None = None, *, held_out: float = 0.0
) -> dict[str, int]:
    """Write shards with an index beside each, which says their format.

    A folder gives pairs: every image with a text of the same name (``a.jpg``, ``a.txt``), of the format `img2dataset`. A JSONL file
    and a table (Parquet, Arrow, a folder of Hugging Face `datasets`) give their records, whose names tell the format: "question" and
    "answer", "caption", "conversations", "segments", "texts", "text".

    Args:
        source: Folder, JSONL file, table, or a pattern of tables.
        out: Folder to write to; must hold no shards.
        samples_per_shard: In each shard but the last.
        image_root: Folder that image paths start from; that of the file if not given. No image may lie outside of it.
        held_out: Share of the pictures whose samples go to ``out/held-out`` instead. A picture's name decides, so one that is held out here
            is held out wherever it is named.

    Returns:
        Shard, by its path in ``out``, → number of its samples.

    Raises:
        DataError: With every kind of problem, and the place of its first; nothing is then written.
        MegavlmError: If one of the two parts would be empty.
    """
    if next(out.glob("*.tar"), None) if out.is_dir() else None:
        raise MegavlmError(f"{out} already holds shards\n  do:    give another folder, or remove it first")
    if not source.exists() and not tables_of(source):
        raise MegavlmError(f"{source} does not exist\n  do:    give a folder of images, a JSONL file, or a table")
    sample_format, shares = _check(source, image_root, held_out)
    if not sum(shares):
        raise MegavlmError(f"{source} holds no samples\n  do:    put images beside texts of the same name, or lines into the file")
    if held_out and 0 in shares:
        raise MegavlmError(f"{shares[1]} of {sum(shares)} samples would be held out\n  do:    give another share, or leave held_out out")

    def part(is_held: bool) -> Iterator[Draft]:
        chosen = (draft for draft in read_drafts(source, image_root, Report()) if draft.is_held_out(held_out) == is_held)
        return progress(chosen, "write shards", shares[is_held])

    written = _write(part(False), out, sample_format, samples_per_shard)
    if held_out:
        more = _write(part(True), out / HELD_OUT, sample_format, samples_per_shard)
        written |= {f"{HELD_OUT}/{name}": number for name, number in more.items()}
    return written


def _write(samples: Iterator[Draft], out: Path, sample_format: str, samples_per_shard: int) -> dict[str, int]:
    out.mkdir(parents=True, exist_ok=True)
    written = {}
    while chunk := list(islice(samples, samples_per_shard)):
        path = out / f"{len(written):06d}.tar"
        temporary = out / f".writing-{path.name}"
        with TarWriter(str(temporary), encoder=False, mtime=0) as writer:
            for draft in chunk:
                writer.write({"__key__": draft.key, **draft.members, **{name: file.read_bytes() for name, file in draft.files.items()}})
        temporary.rename(path)
        written[path.name] = write_index(path, sample_format).samples
    return written


def _check(source: Path, image_root: Path | None, held_out: float) -> tuple[str, list[int]]:
    """The format of what a folder or file holds, and how many samples are to be trained on and how many are held out."""
    report, formats, shares = Report(), {}, [0, 0]
    for draft in progress(read_drafts(source, image_root, report), "check samples"):
        formats.setdefault(draft.sample_format, draft.place)
        shares[draft.is_held_out(held_out)] += 1
        # the text of a pair is read here; images are not
        members = {name: b"" if name.endswith(IMAGE_TYPES) else file.read_bytes() for name, file in draft.files.items()}
        try:
            find_format(draft.sample_format)(
                draft.key,
                draft.members | members,
                SourceConfig(shards="none", format=draft.sample_format),
                lambda: np.random.default_rng(0),
            )
        except ValidationError as error:
            report.add(DataError(error.errors()[0]["msg"], "correct it"), str(source), draft.place)
        except DataError as error:
            report.add(error, str(source), draft.place)
    if len(formats) > 1:
        places = ", ".join(f"{found} ({place})" for found, place in formats.items())
        report.add(DataError(f"the file mixes formats: {places}", "give each a file of its own"), str(source))
    if len(report.problems) == 1:
        raise report.problems[0]
    if report.problems:
        what = "\n".join([*report.grouped(), f"{len(report.problems)} problems; nothing was written"])
        raise DataError(what, "correct what is named, and build again", shard=str(source))
    return next(iter(formats), ""), shares
