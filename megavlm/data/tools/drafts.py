"""What can be written as samples: captioned pictures of a folder, JSON lines, rows of tables. Images are named by path, or are in the rows.

Tested by `tests/data/tools/test_write.py`.
"""

import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from megavlm.data.read.detect import format_of_record
from megavlm.data.read.sample import IMAGE_TYPES
from megavlm.data.read.shards import Members
from megavlm.data.tools.lint import Report
from megavlm.data.tools.tables import read_rows, tables_of
from megavlm.errors import DataError

KINDS = tuple(f".{kind}" for kind in IMAGE_TYPES)
OF_PILLOW = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}


class Draft(NamedTuple):
    """A sample that is to be written."""

    key: str
    place: str
    """Where it comes from: the image, the line, or the row."""
    sample_format: str
    members: Members
    files: dict[str, Path]
    """Members that are copied from files."""
    mark: bytes
    """The first picture's name without folder and suffix, or what it holds; of a text, the text."""

    def is_held_out(self, share: float) -> bool:
        """Whether it is among a share that is not trained on: the same for all that is said of one picture, whatever file says it."""
        return zlib.crc32(self.mark) < share * 2**32


def read_drafts(source: Path, image_root: Path | None, report: Report) -> Iterator[Draft]:
    """What can be written of a source; everything else goes into the report.

    Args:
        source: Folder of pictures with captions, JSONL file, or tables (`megavlm.data.tools.tables`).
        image_root: Folder that image paths start from; that of the file if not given.
        report: Is filled.
    """
    if tables := tables_of(source):
        root = image_root or (source if source.is_dir() else source.parent)
        for table in tables:
            rows = ((f"{table.name} row {number}", row) for number, row in enumerate(read_rows(table)))
            yield from _records(rows, source, root, report, prefix=f"{table.stem}-" if len(tables) > 1 else "")
    elif source.is_dir():
        yield from _pairs(source, report)
    else:
        yield from _records(_lines(source), source, image_root or source.parent, report)


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
        yield Draft(f"{number:08d}", place, "img2dataset", {}, files, path.stem.encode())


def _lines(file: Path) -> Iterator[tuple[str, bytes]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"line {number}", line


def _records(records: Iterator[tuple[str, Any]], source: Path, root: Path, report: Report, *, prefix: str = "") -> Iterator[Draft]:
    for number, (place, record) in enumerate(records):
        try:
            yield _record(f"{prefix}{number:08d}", place, record, root)
        except DataError as error:
            report.add(error, str(source), place)


def _record(key: str, place: str, given: Any, root: Path) -> Draft:
    """The draft of a line of JSON, or of a row, whose images may be bytes."""
    try:
        record = json.loads(given) if isinstance(given, bytes) else dict(given)
        named = _named_images(record)
        images = {f"img{i}": image for i, image in enumerate(named)}
        sample_format = format_of_record(record, bool(images))
        if sample_format is None and images and isinstance(record.get("text"), str):
            sample_format, record = "img2dataset", {"caption": record["text"], **record}
        if sample_format is None:
            raise DataError(
                f"the names {sorted(record)} are those of no format",
                'write "question" and "answer", "caption", "conversations", "segments" or "text"',
            )
        if sample_format == "img2dataset" and len(images) > 1:
            raise DataError(f"a caption has {len(images)} images", "write one line for each")
        members, files, names = {}, {}, {}
        for name, image in images.items():
            kind, content = _kind_and_content(image, root)
            names[name] = kind if sample_format == "img2dataset" else f"{name}.{kind}"
            (files if isinstance(content, Path) else members)[names[name]] = content
        _name_anew(record, sample_format, named, list(names.values()))
        document = json.dumps(record, ensure_ascii=False, default=None if isinstance(given, bytes) else str).encode()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"the line is no sample: {error!r}", "correct the line") from error
    return Draft(key, place, sample_format, {"json": document, **members}, files, _mark(named, document))


def _named_images(record: dict[str, Any]) -> list[Any]:
    """The images of a record, in its order; a path that several segments name is one image."""
    if "segments" in record:
        return list(dict.fromkeys(segment["image"] for segment in record["segments"] if segment.get("image")))
    column = _image_column(record)
    found = record.get(column) if column else None
    return [image for image in (found if isinstance(found, list) else [found]) if image is not None]


def _image_column(record: dict[str, Any]) -> str | None:
    """Where a record has its images: under a name that everybody uses, or in the only column that holds pictures."""
    known = [name for name in ("image", "images") if record.get(name) is not None]
    pictures = [name for name, value in record.items() if _is_picture(value[0] if isinstance(value, list) and value else value)]
    return next(iter(known or (pictures if len(pictures) == 1 else [])), None)


def _is_picture(value: Any) -> bool:
    return isinstance(value, bytes) or (isinstance(value, dict) and value.keys() == {"bytes", "path"})


def _kind_and_content(image: Any, root: Path) -> tuple[str, bytes | Path]:
    """The type of an image, and what it holds or the file that holds it."""
    content = image["bytes"] if _is_picture(image) and isinstance(image, dict) else image
    if isinstance(content, bytes):
        try:
            with Image.open(io.BytesIO(content)) as picture:
                kind = OF_PILLOW[picture.format or ""]
        except (OSError, KeyError) as error:
            raise DataError("an image is damaged, or none that can be read", f"write it as one of {', '.join(OF_PILLOW)}") from error
        return kind, content
    name = image["path"] if isinstance(image, dict) else image
    path = _inside(root, name)
    if Path(name).suffix.lower() not in KINDS:
        raise DataError(f"{name!r} is no image that can be read", f"write it as one of {', '.join(KINDS)}")
    return Path(name).suffix.lower()[1:], path


def _name_anew(record: dict[str, Any], sample_format: str, given: list[Any], names: list[str]) -> None:
    """The names in the shard take the place of paths and pictures."""
    if sample_format == "megavlm":
        for segment in record["segments"]:
            if segment.get("image"):
                segment["image"] = f"img{given.index(segment['image'])}"
        return
    column = _image_column(record)
    if sample_format == "interleaved" and column:
        left = iter(names)
        record["images"] = [None if image is None else next(left).rsplit(".", 1)[0] for image in record[column]]
    elif column:
        del record[column]
        if sample_format != "img2dataset":
            record["image"] = names


def _mark(images: list[Any], document: bytes) -> bytes:
    first = images[0] if images else document
    if isinstance(first, dict):
        first = first["path"] or first["bytes"]
    return first if isinstance(first, bytes) else Path(first).stem.encode()


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
