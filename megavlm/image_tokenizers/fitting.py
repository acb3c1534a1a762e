"""How images of any proportions are brought to a tokenizer's size."""

from typing import Literal

import numpy as np
from PIL import Image, ImageOps

Fit = Literal["crop", "pad", "squash"]
"""``crop``: scaled to cover the size, and cut on both sides alike. ``pad``: scaled to lie within it, on black. ``squash``: scaled to it."""
Loss = Literal["cut", "squashed"]


def fitted(image: np.ndarray, size: tuple[int, int], fit: Fit, resampling: Image.Resampling) -> np.ndarray:
    """A uint8 RGB image ``[H, W, 3]`` in another size (height, width)."""
    if image.shape[:2] == size:
        return image
    picture, wide_first = Image.fromarray(image), (size[1], size[0])
    if fit == "crop":
        return np.asarray(ImageOps.fit(picture, wide_first, resampling))
    if fit == "pad":
        scale = min(wanted / given for wanted, given in zip(size, image.shape[:2]))
        height, width = (max(1, round(given * scale)) for given in image.shape[:2])
        padded = np.zeros((*size, 3), np.uint8)
        top, left = (size[0] - height) // 2, (size[1] - width) // 2
        padded[top : top + height, left : left + width] = np.asarray(picture.resize((width, height), resampling))
        return padded
    return np.asarray(picture.resize(wide_first, resampling))


def loss_of(image: np.ndarray, size: tuple[int, int], fit: Fit) -> Loss | None:
    """What an image loses: its edges or its proportions, by a pixel of ``size`` or more; None if neither."""
    scales = [wanted / given for wanted, given in zip(size, image.shape[:2])]
    stands_out = max(given * max(scales) - wanted for wanted, given in zip(size, image.shape[:2]))
    if fit == "pad" or stands_out < 1:
        return None
    return "cut" if fit == "crop" else "squashed"
