"""Building shards: from a folder of images with captions, or from a JSONL file in our own schema or LLaVA's."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import webdataset

from megavlm.data.read.index import write_index
from megavlm.data.read.sample import IMAGE_TYPES
from megavlm.data.read.shards import Members
from megavlm.errors import DataError, MegavlmError


def build_shards(source: Path, out: Path, samples_per_shard: int, image_root: Path | None = None) -> dict[str, int]:
    """Write shards with an index beside each.

    A folder gives pairs: every image with a text of the same name (``a.jpg``, ``a.txt``), to be read as `img2dataset`. A JSONL file
    gives its records: with "segments" (our own schema, images named by path), or with "conversations" (LLaVA's).

    Args:
        source: Folder, or JSONL file.
        out: Folder to write to; must hold no shards.
        samples_per_shard: In each shard but the last.
        image_root: Folder that image paths start from; that of the JSONL file if not given.

    Returns:
        Shard → number of its samples.
    """
    if next(out.glob("*.tar"), None) if out.is_dir() else None:
        raise MegavlmError(f"{out} already holds shards\n  do:    give another folder, or remove it first")
    if not source.exists():
        raise MegavlmError(f"{source} does not exist\n  do:    give a folder of images, or a JSONL file")
    samples = _pairs(source) if source.is_dir() else _records(source, image_root or source.parent)
    out.mkdir(parents=True, exist_ok=True)
    written = {}
    while chunk := list(islice(samples, samples_per_shard)):
        path = out / f"{len(written):06d}.tar"
        temporary = out / f".writing-{path.name}"
        with webdataset.TarWriter(str(temporary), encoder=False, mtime=0) as writer:
            for key, members in chunk:
                writer.write({"__key__": key, **members})
        temporary.rename(path)
        written[path.name] = write_index(path).samples
    if not written:
        raise MegavlmError(f"{source} holds no samples\n  do:    put images beside texts of the same name, or lines into the file")
    return written


def _pairs(folder: Path) -> Iterator[tuple[str, Members]]:
    kinds = {f".{kind}" for kind in IMAGE_TYPES if kind != "npy"}
    for number, path in enumerate(p for p in sorted(folder.rglob("*")) if p.suffix.lower() in kinds):
        text = path.with_suffix(".txt")
        if not text.is_file():
            raise DataError(f"{path} has no caption", f"write {text.name} beside it, or remove the image")
        yield f"{number:08d}", {path.suffix[1:].lower(): path.read_bytes(), "txt": text.read_bytes()}


def _records(file: Path, root: Path) -> Iterator[tuple[str, Members]]:
    with file.open("rb") as lines:
        for number, line in enumerate(line for line in lines if line.strip()):
            key = f"{number:08d}"
            try:
                record = json.loads(line)
                names = record.get("image", []) if "conversations" in record else None
                if names is None:
                    # our own schema: the names in the shard take the place of the paths
                    names = [segment["image"] for segment in record["segments"] if segment.get("image")]
                    order = {name: f"img{i}" for i, name in enumerate(dict.fromkeys(names))}
                    for segment in record["segments"]:
                        if segment.get("image"):
                            segment["image"] = order[segment["image"]]
                    names = list(order)
                names = [names] if isinstance(names, str) else names
                members = {f"img{i}{Path(name).suffix.lower()}": (root / name).read_bytes() for i, name in enumerate(names)}
                if "conversations" in record and members:
                    record["image"] = list(members)
            except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
                raise DataError(f"line {number + 1} is no sample: {error!r}", "correct the line", "", str(file), key) from error
            yield key, {"json": json.dumps(record, ensure_ascii=False).encode(), **members}
