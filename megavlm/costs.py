"""Floating-point operations by formula: one source for the packer, the planner and the reported utilisation.

A multiplication and an addition count as two. Causal attention over L tokens is counted as L²/2 pairs, which is
what fused kernels execute. Norms, activations and rotary embeddings are left out: they are below a percent.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

BACKWARD_FACTOR = 2
"""The backward pass multiplies by each matrix twice: once for the inputs' gradient, once for the weights'."""

PLAIN_MLP = ("apertus", "arcee", "jais2", "nemotron", "phi", "starcoder2")
"""Families whose MLP has no gate; megavlm.model.proof counts the weights of all others too."""


def num_experts(config) -> int:
    """Experts in each layer of a `transformers` text configuration; 0 if it is dense."""
    return getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 0


@dataclass(frozen=True)
class ModelShape:
    """The sizes that decide what a decoder costs."""

    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    mlp_width: int
    vocabulary_size: int
    mlp_matrices: int = 3
    """A gated MLP has three, a plain one two."""
    num_experts: int = 0
    """MLPs of this width in a layer, and rows of the router before them; 0 without experts."""
    active_experts: int = 1
    """MLPs that a token passes."""
    windows: tuple[int | None, ...] = ()
    """Of each layer, how many tokens a query sees; None is all before it. Empty if no layer has a sliding window."""

    @classmethod
    def of(cls, config) -> "ModelShape":
        """Read from a `transformers` text configuration."""
        experts = num_experts(config)
        return cls(
            width=config.hidden_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_width=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            mlp_width=(experts and getattr(config, "moe_intermediate_size", None)) or config.intermediate_size,
            vocabulary_size=config.vocab_size,
            mlp_matrices=2 if config.model_type in PLAIN_MLP else 3,
            num_experts=experts,
            active_experts=config.num_experts_per_tok if experts else 1,
            windows=_windows(config),
        )

    @property
    def layer_flops_per_token(self) -> int:
        """``a``: forward FLOPs of one layer per token, attention scores excluded. Of experts the active ones count."""
        query_and_output = 2 * self.num_heads * self.head_width
        key_and_value = 2 * self.num_kv_heads * self.head_width
        return 2 * self.width * (query_and_output + key_and_value) + self.mlp_flops_per_token

    @property
    def asking_flops_per_token(self) -> int:
        """The part of ``a`` that a token costs by asking: the projections of its query and of what attention answers."""
        return 2 * self.width * 2 * self.num_heads * self.head_width

    @property
    def mlp_flops_per_token(self) -> int:
        """The part of ``a`` that the MLP costs; of experts the active ones, and the router before them."""
        return 2 * self.width * (self.active_experts * self.mlp_matrices * self.mlp_width + self.num_experts)

    @property
    def layer_flops_per_square(self) -> int:
        """``b``: forward FLOPs of one layer per L² of a sequence of L tokens (scores and weighted sum)."""
        return 2 * self.num_heads * self.head_width

    def unseen_flops(self, attended_s: np.ndarray, bounds: Sequence[tuple[int, int]], bias_columns: ArrayLike = 0) -> np.ndarray:
        """Forward FLOPs that sliding windows save in each stage: they see ``(L - window)² / 2`` pairs less.

        Args:
            attended_s: L in each stage.
            bounds: First and end layer of each.
            bias_columns: Columns that attention adds to carry a bias per key, in each.
        """
        beyond_s = [
            sum(max(0.0, attended - window) ** 2 for window in self.windows[first:end] if window is not None)
            for attended, (first, end) in zip(attended_s, bounds)
        ]
        return self.layer_flops_per_square * (1 + np.asarray(bias_columns) / self.head_width) * np.array(beyond_s)

    @property
    def injection_flops_per_token(self) -> int:
        """Forward FLOPs of one layer per token that gives only keys and values, through projections of its own."""
        return 2 * self.width * 2 * self.num_kv_heads * self.head_width

    @property
    def head_flops_per_row(self) -> int:
        """Forward FLOPs of the output head per labelled row."""
        return 2 * self.width * self.vocabulary_size

    def layers_flops(
        self,
        active_tokens,
        attended_tokens=None,
        bias_columns: ArrayLike = 0,
        *,
        silent_tokens: ArrayLike = 0,
        tokens_without_mlp: ArrayLike = 0,
    ) -> np.ndarray:
        """Forward FLOPs of one layer for sequences of these lengths: ``a·L + b·L²``.

        Args:
            active_tokens: L of each sequence.
            attended_tokens: With tokens that give keys and values only; they go through projections of their own.
            bias_columns: Columns that attention adds to carry a bias per key.
            silent_tokens: How many of L give only keys and values, by the layer's own projections.
            tokens_without_mlp: How many of L do not go through the MLP.
        """
        active = np.asarray(active_tokens, dtype=np.float64)
        attended = active if attended_tokens is None else np.asarray(attended_tokens, dtype=np.float64)
        injected = self.injection_flops_per_token * (attended - active)
        square = self.layer_flops_per_square * (1 + np.asarray(bias_columns) / self.head_width)
        saved = self.asking_flops_per_token * np.asarray(silent_tokens) + self.mlp_flops_per_token * np.asarray(tokens_without_mlp)
        return self.layer_flops_per_token * active - saved + injected + square * attended**2


def _windows(config) -> tuple[int | None, ...]:
    """Sliding windows of a `transformers` text configuration."""
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return ()
    slides = [True] * config.num_hidden_layers if kinds is None else [kind == "sliding_attention" for kind in kinds]
    return tuple(window if is_sliding else None for is_sliding in slides) if any(slides) else ()
