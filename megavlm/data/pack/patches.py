"""Blocks of image codes as single tokens: what the policy `patches` makes of samples.

A block of 2 x 2 codes is one token, the mean of its codes' embeddings. The token before it predicts all of its codes with one softmax.
Text stays as it is, and a sample in patches is a shorter sample, with places from 0 on (next patch prediction, arXiv 2412.15321;
patch-level training, arXiv 2407.12665).

Letters: R blocks, P codes of a block, M labelled rows. Tested by `tests/model/test_patches.py`.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from megavlm.data.pack.encode import EncodedSample, Layout, Span
from megavlm.errors import DataError
from megavlm.routing.tasks import Task

ABSENT = -1
"""Stands for no code: blocks of one task may have more codes than those of the other, and text has one target."""
Sizes = tuple[int, int]
"""Codes along each side of a block, for images that are read and that are drawn; 1 leaves them as they are."""


class Patches(NamedTuple):
    """The blocks of a pack."""

    rows_R: np.ndarray
    """Rows of the pack, ascending."""
    ids_RP: np.ndarray
    """Their codes' ids, `ABSENT` where a block has fewer than P."""


def layout_in_patches(layout: Layout, sizes: Sizes) -> Layout:
    """The layout of `sample_in_patches`, from the layout of the sample.

    Raises:
        DataError: If blocks cannot fill an image.
    """
    spans, gone, gone_labels = [], 0, 0
    for length, task in layout.spans:
        num_blocks, rest = divmod(length, sizes[task] ** 2)
        if rest:
            raise _misfit(f"an image of {length} codes", sizes[task])
        gone += length - num_blocks
        gone_labels += (length - num_blocks) * (task == Task.GENERATION)
        spans.append((num_blocks, task))
    return Layout(layout.num_tokens - gone, layout.num_labels - gone_labels, layout.num_prompt, tuple(spans))


def sample_in_patches(sample: EncodedSample, sizes: Sizes) -> EncodedSample:
    """A sample with one token for each block; that of the block's first code stands for it.

    Raises:
        DataError: If blocks cannot fill an image.
    """
    is_first, spans = np.ones(sample.num_tokens, bool), []
    for span in sample.spans:
        size, (y, x) = sizes[span.task], np.divmod(np.arange(span.length), span.width)
        if span.height % size or span.width % size:
            raise _misfit(f"an image of {span.height} x {span.width} codes", size, sample.key)
        start = int(is_first[: span.start].sum())
        is_first[span.start : span.start + span.length] = (y % size == 0) & (x % size == 0)
        spans.append(replace(span, start=start, height=span.height // size, width=span.width // size))
    kept = {name: getattr(sample, name)[is_first] for name in ("tokens", "has_loss", "tasks")}
    return replace(sample, **kept, spans=tuple(spans))


def find_patches(samples: Sequence[EncodedSample], in_patches: Sequence[EncodedSample], sizes: Sizes) -> Patches:
    """The blocks of samples that are laid end to end.

    Args:
        samples: As they are.
        in_patches: The same, as `sample_in_patches` made them.
        sizes: Of the blocks.
    """
    num_codes = max(sizes) ** 2 if max(sizes) > 1 else 0
    rows, ids, offset = [np.zeros(0, np.int64)], [np.zeros((0, num_codes), np.int64)], 0
    for sample, short in zip(samples, in_patches):
        for span, of_blocks in zip(sample.spans, short.spans):
            if sizes[span.task] > 1:
                rows.append(offset + of_blocks.start + np.arange(of_blocks.length))
                codes = _codes_of_blocks(sample.tokens, span, sizes[span.task])
                ids.append(np.pad(codes, ((0, 0), (0, num_codes - codes.shape[1])), constant_values=ABSENT))
        offset += short.num_tokens
    return Patches(np.concatenate(rows), np.concatenate(ids))


def targets_of(labelled_M: np.ndarray, tokens_T: np.ndarray, patches: Patches) -> np.ndarray:
    """What the rows before labelled ones predict: ``[M]``, or ``[M, P]`` where there may be blocks, filled up with `ABSENT`.

    Args:
        labelled_M: Rows with a loss.
        tokens_T: Ids of all rows.
        patches: The blocks among them.
    """
    num_codes = patches.ids_RP.shape[1]
    if not num_codes:
        return tokens_T[labelled_M]
    targets_TP = np.full((len(tokens_T), num_codes), ABSENT)
    targets_TP[:, 0] = tokens_T
    targets_TP[patches.rows_R] = patches.ids_RP
    return targets_TP[labelled_M]


def _codes_of_blocks(tokens: np.ndarray, span: Span, size: int) -> np.ndarray:
    grid = tokens[span.start : span.start + span.length].reshape(span.height // size, size, span.width // size, size)
    return grid.transpose(0, 2, 1, 3).reshape(-1, size**2)


def _misfit(image: str, size: int, key: str = "") -> DataError:
    what = f"{image} cannot be filled with patches of {size} x {size}"
    return DataError(what, "choose a size that divides the rows and columns of codes", key=key)
