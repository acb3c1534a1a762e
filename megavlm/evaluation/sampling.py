"""Draws images with guidance, and answers in text. Both follow a routing plan: dense, or that of the training.

Letters: B sequences that are decoded together, C codes of the codebook, P places of an image.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from megavlm.data.pack.encode import EncodedSample, Encoder
from megavlm.data.pack.pack import Costing
from megavlm.data.read.sample import Coordinates, Sample, Segment
from megavlm.image_tokenizers.protocol import GridOnly
from megavlm.model.decoding import Decoder


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
) -> np.ndarray:
    """Draw one image per prompt.

    Classifier-free guidance (Ho & Salimans 2022): logits = unconditional + guidance * (conditional - unconditional).

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

    Returns:
        Codes ``[len(prompts), height, width]``.
    """
    vocabulary, grid = encoder.vocabulary, (encoder.image_tokenizer.height, encoder.image_tokenizer.width)
    generator = torch.Generator(device).manual_seed(seed)
    guided = guidance != 1.0
    blank = GridOnly(encoder.image_tokenizer)
    samples = [
        _to_draw(Encoder(vocabulary, blank, unconditional_ratio), prompt, index)
        for unconditional_ratio in ((0.0, 1.0) if guided else (0.0,))
        for index, prompt in enumerate(prompts)
    ]
    decoder = Decoder(
        model=model,
        samples=samples,
        prompt_lengths=[sample.spans[0].start for sample in samples],
        costing=costing,
        device=device,
    )
    logits_BV, drawn, num_codes = decoder.start(), [], grid[0] * grid[1]
    barred_PC = torch.from_numpy(encoder.image_tokenizer.barred()).to(device)
    for place in range(num_codes):
        logits_BC = logits_BV[:, vocabulary.first_code : vocabulary.size]
        if guided:
            with_prompt, without = logits_BC.chunk(2)
            logits_BC = without + guidance * (with_prompt - without)
        logits_BC = (logits_BC / temperature).masked_fill(barred_PC[place], -torch.inf)
        if top_k:
            lowest_kept = logits_BC.topk(min(top_k, logits_BC.shape[1]), dim=1).values[:, -1:]
            logits_BC = logits_BC.masked_fill(logits_BC < lowest_kept, -torch.inf)
        codes_B = torch.multinomial(logits_BC.softmax(1), 1, generator=generator)[:, 0]
        drawn.append(codes_B)
        if place + 1 < num_codes:
            tokens_B = codes_B + vocabulary.first_code
            logits_BV = decoder.feed(torch.cat([tokens_B, tokens_B]) if guided else tokens_B)
    return torch.stack(drawn, 1).view(len(prompts), *grid).cpu().numpy()


@torch.no_grad()
def answer(
    model: Callable,
    encoder: Encoder,
    prompts: Sequence[EncodedSample],
    costing: Costing,
    *,
    device: torch.device,
    max_tokens: int = 16,
) -> list[str]:
    """Answer each prompt with the most likely text, token by token, until ``<eos>``.

    Args:
        model: A backbone, or an engine around one.
        encoder: Encoder with the model's vocabulary.
        prompts: Questions with their images, without the answer.
        costing: Costing of the routing plan to follow.
        device: Where the model is.
        max_tokens: Most tokens of an answer.
    """
    vocabulary = encoder.vocabulary
    decoder = Decoder(
        model=model,
        samples=prompts,
        prompt_lengths=[prompt.num_tokens for prompt in prompts],
        costing=costing,
        device=device,
        num_more=max_tokens,
    )
    logits_BV, answers = decoder.start(), [[] for _ in prompts]
    running = torch.ones(len(prompts), dtype=torch.bool, device=device)
    is_text_V = torch.arange(logits_BV.shape[1], device=device) < vocabulary.num_text
    is_text_V[vocabulary.eos] = True
    for _ in range(max_tokens):
        tokens_B = logits_BV.masked_fill(~is_text_V, -torch.inf).argmax(1)
        running &= tokens_B != vocabulary.eos
        if not running.any():
            break
        for ids, token, goes_on in zip(answers, tokens_B.tolist(), running.tolist()):
            if goes_on:
                ids.append(token)
        logits_BV = decoder.feed(tokens_B)
    return [vocabulary.decode_text(ids) for ids in answers]


def _to_draw(encoder: Encoder, prompt: str, index: int) -> EncodedSample:
    """A generation sample whose image is a placeholder."""
    segments = (Segment(text=prompt), Segment(image="image", loss=True))
    image = {"image": np.zeros((1, 1, 3), np.uint8)}
    return encoder(Sample("", "generation", segments, image, Coordinates(0, 0, 0, index)))
