"""What one decoder layer does beside its matrix products, counted instead of guessed: the stock layer runs forward and backward without
memory (device ``meta``), with a stand-in for the fused attention.

Tested by `tests/planner/test_plan.py`.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedConfig

from megavlm.model import attention

ROWS = 1024
"""Rows that the layer is counted with; all figures but the kernels' number grow with them."""
PRODUCTS = ("mm", "addmm", "bmm", "_grouped_mm")
"""Kernels of matrix products, by torch's names."""


@dataclass(frozen=True)
class LayerCount:
    """Forward and backward pass of a layer; products and attention left out, but for their kernels."""

    moved_bytes: float
    """What kernels read and write, per row."""
    forward_moved_bytes: float
    """Of these, in the forward pass."""
    num_kernels: int
    """Calls of kernels, forward and backward."""
    saved_bytes: float
    """What is kept for the backward pass, per row, the layer's input included."""
    input_bytes: float
    """The input alone: what is kept where the layer is computed again."""


@lru_cache(maxsize=16)
def count_layer(described: str, kind: type[PreTrainedConfig], dtype: torch.dtype) -> LayerCount:
    """Count a layer of an exact family.

    Args:
        described: ``to_json_string()`` of a configuration of `transformers`, for text.
        kind: Its class.
        dtype: Of the forward and backward pass.
    """
    config = kind.from_dict(json.loads(described) | {"num_hidden_layers": 1, "layer_types": None, "vocab_size": 8})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).model
        x_1KD = torch.empty(1, ROWS, config.hidden_size, dtype=dtype, requires_grad=True)
        positions = torch.arange(ROWS)[None]
    rotary = model.rotary_emb(x_1KD, positions)
    config._attn_implementation = model.config._attn_implementation = attention.NAME
    layer, saved = model.layers[0], _Saved(model)
    with _Kernels() as forward, torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda x: x):
        out = layer(x_1KD, attention_mask=None, position_embeddings=rotary, use_cache=False, context=_Context())
        out = out[0] if isinstance(out, tuple) else out
    with _Kernels() as backward:
        out.backward(torch.empty_like(out))
    return LayerCount(
        moved_bytes=(forward.moved_bytes + backward.moved_bytes) / ROWS,
        forward_moved_bytes=forward.moved_bytes / ROWS,
        num_kernels=forward.num_kernels + backward.num_kernels,
        saved_bytes=sum(saved.bytes_of.values()) / ROWS,
        input_bytes=x_1KD.numel() * x_1KD.element_size() / ROWS,
    )


class _Attention(torch.autograd.Function):
    """Stands for the fused kernel: keeps queries, keys, values and what comes out, and a float32 number per row and head."""

    @staticmethod
    def forward(ctx: Any, q_KHd: torch.Tensor, k_KHd: torch.Tensor, v_KHd: torch.Tensor) -> torch.Tensor:
        out_KHd = torch.empty_like(q_KHd)
        ctx.save_for_backward(q_KHd, k_KHd, v_KHd, out_KHd, q_KHd.new_empty(q_KHd.shape[:2], dtype=torch.float32))
        return out_KHd

    @staticmethod
    def backward(ctx: Any, *_gradients: Any) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


class _Context:
    """What the layer is given in place of a `megavlm.model.attention.Context`."""

    longest = 0

    def attend(self, q_KHd: torch.Tensor, k_KHd: torch.Tensor, v_KHd: torch.Tensor, _scale: float) -> torch.Tensor:
        return _Attention.apply(q_KHd, k_KHd, v_KHd)  # pyright: ignore[reportReturnType]


class _Saved:
    """Bytes of the storages that autograd keeps, each once; weights are none of its own."""

    def __init__(self, model: nn.Module):
        self.weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self.bytes_of: dict[int, int] = {}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.weights:
            self.bytes_of[storage._cdata] = storage.nbytes()
        return tensor


class _Kernels(TorchDispatchMode):
    """Counts kernels, and what those move that are no products."""

    def __init__(self) -> None:
        super().__init__()
        self.moved_bytes = 0
        self.num_kernels = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if func.is_view or name.startswith(("empty", "new_empty", "detach", "_unsafe_view", "alias")):
            return out
        self.num_kernels += 1
        if name not in PRODUCTS:
            self.moved_bytes += sum(x.numel() * x.element_size() for x in _tensors([args, kwargs or {}, out]))
        return out


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _tensors(inner)
