"""A trained model that answers and draws for people: what was written or drawn so far, step by step.

Letters: N drawings of one request, H and W pixels, C colours, h and w rows and columns of codes.
"""

import secrets
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import numpy as np
from pydantic import Field, ValidationError

from megavlm.errors import MegavlmError
from megavlm.evaluation.prompts import Part, check_length, to_draw, to_read
from megavlm.evaluation.sampling import stream_codes, stream_tokens
from megavlm.evaluation.trained import TrainedModel
from megavlm.randomness import Purpose, integer_seed
from megavlm.settings import MOST, Count, Number, Positive, Seed, Settings

BLANK = 255
"""Of pixels that are not drawn yet."""
UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""Stands in a text for a character whose bytes are not all there."""


class Writing(Settings):
    """How an answer is written."""

    max_tokens: Positive = 64
    """Most tokens; fewer where the model's length leaves fewer."""
    temperature: Annotated[Number, Field(ge=0, le=1e4)] = 0.0
    """Of the softmax; 0 takes the most likely token."""
    top_k: Count = 0
    """Draw among the k most likely tokens; 0 is all."""
    seed: Seed = 0
    """Of the sampling."""


class Drawing(Settings):
    """How images are drawn."""

    num: Annotated[Positive, Field(le=10**4)] = 1
    """How many, in one batch."""
    temperature: Annotated[Number, Field(ge=1e-4, le=1e4)] = 1.0
    """Of the softmax."""
    top_k: Count = 0
    """Draw among the k most likely codes; 0 is all."""
    guidance: Annotated[Number, Field(ge=0, le=1000)] = 1.0
    """Classifier-free guidance scale; 1 is none."""
    seed: Seed = 0
    """Of the sampling."""


class Answer(NamedTuple):
    """An answer so far."""

    text: str
    num_tokens: int
    ended: Literal["", "stop", "length"]
    """Empty while it goes on; `stop` at its own end, `length` where it was cut."""


class Sketch(NamedTuple):
    """Drawings so far."""

    pictures: np.ndarray
    """uint8 ``[N, H, W, 3]``; what is not drawn yet is blank."""
    share: float
    """Of the codes that are drawn."""


Kind = TypeVar("Kind", bound=Settings)


def read_settings(kind: type[Kind], given: Mapping[str, Any]) -> Kind:
    """Settings that a user gave.

    Raises:
        MegavlmError: Naming each that cannot be used.
    """
    try:
        return kind.model_validate(dict(given))
    except ValidationError as error:
        mistakes = "; ".join(f"{'.'.join(map(str, m['loc']))}: {m['msg']} (value {m['input']!r})" for m in error.errors())
        raise MegavlmError(f"{mistakes}\n  do:    correct what is named") from error


class Talker:
    """One model. Not for two threads at a time: see `megavlm.talk.line`.

    Args:
        model: The model.
    """

    def __init__(self, model: TrainedModel):
        self.model = model
        self.longest = getattr(model.backbone.causal_lm.config, "max_position_embeddings", MOST)
        """Most tokens of a sequence that the model is made for."""

    @cached_property
    def picture_size(self) -> tuple[int, int]:
        """(width, height) of a drawing."""
        tokenizer = self.model.image_tokenizer
        height, width = tokenizer.decode(np.zeros((1, tokenizer.height, tokenizer.width), np.int64)).shape[1:3]
        return width, height

    def drawing_settings(self, **given: Any) -> Drawing:
        """The recipe's way to draw, with what is given."""
        named = self.model.config.model_dump(include={"temperature", "top_k", "guidance"})
        return read_settings(Drawing, named | given)

    def answer(self, parts: Sequence[Part], writing: Writing) -> Iterator[Answer]:
        """Answer what the parts end with. The last thing that is yielded is the whole answer.

        Args:
            parts: The conversation: questions with their images and the answers before the last question, in order.
            writing: How.

        Raises:
            MegavlmError: At once, if the model is not made for a prompt of that length.
        """
        prompt = to_read(self.model.encoder, parts)
        check_length(prompt, self.longest - 1)
        return self._answer(prompt, writing, min(writing.max_tokens, self.longest - prompt.num_tokens))

    def _answer(self, prompt, writing: Writing, max_tokens: int) -> Iterator[Answer]:
        model, vocabulary = self.model, self.model.encoder.vocabulary
        seed = integer_seed(writing.seed, Purpose.WRITING)
        ids, text = [], ""
        steps = stream_tokens(
            model.backbone,
            model.encoder,
            [prompt],
            model.costing,
            device=model.device,
            max_tokens=max_tokens,
            temperature=writing.temperature,
            top_k=writing.top_k,
            seed=seed,
        )
        for (token,) in steps:
            if token == vocabulary.eos:
                yield Answer(vocabulary.decode_text(ids), len(ids), "stop")
                return
            ids.append(token)
            text = vocabulary.decode_text(ids).rstrip(UNFINISHED)
            if len(ids) < max_tokens:
                yield Answer(text, len(ids), "")
        yield Answer(vocabulary.decode_text(ids), len(ids), "length")

    def draw(self, parts: Sequence[Part], drawing: Drawing) -> Iterator[Sketch]:
        """Draw, row by row where codes stand in rows. The last sketch is the whole drawing.

        Args:
            parts: The condition: texts and images in order.
            drawing: How.

        Raises:
            MegavlmError: At once, if the model is not made for a prompt of that length, or the image tokenizer cannot decode.
        """
        tokenizer = self.model.image_tokenizer
        if not tokenizer.has_decoder:
            raise MegavlmError(
                "the image tokenizer cannot decode, so nothing can be drawn\n  do:    ask, or use a run with another tokenizer"
            )
        check_length(to_draw(self.model.encoder, parts), self.longest)
        return self._draw(parts, drawing)

    def _draw(self, parts: Sequence[Part], drawing: Drawing) -> Iterator[Sketch]:
        model, tokenizer = self.model, self.model.image_tokenizer
        codes_NP = np.zeros((drawing.num, tokenizer.height * tokenizer.width), np.int64)
        steps = stream_codes(
            model.backbone,
            model.encoder,
            [parts] * drawing.num,
            model.costing,
            device=model.device,
            seed=integer_seed(drawing.seed, Purpose.DRAWING),
            temperature=drawing.temperature,
            top_k=drawing.top_k,
            guidance=drawing.guidance,
            guidance_costing=model.guidance_costing,
        )
        for place, codes_N in enumerate(steps, 1):
            codes_NP[:, place - 1] = codes_N.cpu()
            if place % tokenizer.width == 0:
                yield Sketch(self._pictures(codes_NP, place // tokenizer.width), place / codes_NP.shape[1])

    def _pictures(self, codes_NP: np.ndarray, rows: int) -> np.ndarray:
        tokenizer = self.model.image_tokenizer
        pictures_NHWC = tokenizer.decode(codes_NP.reshape(-1, tokenizer.height, tokenizer.width)).copy()
        pictures_NHWC[:, round(pictures_NHWC.shape[1] * rows / tokenizer.height) :] = BLANK
        return pictures_NHWC


Step = TypeVar("Step")


def last(steps: Iterator[Step]) -> Step:
    """The last step: the whole answer or drawing."""
    return deque(steps, maxlen=1).pop()


def random_seed() -> int:
    """A seed for a request that names none."""
    return secrets.randbelow(2**31)
