"""Pictures for people: grids of images with captions."""

import math
import textwrap
from collections.abc import Collection, Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot


def save_grid(images: Collection[np.ndarray], captions: Sequence[str], path: Path, columns: int = 10, title: str = "") -> None:
    """Write a PNG of images in rows.

    Args:
        images: uint8 RGB ``[H, W, 3]`` each, of any size.
        captions: One for each; may be empty strings.
        path: The PNG to write.
        columns: Images per row.
        title: Above the grid.
    """
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(1.5 * columns, 1.75 * rows + 0.5), squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, caption in zip(axes.flat, images, captions):
        axis.imshow(image, interpolation="nearest", vmin=0, vmax=255)
        axis.set_title(textwrap.fill(caption, 22), fontsize=8)
    if title:
        figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
