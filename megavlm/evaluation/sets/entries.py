"""Sets in local files: their entries, their images, and a list of unusable entries.

A set is JSON lines, a JSON list, or a JSON object of id → entry. The content tells which, because many published ``.json`` files are lines.

Tested by `tests/evaluation/sets/test_judge.py`.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel, ValidationError

from megavlm.data.read.sample import IMAGE_TYPES, decode_image
from megavlm.errors import ConfigError, DataError, MegavlmError
from megavlm.system.user_code import import_attribute

log = logging.getLogger(__name__)

Schema = TypeVar("Schema", bound=BaseModel)


@dataclass(frozen=True)
class Item:
    """One thing to answer or to draw."""

    where: str
    """Its place in the file: `line 12`, `entry 3`, `question 4193`."""
    prompt: str
    """The question or request."""
    truth: Any
    """The right answer, or what the scorer compares with."""
    image: str = ""
    """Path of the image below the set's image folder; empty for drawings."""
    group: str = ""
    """A part of the set that gets figures of its own; empty if there are none."""


class BadEntries:
    """Counts and names the entries of a file that cannot be used.

    Args:
        file: The set.
        limit: Most unusable entries; one more ends the judging.
    """

    def __init__(self, file: Path, limit: int):
        self.file = file
        self.limit = limit
        self.found: list[dict[str, str]] = []

    def add(self, where: str, what: str) -> None:
        """
        Raises:
            MegavlmError: If there are more than the limit.
        """
        self.found.append({"where": where, "what": what})
        log.warning("%s, %s: %s; left out", self.file, where, what)
        if len(self.found) > self.limit:
            raise MegavlmError(
                f"{self.file} has more than {self.limit} bad entries; the last one, {where}: {what}\n"
                "  do:    check the file and the image folder (--images), or allow more with --max_bad"
            )


def load_json(path: Path) -> Any:
    """The JSON document of a file, or its non-empty lines as a list of bytes where it is JSON lines.

    Raises:
        MegavlmError: If the file does not exist.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise MegavlmError(f"{path} cannot be read: {error.strerror}\n  do:    give the path of the set's file") from error
    if path.suffix != ".jsonl":
        try:
            return json.loads(content)
        except ValueError:
            pass
    return content.splitlines()


def read_entries(path: Path, schema: type[Schema], bad: BadEntries) -> list[tuple[str, Schema]]:
    """The entries of a file with their places; those that do not fit the schema are counted as bad."""
    document = load_json(path)
    if isinstance(document, dict) and all(isinstance(entry, dict) for entry in document.values()):
        named = [(f"entry {name}", entry) for name, entry in document.items()]
    elif isinstance(document, list):
        word = "line" if document and isinstance(document[0], bytes) else "entry"
        named = [(f"{word} {number}", entry) for number, entry in enumerate(document, 1) if entry != b""]
    else:
        raise MegavlmError(f"{path} holds no entries\n  do:    write JSON lines, a JSON list, or a JSON object of id to entry")
    return parse_entries(named, schema, bad)


def parse_entries(named: list[tuple[str, Any]], schema: type[Schema], bad: BadEntries) -> list[tuple[str, Schema]]:
    """Validate entries: JSON documents, or lines of bytes that hold one each."""
    parsed = []
    for where, entry in named:
        try:
            parsed.append((where, schema.model_validate(json.loads(entry) if isinstance(entry, bytes) else entry)))
        except ValidationError as error:
            bad.add(where, "; ".join(f"{'.'.join(map(str, m['loc']))}: {m['msg']}" for m in error.errors()))
        except ValueError as error:
            bad.add(where, f"broken JSON: {error}")
    return parsed


def read_image(path: Path) -> np.ndarray:
    """An image file as uint8 RGB ``[H, W, 3]``, or codes from an npy file as int64 ``[height, width]``.

    Raises:
        DataError: If it is missing or broken.
    """
    kind = path.suffix[1:].lower()
    if kind not in IMAGE_TYPES:
        raise DataError(f"image {path} is not one of {', '.join(IMAGE_TYPES)}", "give file names with their suffix, or --image_name")
    try:
        return decode_image(path.stem, {f"{path.stem}.{kind}": path.read_bytes()})
    except OSError as error:
        raise DataError(f"image {path} cannot be read: {error.strerror}", "check --images and --image_name") from error


def find_function(name: str, option: str) -> Callable:
    """The function that ``module:function`` or ``file.py:function`` names.

    Raises:
        ConfigError: If there is no such function.
    """
    try:
        return import_attribute(name)
    except Exception as error:  # whatever the user's code raises
        raise ConfigError(
            f"{option}: {name} cannot be imported: {type(error).__name__}: {error}\n  do:    give module:function, or file.py:function"
        ) from error
