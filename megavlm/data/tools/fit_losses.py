"""What becomes of images that have not a tokenizer's proportions, counted before a run. Tested by `tests/launch/test_init.py`."""

from collections import Counter

import numpy as np

from megavlm.data.read.sample import Sample
from megavlm.image_tokenizers.protocol import ImageTokenizer


class Losses:
    """Counts what an image tokenizer does to images of other proportions.

    Args:
        tokenizer: Whose ``fit`` it is.
    """

    def __init__(self, tokenizer: ImageTokenizer):
        self.tokenizer = tokenizer
        self.num_images = 0
        self.counts: Counter[str] = Counter()

    def add(self, sample: Sample) -> None:
        """Count the raw images of a sample."""
        raw = [image for image in sample.images.values() if image.dtype == np.uint8]
        self.num_images += len(raw)
        self.counts.update(loss for image in raw if (loss := self.tokenizer.loss_of(image)))

    def lines(self) -> list[str]:
        """In words; none if nothing is lost."""
        return [
            f"{count} of {self.num_images} images would be {loss} (vocabulary.image_tokenizer.fit)" for loss, count in self.counts.items()
        ]
