"""Selectors: which tokens of a span stay.

A *host selector* gives every token of a span a score from its place and chance alone; the lowest stay. It never looks at the
content, so it may serve spans that the model is to predict (P6). A *device selector* scores the tokens of all spans by their content when
the stage begins, and the highest stay; it may serve spans that the model reads.

Letters: C candidates, Q rows of questions.

Tested by `tests/routing/test_route.py`.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

HostSelector = Callable[[int, int, np.random.Generator], np.ndarray]
HOST_SELECTORS: dict[str, HostSelector] = {}
DEVICE_SELECTORS: dict[str, "DeviceSelector"] = {}


@dataclass
class Candidates:
    """The C tokens of N spans among which a stage chooses, span by span, each in raster order. All indices come from the host."""

    lengths: list[int]
    """Tokens of each span."""
    rows_C: torch.Tensor
    """Rows of the pack."""
    span_C: torch.Tensor
    """Which span."""
    left_C: torch.Tensor
    """Tokens of the span from this one on."""
    first_C: torch.Tensor
    """Which candidate is the first of the span."""
    neighbours_C4: torch.Tensor
    """Rows above, below, left and right in the grid; the token's own where there is none."""
    question_rows_Q: torch.Tensor
    """Rows that may rank a span: what follows it in its sample up to the first token with a loss, tokens of other images left out."""
    question_span_Q: torch.Tensor
    """Which span each ranks."""

    def map_tensors(self, function) -> "Candidates":
        """A copy with ``function`` applied to every tensor."""
        return Candidates(**{k: function(v) if isinstance(v, torch.Tensor) else v for k, v in vars(self).items()})


@dataclass
class Evidence:
    """What a device selector may look at; none of it carries a gradient."""

    h_TD: torch.Tensor
    """The residual stream before the stage."""
    q_THd: torch.Tensor
    """Queries of the layer before, without rotary embedding; of a row that was inactive there, those of the last layer it was active
    in, and zeros if there is none. Empty unless the selector needs them."""
    k_THd: torch.Tensor
    """Keys of the layer before, likewise; as many heads as the queries."""


@dataclass(frozen=True)
class DeviceSelector:
    """A scoring function ``(evidence, candidates) -> scores [C]``, and what it looks at."""

    score: Callable[[Evidence, Candidates], torch.Tensor]
    needs_attention: bool
    """Queries or keys of the layer before."""
    needs_question: bool
    """Rows behind the span that it scores."""


def register_selector(name: str, on_device: bool = False, needs_attention: bool = False, needs_question: bool = True):
    """Decorator: make a selector known to recipes.

    Args:
        name: What recipes call it.
        on_device: It scores content: ``(evidence, candidates) -> scores [C]``, the highest stay. Otherwise
            ``(height, width, rng) -> scores [height*width]``, the lowest stay.
        needs_attention: A device selector that looks at queries or keys of the layer before.
        needs_question: A device selector that looks at anything behind the span that it scores; where it does not, decoding may begin
            before the question is complete.
    """

    def register(function):
        if on_device:
            DEVICE_SELECTORS[name] = DeviceSelector(function, needs_attention, needs_question)
        else:
            HOST_SELECTORS[name] = function
        return function

    return register


def check_selector(name: str) -> str:
    """Validate a selector's name in a recipe."""
    known = [*HOST_SELECTORS, *DEVICE_SELECTORS]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
        raise ValueError(f"there is no selector {name!r}. Did you mean {near}? There are {', '.join(known)}")
    return name


def sort_by_span(score_C: torch.Tensor, span_C: torch.Tensor) -> torch.Tensor:
    """Indices that put float32 scores span by span, the highest first; ties in the order given.

    One composite sort: the bits of a float32 become an integer of the same order, and the span stands above them in an int64 key.
    """
    bits_C = score_C.view(torch.int32).long()
    # a negative float: all bits flipped; another: the sign bit set
    ascending_C = torch.where(bits_C < 0, ~bits_C & 0xFFFFFFFF, bits_C | 0x80000000)
    return ((span_C << 32) + (0xFFFFFFFF - ascending_C)).sort(stable=True).indices


@register_selector("random")
def random(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Uniformly random: the baseline to beat."""
    return rng.random(height * width)


@register_selector("stride")
def stride(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Keeps the grid evenly covered at every share, with the same tokens in every draw.

    The order of the recursive ordered-dither matrix (Bayer 1973): the first quarter is every second token of every
    second row, the first sixteenth every fourth of every fourth.
    """
    y, x = np.divmod(np.arange(height * width), width)
    num_bits = int(max(height, width) - 1).bit_length()
    score = np.zeros(height * width, np.int64)
    for bit in range(num_bits):
        # the lowest bit of the place decides first, the diagonal neighbour before the one beside it
        quadrant = 2 * ((x >> bit & 1) ^ (y >> bit & 1)) + (y >> bit & 1)
        score = score * 4 + quadrant
    return score.astype(np.float64)


@register_selector("stratified")
def stratified(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """One of every 2 x 2 of the grid, drawn anew, stays first, then a second one of each: at a share of a quarter every place has a token
    beside it (SPRINT, arXiv 2510.21986, keeps a part of every window likewise)."""
    score = rng.random((height, width))
    for top in range(0, height, 2):
        for left in range(0, width, 2):
            cell = score[top : top + 2, left : left + 2]
            cell += cell.ravel().argsort().argsort().reshape(cell.shape)
    return score.ravel()


@register_selector("key_norm", on_device=True, needs_attention=True, needs_question=False)
def key_norm(evidence: Evidence, candidates: Candidates) -> torch.Tensor:
    """Tokens with small keys stay: a small norm goes with much attention (Devoto et al., arXiv 2406.11430).

    Says little in models that normalise their keys (Qwen3, Gemma 3): only the weights of that norm make a difference.
    """
    return -evidence.k_THd.float().square().sum((1, 2)).index_select(0, candidates.rows_C)


@register_selector("redundancy", on_device=True, needs_question=False)
def redundancy(evidence: Evidence, candidates: Candidates) -> torch.Tensor:
    """Tokens unlike their neighbours in the grid stay: minus the mean cosine similarity of hidden states."""
    unit_TD = torch.nn.functional.normalize(evidence.h_TD.float(), dim=1)
    own_CD = unit_TD.index_select(0, candidates.rows_C)
    similarity_C4 = torch.stack([(own_CD * unit_TD.index_select(0, rows)).sum(1) for rows in candidates.neighbours_C4.T], 1)
    # a token is its own neighbour where the grid ends: not counted
    exists_C4 = candidates.neighbours_C4 != candidates.rows_C[:, None]
    return -(similarity_C4 * exists_C4).sum(1) / exists_C4.sum(1).clamp(min=1)


@register_selector("question_attention", on_device=True, needs_attention=True)
def question_attention(evidence: Evidence, candidates: Candidates) -> torch.Tensor:
    """Tokens that the question attends to stay: its mean query per head against the span's keys, softmax over the span, mean of
    the heads.

    After PyramidDrop (arXiv 2410.17247), but without rotary embedding, whose decay favours the end of the image (FEATHER, arXiv
    2412.13180), and never from the answer's tokens.
    """
    num_spans = len(candidates.lengths)
    q_QHd = evidence.q_THd.float().index_select(0, candidates.question_rows_Q)
    q_NHd = q_QHd.new_zeros(num_spans, *q_QHd.shape[1:]).index_add(0, candidates.question_span_Q, q_QHd)
    count_N = q_QHd.new_zeros(num_spans).index_add(0, candidates.question_span_Q, torch.ones_like(q_QHd[:, 0, 0]))
    q_NHd = q_NHd / count_N.clamp(min=1)[:, None, None]
    k_CHd = evidence.k_THd.float().index_select(0, candidates.rows_C)
    score_CH = (q_NHd.index_select(0, candidates.span_C) * k_CHd).sum(2) * k_CHd.shape[2] ** -0.5
    span_CH = candidates.span_C[:, None].expand_as(score_CH)
    highest_NH = score_CH.new_full((num_spans, score_CH.shape[1]), -torch.inf).scatter_reduce(0, span_CH, score_CH, "amax")
    weight_CH = (score_CH - highest_NH.gather(0, span_CH)).exp()
    total_NH = weight_CH.new_zeros(highest_NH.shape).scatter_add(0, span_CH, weight_CH)
    return (weight_CH / total_NH.gather(0, span_CH)).mean(1)
