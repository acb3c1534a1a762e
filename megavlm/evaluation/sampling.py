"""Decoding with a key/value cache: drawing images with guidance, and answering in text.

``forward`` is the stock `transformers` forward pass, of a plain model or entering through a DeepSpeed engine. Prompts of different
lengths are padded on the left; positions count from each prompt's first token, as in training.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import DynamicCache

from megavlm.vocabulary import Vocabulary


class Decoder:
    """One batch of prompts and its cache; feeds tokens and returns the next token's logits.

    Args:
        forward: ``transformers``' forward pass of a causal language model.
        prompts: Token ids of each of B prompts.
        device: Where the model is.
    """

    def __init__(self, forward: Callable, prompts: Sequence[Sequence[int]], device: torch.device):
        self.forward, self.cache = forward, DynamicCache()
        longest = max(map(len, prompts))
        self.mask_BT = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        self.prompt_BT = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)

    def start(self) -> torch.Tensor:
        """Read the prompts; logits ``[B, V]`` of the token after each, float32."""
        return self._step(self.prompt_BT, (self.mask_BT.cumsum(1) - 1).clamp(min=0))

    def feed(self, tokens_B: torch.Tensor) -> torch.Tensor:
        """Append one token to each sequence; logits ``[B, V]`` of the next, float32."""
        position_B1 = self.mask_BT.sum(1, keepdim=True)
        self.mask_BT = torch.cat([self.mask_BT, torch.ones_like(position_B1)], 1)
        return self._step(tokens_B[:, None], position_B1)

    def _step(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        output = self.forward(
            input_ids=ids,
            attention_mask=self.mask_BT,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float()


@torch.no_grad()
def draw_images(
    forward: Callable,
    vocabulary: Vocabulary,
    prompts: Sequence[str],
    grid: tuple[int, int],
    device: torch.device,
    seed: int,
    temperature: float = 1.0,
    top_k: int = 0,
    guidance: float = 1.0,
) -> np.ndarray:
    """Draw one image per prompt.

    Classifier-free guidance (Ho & Salimans 2022): logits = unconditional + guidance * (conditional - unconditional).

    Args:
        forward: The model.
        vocabulary: Its id space.
        prompts: What to draw.
        grid: Height and width of the image in codes.
        device: Where the model is.
        seed: Of the sampling.
        temperature: Of the softmax.
        top_k: Draw among the k most likely codes; 0 is all.
        guidance: 1 is none.

    Returns:
        Codes ``[len(prompts), height, width]``.
    """
    generator = torch.Generator(device).manual_seed(seed)
    conditional = [[vocabulary.bos, *vocabulary.encode_text(prompt), vocabulary.boi] for prompt in prompts]
    guided = guidance != 1.0
    unconditional = [[vocabulary.bos, vocabulary.unconditional, vocabulary.boi]] * len(prompts) if guided else []
    decoder = Decoder(forward, conditional + unconditional, device)
    logits_BV, drawn = decoder.start(), []
    for _ in range(grid[0] * grid[1]):
        logits_BC = logits_BV[:, vocabulary.first_code : vocabulary.size]
        if guided:
            with_prompt, without = logits_BC.chunk(2)
            logits_BC = without + guidance * (with_prompt - without)
        logits_BC = logits_BC / temperature
        if top_k:
            lowest_kept = logits_BC.topk(min(top_k, logits_BC.shape[1]), dim=1).values[:, -1:]
            logits_BC = logits_BC.masked_fill(logits_BC < lowest_kept, -torch.inf)
        codes_B = torch.multinomial(logits_BC.softmax(1), 1, generator=generator)[:, 0]
        drawn.append(codes_B)
        if len(drawn) < grid[0] * grid[1]:
            tokens_B = codes_B + vocabulary.first_code
            logits_BV = decoder.feed(torch.cat([tokens_B, tokens_B]) if guided else tokens_B)
    return torch.stack(drawn, 1).view(len(prompts), *grid).cpu().numpy()


@torch.no_grad()
def answer(
    forward: Callable, vocabulary: Vocabulary, prompts: Sequence[Sequence[int]], device: torch.device, max_tokens: int = 16
) -> list[str]:
    """Answer each prompt with the most likely text, token by token, until ``<eos>``.

    Args:
        forward: The model.
        vocabulary: Its id space.
        prompts: Token ids, images included.
        device: Where the model is.
        max_tokens: Longest answer.
    """
    decoder = Decoder(forward, prompts, device)
    logits_BV, answers = decoder.start(), [[] for _ in prompts]
    running = torch.ones(len(prompts), dtype=torch.bool, device=device)
    for _ in range(max_tokens):
        # an answer is text or its end
        logits_BV[:, vocabulary.num_text :] = torch.where(
            torch.arange(vocabulary.num_text, logits_BV.shape[1], device=device) == vocabulary.eos,
            logits_BV[:, vocabulary.num_text :],
            -torch.inf,
        )
        tokens_B = logits_BV.argmax(1)
        running &= tokens_B != vocabulary.eos
        if not running.any():
            break
        for ids, token, goes_on in zip(answers, tokens_B.tolist(), running.tolist()):
            if goes_on:
                ids.append(token)
        logits_BV = decoder.feed(tokens_B)
    return [vocabulary.decode_text(ids) for ids in answers]
