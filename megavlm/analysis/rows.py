"""Which rows of a pack's stages are looked at, and the kind of every key.

The host knows all of it before the device sees the pack. Content decides *which* tokens of a span are active, but not how many, and rows
stay in order. So the kind of every active row follows from lengths alone (P4).

Letters: U active tokens and guests in order, Q rows looked at, R guests, C cells (task, kind of query).
Tested by `tests/analysis/test_attention.py`.
"""

from dataclasses import dataclass

import numpy as np
import torch

from megavlm.data.pack.pack import Pack
from megavlm.routing.policies import PARTIAL
from megavlm.routing.route import Route, Stage
from megavlm.routing.tasks import TASKS
from megavlm.vocabulary import Vocabulary

KINDS = ("text", "image", "special", "sink")
"""Kinds of keys. The sink is the first token of its sequence, whatever that is (arXiv 2309.17453)."""
TEXT, IMAGE, SPECIAL, SINK = range(len(KINDS))
QUERIES = ("text", "image")
"""Kinds of queries, numbered as in `KINDS`; queries of special tokens and the sink are left out."""
NUM_CELLS = len(TASKS) * len(QUERIES)
"""Cells are (task of the sample, kind of query): ``task * len(QUERIES) + kind``."""


def token_kinds(tokens: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """The kind of each token id, sinks left out."""
    is_code = (tokens >= vocabulary.first_code) & (tokens < vocabulary.end_code)
    return np.where(vocabulary.is_text(tokens), TEXT, np.where(is_code, IMAGE, SPECIAL))


@dataclass
class SequenceRows:
    """The rows looked at in one sequence of a stage; places count the U rows that give keys, from the pack's beginning."""

    first: int
    """Place of the sequence's first key."""
    end: int
    """Place behind the last key that any of the rows can see."""
    queries_Q: torch.Tensor
    """Places of the rows among the active ones."""
    places_Q: torch.Tensor
    """Places of their own keys, counted from ``first``."""
    cells_Q: torch.Tensor


@dataclass
class StageRows:
    """The rows looked at in the layers of one stage."""

    layers: range
    kinds_U: torch.Tensor
    """Kind of every key, those of injected tokens included."""
    sequences: list[SequenceRows]
    counts_C2: np.ndarray
    """Per cell: the number of rows looked at, and of those that can see an image token."""

    def to(self, device: torch.device) -> "StageRows":
        sequences = [
            SequenceRows(s.first, s.end, *(x.to(device, non_blocking=True) for x in (s.queries_Q, s.places_Q, s.cells_Q)))
            for s in self.sequences
        ]
        return StageRows(self.layers, self.kinds_U.to(device, non_blocking=True), sequences, self.counts_C2)


def sample_rows(pack: Pack, vocabulary: Vocabulary, num_rows: int, num_sequences: int, *, rng: np.random.Generator) -> list[StageRows]:
    """Draw the rows to look at, for every stage of a pack.

    Args:
        pack: The pack, on the host.
        vocabulary: Tells text from images by their ids.
        num_rows: Most rows of one kind in one sequence.
        num_sequences: Most sequences of one task.
        rng: Draws them.
    """
    kinds_T = token_kinds(pack.tokens_T.numpy(), vocabulary)
    ends = np.cumsum(np.array(pack.sequences.lengths, np.int64))
    kinds_T[ends - pack.sequences.lengths] = SINK
    tasks = np.array(pack.tasks)
    chosen = np.concatenate([rng.permutation(np.flatnonzero(tasks == t))[:num_sequences] for t in range(len(TASKS))])
    return [_of_stage(stage, pack, kinds_T, ends, chosen=np.sort(chosen), num_rows=num_rows, rng=rng) for stage in pack.route.stages]


def _of_stage(stage: Stage, pack: Pack, kinds_T, ends, *, chosen, num_rows: int, rng) -> StageRows:
    is_active = active_rows(stage, pack.route, pack.num_tokens)
    gives_keys = is_active.copy()
    for injection in stage.injections:
        gives_keys[injection.rows_R.numpy()] = True
    rows_U = np.flatnonzero(gives_keys)
    kinds_U, asks_U = kinds_T[rows_U], (is_active & _asking_rows(stage, pack))[rows_U]
    number_U = np.cumsum(is_active[rows_U]) - 1  # among the active ones
    bounds = np.searchsorted(rows_U, np.append(0, ends))
    sequences, counts_C2 = [], np.zeros((NUM_CELLS, 2))
    for s in chosen:
        first, end = bounds[s], bounds[s + 1]
        picked = [
            rng.permutation(first + np.flatnonzero(asks_U[first:end] & (kinds_U[first:end] == kind)))[:num_rows]
            for kind in range(len(QUERIES))
        ]
        places, cells = np.concatenate(picked), pack.tasks[s] * len(QUERIES) + np.repeat([0, 1], [len(p) for p in picked])
        if not len(places):
            continue
        sees_image = np.cumsum(kinds_U[first:end] == IMAGE)[places - first] > 0
        counts_C2 += np.stack([np.bincount(c, minlength=NUM_CELLS) for c in (cells, cells[sees_image])], axis=1)
        tensors = [torch.from_numpy(x.astype(np.int64)) for x in (number_U[places], places - first, cells)]
        sequences.append(SequenceRows(int(first), int(places.max()) + 1, *tensors))
    layers = range(stage.first_layer, stage.end_layer)
    return StageRows(layers, torch.from_numpy(kinds_U.astype(np.int64)), sequences, counts_C2)


def _asking_rows(stage: Stage, pack: Pack) -> np.ndarray:
    """A mask of the rows that are known to ask in a stage; where the device chooses which tokens only show their keys, none of those."""
    asks = np.full(pack.num_tokens, stage.asking_K is None)
    if stage.asking_K is not None:
        asks[stage.asking_K.numpy()] = True
        for choice in stage.choices:
            asks[pack.route.candidates[choice.task].rows_C.numpy()] |= choice.plan.how != "show"
    return asks


def active_rows(stage: Stage, route: Route, num_rows: int) -> np.ndarray:
    """A mask of the rows active in a stage ``[num_rows]``; where the device chooses, the first ones of a span stand for the chosen."""
    is_active = np.ones(num_rows, bool) if stage.active_K is None else np.zeros(num_rows, bool)
    if stage.active_K is not None:
        is_active[stage.active_K.numpy()] = True
    for choice in stage.choices:
        if choice.plan.how in PARTIAL:
            continue
        among = route.candidates[choice.task]
        starts = np.cumsum([0, *among.lengths])
        for start, kept in zip(starts, choice.kept):
            is_active[among.rows_C[start : start + kept].numpy()] = True
    return is_active
