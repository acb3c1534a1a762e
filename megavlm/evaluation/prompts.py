"""What stands before a drawing or an answer: texts and images in order, as a sample of the training would have them.

    to read    <bos> <boi> codes <eoi> Which digit is this?                     then the answer
    to draw    <bos> <boi> codes <eoi> the same, but thinner <boi> … <eoi>      the drawing is a placeholder

The turns of a conversation follow each other without a mark, as in the training's LLaVA format. Tested by `tests/talk/test_talker.py`.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from megavlm.data.pack.encode import EncodedSample, Encoder
from megavlm.data.read.sample import Coordinates, Sample, Segment
from megavlm.errors import MegavlmError
from megavlm.image_tokenizers.protocol import GridOnly

Part = str | np.ndarray
"""A text; or an image, uint8 RGB ``[H, W, 3]`` or int64 codes ``[h, w]``."""
DRAWING = "drawing"
"""Name of the placeholder's image."""


def to_draw(encoder: Encoder, parts: Sequence[Part], number: int = 0, *, is_unconditional: bool = False) -> EncodedSample:
    """A generation sample whose last image is a placeholder: its last span.

    Args:
        encoder: Encoder with the model's vocabulary and image tokenizer.
        parts: The condition.
        number: Place in the batch; routes that choose tokens by chance depend on it.
        is_unconditional: Texts become ``<unconditional>``, for guidance. Images stay, as in training.
    """
    condition = _sample(parts, "generation", number, Segment(image=DRAWING, loss=True))
    ratio = float(is_unconditional)
    runs = Encoder(encoder.vocabulary, encoder.image_tokenizer, ratio).runs(replace(condition, segments=condition.segments[:-1]))
    blank = Encoder(encoder.vocabulary, GridOnly(encoder.image_tokenizer)).runs(replace(condition, segments=condition.segments[-1:]))
    return encoder.join(condition, runs + blank)


def to_read(encoder: Encoder, parts: Sequence[Part], number: int = 0) -> EncodedSample:
    """An understanding sample without its answer."""
    # a stand-in for the model's answer; prompt() removes it
    return encoder(_sample(parts, "understanding", number, Segment(text="?", loss=True))).prompt()


def check_length(sample: EncodedSample, longest: int, where: str = "the prompt") -> None:
    """
    Raises:
        MegavlmError: If a prompt to read, or a whole drawing with its prompt, is longer than the model is made for.
    """
    if sample.num_tokens > longest:
        raise MegavlmError(
            f"{where} takes {sample.num_tokens} tokens with its images{' and the drawing' if sample.task else ''}, the model is made for"
            f" {longest} (max_position_embeddings)\n"
            "  do:    shorten the text, take out images, or begin a new conversation"
        )


def _sample(parts: Sequence[Part], task, number: int, last: Segment) -> Sample:
    names = [f"image {i + 1}" for i in range(len(parts))]
    images = {name: part for name, part in zip(names, parts) if isinstance(part, np.ndarray)}
    segments = [Segment(text=part) if isinstance(part, str) else Segment(image=name) for name, part in zip(names, parts)]
    placeholder = {DRAWING: np.zeros((1, 1, 3), np.uint8)}
    return Sample("", task, (*segments, last), images | placeholder, Coordinates(0, 0, 0, number))
