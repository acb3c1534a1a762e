"""What we use of DeepSpeed's engine at stage 3, whose own types say nothing. Tested by `tests/distributed/test_training.py`."""

from collections.abc import MutableMapping
from typing import Any, Protocol

import torch
from torch import nn


class ZeroParameter(Protocol):
    """A parameter as ZeRO-3 has extended it."""

    requires_grad: bool
    ds_numel: int
    """Elements of the whole."""
    ds_tensor: torch.Tensor
    """This rank's part, flat, with the padding of the last one."""


class ZeroOptimizer(Protocol):
    """DeepSpeed's optimizer at stage 3: partitions of parameters, in flat tensors, around a plain optimizer."""

    optimizer: torch.optim.Optimizer
    """The plain one."""
    param_groups: list[dict[str, Any]]
    fp16_partitioned_groups_flat: list[torch.Tensor]
    """This rank's part of what the forward pass reads, whatever its precision."""
    fp32_partitioned_groups_flat: list[torch.Tensor]
    """This rank's part of the masters, a tensor per sub-group."""
    grad_partitions_flat_buffer: torch.Tensor
    persistent_parameters: list[Any]
    """Small parameters that every rank keeps whole, as DeepSpeed has extended them."""
    sub_group_to_group_id: MutableMapping[int, int]
    _global_grad_norm: torch.Tensor

    def zero_grad(self) -> None: ...


class Engine(Protocol):
    """DeepSpeed's engine around a backbone."""

    @property
    def module(self) -> Any:
        """The backbone."""
        ...

    @property
    def optimizer(self) -> ZeroOptimizer: ...

    def __call__(self, *inputs: Any) -> torch.Tensor: ...

    def backward(self, loss: torch.Tensor, *, scale_wrt_gas: bool) -> Any: ...

    def step(self) -> None: ...

    def train(self, mode: bool = True) -> nn.Module: ...

    def eval(self) -> nn.Module: ...
