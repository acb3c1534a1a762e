"""Causal attention inside packed sequences, registered with `transformers` as ``megavlm_varlen``.

On CUDA in half precision it is torch's fused variable-length kernel; elsewhere scaled dot-product attention per sequence, which on
a CPU beats padding and block masks. Both are tested against one dense masked reference.
"""

import torch
from torch.nn import functional
from transformers import AttentionInterface

from megavlm.routing.route import Sequences

NAME = "megavlm_varlen"


def packed_attention(
    q_THd: torch.Tensor, k_THd: torch.Tensor, v_THd: torch.Tensor, sequences: Sequences, scale: float
) -> torch.Tensor:
    """Causal attention that never crosses a sequence.

    Args:
        q_THd: Queries.
        k_THd: Keys, with as many heads as the queries.
        v_THd: Values, likewise.
        sequences: Boundaries; they cover all T rows.
        scale: Factor of the scores.

    Returns:
        ``[T, H, d]``.
    """
    if q_THd.is_cuda and q_THd.dtype in (torch.float16, torch.bfloat16):
        return _fused(q_THd, k_THd, v_THd, sequences, scale)
    return _per_sequence(q_THd, k_THd, v_THd, sequences, scale)


def _fused(q_THd, k_THd, v_THd, sequences: Sequences, scale: float) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn  # importing it without CUDA fails in some builds

    cu, longest = sequences.cu_seqlens, sequences.max_seqlen
    return varlen_attn(q_THd, k_THd, v_THd, cu, cu, longest, longest, scale=scale, window_size=(-1, 0))


def _per_sequence(q_THd, k_THd, v_THd, sequences: Sequences, scale: float) -> torch.Tensor:
    # split, not slices: its backward is one concatenation
    parts = (x.transpose(0, 1).split(sequences.lengths, dim=1) for x in (q_THd, k_THd, v_THd))
    outputs = [
        functional.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, scale=scale)[0]
        for q, k, v in zip(*parts)
    ]
    return torch.cat(outputs, dim=1).transpose(0, 1)


def _for_transformers(module, query, key, value, attention_mask, *, scaling, sequences: Sequences, **_unused):
    """The signature that `transformers` calls: ``[1, heads, T, d]`` in, ``[1, T, heads, d]`` out."""
    groups = query.shape[1] // key.shape[1]
    q_THd, k_THd, v_THd = (x[0].transpose(0, 1) for x in (query, key, value))
    if groups > 1:
        # torch 2.11's varlen_attn has no grouped queries
        k_THd, v_THd = (x.repeat_interleave(groups, dim=1) for x in (k_THd, v_THd))
    return packed_attention(q_THd, k_THd, v_THd, sequences, scaling)[None], None


AttentionInterface.register(NAME, _for_transformers)
