"""What is trained, and how, as far as memory and time depend on it. Tested by `tests/planner/test_plan.py`."""

import json
import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from transformers import PreTrainedConfig

from megavlm.config import RunConfig
from megavlm.costs import ModelShape
from megavlm.engine.deepspeed_file import read_deepspeed_file
from megavlm.engine.zero_sizes import fill_in
from megavlm.errors import ConfigError
from megavlm.model.sizes import parameter_sizes
from megavlm.planner.layer import LayerCount, count_layer

MOST_LIVE = 1e9
"""DeepSpeed's defaults of ``stage3_max_live_parameters`` and ``stage3_max_reuse_distance``."""


@dataclass(frozen=True)
class Model:
    """A model in training.

    Args:
        config: The recipe.
        described: Configuration of `transformers`, with the run's vocabulary.
        bounds: (first layer, end layer) of each stage.
        on_cuda: Whether it is to run on GPUs.
        memory_bytes: Of a GPU.
    """

    config: RunConfig
    described: PreTrainedConfig
    bounds: tuple[tuple[int, int], ...]
    on_cuda: bool
    memory_bytes: float = 80e9

    @cached_property
    def shape(self) -> ModelShape:
        return ModelShape.of(self.described)

    @property
    def sizes(self) -> list[int]:
        """Numbers in each parameter."""
        return _sizes(self.described.to_json_string(use_diff=False), type(self.described))

    @property
    def num_parameters(self) -> int:
        return sum(self.sizes)

    @property
    def vocabulary_size(self) -> int:
        return self.shape.vocabulary_size

    @property
    def is_bfloat16(self) -> bool:
        return self.config.model.is_bfloat16("cuda" if self.on_cuda else "cpu")

    @property
    def item_bytes(self) -> int:
        """Of a number in the forward and backward pass."""
        return 2 if self.is_bfloat16 else 4

    @property
    def gradient_bytes(self) -> int:
        """Of a number of a gradient on its way: in the bucket, and in float32 as it is sent."""
        return self.item_bytes + 4

    @cached_property
    def layer(self) -> LayerCount:
        dtype = torch.bfloat16 if self.is_bfloat16 else torch.float32
        return count_layer(self.described.to_json_string(use_diff=False), type(self.described), dtype)

    @property
    def layer_parameters(self) -> float:
        """Of one layer."""
        return (self.num_parameters - self.outer_parameters) / self.shape.num_layers

    @property
    def outer_parameters(self) -> int:
        """Of the embedding and the output head."""
        matrices = 1 if self.described.tie_word_embeddings else 2
        return matrices * self.vocabulary_size * self.shape.width

    @property
    def zero(self) -> dict[str, Any]:
        """DeepSpeed's ``zero_optimization``."""
        memory_bytes = int(self.memory_bytes) if self.on_cuda else None
        return _zero(self.config.engine.deepspeed, tuple(self.sizes), memory_bytes, self.item_bytes)

    @cached_property
    def persistent_parameters(self) -> int:
        """Numbers that stay whole from step to step: those of small parameters."""
        threshold = self.zero.get("stage3_param_persistence_threshold", 1e5)
        return sum(size for size in self.sizes if size <= threshold)

    @cached_property
    def live_parameters(self) -> float:
        """Numbers that are whole at one moment."""
        most = min(self.zero.get("stage3_max_live_parameters", MOST_LIVE), self.zero.get("stage3_max_reuse_distance", MOST_LIVE))
        prefetched = self.zero.get("stage3_prefetch_bucket_size", 5e7)
        return min(self.num_parameters, max(most, max(self.sizes)) + prefetched + self.persistent_parameters)

    @property
    def gathers_per_pack(self) -> int:
        """How often weights become whole for a pack: for the backward pass again, where they could not stay."""
        return 1 if self.num_parameters <= self.live_parameters else 2

    @property
    def reduced_parameters(self) -> float:
        """Numbers of gradients that wait in the bucket. On a CPU only those count that were written to."""
        bucket = self.zero.get("reduce_bucket_size", 5e8)
        return max(self.sizes) + (bucket if self.on_cuda else min(bucket, self.num_parameters))

    @property
    def num_chunks(self) -> int:
        """Calls of the output head per pack."""
        return math.ceil(self.config.data.pack_tokens / self.config.loss.chunk_rows)

    @property
    def recomputed_shares(self) -> list[float]:
        """Share of each stage's layers that are computed again."""
        every = int(self.config.model.activation_checkpointing)
        again = [every > 0 and (layer + 1) % every == 0 for layer in range(self.shape.num_layers)]
        return [sum(again[first:end]) / (end - first) for first, end in self.bounds]

    def check_sequence_parallel(self, number: int) -> None:
        """Whether heads can be divided over so many processes.

        Raises:
            ConfigError: If they cannot.
        """
        heads, kv_heads = self.shape.num_heads, self.shape.num_kv_heads
        if heads % number or (kv_heads % number and number % kv_heads):
            raise ConfigError(
                f"--sequence_parallel={number}: {heads} heads and {kv_heads} heads of keys cannot be divided over {number} processes\n"
                f"  do:    give a divisor of {heads} that divides {kv_heads}, or is a multiple of it"
            )


@lru_cache(maxsize=16)
def _sizes(described: str, kind: type[PreTrainedConfig]) -> list[int]:
    """Making the model takes a second, even without memory, and a plan looks at many situations."""
    return parameter_sizes(kind.from_dict(json.loads(described)))


@lru_cache(maxsize=16)
def _zero(name: str, sizes: tuple[int, ...], memory_bytes: int | None, item_bytes: int) -> dict[str, Any]:
    document = read_deepspeed_file(name)
    return fill_in(document["zero_optimization"], list(sizes), memory_bytes=memory_bytes, element_bytes=item_bytes)
