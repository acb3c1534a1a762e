"""Routes: the stages of one pack, and the cost of every stage, known before the device sees the pack (P4).

A stage is a run of consecutive layers that see the same rows of the pack. How many rows that are is a function of
lengths, shares and the step alone (`RoutingPlan.kept_tokens`). *Which* rows a host selector keeps is decided here, when the pack is
built; what depends on content is left to the device as a `Choice`, whose outcome has a size that is known here too.

Letters: C candidates, R rows that give only keys and values, U all rows that give keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch

from megavlm.routing.policies import LayerPlan
from megavlm.routing.selectors import Candidates

BIAS_WIDTH = 8
"""Columns that attention adds to queries and keys to carry a bias per key: kernels want head widths in multiples of 8."""


@dataclass
class Sequences:
    """Boundaries of packed sequences, none of them empty (varlen kernels accept none)."""

    lengths: list[int]
    cu_seqlens: torch.Tensor
    """int32 ``[S+1]``."""

    @classmethod
    def of(cls, lengths: np.ndarray) -> "Sequences":
        lengths = lengths[lengths > 0]
        cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        return cls(lengths.tolist(), torch.from_numpy(cu_seqlens))

    @property
    def max_seqlen(self) -> int:
        return max(self.lengths)

    def map_tensors(self, function) -> "Sequences":
        return map_tensors(self, function)


@dataclass
class Choice:
    """What the device decides at the beginning of a stage: which of the candidates of a task are active."""

    task: int
    plan: LayerPlan
    kept: list[int]
    """How many of each span."""
    take_K: torch.Tensor
    """Where the kept ones stand when the candidates are sorted by span and score."""
    quota_C: torch.Tensor
    """``kept`` for each candidate."""
    selector: str
    """Name of the selector that ranks, if ``plan`` says so."""
    needs_attention: bool = False
    """It makes a ranking, or merges, by queries or keys of the layer before."""


@dataclass
class Injection:
    """Rows that take no part in a stage but give keys and values to it."""

    task: int
    rows_R: torch.Tensor
    sequences: Sequences
    """Boundaries of active and injected rows together."""


@dataclass
class Split:
    """The sequences of a stage with merged tokens, whose keys carry a bias, and the others, which do not pay for it."""

    merged_rows: torch.Tensor
    """Where the rows of the former stand among those that give keys."""
    other_rows: torch.Tensor
    """Likewise those of the latter."""
    back_U: torch.Tensor
    """Brings both, one behind the other, back into the pack's order."""
    merged: Sequences
    others: Sequences


@dataclass
class Stage:
    """Layers ``first_layer … end_layer-1`` and the rows of the pack that are active in them."""

    first_layer: int
    end_layer: int
    sequences: Sequences
    """Boundaries of the active rows."""
    active_K: torch.Tensor | None
    """int64, ascending: active rows, those of choices left out; None where every row is active."""
    asking_K: torch.Tensor | None = None
    """Likewise the active rows that ask, which the others do not: those only give keys and values. None where every active row asks."""
    mlp_K: torch.Tensor | None = None
    """Likewise those that go through the MLP; None where every active row does."""
    choices: list[Choice] = field(default_factory=list)
    injections: list[Injection] = field(default_factory=list)
    is_watched: bool = False
    """A later stage chooses by queries or keys of this one's last layer."""
    split: Split | None = None
    """None where every sequence has merged tokens, or none has."""

    def map_tensors(self, function) -> "Stage":
        return map_tensors(self, function)


@dataclass
class Route:
    """The stages of one pack, from the first layer to the last, and what choices choose among, by task."""

    stages: list[Stage]
    candidates: dict[int, Candidates] = field(default_factory=dict)

    def map_tensors(self, function) -> "Route":
        """A copy with ``function`` applied to every tensor (move to a device, pin)."""
        candidates = {task: among.map_tensors(function) for task, among in self.candidates.items()}
        return Route([stage.map_tensors(function) for stage in self.stages], candidates)


def map_tensors(holder, function):
    """A copy of a dataclass with ``function`` applied to its tensors, those in nested dataclasses and lists included."""

    def mapped(value):
        if isinstance(value, torch.Tensor):
            return function(value)
        if isinstance(value, list) and value and hasattr(value[0], "__dataclass_fields__"):
            return [map_tensors(item, function) for item in value]
        return map_tensors(value, function) if isinstance(value, (Sequences, Split)) else value

    return replace(holder, **{f.name: mapped(getattr(holder, f.name)) for f in fields(holder)})


@dataclass
class PackLayout:
    """What a route is built from: S sequences of a pack and their N image spans."""

    lengths: np.ndarray
    """Tokens of each sequence ``[S]``."""
    spans: Sequence
    """Image spans (``height``, ``width``, ``length``, ``task``)."""
    starts: np.ndarray
    """Row at which each span starts ``[N]``."""
    labelled_rows: np.ndarray
    """Rows of tokens with a loss, ascending."""
    prompt_rows: np.ndarray
    """Rows of generation prompts that predict nothing."""
