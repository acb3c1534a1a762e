"""A run's TensorBoard: rank 0 writes, and whatever goes wrong there is a remark. Letters: N images, H and W pixels, C colours."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch.utils.tensorboard.summary import image, scalar

from megavlm.monitor.event_file import EventFile
from megavlm.system.harmless import harmless


class Board:
    """Takes what is to be shown on every rank; one of them writes it.

    Args:
        folder: Where ``tensorboard --logdir`` looks.
        first_step: What an earlier start wrote from this step on is taken back.
        writes: Whether this is the rank that writes.
    """

    def __init__(self, folder: Path, first_step: int, writes: bool):
        self.folder = folder
        self.first_step = first_step
        self.writes = writes
        self._file: EventFile | None = None
        self.scalars({}, first_step)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Show numbers, by their tags."""
        if self.writes:
            with harmless(str(self.folder)):
                file = self._opened()
                for tag, value in values.items():
                    file.add(scalar(tag, value), step)

    def images(self, tag: str, images_NHWC: np.ndarray, step: int) -> None:
        """Show images, uint8 RGB."""
        if self.writes and len(images_NHWC):
            with harmless(f"images in {self.folder}"):
                self._opened().add(image(tag, images_NHWC, dataformats="NHWC"), step)

    def close(self) -> None:
        """No more is written."""
        if self._file:
            with harmless(str(self.folder)):
                self._file.close()

    def _opened(self) -> EventFile:
        """The file; tried again if the disk was full before."""
        if self._file is None:
            self._file = EventFile(self.folder, self.first_step)
        return self._file
