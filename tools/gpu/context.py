"""What a section gets, and the sizes for each device. Tested by `tests/tools/test_gpu_check.py`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from tools.gpu.record import Record

Item = Callable[[], "Outcome"]


@dataclass
class Outcome:
    """What an item measured, and what it should have been and was not."""

    result: dict[str, Any]
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ModelSizes:
    """A decoder of the family qwen3."""

    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    mlp_width: int

    def architecture(self) -> dict[str, Any]:
        return {
            "model_type": "qwen3",
            "hidden_size": self.width,
            "intermediate_size": self.mlp_width,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_width,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": False,
        }


@dataclass(frozen=True)
class Sizes:
    """How large everything is. The code is the same on every device, the sizes are not."""

    parity_heads: int
    parity_image_side: int
    models: dict[str, ModelSizes]
    """The models of the sections mfu, ceilings and profile; the first is the smaller one."""
    vocabularies: dict[str, int]
    """Name → ids."""
    pack_tokens: int
    image_side: int
    packs_per_step: int
    timed_steps: int
    chunk_rows: int
    attention_lengths: tuple[int, ...]
    copy_bytes: int
    repeats: int
    engine_width: int
    study: dict[str, int]
    study_policies: tuple[str, ...]


CUDA = Sizes(
    parity_heads=4,
    parity_image_side=9,
    models={
        "0.5B": ModelSizes(1536, 16, 12, 4, 128, 4608),
        "1B": ModelSizes(2048, 16, 16, 8, 128, 6144),
    },
    vocabularies={"32k": 32_000, "150k": 150_000},
    pack_tokens=16384,
    image_side=31,
    packs_per_step=2,
    timed_steps=5,
    chunk_rows=4096,
    attention_lengths=(256, 512, 1024, 2048, 4096, 8192, 16384),
    copy_bytes=2**32,
    repeats=10,
    engine_width=256,
    study={"train": 6000, "test": 250, "vq_steps": 600, "steps": 300, "drawings": 100, "parallel": 5},
    study_policies=("dense", "shared_bypass", "random_ltd"),
)
CPU = Sizes(
    parity_heads=2,
    parity_image_side=4,
    models={"0.5B": ModelSizes(64, 4, 2, 1, 32, 128), "1B": ModelSizes(96, 4, 3, 1, 32, 192)},
    vocabularies={"32k": 320, "150k": 1500},
    pack_tokens=512,
    image_side=7,
    packs_per_step=2,
    timed_steps=2,
    chunk_rows=128,
    attention_lengths=(64, 256),
    copy_bytes=2**22,
    repeats=2,
    engine_width=32,
    study={"train": 100, "test": 20, "vq_steps": 4, "steps": 3, "drawings": 4, "parallel": 1},
    study_policies=("dense",),
)


@dataclass
class Context:
    """A section's surroundings."""

    device: torch.device
    record: Record
    folder: Path
    """Scratch; it may be gone in the next call."""
    out: Path
    """Where pictures and traces for the reader go, beside the JSON."""

    @cached_property
    def sizes(self) -> Sizes:
        return CUDA if self.device.type == "cuda" else CPU

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"
