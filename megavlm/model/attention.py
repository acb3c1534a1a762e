"""Causal attention inside packed sequences, registered with `transformers` as ``megavlm_varlen``.

On CUDA in half precision it is torch's fused variable-length kernel; elsewhere scaled dot-product attention per sequence, which on
a CPU beats padding and block masks. Capped scores, which neither computes, are written out. All are tested against one dense masked
reference.

Letters: R guests, U active tokens and guests in order, M rows of sequences with merged tokens, O rows of the others, L rows of one
sequence, x columns of a bias.
"""

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any, cast

import torch
from torch.nn import functional
from transformers import AttentionInterface

from megavlm.errors import ConfigError
from megavlm.routing.gates import at_least_float32
from megavlm.routing.plan import WIDEST_HEAD
from megavlm.routing.route import BIAS_WIDTH, Sequences, Split
from megavlm.routing.router import WHOLE, Parts
from megavlm.routing.rows import take_rows

NAME = "megavlm_varlen"
WITHOUT_EFFECT = ("position_ids", "use_cache")
"""Arguments of layers that their attention hands on to no end."""


@dataclass(frozen=True)
class Scoring:
    """How a layer makes its scores."""

    scale: float
    """Factor of the products of queries and keys."""
    window: int | None = None
    """A query sees so many rows of its sequence, itself and those before it; None is all. Rows that a route leaves out do not count."""
    softcap: float | None = None
    """Scores become ``softcap * tanh(score / softcap)`` (Gemma 2, arXiv 2408.00118)."""

    def capped(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores, softly capped where the layer does so."""
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)

    def hides(self, queries_Q: torch.Tensor, keys_L: torch.Tensor) -> torch.Tensor:
        """Which keys queries cannot see, by the places of both in their sequence ``[Q, L]``."""
        back_QL = queries_Q[:, None] - keys_L
        return back_QL < 0 if self.window is None else (back_QL < 0) | (back_QL >= self.window)


@dataclass
class Guests:
    """Keys and values of tokens that are not queried: R rows beside the K active ones, U together in the pack's order."""

    k_RHd: torch.Tensor
    v_RHd: torch.Tensor
    place_K: torch.Tensor
    """Where the active rows stand among the U."""
    place_R: torch.Tensor
    """Where the guests stand."""
    sequences: Sequences
    """Boundaries of the U."""


@dataclass
class Context:
    """What a layer's attention needs to know beyond queries, keys and values."""

    sequences: Sequences
    """Boundaries of the active rows."""
    guests: Guests | None = None
    log_sizes_K: torch.Tensor | None = None
    """Added to the scores of each key: the logarithm of how many tokens it stands for."""
    split: Split | None = None
    """With ``log_sizes_K``, where not every sequence has merged tokens."""
    parts: Parts = WHOLE
    """Which of the active rows do a part of the layer only; for observers."""
    observe: Callable | None = None
    """Called with queries, keys and values ``[K, heads, d]``, rotary embedding included, and the layer's `Scoring`."""


def packed_attention(
    q_THd: torch.Tensor,
    k_THd: torch.Tensor,
    v_THd: torch.Tensor,
    sequences: Sequences,
    *,
    scoring: Scoring,
    bias_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention that never crosses a sequence.

    Args:
        q_THd: Queries.
        k_THd: Keys; each of their heads serves as many of the queries'.
        v_THd: Values, likewise.
        sequences: Boundaries; they cover all T rows.
        scoring: How scores are made.
        bias_T: Added to the scores of each key.

    Returns:
        ``[T, H, d]``.
    """
    if scoring.softcap is not None:
        return _written_out(q_THd, k_THd, v_THd, sequences, scoring=scoring, bias_T=bias_T)
    width = q_THd.shape[2]
    if bias_T is not None:
        # one more product per score carries the bias through any kernel
        ones_THx, bias_THx = (functional.pad(torch.ones_like(x[..., :1]), (0, BIAS_WIDTH - 1)) for x in (q_THd, k_THd))
        bias_THx = bias_THx * (bias_T / scoring.scale).to(k_THd.dtype)[:, None, None]
        q_THd, k_THd = torch.cat([q_THd, ones_THx], 2), torch.cat([k_THd, bias_THx], 2)
        v_THd = functional.pad(v_THd, (0, BIAS_WIDTH))
    attend = _fused if takes_fused(q_THd) else _per_sequence
    return attend(q_THd, k_THd, v_THd, sequences, scoring=scoring)[..., :width]


def takes_fused(q_THd: torch.Tensor) -> bool:
    """Whether torch's fused kernel computes the attention of these queries. Heads that it does not take are refused when a run starts."""
    return q_THd.is_cuda and q_THd.dtype in (torch.float16, torch.bfloat16)


def fits_fused(head_width: int) -> bool:
    """Whether the fused kernel takes heads of this width (FlashAttention: a multiple of 8, at most 256)."""
    return head_width % 8 == 0 and head_width <= WIDEST_HEAD


def _fused(q_THd, k_THd, v_THd, sequences: Sequences, *, scoring: Scoring) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn  # CPU builds of torch may lack it

    cu, longest = sequences.cu_seqlens, sequences.max_seqlen
    before = -1 if scoring.window is None else scoring.window - 1
    options: dict[str, Any] = {"scale": scoring.scale, "window_size": (before, 0)}
    if q_THd.shape[1] != k_THd.shape[1]:
        if "enable_gqa" in signature(varlen_attn).parameters:
            options["enable_gqa"] = True
        else:  # torch 2.11
            k_THd, v_THd = _repeated(q_THd, k_THd, v_THd)
    out = varlen_attn(q_THd, k_THd, v_THd, cu, cu, longest, longest, **options)
    return cast(torch.Tensor, out)  # more than one only if asked for


def _repeated(q_THd, *keys_and_values: torch.Tensor) -> list[torch.Tensor]:
    """Keys and values with as many heads as the queries."""
    groups = q_THd.shape[1] // keys_and_values[0].shape[1]
    return [x if groups == 1 else x.repeat_interleave(groups, dim=1) for x in keys_and_values]


def _per_sequence(q_THd, k_THd, v_THd, sequences: Sequences, *, scoring: Scoring) -> torch.Tensor:
    k_THd, v_THd = _repeated(q_THd, k_THd, v_THd)
    # split, not slices: its backward is one concatenation
    parts = (x.transpose(0, 1).split(sequences.lengths, dim=1) for x in (q_THd, k_THd, v_THd))
    outputs = []
    for q, k, v in zip(*parts):
        options: dict[str, Any] = {"is_causal": True}
        if scoring.window is not None and scoring.window < q.shape[1]:
            places_L = torch.arange(q.shape[1], device=q.device)
            options = {"attn_mask": ~scoring.hides(places_L, places_L)}
        outputs.append(functional.scaled_dot_product_attention(q[None], k[None], v[None], scale=scoring.scale, **options)[0])
    return torch.cat(outputs, dim=1).transpose(0, 1)


def _written_out(q_THd, k_THd, v_THd, sequences: Sequences, *, scoring: Scoring, bias_T: torch.Tensor | None) -> torch.Tensor:
    """One sequence after the other, all of its scores at once. The bias is added to what is capped: a key of weight n counts n times."""
    k_THd, v_THd = _repeated(q_THd, k_THd, v_THd)
    bias_T = q_THd.new_zeros(len(q_THd)) if bias_T is None else bias_T
    outputs = []
    for q_LHd, k_LHd, v_LHd, bias_L in zip(*(x.split(sequences.lengths) for x in (q_THd, k_THd, v_THd, bias_T))):
        places_L = torch.arange(len(q_LHd), device=q_LHd.device)
        scores_HLL = scoring.capped(torch.einsum("qhd,khd->hqk", q_LHd, k_LHd) * scoring.scale) + bias_L.to(q_LHd.dtype)
        weights_HLL = at_least_float32(scores_HLL.masked_fill(scoring.hides(places_L, places_L), -torch.inf)).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights_HLL.to(v_LHd.dtype), v_LHd))
    return torch.cat(outputs)


def _for_transformers(module, query, key, value, attention_mask, *, scaling, context, **asked):  # noqa: PLR0917 (transformers calls it by place)
    """The signature that `transformers` calls: ``[1, heads, T, d]`` in, ``[1, T, heads, d]`` out."""
    scoring = Scoring(scaling, asked.pop("sliding_window", None), asked.pop("softcap", None))
    _refuse(module, attention_mask, asked)
    q_KHd, k_KHd, v_KHd = (x[0].transpose(0, 1) for x in (query, key, value))
    if not isinstance(context, Context):  # decoding with a cache
        return context.attend(q_KHd, k_KHd, v_KHd, scoring)[None], None
    if context.observe is not None:
        context.observe(q_KHd, k_KHd, v_KHd, scoring)
    sequences, guests, log_sizes_K = context.sequences, context.guests, context.log_sizes_K
    if guests is not None:
        # guests ask nothing: their queries are zeros, and what comes out for them is dropped
        q_KHd = placed(q_KHd, guests, None)
        k_KHd, v_KHd = placed(k_KHd, guests, guests.k_RHd), placed(v_KHd, guests, guests.v_RHd)
        sequences = guests.sequences
        log_sizes_K = None if log_sizes_K is None else placed(log_sizes_K, guests, None)
    if log_sizes_K is not None and context.split is not None:
        out_KHd = _split_attention(q_KHd, k_KHd, v_KHd, context.split, scoring=scoring, bias_U=log_sizes_K)
    else:
        out_KHd = packed_attention(q_KHd, k_KHd, v_KHd, sequences, scoring=scoring, bias_T=log_sizes_K)
    if guests is not None:
        out_KHd = take_rows(out_KHd, guests.place_K)
    return out_KHd[None], None


def _refuse(module, attention_mask, asked: dict[str, Any]) -> None:
    """Nothing that a model asks of its attention is passed over.

    Raises:
        ConfigError: Naming what is not computed here.
    """
    wishes = {name: value for name, value in asked.items() if name not in WITHOUT_EFFECT and value is not None}
    if wishes.get("dropout") == 0:
        del wishes["dropout"]
    if attention_mask is not None:
        wishes["attention_mask"] = attention_mask
    if wishes:
        raise ConfigError(
            f"{type(module).__name__} asks of its attention what is not computed here: {', '.join(wishes)}\n"
            "  do:    choose a family of docs/models.md that is exact, or leave out the field that asks for it"
        )


def _split_attention(q_UHd, k_UHd, v_UHd, split: Split, *, scoring: Scoring, bias_U: torch.Tensor) -> torch.Tensor:
    """Attention whose bias only those sequences carry that have one."""
    merged, others = split.merged_rows, split.other_rows
    q_MHd, k_MHd, v_MHd, bias_M = (take_rows(x, merged) for x in (q_UHd, k_UHd, v_UHd, bias_U))
    with_bias = packed_attention(q_MHd, k_MHd, v_MHd, split.merged, scoring=scoring, bias_T=bias_M)
    q_OHd, k_OHd, v_OHd = (take_rows(x, others) for x in (q_UHd, k_UHd, v_UHd))
    without = packed_attention(q_OHd, k_OHd, v_OHd, split.others, scoring=scoring)
    return take_rows(torch.cat([with_bias, without]), split.back_U)


def placed(x_KHd: torch.Tensor, guests: Guests, guest_RHd: torch.Tensor | None) -> torch.Tensor:
    """What belongs to the active tokens and to the guests, in the pack's order ``[U, …]``."""
    together = x_KHd.new_zeros(len(guests.place_K) + len(guests.place_R), *x_KHd.shape[1:])
    together = together.index_copy(0, guests.place_K, x_KHd)
    return together if guest_RHd is None else together.index_copy(0, guests.place_R, guest_RHd.to(x_KHd.dtype))


AttentionInterface.register(NAME, _for_transformers)
