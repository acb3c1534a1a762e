"""Draws images with guidance, and answers in text. Both follow a routing plan: dense, or that of the training.

Letters: B sequences that are decoded together, C codes of the codebook, P places of an image.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megavlm.data.pack.encode import EncodedSample, Encoder
from megavlm.data.pack.pack import Costing
from megavlm.data.read.sample import Coordinates, Sample, Segment
from megavlm.evaluation.batches import BATCH_TOKENS, batches
from megavlm.image_tokenizers.protocol import GridOnly
from megavlm.model.decoding import Decoder
from megavlm.randomness import Purpose, integer_seed
from megavlm.system.progress import progress
from megavlm.vocabulary import Vocabulary

NOISE_NUMBERS = 2**25
"""Random numbers for one place of all drawings that share a generator."""


@torch.no_grad()
def draw_images(
    model: Callable,
    encoder: Encoder,
    prompts: Sequence[str],
    costing: Costing,
    *,
    device: torch.device,
    seed: int,
    temperature: float = 1.0,
    top_k: int = 0,
    guidance: float = 1.0,
    batch_tokens: int = BATCH_TOKENS,
) -> np.ndarray:
    """Draw one image per prompt.

    Classifier-free guidance (Ho & Salimans 2022): logits = unconditional + guidance * (conditional - unconditional).
    The random numbers of a drawing depend on its place among the prompts, not on the batch that it is drawn in.

    Args:
        model: A backbone, or an engine around one.
        encoder: Encoder with the model's vocabulary and image tokenizer.
        prompts: What to draw.
        costing: Costing of the routing plan to follow.
        device: Where the model is.
        seed: Seed of the sampling.
        temperature: Temperature of the softmax.
        top_k: Draw among the k most likely codes; 0 is all.
        guidance: 1 is none.
        batch_tokens: Tokens that are decoded together, prompts and images; with guidance every prompt counts twice.

    Returns:
        Codes ``[len(prompts), height, width]``.
    """
    blank, ratios = GridOnly(encoder.image_tokenizer), (0.0, 1.0) if guidance != 1.0 else (0.0,)
    samples = [
        [_to_draw(Encoder(encoder.vocabulary, blank, ratio), prompt, index) for index, prompt in enumerate(prompts)] for ratio in ratios
    ]
    num_shared = max(1, NOISE_NUMBERS // encoder.image_tokenizer.codebook_size)
    lengths = [len(ratios) * max(sample.num_tokens for sample in pair) for pair in zip(*samples)]
    drawn = []
    for first in range(0, len(prompts), num_shared):
        shared = slice(first, first + num_shared)
        group_seed = seed if first == 0 else integer_seed(seed, Purpose.DRAWING, first)
        for batch in batches(lengths[shared], batch_tokens):
            noise = _Noise(len(lengths[shared]), batch, torch.Generator(device).manual_seed(group_seed))
            chosen = [sample for of_ratio in samples for sample in of_ratio[shared][batch]]
            options = {"temperature": temperature, "top_k": top_k, "guidance": guidance}
            drawn.append(_draw_batch(model, encoder, chosen, costing, noise=noise, device=device, **options))
    grid = encoder.image_tokenizer.height, encoder.image_tokenizer.width
    return np.concatenate(drawn).reshape(len(prompts), *grid)


@dataclass
class _Noise:
    """Exponential random numbers for some of N drawings: those that they would have if all were drawn together."""

    number: int
    rows: slice
    generator: torch.Generator

    def next(self, like_BC: torch.Tensor) -> torch.Tensor:
        """The numbers for the next place ``[B, C]``."""
        return like_BC.new_empty(self.number, like_BC.shape[1]).exponential_(generator=self.generator)[self.rows]


def _draw_batch(
    model: Callable,
    encoder: Encoder,
    samples: list[EncodedSample],
    costing: Costing,
    *,
    noise: _Noise,
    device: torch.device,
    temperature: float,
    top_k: int,
    guidance: float,
) -> np.ndarray:
    """Codes ``[B, P]`` of samples that are drawn together; with guidance these are 2 B, the unconditional ones last."""
    vocabulary, tokenizer = encoder.vocabulary, encoder.image_tokenizer
    guided = guidance != 1.0
    decoder = Decoder(
        model=model,
        samples=samples,
        prompt_lengths=[sample.spans[0].start for sample in samples],
        costing=costing,
        device=device,
    )
    logits_BV, drawn, num_codes = decoder.start(), [], tokenizer.height * tokenizer.width
    barred_PC = torch.from_numpy(tokenizer.barred()).to(device)
    for place in progress(range(num_codes), "draw images"):
        logits_BC = logits_BV[:, vocabulary.first_code : vocabulary.size]
        if guided:
            with_prompt, without = logits_BC.chunk(2)
            logits_BC = without + guidance * (with_prompt - without)
        logits_BC = (logits_BC / temperature).masked_fill(barred_PC[place], -torch.inf)
        if top_k:
            lowest_kept = logits_BC.topk(min(top_k, logits_BC.shape[1]), dim=1).values[:, -1:]
            logits_BC = logits_BC.masked_fill(logits_BC < lowest_kept, -torch.inf)
        probabilities_BC = logits_BC.softmax(1)
        # what torch.multinomial does, without its look at the probabilities, for which the host would wait
        codes_B = (probabilities_BC / noise.next(probabilities_BC)).argmax(1)
        drawn.append(codes_B)
        if place + 1 < num_codes:
            tokens_B = codes_B + vocabulary.first_code
            logits_BV = decoder.feed(torch.cat([tokens_B, tokens_B]) if guided else tokens_B)
    return torch.stack(drawn, 1).cpu().numpy()


@torch.no_grad()
def answer(
    model: Callable,
    encoder: Encoder,
    prompts: Sequence[EncodedSample],
    costing: Costing,
    *,
    device: torch.device,
    max_tokens: int = 16,
    batch_tokens: int = BATCH_TOKENS,
) -> list[str]:
    """Answer each prompt with the most likely text, token by token, until ``<eos>``.

    Args:
        model: A backbone, or an engine around one.
        encoder: Encoder with the model's vocabulary.
        prompts: Questions with their images, without the answer.
        costing: Costing of the routing plan to follow.
        device: Where the model is.
        max_tokens: Most tokens of an answer.
        batch_tokens: Tokens that are decoded together, prompts and answers.
    """
    answers = []
    for batch in batches([prompt.num_tokens + max_tokens for prompt in prompts], batch_tokens):
        chosen = prompts[batch]
        decoder = Decoder(
            model=model,
            samples=chosen,
            prompt_lengths=[prompt.num_tokens for prompt in chosen],
            costing=costing,
            device=device,
            num_more=max_tokens,
        )
        answers += [encoder.vocabulary.decode_text(ids) for ids in _write(decoder, encoder.vocabulary, max_tokens)]
    return answers


def _write(decoder: Decoder, vocabulary: Vocabulary, max_tokens: int) -> list[list[int]]:
    """Tokens of each answer; the host waits for each token, to know when all are at their ends."""
    logits_BV = decoder.start()
    answers = [[] for _ in range(len(logits_BV))]
    goes_on = [True] * len(answers)
    is_text_V = torch.arange(logits_BV.shape[1], device=logits_BV.device) < vocabulary.num_text
    is_text_V[vocabulary.eos] = True
    for _ in range(max_tokens):
        tokens_B = logits_BV.masked_fill(~is_text_V, -torch.inf).argmax(1)
        tokens = tokens_B.tolist()
        goes_on = [before and token != vocabulary.eos for before, token in zip(goes_on, tokens)]
        if not any(goes_on):
            break
        for ids, token, is_running in zip(answers, tokens, goes_on):
            if is_running:
                ids.append(token)
        logits_BV = decoder.feed(tokens_B)
    return answers


def _to_draw(encoder: Encoder, prompt: str, index: int) -> EncodedSample:
    """A generation sample whose image is a placeholder."""
    segments = (Segment(text=prompt), Segment(image="image", loss=True))
    image = {"image": np.zeros((1, 1, 3), np.uint8)}
    return encoder(Sample("", "generation", segments, image, Coordinates(0, 0, 0, index)))
