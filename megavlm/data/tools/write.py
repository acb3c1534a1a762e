"""Building shards: from a folder of images with captions, or from a JSONL file in our own schema or LLaVA's.

Everything is checked before anything is written, so that all problems are reported at once and no shards are left half-way.
"""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import ValidationError
from webdataset.writer import TarWriter

from megavlm.data.read.formats import find_format
from megavlm.data.read.index import write_index
from megavlm.data.read.sample import IMAGE_TYPES
from megavlm.data.read.shards import Members
from megavlm.data.read.source import SourceConfig
from megavlm.data.tools.lint import Report
from megavlm.errors import DataError, MegavlmError

KINDS = tuple(f".{kind}" for kind in IMAGE_TYPES)


class Draft(NamedTuple):
    """A sample that is to be written."""

    key: str
    place: str
    """Where it comes from: the image, or the line."""
    sample_format: str
    members: Members
    files: dict[str, Path]
    """Members that are copied from files."""


def build_shards(source: Path, out: Path, samples_per_shard: int, image_root: Path | None = None) -> dict[str, int]:
    """Write shards with an index beside each, which says their format.

    A folder gives pairs: every image with a text of the same name (``a.jpg``, ``a.txt``), of the format `img2dataset`. A JSONL file
    gives its records: with "segments" (our own schema, images named by path), or with "conversations" (LLaVA's).

    Args:
        source: Folder, or JSONL file.
        out: Folder to write to; must hold no shards.
        samples_per_shard: In each shard but the last.
        image_root: Folder that image paths start from; that of the JSONL file if not given. No image may lie outside of it.

    Returns:
        Shard → number of its samples.

    Raises:
        DataError: With every kind of problem, and the place of its first; nothing is then written.
    """
    if next(out.glob("*.tar"), None) if out.is_dir() else None:
        raise MegavlmError(f"{out} already holds shards\n  do:    give another folder, or remove it first")
    if not source.exists():
        raise MegavlmError(f"{source} does not exist\n  do:    give a folder of images, or a JSONL file")
    formats = _check(source, image_root)
    if not formats:
        raise MegavlmError(f"{source} holds no samples\n  do:    put images beside texts of the same name, or lines into the file")
    samples = _drafts(source, image_root, Report())
    out.mkdir(parents=True, exist_ok=True)
    written = {}
    while chunk := list(islice(samples, samples_per_shard)):
        path = out / f"{len(written):06d}.tar"
        temporary = out / f".writing-{path.name}"
        with TarWriter(str(temporary), encoder=False, mtime=0) as writer:
            for draft in chunk:
                writer.write({"__key__": draft.key, **draft.members, **{name: file.read_bytes() for name, file in draft.files.items()}})
        temporary.rename(path)
        written[path.name] = write_index(path, formats[0]).samples
    return written


def _check(source: Path, image_root: Path | None) -> list[str]:
    """The formats of what a folder or file holds: one, or none if it is empty."""
    report, formats = Report(), {}
    for draft in _drafts(source, image_root, report):
        formats.setdefault(draft.sample_format, draft.place)
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
    return list(formats)


def _drafts(source: Path, image_root: Path | None, report: Report) -> Iterator[Draft]:
    """What can be written of a source; everything else goes into the report."""
    return _pairs(source, report) if source.is_dir() else _records(source, image_root or source.parent, report)


def _pairs(folder: Path, report: Report) -> Iterator[Draft]:
    kinds = [kind for kind in KINDS if kind != ".npy"]
    # not what macOS keeps beside a file on a foreign disk
    images = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in kinds and not path.name.startswith("._")]
    for number, path in enumerate(images):
        place, text = str(path.relative_to(folder)), path.with_suffix(".txt")
        try:
            if not text.exists():
                raise DataError("the image has no caption", "write a text of its name beside it, or remove the image")
            files = {path.suffix[1:].lower(): _inside(folder, place), "txt": _inside(folder, str(text.relative_to(folder)))}
        except DataError as error:
            report.add(error, str(folder), place)
            continue
        yield Draft(f"{number:08d}", place, "img2dataset", {}, files)


def _records(file: Path, root: Path, report: Report) -> Iterator[Draft]:
    num_read = 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield _record(f"{num_read:08d}", f"line {number}", line, root)
            except DataError as error:
                report.add(error, str(file), f"line {number}")
            num_read += 1


def _record(key: str, place: str, line: bytes, root: Path) -> Draft:
    try:
        record = json.loads(line)
        is_ours = "conversations" not in record
        names = [segment["image"] for segment in record["segments"] if segment.get("image")] if is_ours else record.get("image", [])
        names = list(dict.fromkeys(names)) if is_ours else [names] if isinstance(names, str) else names
        files = {f"img{i}{Path(name).suffix.lower()}": _inside(root, name) for i, name in enumerate(names)}
        if is_ours:
            # the names in the shard take the place of the paths
            for segment in record["segments"]:
                if segment.get("image"):
                    segment["image"] = f"img{names.index(segment['image'])}"
        elif files:
            record["image"] = list(files)
        if unknown := [name for name in names if Path(name).suffix.lower() not in KINDS]:
            raise DataError(f"{unknown[0]!r} is no image that can be read", f"write it as one of {', '.join(KINDS)}")
        document = json.dumps(record, ensure_ascii=False).encode()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"the line is no sample: {error!r}", "correct the line") from error
    return Draft(key, place, "megavlm" if is_ours else "llava", {"json": document}, files)


def _inside(root: Path, name: str) -> Path:
    """A file below a folder, by its path from there; links may not lead out."""
    try:
        path = (root / name).resolve()
        is_file, is_inside = path.is_file(), path.is_relative_to(root.resolve())
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{name!r} is no path: {error}", "correct the path") from error
    if not is_inside:
        raise DataError(f"{name!r} lies outside of {root}", "copy it into the folder, or give the folder that holds it as image_root")
    if not is_file:
        raise DataError(f"{name!r} is no file below {root}", "correct the path, or give the folder that paths start from as image_root")
    return path
