"""Hostile samples and shards, each from its number: fields, names, images, codes and archives that are mutated, cut, joined and linked."""

import bz2
import gzip
import io
import json
import lzma
import random
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

FORMATS = ("megavlm", "img2dataset", "llava", "text", "interleaved")
RAW = "@raw@"
RAW_VALUES = (
    "9" * 5000,
    "1e999",
    "-1e999",
    "NaN",
    "[" * 3000 + "]" * 3000,
    "[" * 200_000,
    '"\\ud800"',
    '"\\udfff\\ud800"',
    '"\\u0000"',
    "",
    "tru",
)
VALUES = (
    None,
    True,
    False,
    -1,
    0,
    2**70,
    1.5,
    "",
    " ",
    "\n",
    "\0",
    "x" * 9000,
    "ß🙂",
    [],
    {},
    [[]],
    "../../etc/passwd",
    "img0",
    "img9",
    "text",
    "a\0b.png",
)
NAMES = (
    "json",
    "txt",
    "png",
    "jpg",
    "img0.png",
    "img0.npy",
    "img1.webp",
    "",
    "a.b.c",
    "__problem__",
    "JSON",
    "\udcff.json",
    "x" * 300 + ".json",
    "\n.json",
)
MODES = ("RGB", "L", "1", "P", "LA", "RGBA", "I;16", "CMYK")


def image_bytes(chance: random.Random) -> tuple[str, bytes]:
    kind = chance.choice(("png", "png", "jpg", "webp"))
    mode = chance.choice(MODES if kind == "png" else ("RGB", "L", "CMYK") if kind == "jpg" else ("RGB", "RGBA"))
    mode = "RGB" if kind == "png" and mode == "CMYK" else mode
    size = chance.choice(((8, 8), (8, 8), (1, 1), (300, 2), (1, 900), (17, 9)))
    image, content = Image.new(mode, size, 0), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = chance.randrange(12)
    frames = [image.copy()] if kind != "jpg" and chance.random() < 0.1 else []
    options: dict[str, Any] = {"save_all": True, "append_images": [Image.new(mode, size, 1)]} if frames else {}
    image.save(content, {"jpg": "JPEG"}.get(kind, kind.upper()), exif=exif, **options)
    return kind, damaged(chance, content.getvalue(), 0.4)


def codes_bytes(chance: random.Random) -> bytes:
    shape = chance.choice(((2, 2), (8, 8), (1, 1), (0, 3), (4,), (2, 2, 2), (300, 300)))
    kind = chance.choice((np.int16, np.uint16, np.uint8, np.int64, np.uint64, np.float32, ">i4", "U3", bool))
    content = io.BytesIO()
    np.save(content, np.full(shape, chance.choice((0, 1, 16, 1, 2)), kind))
    return damaged(chance, content.getvalue(), 0.3)


def damaged(chance: random.Random, content: bytes, how_often: float) -> bytes:
    """The same, or cut, emptied, flipped, patched, doubled."""
    if chance.random() > how_often or not content:
        return content
    place, end = sorted(chance.randrange(len(content) + 1) for _ in range(2))
    noise = chance.randbytes(chance.choice((1, 4, 512)))
    return chance.choice(
        (
            content[:place],
            b"",
            content[:place] + noise + content[place + len(noise) :],
            content[:place] + noise + content[place:],
            content[:place] + content[end:],
            content + content,
            content + noise,
            bytes(len(content)),
        )
    )


def document_of(chance: random.Random, format: str) -> dict[str, Any]:
    if format == "megavlm":
        image, text = {"image": "img0", "loss": False}, {"text": "a word", "loss": True}
        return {"task": chance.choice(("understanding", "text")), "segments": [image, {"text": "what?"}, text], "meta": {"n": 1}}
    if format == "llava":
        turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a word"}]
        return {"id": "me", "image": chance.choice(("img0.png", ["img0.png"])), "conversations": turns}
    if format == "interleaved":
        return {"texts": ["a", None, "b"], "images": [None, "img0", None]}
    return {"text": "some text", "caption": "a caption"}


def mutate(chance: random.Random, tree: Any) -> Any:
    """One place of a JSON tree replaced, left out or doubled."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            walk(node[key])

    walk(tree)
    if not places:
        return tree
    node, key = chance.choice(places)
    action = chance.randrange(5)
    if action == 0:
        del node[key]
    elif action == 1 and isinstance(node, list):
        node.insert(key, node[key])
    elif action == 2:
        node[key] = RAW
    elif action == 3 and isinstance(node, dict):
        node[chance.choice(("x", "loss", "image", "text", ""))] = chance.choice(VALUES)
    else:
        node[key] = chance.choice(VALUES)
    return tree


def json_bytes(chance: random.Random, format: str, is_good: bool) -> bytes:
    tree = document_of(chance, format)
    if is_good:
        return json.dumps(tree).encode()
    for _ in range(chance.choice((0, 1, 1, 2, 5))):
        tree = mutate(chance, tree)
    text = json.dumps(tree, ensure_ascii=chance.random() < 0.5).replace(f'"{RAW}"', chance.choice(RAW_VALUES))
    return damaged(chance, text.encode("utf-8", "surrogatepass"), 0.1)


def members_of(chance: random.Random, format: str, is_good: bool) -> dict[str, bytes]:
    members = {"json": json_bytes(chance, format, is_good)}
    if format in ("megavlm", "llava", "interleaved", "img2dataset"):
        stem = "" if format == "img2dataset" else "img0."
        if is_good:
            content = io.BytesIO()
            Image.new("RGB", (8, 8)).save(content, "PNG")
            members[f"{stem}png"] = content.getvalue()
        elif chance.random() < 0.4:
            members[f"{stem}npy"] = codes_bytes(chance)
        else:
            kind, content = image_bytes(chance)
            members[f"{stem}{kind}"] = content
    if not is_good and chance.random() < 0.2:
        members[chance.choice(NAMES)] = chance.choice((b"", b"words", b"\xff\xfe", image_bytes(chance)[1]))
    return members


def tar_bytes(chance: random.Random, samples: list[tuple[str, dict[str, bytes]]], is_hostile: bool) -> bytes:
    content = io.BytesIO()
    format = chance.choice((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    with tarfile.open(fileobj=content, mode="w", format=format) as tar:
        for key, members in samples:
            for name, member in members.items():
                header = tarfile.TarInfo(f"{key}.{name}" if name else key)
                header.size, header.mtime = len(member), chance.choice((0, 1.5))
                if is_hostile and chance.random() < 0.05:
                    header.type = chance.choice((b"1", b"2", b"3", b"5", b"6", b"7", b"S", b"Z", b"V", b"L", b"x", b"g"))
                    header.linkname = chance.choice(("a.json", "/etc/passwd", header.name))
                try:
                    tar.addfile(header, io.BytesIO(member))
                except (ValueError, UnicodeError):  # the old format has no room for this name
                    continue
    return content.getvalue()


def write_hostile_shard(chance: random.Random, folder: Path) -> tuple[Path, str, list[str]]:
    """A shard, its format, and the keys of its samples that must be read if it is whole."""
    format = chance.choice(FORMATS)
    kind = chance.choice(("tar", "tar", "tar", "tar.gz", "jsonl", "json"))
    keys = [chance.choice(("{}", "d/{}", "{}")).format(i) for i in range(chance.choice((1, 3, 6)))]
    is_good = [chance.random() < 0.4 for _ in keys]
    if kind in ("jsonl", "json"):
        lines = [json_bytes(chance, format, good) for good in is_good]
        content = b"\n".join(lines) + b"\n" if kind == "jsonl" else b"[" + b", ".join(lines) + b"]"
        is_damaged = True
        content = damaged(chance, content, 0.2)
    else:
        extra = [("d/._0", {"json": b"Mac OS X"}), ("README", {"": b"x"})] if chance.random() < 0.2 else []
        samples = [*zip(keys, (members_of(chance, format, good) for good in is_good)), *extra]
        is_damaged = chance.random() < 0.5
        content = tar_bytes(chance, samples, is_damaged)
        content = damaged(chance, content, 0.6) if is_damaged else content
        pack = chance.choice((gzip.compress, bz2.compress, lzma.compress)) if kind == "tar.gz" else bytes
        content = pack(content) + (pack(content) if is_damaged and chance.random() < 0.2 else b"")
        content = damaged(chance, content, 0.2) if is_damaged else content
    path = folder / f"a.{kind}"
    path.write_bytes(content)
    return path, format, [] if is_damaged else [key for key, good in zip(keys, is_good) if good]
