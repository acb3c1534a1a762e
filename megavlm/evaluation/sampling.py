"""Draws images with guidance, and answers in text. Both follow a routing plan: dense, or that of the training.

Letters: B sequences that are decoded together, C codes of the codebook, P places of an image.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megavlm.data.pack.encode import EncodedSample, Encoder
from megavlm.data.pack.pack import Costing
from megavlm.evaluation.batches import BATCH_TOKENS, batches
from megavlm.evaluation.prompts import Part, to_draw
from megavlm.model.decoding import Decoder
from megavlm.randomness import Purpose, integer_seed
from megavlm.system.progress import progress

NOISE_NUMBERS = 2**25
"""Random numbers for one place of all drawings that share a generator."""


@torch.no_grad()
def draw_images(
    model: Callable,
    encoder: Encoder,
    prompts: Sequence[str | Sequence[Part]],
    costing: Costing,
    *,
    device: torch.device,
    seed: int,
    temperature: float = 1.0,
    top_k: int = 0,
    guidance: float = 1.0,
    guidance_costing: Costing | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> np.ndarray:
    """Draw one image per prompt.

    Classifier-free guidance (Ho & Salimans 2022): logits = unconditional + guidance * (conditional - unconditional).
    The random numbers of a drawing depend on its place among the prompts, not on the batch that it is drawn in.

    Args:
        model: A backbone, or an engine around one.
        encoder: Encoder with the model's vocabulary and image tokenizer.
        prompts: What to draw: a text, or texts and images in order.
        costing: Costing of the routing plan to follow.
        device: Where the model is.
        seed: Seed of the sampling.
        temperature: Temperature of the softmax.
        top_k: Draw among the k most likely codes; 0 is all.
        guidance: 1 is none. It weighs the texts; images of a prompt stay in both.
        guidance_costing: Costing of the routing plan that the unconditional half follows; the same as the other half's by default. A weaker
            model as the one to be guided away from draws better (Karras et al., arXiv 2406.02507; by a route, arXiv 2601.01608).
        batch_tokens: Tokens that are decoded together, prompts and images; with guidance every prompt counts twice.

    Returns:
        Codes ``[len(prompts), height, width]``.
    """
    samples = _samples(encoder, prompts, guidance)
    num_shared = max(1, NOISE_NUMBERS // encoder.image_tokenizer.codebook_size)
    lengths = [len(samples) * max(sample.num_tokens for sample in pair) for pair in zip(*samples)]
    drawn = []
    for first in range(0, len(prompts), num_shared):
        shared = slice(first, first + num_shared)
        group_seed = seed if first == 0 else integer_seed(seed, Purpose.DRAWING, first)
        for batch in batches(lengths[shared], batch_tokens):
            noise = _Noise(len(lengths[shared]), batch, torch.Generator(device).manual_seed(group_seed))
            chosen = [sample for of_ratio in samples for sample in of_ratio[shared][batch]]
            options = {"temperature": temperature, "top_k": top_k, "guidance": guidance, "guidance_costing": guidance_costing}
            codes = _stream_batch(model, encoder, chosen, costing, noise=noise, device=device, **options)
            drawn.append(torch.stack(list(codes), 1).cpu().numpy())
    grid = encoder.image_tokenizer.height, encoder.image_tokenizer.width
    return np.concatenate(drawn).reshape(len(prompts), *grid)


def stream_codes(
    model: Callable,
    encoder: Encoder,
    prompts: Sequence[str | Sequence[Part]],
    costing: Costing,
    *,
    device: torch.device,
    seed: int,
    temperature: float = 1.0,
    top_k: int = 0,
    guidance: float = 1.0,
    guidance_costing: Costing | None = None,
) -> Iterator[torch.Tensor]:
    """What `draw_images` draws, all in one batch: the codes ``[B]`` of one place of every image after another."""
    samples = [sample for of_ratio in _samples(encoder, prompts, guidance) for sample in of_ratio]
    noise = _Noise(len(prompts), slice(None), torch.Generator(device).manual_seed(seed))
    options = {"temperature": temperature, "top_k": top_k, "guidance": guidance, "guidance_costing": guidance_costing}
    return _stream_batch(model, encoder, samples, costing, noise=noise, device=device, **options)


def _samples(encoder: Encoder, prompts: Sequence[str | Sequence[Part]], guidance: float) -> list[list[EncodedSample]]:
    """The prompts with placeholders; with guidance, once more without their texts."""
    parts = [[prompt] if isinstance(prompt, str) else prompt for prompt in prompts]
    ratios = (False, True) if guidance != 1.0 else (False,)
    return [
        [to_draw(encoder, part, number, is_unconditional=is_unconditional) for number, part in enumerate(parts)]
        for is_unconditional in ratios
    ]


@dataclass
class _Noise:
    """Exponential random numbers for some of N drawings: those that they would have if all were drawn together."""

    number: int
    rows: slice
    generator: torch.Generator

    def next(self, like_BC: torch.Tensor) -> torch.Tensor:
        """The numbers for the next place ``[B, C]``."""
        return like_BC.new_empty(self.number, like_BC.shape[1]).exponential_(generator=self.generator)[self.rows]


@torch.no_grad()
def _stream_batch(
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
    guidance_costing: Costing | None,
) -> Iterator[torch.Tensor]:
    """Codes ``[B]``, place by place, of samples that are drawn together; with guidance these are 2 B, the unconditional ones last."""
    vocabulary, tokenizer = encoder.vocabulary, encoder.image_tokenizer
    guided = guidance != 1.0
    num = len(samples) // 2
    halves = [(samples[:num], costing), (samples[num:], guidance_costing)] if guided and guidance_costing else [(samples, costing)]
    decoders = [
        Decoder(
            model=model,
            samples=half,
            prompt_lengths=[sample.spans[-1].start for sample in half],
            costing=of_half,
            device=device,
        )
        for half, of_half in halves
    ]
    logits_BV, num_codes = torch.cat([decoder.start() for decoder in decoders]), tokenizer.height * tokenizer.width
    barred_PC = torch.from_numpy(tokenizer.barred()).to(device)
    for place in progress(range(num_codes), "draw images"):
        logits_BC = logits_BV[:, vocabulary.first_code : vocabulary.end_code]
        if guided:
            with_prompt, without = logits_BC.chunk(2)
            logits_BC = without + guidance * (with_prompt - without)
        logits_BC = (logits_BC / temperature).masked_fill(barred_PC[place], -torch.inf)
        codes_B = _chosen(logits_BC, top_k, noise)
        yield codes_B
        if place + 1 < num_codes:
            tokens_B = codes_B + vocabulary.first_code
            tokens_B = torch.cat([tokens_B, tokens_B]) if guided else tokens_B
            of_decoders = zip(decoders, tokens_B.chunk(len(decoders)))
            logits_BV = torch.cat([decoder.feed(of_decoder_B) for decoder, of_decoder_B in of_decoders])


def _chosen(logits_BC: torch.Tensor, top_k: int, noise: _Noise) -> torch.Tensor:
    """Indices ``[B]`` drawn from the softmax of the ``top_k`` largest logits, or of all where it is 0."""
    if top_k:
        lowest_kept = logits_BC.topk(min(top_k, logits_BC.shape[1]), dim=1).values[:, -1:]
        logits_BC = logits_BC.masked_fill(logits_BC < lowest_kept, -torch.inf)
    probabilities_BC = logits_BC.softmax(1)
    # what torch.multinomial does, without its look at the probabilities, for which the host would wait
    return (probabilities_BC / noise.next(probabilities_BC)).argmax(1)


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
        written: list[list[int]] = [[] for _ in chosen]
        for tokens in stream_tokens(model, encoder, chosen, costing, device=device, max_tokens=max_tokens):
            for ids, token in zip(written, tokens):
                ids.append(token)
        answers += [encoder.vocabulary.decode_text(ids) for ids in written]
    return answers


@torch.no_grad()
def stream_tokens(
    model: Callable,
    encoder: Encoder,
    prompts: Sequence[EncodedSample],
    costing: Costing,
    *,
    device: torch.device,
    max_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    seed: int = 0,
) -> Iterator[list[int]]:
    """The next token of every answer, again and again, in one batch: ``<eos>`` from where an answer has ended, at last of all.

    The host waits for each token, to know when all are at their ends.

    Args:
        model: A backbone, or an engine around one.
        encoder: Encoder with the model's vocabulary.
        prompts: Questions with their images, without the answer.
        costing: Costing of the routing plan to follow.
        device: Where the model is.
        max_tokens: Most tokens of an answer.
        temperature: Temperature of the softmax; 0 takes the most likely token.
        top_k: Draw among the k most likely tokens; 0 is all.
        seed: Seed of the sampling.
    """
    vocabulary = encoder.vocabulary
    noise = _Noise(len(prompts), slice(None), torch.Generator(device).manual_seed(seed))
    decoder = Decoder(
        model=model,
        samples=prompts,
        prompt_lengths=[prompt.num_tokens for prompt in prompts],
        costing=costing,
        device=device,
        num_more=max_tokens,
    )
    logits_BV = decoder.start()
    goes_on = [True] * len(prompts)
    is_text_V = torch.from_numpy(vocabulary.is_text(np.arange(logits_BV.shape[1]))).to(device)
    is_text_V[vocabulary.eos] = True
    for place in range(max_tokens):
        logits_BV = logits_BV.masked_fill(~is_text_V, -torch.inf)
        tokens_B = _chosen(logits_BV / temperature, top_k, noise) if temperature else logits_BV.argmax(1)
        tokens = tokens_B.tolist()
        goes_on = [before and token != vocabulary.eos for before, token in zip(goes_on, tokens)]
        yield [token if is_running else vocabulary.eos for token, is_running in zip(tokens, goes_on)]
        if not any(goes_on):
            break
        if place + 1 < max_tokens:
            logits_BV = decoder.feed(tokens_B)
