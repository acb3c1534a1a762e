"""Section *ceilings*: what this device reaches where nothing stands in its way.

Matrix products at the models' shapes, attention by length, and memory. The section *mfu* is held against the best of the products.
Tested by `tests/tools/test_gpu_check.py`.
"""

from functools import partial

import numpy as np
import torch

from megavlm.model.attention import Scoring, packed_attention
from megavlm.routing.route import Sequences
from tools.gpu.context import Context, Item, Outcome
from tools.gpu.timing import seconds_of

LEAST_OF_SHEET = 0.5
"""Below this share of the data sheet's peak something is wrong with the device, or it is not alone."""


def items(context: Context) -> dict[str, Item]:
    found: dict[str, Item] = {f"products of {name}": partial(products, context, name) for name in context.sizes.models}
    found["memory"] = partial(memory, context)
    for name in context.sizes.models:
        found[f"attention of {name}"] = partial(attention, context, name)
    return found


def shapes_of(context: Context, name: str) -> dict[str, tuple[int, int, int]]:
    """The matrix products of a model's forward pass: rows, inner width, columns."""
    sizes, tokens = context.sizes.models[name], context.sizes.pack_tokens
    queries, keys = sizes.num_heads * sizes.head_width, sizes.num_kv_heads * sizes.head_width
    layers = {
        "query": (tokens, sizes.width, queries),
        "key": (tokens, sizes.width, keys),
        "output": (tokens, queries, sizes.width),
        "gate and up": (tokens, sizes.width, sizes.mlp_width),
        "down": (tokens, sizes.mlp_width, sizes.width),
    }
    heads = {f"head, {ids} ids": (context.sizes.chunk_rows, sizes.width, size) for ids, size in context.sizes.vocabularies.items()}
    return layers | heads


def products(context: Context, name: str) -> Outcome:
    """FLOP/s of each product of a model in bfloat16, on random numbers: zeros would run faster."""
    found = {}
    for what, (m, k, n) in shapes_of(context, name).items():
        a = torch.randn(m, k, device=context.device, dtype=torch.bfloat16)
        b = torch.randn(n, k, device=context.device, dtype=torch.bfloat16)
        seconds = seconds_of(context.device, partial(torch.nn.functional.linear, a, b), context.sizes.repeats)
        found[what] = 2 * m * k * n / seconds
    best = max(found.values())
    return Outcome({"flops_per_s": found, "best_flops_per_s": best}, below_sheet(context, best))


def below_sheet(context: Context, flops_per_s: float) -> list[str]:
    """What to say of a device that is far below its data sheet."""
    from megavlm.monitor.peaks import peak_flops_per_s

    peak = peak_flops_per_s(context.device)
    if peak is None or flops_per_s >= LEAST_OF_SHEET * peak:
        return []
    return [f"the best matrix product reaches {flops_per_s / 1e12:.0f} TFLOP/s, {flops_per_s / peak:.0%} of the data sheet's"]


def attention(context: Context, name: str) -> Outcome:
    """FLOP/s of packed causal attention, forward and with its backward pass, for packs of equally long sequences."""
    sizes, tokens = context.sizes.models[name], context.sizes.pack_tokens
    found = {}
    for length in context.sizes.attention_lengths:
        sequences = Sequences.of(np.full(tokens // length, length)).map_tensors(lambda tensor: tensor.to(context.device))
        shape = (tokens // length * length, sizes.num_heads, sizes.head_width)
        q, k, v = (torch.randn(shape, device=context.device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        forward = partial(packed_attention, q, k, v, sequences, scoring=Scoring(sizes.head_width**-0.5))
        gradient = torch.randn(shape, device=context.device, dtype=torch.bfloat16)

        def both(forward=forward, gradient=gradient):
            forward().backward(gradient)

        flops = 2 * tokens * length * sizes.num_heads * sizes.head_width
        seconds, seconds_of_both = (seconds_of(context.device, work, context.sizes.repeats) for work in (forward, both))
        # the backward pass of flash attention multiplies five times where the forward pass does twice
        found[length] = {"forward_flops_per_s": flops / seconds, "both_flops_per_s": 3.5 * flops / seconds_of_both}
    return Outcome({"by_length": found})


def memory(context: Context) -> Outcome:
    """Bytes per second of a copy within the device, counting what is read and what is written; and of pinned memory to it."""
    source = torch.randint(0, 100, (context.sizes.copy_bytes // 4,), device=context.device, dtype=torch.int32)
    target = torch.empty_like(source)
    seconds = seconds_of(context.device, partial(target.copy_, source), context.sizes.repeats)
    found = {"copy_bytes_per_s": 2 * context.sizes.copy_bytes / seconds}
    if context.is_cuda:
        pinned = torch.empty(2**28, dtype=torch.uint8).pin_memory()
        there = torch.empty_like(pinned, device=context.device)
        copy = partial(there.copy_, pinned, non_blocking=True)
        found["from_host_bytes_per_s"] = 2**28 / seconds_of(context.device, copy, context.sizes.repeats)
        found["total_gib"] = torch.cuda.get_device_properties(context.device).total_memory / 2**30
    return Outcome(found)
