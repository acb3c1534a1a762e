"""Image tokenizers: ``encode(images) -> codes`` and ``decode(codes) -> images``.

Every tokenizer gives a grid of ``height x width`` codes out of ``codebook_size``. Those of pretrained models are in `megavlm.model.vq_tokenizer`.
"""

import hashlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from PIL import Image


class ImageTokenizer(Protocol):
    """What the encoder, the sampler and the evaluation need of a tokenizer. Sizes are known without reading weights."""

    codebook_size: int
    height: int
    width: int
    has_decoder: bool
    fingerprint: str
    """Differs between tokenizers that give different codes."""

    def encode(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """uint8 RGB images ``[H, W, 3]`` of any sizes to codes ``[N, height, width]``."""

    def decode(self, codes_Nhw: np.ndarray) -> np.ndarray:
        """Codes ``[N, height, width]`` to uint8 RGB images ``[N, H, W, 3]``."""


class PixelTokenizer:
    """A code is the grey level of a pixel: exact on images of ``height x width`` with ``levels`` grey levels.

    Other images are scaled to the size (box filter) and rounded to the nearest level.

    Args:
        levels: Number of grey levels, which is the size of the codebook.
        height: Rows of the grid.
        width: Columns of the grid.
    """

    has_decoder = True

    def __init__(self, levels: int, height: int, width: int):
        self.codebook_size, self.height, self.width = levels, height, width
        self.fingerprint = hashlib.sha256(f"pixel {levels}".encode()).hexdigest()

    def encode(self, images: Sequence[np.ndarray]) -> np.ndarray:
        size = (self.width, self.height)
        images_NHWC = np.stack(
            [
                image if image.shape[1::-1] == size else np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))
                for image in images
            ]
        )
        grey_Nhw = images_NHWC.astype(np.float64).mean(axis=3)
        return np.rint(grey_Nhw * (self.codebook_size - 1) / 255).astype(np.int64)

    def decode(self, codes_Nhw: np.ndarray) -> np.ndarray:
        grey_Nhw = np.rint(np.asarray(codes_Nhw) * 255 / (self.codebook_size - 1)).astype(np.uint8)
        return np.repeat(grey_Nhw[..., None], 3, axis=3)
