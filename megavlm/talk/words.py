"""What a user types or writes into a file, as texts and images in order. Tested by `tests/talk/test_talker.py`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megavlm.data.read.sample import IMAGE_TYPES
from megavlm.errors import DataError, MegavlmError
from megavlm.evaluation.prompts import Part
from megavlm.evaluation.sets.entries import read_image


def read_parts(words: Sequence[str], folder: Path | None = None) -> list[Part]:
    """Texts as they are; a word that ends like an image's name is the path of one.

    Args:
        words: Texts and paths in order.
        folder: Where relative paths begin; by default here.

    Raises:
        MegavlmError: If an image is missing or is none.
    """
    return [read_picture((folder or Path()) / word) if is_picture(word) else word for word in words]


def is_picture(word: str) -> bool:
    return Path(word).suffix[1:].lower() in IMAGE_TYPES


def read_picture(path: Path) -> np.ndarray:
    """The image of a file.

    Raises:
        MegavlmError: If it is missing or is none.
    """
    try:
        return read_image(path)
    except DataError as error:
        raise MegavlmError(
            f"{path}: {error.what}\n  do:    give the path of a PNG, JPEG or WebP; a text that ends like one gets a full stop"
        ) from error


def turns_of(words: Sequence[str]) -> list[list[str]]:
    """Words cut behind every text: what stands before an answer.

    Raises:
        MegavlmError: If no text stands behind the last image, or there is none at all.
    """
    turns: list[list[str]] = [[]]
    for word in words:
        turns[-1].append(word)
        if not is_picture(word):
            turns.append([])
    if turns.pop() or not turns:
        raise MegavlmError('there is no question behind the last image\n  do:    megavlm ask RUN image.png "What is this?"')
    return turns
