"""Samples to tokens: ``<bos> segments … <eos>``, an image being ``<boi> codes <eoi>``.

Worked example, generation (loss on the tokens marked ``*``, each predicted from the token before it)::

    <bos> draw a seven <boi>* c0* c1* … c63* <eoi>* <eos>*

``<eos>`` has a loss where the last segment has one.
"""

from dataclasses import dataclass

import numpy as np

from megavlm.data.sample import Coordinates, Sample
from megavlm.errors import DataError
from megavlm.model.image_tokenizer import ImageTokenizer
from megavlm.randomness import Purpose, stream
from megavlm.vocabulary import Vocabulary

UNDERSTANDING, GENERATION, TEXT = 0, 1, 2


@dataclass(frozen=True)
class Span:
    """A run of image tokens of one image: where it starts in its sample, and its grid."""

    start: int
    height: int
    width: int
    has_loss: bool

    @property
    def length(self) -> int:
        return self.height * self.width

    @property
    def task(self) -> int:
        """Which task's route the span takes: an image that is drawn is generation's, one that is read understanding's."""
        return GENERATION if self.has_loss else UNDERSTANDING


@dataclass(frozen=True)
class EncodedSample:
    """A sample as the model sees it.

    ``tokens[i]`` are ids, ``has_loss[i]`` says whether token i is to be predicted (never the first), and
    ``tasks[i]`` which task's loss it then counts for.
    """

    key: str
    coordinates: Coordinates
    tokens: np.ndarray
    has_loss: np.ndarray
    tasks: np.ndarray
    spans: tuple[Span, ...]

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)


class Encoder:
    """Turns samples into tokens.

    Args:
        vocabulary: The id space.
        image_tokenizer: Turns images into codes.
        unconditional_ratio: Share of generation samples whose text without a loss becomes ``<unconditional>``.
        seed: Of that choice, which depends on the sample's coordinates only.
    """

    def __init__(
        self, vocabulary: Vocabulary, image_tokenizer: ImageTokenizer, unconditional_ratio: float = 0.0, seed: int = 0
    ):
        self.vocabulary, self.image_tokenizer = vocabulary, image_tokenizer
        self.unconditional_ratio, self.seed = unconditional_ratio, seed

    def __call__(self, sample: Sample) -> EncodedSample:
        """Encode one sample.

        Raises:
            DataError: Without a place, where codes lie outside the codebook or have the wrong grid.
        """
        vocabulary = self.vocabulary
        ids, losses, tasks, spans = [vocabulary.bos], [False], [TEXT], []
        text_task = TEXT if sample.task == "text" else UNDERSTANDING
        unconditional = sample.task == "generation" and self._is_unconditional(sample.coordinates)
        for segment in sample.segments:
            if segment.image is not None:
                codes_hw = self._codes(segment.image, sample.images[segment.image])
                spans.append(Span(len(ids) + 1, *codes_hw.shape, segment.loss))
                new = [vocabulary.boi, *vocabulary.encode_codes(codes_hw).tolist(), vocabulary.eoi]
                task = GENERATION if segment.loss else text_task
            elif unconditional and not segment.loss:
                new, task = [vocabulary.unconditional], text_task
            else:
                new, task = vocabulary.encode_text(segment.text), text_task
            ids += new
            losses += [segment.loss] * len(new)
            tasks += [task] * len(new)
        return EncodedSample(
            key=sample.key,
            coordinates=sample.coordinates,
            tokens=np.array([*ids, vocabulary.eos], np.int64),
            has_loss=np.array([*losses, losses[-1]]),
            tasks=np.array([*tasks, tasks[-1]], np.int64),
            spans=tuple(spans),
        )

    def _is_unconditional(self, coordinates: Coordinates) -> bool:
        return stream(self.seed, Purpose.SAMPLE, *coordinates).random() < self.unconditional_ratio

    def _codes(self, name: str, image: np.ndarray) -> np.ndarray:
        """uint8 pixels are tokenized; int64 codes, made before, are checked."""
        if image.dtype == np.uint8:
            return self.image_tokenizer.encode(image[None])[0]
        size = self.image_tokenizer.codebook_size
        if image.min() < 0 or image.max() >= size:
            raise DataError(
                f"{name} has codes from {image.min()} to {image.max()}, outside the codebook of {size}",
                "tokenize the images with the run's image tokenizer (vocabulary.image_tokenizer)",
            )
        return image
