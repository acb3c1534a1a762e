"""Images as grey levels of single pixels. Tested by `tests/evaluation/test_digits.py`.

Letters: N images, H and W pixels, C colours, h and w rows and columns of codes.
"""

import hashlib
from collections.abc import Collection
from typing import Annotated, Literal

import numpy as np
from PIL import Image
from pydantic import Field

from megavlm.image_tokenizers.fitting import Fit, fitted
from megavlm.image_tokenizers.protocol import DenseCodes, Side
from megavlm.settings import Settings, Whole


class PixelTokenizerConfig(Settings):
    """Images as grey levels of single pixels (`megavlm.image_tokenizers.pixel.PixelTokenizer`)."""

    kind: Literal["pixel"] = "pixel"
    """Which tokenizer."""
    levels: Annotated[Whole, Field(ge=2, le=256)] = 17
    """Size of the codebook: number of grey levels."""
    height: Side = 8
    """Rows of codes per image."""
    width: Side = 8
    """Columns of codes per image."""
    fit: Fit = "squash"
    """What happens to images of other proportions: crop, pad or squash (`megavlm.image_tokenizers.fitting`)."""


class PixelTokenizer(DenseCodes):
    """A code is the grey level of a pixel: exact on images of ``height x width`` with ``levels`` grey levels.

    Other images are brought to the size (box filter) and rounded to the nearest level.

    Args:
        levels: Number of grey levels, which is the size of the codebook.
        height: Rows of the grid.
        width: Columns of the grid.
        fit: What happens to images of other proportions.
    """

    has_decoder = True

    def __init__(self, levels: int, height: int, width: int, fit: Fit = "squash"):
        self.codebook_size = levels
        self.height = height
        self.width = width
        self.fit_kind: Fit = fit

    @property
    def fingerprint(self) -> str:
        # as ever where images are squashed
        fit = "" if self.fit_kind == "squash" else f" {self.fit_kind}"
        return hashlib.sha256(f"pixel {self.codebook_size}{fit}".encode()).hexdigest()

    @property
    def pixels(self) -> tuple[int, int]:
        return self.height, self.width

    def encode(self, images: Collection[np.ndarray]) -> np.ndarray:
        images_NHWC = np.stack([fitted(image, self.pixels, self.fit_kind, Image.Resampling.BOX) for image in images])
        grey_Nhw = images_NHWC.astype(np.float64).mean(axis=3)
        return np.rint(grey_Nhw * (self.codebook_size - 1) / 255).astype(np.int64)

    def decode(self, codes_Nhw: np.ndarray) -> np.ndarray:
        grey_Nhw = np.rint(np.asarray(codes_Nhw) * 255 / (self.codebook_size - 1)).astype(np.uint8)
        return np.repeat(grey_Nhw[..., None], 3, axis=3)
