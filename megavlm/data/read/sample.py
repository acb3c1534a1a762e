"""The sample: text and image segments in order, and a task. Its schema inside a WebDataset shard:

    000017.json      {"task": "understanding",
                      "segments": [{"image": "img0"}, {"text": "Which digit is this?"}, {"text": "seven", "loss": true}],
                      "meta": {"label": 7}}
    000017.img0.png  the image named by the segment: .png .jpg .jpeg .webp, or .npy with codes [height, width]

``loss`` marks what the model learns to predict. ``meta`` is free, and is not shown to the model.
"""

import io
import warnings
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from megavlm.errors import DataError
from megavlm.routing.tasks import TaskName

MAX_NPY_HEADER_BYTES = 4096

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
        if not any(segment.loss for segment in self.segments):
            raise ValueError("no segment has a loss, so there is nothing to learn")
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
        if first["type"] == "json_invalid":
            raise DataError(f"broken JSON: {first['ctx']['error']}", "write the json member as UTF-8 JSON") from error
        mistakes = "; ".join(f"{'.'.join(map(str, m['loc']))}: {m['msg']}" for m in error.errors())
        raise DataError(f"JSON does not follow the sample schema: {mistakes}", "correct the json member") from error


def parse_sample(key: str, members: dict[str, bytes], coordinates: Coordinates) -> Sample:
    """Decode the members of one sample in our own schema.

    Raises:
        DataError: Without a place, which the caller knows and adds.
    """
    record = parse_record(members)
    names = dict.fromkeys(segment.image for segment in record.segments if segment.image is not None)
    images = {name: decode_image(name, members) for name in names}
    return Sample(key, record.task, record.segments, images, coordinates, record.meta)


def decode_image(name: str, members: dict[str, bytes]) -> np.ndarray:
    """The image that a segment names: uint8 RGB ``[H, W, 3]``, or int64 codes ``[height, width]`` from an npy member.

    Raises:
        DataError: Without a place, which the caller knows and adds.
    """
    for kind in IMAGE_TYPES:
        if (content := members.get(f"{name}.{kind}")) is not None:
            return _decode_codes(name, content) if kind == "npy" else _decode_pixels(f"{name}.{kind}", content)
    raise DataError(
        f"image {name!r} has no member; the sample has {sorted(members)}",
        f"add {name}.png (or {', '.join(IMAGE_TYPES[1:])}) or take the segment out",
    )


def _decode_pixels(member: str, content: bytes) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP")) as image:
                return np.asarray(image.convert("RGB"))
    # Pillow raises whatever its decoders stumble over: OSError, SyntaxError, ValueError, struct.error, …
    except Exception as error:
        raise DataError(f"{member} cannot be read as an image: {error}", "replace or remove the image") from error


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
