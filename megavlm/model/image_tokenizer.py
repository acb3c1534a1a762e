"""Image tokenizers: ``encode(images) -> codes`` and ``decode(codes) -> images``.

Every tokenizer works on images of one size and gives a grid of ``height x width`` codes out of ``codebook_size``.
"""

from typing import Protocol

import numpy as np
from PIL import Image


class ImageTokenizer(Protocol):
    """What the encoder, the sampler and the evaluation need of a tokenizer."""

    codebook_size: int
    height: int
    width: int

    def encode(self, images_NHWC: np.ndarray) -> np.ndarray:
        """uint8 RGB images ``[N, H, W, 3]`` of any size to codes ``[N, height, width]``."""

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

    def __init__(self, levels: int, height: int, width: int):
        self.codebook_size, self.height, self.width = levels, height, width

    def encode(self, images_NHWC: np.ndarray) -> np.ndarray:
        if images_NHWC.shape[1:3] != (self.height, self.width):
            size = (self.width, self.height)
            images_NHWC = np.stack(
                [np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX)) for image in images_NHWC]
            )
        grey_Nhw = images_NHWC.astype(np.float64).mean(axis=3)
        return np.rint(grey_Nhw * (self.codebook_size - 1) / 255).astype(np.int64)

    def decode(self, codes_Nhw: np.ndarray) -> np.ndarray:
        grey_Nhw = np.rint(np.asarray(codes_Nhw) * 255 / (self.codebook_size - 1)).astype(np.uint8)
        return np.repeat(grey_Nhw[..., None], 3, axis=3)
