"""The protocol of image tokenizers: ``encode(images) -> codes``, ``decode(codes) -> images``, and what the engine needs beside that.

Letters: N images, h and w rows and columns of codes, R places with features, F numbers of a feature.
Tested by `tests/image_tokenizers/test_compressed.py`.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Protocol

import numpy as np
import torch
from pydantic import Field

from megavlm.errors import DataError
from megavlm.image_tokenizers.fitting import Fit, Loss, loss_of
from megavlm.settings import Positive

Side = Annotated[Positive, Field(le=1024)]
"""Rows or columns of codes of one image."""


@dataclass(frozen=True, eq=False)
class Features:
    """Features that the model reads at some places of a span, instead of the embeddings of its codes."""

    places_R: np.ndarray
    """Places in the span."""
    values_RF: np.ndarray
    """float32; a projection of the model turns them into embeddings."""


class ImageTokenizer(Protocol):
    """Gives a grid of ``height x width`` codes out of ``codebook_size``. Sizes are known without reading weights."""

    codebook_size: int
    height: int
    width: int
    has_decoder: bool
    feature_width: int
    """Width of the features that the model reads; 0 if it reads codes."""

    @property
    def fingerprint(self) -> str:
        """A text that differs between tokenizers that give different codes."""
        ...

    @property
    def of_shards(self) -> "ImageTokenizer":
        """The tokenizer whose codes pre-tokenised shards hold: itself, or the one inside."""
        ...

    def encode(self, images: Collection[np.ndarray]) -> np.ndarray:
        """uint8 RGB images ``[H, W, 3]`` of any sizes to codes ``[N, height, width]``."""
        ...

    def encode_member(self, name: str, image: np.ndarray, has_loss: bool) -> tuple[np.ndarray, Features | None]:
        """Codes ``[h, w]`` of an image from a shard, and the features that are read in their place, if any.

        Args:
            name: Name of the image in its sample, for errors.
            image: uint8 pixels ``[H, W, 3]``, or int64 codes ``[h, w]`` made before.
            has_loss: Whether the image is drawn; only images that are read have features.

        Raises:
            DataError: If codes do not belong to this tokenizer. The error names no place; the caller adds it.
        """
        ...

    def decode(self, codes_Nhw: np.ndarray, /) -> np.ndarray:
        """Codes ``[N, height, width]`` to uint8 RGB images ``[N, H, W, 3]``."""
        ...

    def loss_of(self, image: np.ndarray) -> Loss | None:
        """What an image ``[H, W, 3]`` loses when it is brought to the tokenizer's size; None if nothing."""
        ...

    def codebook(self) -> torch.Tensor | None:
        """The embedding of every code, as the decoder gets it ``[codebook_size, D]``; None if codes have no embeddings."""
        ...

    def barred(self) -> np.ndarray:
        """Which code may not stand at which place when an image is drawn: bool ``[height * width, codebook_size]``."""
        ...

    def to(self, device: torch.device) -> None:
        """Move the tokenizer to a device."""
        ...


def codes_of_member(tokenizer: ImageTokenizer, name: str, image: np.ndarray) -> np.ndarray:
    """Codes ``[h, w]``: uint8 pixels are tokenized; int64 codes, made before, are checked."""
    if image.dtype == np.uint8:
        return tokenizer.encode(image[None])[0]
    # negative codes, read as unsigned, are the largest
    if image.view(np.uint64).max() >= tokenizer.codebook_size:
        raise DataError(
            f"{name} has codes from {image.min()} to {image.max()}, outside the codebook of {tokenizer.codebook_size}",
            "tokenize the images with the run's image tokenizer (vocabulary.image_tokenizer)",
        )
    return image


class DenseCodes(ImageTokenizer, Protocol):
    """The base of most tokenizers: shards hold their own codes, the model reads codes, and any code may stand anywhere."""

    feature_width = 0
    pixels: tuple[int, int] = (0, 0)
    """(height, width) that images are brought to."""
    fit_kind: Fit = "pad"
    """How."""

    @property
    def of_shards(self) -> ImageTokenizer:
        return self

    def encode_member(self, name: str, image: np.ndarray, has_loss: bool) -> tuple[np.ndarray, None]:
        return codes_of_member(self, name, image), None

    def loss_of(self, image: np.ndarray) -> Loss | None:
        return loss_of(image, self.pixels, self.fit_kind)

    def codebook(self) -> torch.Tensor | None:
        return None

    def barred(self) -> np.ndarray:
        return np.zeros((self.height * self.width, self.codebook_size), bool)

    def to(self, device: torch.device) -> None:
        pass


class GridOnly(DenseCodes):
    """An image tokenizer's grid without its work: all codes are 0. For layouts, which depend on sizes only.

    Args:
        of: The tokenizer. Codes from shards keep their own grid, except with a compressed tokenizer, which makes them fewer.
    """

    has_decoder = False

    def __init__(self, of: ImageTokenizer):
        self.codebook_size = of.codebook_size
        self.height = of.height
        self.width = of.width
        self._keeps_codes = of.of_shards is of

    @property
    def fingerprint(self) -> str:
        return ""

    def encode(self, images: Collection[np.ndarray]) -> np.ndarray:
        return np.zeros((len(images), self.height, self.width), np.int64)

    def encode_member(self, name: str, image: np.ndarray, has_loss: bool) -> tuple[np.ndarray, None]:
        return codes_of_member(self, name, image) if self._keeps_codes else self.encode([image])[0], None

    def decode(self, codes_Nhw: np.ndarray) -> np.ndarray:
        raise TypeError("a grid has no images")
