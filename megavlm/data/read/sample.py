"""The sample: text and image segments in order, and a task. Its schema inside a WebDataset shard:

    000017.json      {"task": "understanding",
                      "segments": [{"image": "img0"}, {"text": "Which digit is this?"}, {"text": "seven", "loss": true}],
                      "meta": {"label": 7}}
    000017.img0.png  the image named by the segment: .png .jpg .jpeg .webp, or .npy with codes [height, width]

``loss`` marks what the model learns to predict. ``meta`` is free, and is not shown to the model.
"""

import io
from collections.abc import Container
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from megavlm.data.read.pixels import decode_pixels
from megavlm.data.read.shards import refuse_unread
from megavlm.errors import DataError
from megavlm.routing.tasks import TaskName

MAX_NPY_HEADER_BYTES = 4096
MAX_CHARACTERS = 16 << 20
"""Of one text: far more than any pack holds."""
MAX_CODES = 1 << 24
"""Of one image: a million times what a pack holds."""

IMAGE_TYPES = ("png", "jpg", "jpeg", "webp", "npy")


class Coordinates(NamedTuple):
    """Where a sample stands: enough to read it again, and its name in every record that megavlm keeps."""

    source: int
    """Number of the source, in the order of the recipe."""
    epoch: int
    """How many times the source was gone through before."""
    shard: int
    """Number of the shard in the source's list."""
    index: int
    """Number of the sample in the shard."""
    piece: int = 0
    """Number of the piece, where an over-long sample was split."""


class Segment(BaseModel):
    """A piece of text, or the name of an image."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: str | None = None
    image: str | None = None
    loss: bool = False

    @model_validator(mode="after")
    def _either_text_or_image(self) -> "Segment":
        if (self.text is None) == (self.image is None):
            raise ValueError("a segment has either text or image")
        return self


class Record(BaseModel):
    """The JSON member of a sample."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: TaskName
    segments: tuple[Segment, ...]
    meta: dict[str, Any] = {}

    @model_validator(mode="after")
    def _something_to_learn(self) -> "Record":
        losses = [segment for segment in self.segments if segment.loss]
        if not losses:
            raise ValueError("no segment has a loss, so there is nothing to learn")
        if not any(segment.image is not None or (segment.text or "").strip() for segment in losses):
            raise ValueError("every text with a loss is empty, so there is nothing to learn")
        return self


@dataclass(frozen=True)
class Sample:
    """One training example, decoded.

    ``images`` maps the names used by the segments to uint8 RGB ``[H, W, 3]`` or to int64 codes ``[height, width]``.
    """

    key: str
    task: TaskName
    segments: tuple[Segment, ...]
    images: dict[str, np.ndarray]
    coordinates: Coordinates
    meta: dict[str, Any] = field(default_factory=dict)


def parse_record(members: dict[str, bytes]) -> Record:
    """The JSON member of a sample in our own schema.

    Raises:
        DataError: Without a place, which the caller knows and adds.
    """
    if "json" not in members:
        raise DataError(f"the sample has no json member, only {sorted(members)}", "write samples in the schema of megavlm")
    try:
        return Record.model_validate_json(members["json"])
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "json_invalid" and "ctx" in first:
            raise DataError(f"broken JSON: {first['ctx']['error']}", "write the json member as UTF-8 JSON") from error
        mistakes = "; ".join(f"{'.'.join(map(str, m['loc']))}: {m['msg']}" for m in error.errors())
        raise DataError(f"JSON does not follow the sample schema: {mistakes}", "correct the json member") from error


def image_names(record: Record) -> list[str]:
    """The images that a record names, each once."""
    return list(dict.fromkeys(segment.image for segment in record.segments if segment.image is not None))


def refuse_unnamed(names: Container[str], members: dict[str, bytes]) -> None:
    """Raise a DataError if there is an image in ``members`` that is none of ``names``: nothing is left out silently."""
    left = [member for member in members if _stem_and_kind(member)[1] in IMAGE_TYPES and _stem_and_kind(member)[0] not in names]
    if left:
        raise DataError(f"no segment names the images {sorted(left)}", "name them in the JSON, or take them out")


def parse_sample(key: str, members: dict[str, bytes], coordinates: Coordinates) -> Sample:
    """Decode the members of one sample in our own schema.

    Raises:
        DataError: Without a place, which the caller knows and adds.
    """
    refuse_unread(members)
    record = parse_record(members)
    refuse_unnamed(image_names(record), members)
    return make_sample(key, record, members, coordinates)


def make_sample(key: str, record: Record, members: dict[str, bytes], coordinates: Coordinates) -> Sample:
    """A sample from its record, with the images that it names.

    Raises:
        DataError: Without a place, which the caller knows and adds.
    """
    for segment in record.segments:
        _check_text(segment.text or "")
    images = {name: decode_image(name, members) for name in image_names(record)}
    return Sample(key, record.task, record.segments, images, coordinates, record.meta)


def _check_text(text: str) -> None:
    if len(text) > MAX_CHARACTERS:
        raise DataError(f"a text has {len(text)} characters, the limit is {MAX_CHARACTERS}", "cut the document into several samples")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        # JSON can write half of a character: "\\ud800"
        raise DataError(f"a text holds half a character (a lone surrogate): {error}", "write text as UTF-8") from error


def decode_image(name: str, members: dict[str, bytes]) -> np.ndarray:
    """The image that a segment names: uint8 RGB ``[H, W, 3]``, or int64 codes ``[height, width]`` from an npy member.

    Raises:
        DataError: Without a place, which the caller knows and adds.
    """
    kinds = [kind for kind in IMAGE_TYPES if f"{name}.{kind}" in members]
    if not kinds:
        raise DataError(
            f"image {name!r} has no member; the sample has {sorted(members)}",
            f"add {name}.png (or {', '.join(IMAGE_TYPES[1:])}) or take the segment out",
        )
    if len(kinds) > 1:
        raise DataError(f"image {name!r} is there as {' and as '.join(kinds)}", "take out all but one")
    content = members[f"{name}.{kinds[0]}"]
    return _decode_codes(name, content) if kinds[0] == "npy" else decode_pixels(f"{name}.{kinds[0]}", content)


def _stem_and_kind(member: str) -> tuple[str, str]:
    stem, _, kind = member.rpartition(".")
    return stem, kind


def _decode_codes(name: str, content: bytes) -> np.ndarray:
    remedy = "write codes with numpy.save as a two-dimensional integer array"
    # a header ends with its first line
    try:
        shape, fortran_order, dtype, begin = _npy_header(content[: content.index(b"\n", 0, MAX_NPY_HEADER_BYTES) + 1])
    # numpy tokenizes the header as Python and raises whatever that stumbles over: ValueError, TokenError, SyntaxError, …
    except Exception as error:
        raise DataError(f"{name}.npy is not an npy file: {error}", remedy) from error
    # judged by its header, before anything is allocated; an array of objects would be a pickle
    if dtype.kind not in "iu" or len(shape) != 2 or min(shape) < 1:
        raise DataError(f"{name}.npy holds {dtype} of shape {shape}, not codes", remedy)
    if len(content) - begin != shape[0] * shape[1] * dtype.itemsize:
        raise DataError(f"{name}.npy says {shape} {dtype} but holds {len(content) - begin} bytes", remedy)
    if shape[0] * shape[1] > MAX_CODES:
        raise DataError(f"{name}.npy holds {shape[0]} x {shape[1]} codes, more than any image has", remedy)
    return np.frombuffer(content, dtype, offset=begin).reshape(shape, order="F" if fortran_order else "C").astype(np.int64)


@lru_cache(maxsize=1024)
def _npy_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, order, type and length of the header. Images of one size have the same: parsing it is slow."""
    stream = io.BytesIO(header)
    version = np.lib.format.read_magic(stream)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }[version]
    return *read_header(stream), stream.tell()
