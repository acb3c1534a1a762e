"""A run's TensorBoard: rank 0 writes, and whatever goes wrong there is a remark."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter

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
        self._writer: SummaryWriter | None = None
        with harmless(str(folder)):
            if writes:
                self._writer = SummaryWriter(str(folder), purge_step=first_step)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Show numbers, by their tags."""
        if self._writer:
            with harmless(str(self.folder)):
                for tag, value in values.items():
                    self._writer.add_scalar(tag, value, step)

    def images(self, tag: str, images_NHWC: np.ndarray, step: int) -> None:
        """Show images, uint8 RGB, at once."""
        if self._writer and len(images_NHWC):
            with harmless(f"images in {self.folder}"):
                self._writer.add_images(tag, images_NHWC, step, dataformats="NHWC")
                self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        if self._writer:
            with harmless(str(self.folder)):
                self._writer.close()
