"""Pictures for people: grids of images with captions. Texts in them may be anything that a user or a model has written."""

import io
import math
import re
import textwrap
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.figure import Figure

# the same pictures on every machine: a user's own settings may ask for TeX
matplotlib.rcdefaults()
# a sign that the font lacks is drawn as a box, which says enough
warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)

MOST_IMAGES = 500
"""A grid shows no more: its layout takes a second per hundred, and a PNG has a limit."""
LONGEST_TEXT = 2000
CAPTION_WIDTH, CAPTION_LINES = 22, 5
"""Characters and lines of one image's caption."""


def plain(text: str, width: int = 80, lines: int = 3) -> str:
    """Text that a figure shows as it is: not as mathematics, without what no font can draw, cut where it is too long.

    Every text that was not written in our own code goes through here before it is a title, a label or an entry of a legend.

    Args:
        text: Anything.
        width: Characters per line.
        lines: At most so many.
    """
    # control characters, halves of surrogate pairs, marks of direction
    drawable = re.sub(
        r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\u200e\u200f\u202a-\u202e\ufffe\uffff]", "\ufffd", text[:LONGEST_TEXT]
    )
    wrapped = textwrap.wrap(drawable, width, max_lines=lines, placeholder=" …")
    return "\n".join(wrapped).replace("$", r"\$")


def save_figure(figure: Figure, path: Path, dpi: int = 110) -> Path:
    """Write a figure and forget it, also if it cannot be written; makes the folder."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=dpi)
    finally:
        pyplot.close(figure)
    return path


def save_grid(images: Collection[np.ndarray], captions: Sequence[str], path: Path, columns: int = 10, *, title: str = "") -> None:
    """Write a PNG of images in rows.

    Args:
        images: uint8 RGB ``[H, W, 3]`` each, of any size; without any, the picture says so. Of more than ``MOST_IMAGES`` the first ones are
            shown, and the title says that too.
        captions: One for each; may be empty strings.
        path: The PNG to write.
        columns: Images per row.
        title: Above the grid.
    """
    shown = list(images)[:MOST_IMAGES]
    if len(shown) < len(images):
        title = f"{title} (the first {len(shown)} of {len(images)})"
    columns = min(columns, max(1, len(shown)))
    rows = max(1, math.ceil(len(shown) / columns))
    figure, axes = pyplot.subplots(rows, columns, figsize=(1.5 * columns, 1.75 * rows + 0.5), squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, caption in zip(axes.flat, shown, captions, strict=False):
        axis.imshow(image, interpolation="nearest", vmin=0, vmax=255)
        axis.set_title(plain(caption, CAPTION_WIDTH, CAPTION_LINES), fontsize=8)
    if not shown:
        axes[0, 0].set_title("no images", fontsize=8)
    if title:
        figure.suptitle(plain(title, max(20, 16 * columns)), fontsize=11)
    save_figure(figure, path, dpi=100)


def png(image: np.ndarray) -> bytes:
    """An image ``[H, W, 3]`` as the bytes of a PNG."""
    content = io.BytesIO()
    Image.fromarray(image).save(content, "PNG")
    return content.getvalue()
