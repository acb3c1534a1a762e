"""Samples to tokens: ``<bos> segments … <eos>``, an image being ``<boi> codes <eoi>``.

Worked example, generation (loss on the tokens marked ``*``, each predicted from the token before it)::

    <bos> draw a seven <boi>* c0* c1* … c63* <eoi>* <eos>*

``<eos>`` has a loss where the last segment has one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from megavlm.data.read.sample import Coordinates, Sample
from megavlm.image_tokenizers.protocol import Features, ImageTokenizer
from megavlm.randomness import Purpose, uniform
from megavlm.routing.tasks import TASKS, Task
from megavlm.vocabulary import Vocabulary


@dataclass(frozen=True)
class Span:
    """A run of image tokens of one image: where it starts in its sample, and its grid."""

    start: int
    height: int
    width: int
    has_loss: bool
    features: Features | None = field(default=None, compare=False)
    """What the model reads instead of the embeddings of codes, if anything."""

    @property
    def length(self) -> int:
        return self.height * self.width

    @property
    def task(self) -> int:
        """Which task's route the span takes: an image that is drawn is generation's, one that is read understanding's."""
        return int(Task.GENERATION if self.has_loss else Task.UNDERSTANDING)  # plain, for config.yaml


class Layout(NamedTuple):
    """What the cost of a sample depends on."""

    num_tokens: int
    num_labels: int
    """Tokens with a loss."""
    num_prompt: int
    """Tokens of a generation prompt that predict nothing."""
    spans: tuple[tuple[int, int], ...]
    """(length, task) of its image spans."""


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
    task: int
    """The sample's own task, for its share of the cost."""
    num_pieces: int = 1
    """Samples that an over-long document was split into, this one among them."""

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @cached_property
    def place(self) -> list[int]:
        """The coordinates as a plain list, for states; not to be changed."""
        return list(self.coordinates)

    @cached_property
    def piece(self) -> list[int]:
        """Pieces of its document and its length, for states; not to be changed."""
        return [self.num_pieces, self.num_tokens]

    @cached_property
    def layout(self) -> Layout:
        spans = tuple((span.length, span.task) for span in self.spans)
        return Layout(self.num_tokens, int(np.count_nonzero(self.has_loss)), len(self.prompt_places), spans)

    @property
    def first_label(self) -> int:
        """The first token with a loss, or the length if there is none."""
        return int(self.has_loss.argmax()) if self.has_loss.any() else self.num_tokens

    @cached_property
    def prompt_places(self) -> np.ndarray:
        """Places of a generation sample's prompt that predict nothing: text before the token that predicts the first label."""
        if self.task != Task.GENERATION:
            return np.zeros(0, np.int64)
        is_prompt = np.ones(max(0, self.first_label - 1), bool)
        for span in self.spans:
            is_prompt[span.start : span.start + span.length] = False
        return np.flatnonzero(is_prompt)

    def prompt(self) -> "EncodedSample":
        """Only the tokens before the first one with a loss."""
        end = self.first_label
        spans = tuple(span for span in self.spans if span.start < end)
        return replace(self, tokens=self.tokens[:end], has_loss=self.has_loss[:end], tasks=self.tasks[:end], spans=spans)


Ids = Sequence[int] | np.ndarray
"""Ids of tokens."""


class Run(NamedTuple):
    """The ids of one segment."""

    ids: Ids
    has_loss: bool
    task: int
    grid: tuple[int, ...] | None = None
    """Rows and columns of codes, of an image."""
    features: Features | None = None


def num_tokens(runs: list[Run]) -> int:
    """Length of the sample that `Encoder.join` makes of them."""
    return 2 + sum(map(len, [run.ids for run in runs]))


class Encoder:
    """Turns samples into tokens.

    Args:
        vocabulary: The id space.
        image_tokenizer: Turns images into codes.
        unconditional_ratio: Share of generation samples whose text without a loss becomes ``<unconditional>``.
        seed: Seed of that choice, which depends on the sample's coordinates only.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        image_tokenizer: ImageTokenizer,
        unconditional_ratio: float = 0.0,
        seed: int = 0,
    ):
        self.vocabulary = vocabulary
        self.image_tokenizer = image_tokenizer
        self.unconditional_ratio = unconditional_ratio
        self.seed = seed

    def __call__(self, sample: Sample) -> EncodedSample:
        """Encode one sample.

        Raises:
            DataError: Without a place, where codes lie outside the codebook or have the wrong grid.
        """
        return self.join(sample, self.runs(sample))

    def runs(self, sample: Sample) -> list[Run]:
        """The ids of every segment.

        Raises:
            DataError: As for a whole sample.
        """
        text_task = Task.TEXT if sample.task == "text" else Task.UNDERSTANDING
        unconditional = sample.task == "generation" and self._is_unconditional(sample.coordinates)
        runs = []
        for segment in sample.segments:
            if segment.image is not None:
                codes_hw, features = self.image_tokenizer.encode_member(segment.image, sample.images[segment.image], segment.loss)
                task = Task.GENERATION if segment.loss else text_task
                runs.append(Run(self.vocabulary.encode_image(codes_hw), segment.loss, task, codes_hw.shape, features))
            elif unconditional and not segment.loss:
                runs.append(Run([self.vocabulary.unconditional], segment.loss, text_task))
            else:
                assert segment.text is not None  # a segment has either text or image
                runs.append(Run(self.vocabulary.encode_text(segment.text), segment.loss, text_task))
        return runs

    def join(self, sample: Sample, runs: list[Run]) -> EncodedSample:
        """``<bos> runs … <eos>``: some segments of a sample, or all of them."""
        length = num_tokens(runs)
        tokens, has_loss, tasks = np.empty(length, np.int64), np.zeros(length, bool), np.full(length, Task.TEXT, np.int8)
        tokens[0], tokens[-1] = self.vocabulary.bos, self.vocabulary.eos
        spans, end = [], 1
        for ids, run_has_loss, task, grid, features in runs:
            begin, end = end, end + len(ids)
            tokens[begin:end], tasks[begin:end] = ids, task
            if run_has_loss:
                has_loss[begin:end] = True
            if grid:
                height, width = grid
                spans.append(Span(begin + 1, height, width, run_has_loss, features))
        if runs:  # <eos> is of the last segment
            has_loss[end:], tasks[end:] = runs[-1].has_loss, runs[-1].task
        return EncodedSample(sample.key, sample.coordinates, tokens, has_loss, tasks, tuple(spans), task=TASKS.index(sample.task))

    def _is_unconditional(self, coordinates: Coordinates) -> bool:
        return uniform(self.seed, Purpose.SAMPLE, *coordinates[:4]) < self.unconditional_ratio
