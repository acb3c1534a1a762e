"""A run's window: TensorBoard, and other writers of the same numbers. Rank 0 writes, and whatever goes wrong there is a remark.

Letters: N images, H and W pixels, C colours.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.tensorboard.summary import custom_scalars, image, scalar, text

from megavlm.monitor.event_file import EventFile
from megavlm.monitor.layout import LAYOUT
from megavlm.monitor.writers import WRITERS, Writer
from megavlm.system.harmless import harmless

TENSORBOARD = "tensorboard"


class Board:
    """Takes what is to be shown on every rank; one of them writes it.

    Args:
        folder: Where ``tensorboard --logdir`` looks; the other writers write beside it.
        first_step: What an earlier start wrote from this step on is taken back; None takes nothing back.
        writes: Whether this is the rank that writes.
        writers: Who gets the numbers; pictures and texts go to TensorBoard alone.
    """

    def __init__(self, folder: Path, first_step: int | None, writes: bool, writers: Sequence[str] = (TENSORBOARD,)):
        self.folder = folder
        self.first_step = first_step
        self.writes = writes
        self._has_events = TENSORBOARD in writers
        self._file: EventFile | None = None
        self._others: dict[str, Writer] = {}
        if writes:
            with harmless(str(folder)):
                self._opened()
            for name in writers:
                if name != TENSORBOARD:
                    with harmless(f"what {name} shows of {folder.parent}"):
                        self._others[name] = WRITERS[name](folder.parent, first_step or 0)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Show numbers, by their tags."""
        if not self.writes:
            return
        with harmless(str(self.folder)):
            if file := self._opened():
                for tag, value in values.items():
                    file.add(scalar(tag, value), step)
        for name, writer in self._others.items():
            with harmless(f"what {name} shows of {self.folder.parent}"):
                writer.scalars(values, step)

    def images(self, tag: str, images_NHWC: np.ndarray, step: int) -> None:
        """Show images, uint8 RGB."""
        if self.writes and len(images_NHWC):
            with harmless(f"images in {self.folder}"):
                if file := self._opened():
                    file.add(image(tag, images_NHWC, dataformats="NHWC"), step)

    def picture(self, tag: str, path: Path, step: int) -> None:
        """Show a picture that was written, such as a figure."""
        if self.writes:
            with harmless(f"the picture {path} in {self.folder}"), Image.open(path) as pixels:
                self.images(tag, np.asarray(pixels.convert("RGB"))[None], step)

    def text(self, tag: str, words: str, step: int) -> None:
        """Show text, as Markdown; what a user, a model or an error has written goes through `verbatim`."""
        if self.writes:
            with harmless(f"text in {self.folder}"):
                if file := self._opened():
                    file.add(text(tag, words), step)

    def close(self) -> None:
        """No more is written."""
        if self._file:
            with harmless(str(self.folder)):
                self._file.close()
        for name, writer in self._others.items():
            with harmless(f"what {name} shows of {self.folder.parent}"):
                writer.close()

    def _opened(self) -> EventFile | None:
        """The file, if it is wanted; tried again if the disk was full before."""
        if self._file is None and self._has_events:
            self._file = EventFile(self.folder, self.first_step)
            self._file.add(custom_scalars(LAYOUT), 0)
        return self._file


def verbatim(words: str) -> str:
    """Any text as Markdown that shows it as it is: a block of code."""
    return "\n".join(f"    {line}" for line in words.splitlines() or [""])
