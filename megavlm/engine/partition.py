"""A model that comes into being divided over the processes: none of them ever holds all of it.

ZeRO-3 divides a model that is there already. Made in the usual way, every process would first hold the whole in float32: eight of them,
on one node, eight times. Here every module is divided as soon as its constructor is done. `deepspeed.zero.Init`, entered as a context,
does that too, but draws in the precision and on the device of training, so that a seed would give other weights.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import PreTrainedModel

from megavlm.system.memory import freed_memory_given_back

Module = TypeVar("Module", bound=nn.Module)


def make_partitioned(make: Callable[[], Module], document: dict[str, Any], *, bfloat16: bool, device: torch.device) -> Module:
    """A module under ZeRO-3, with the very weights that it would have without. Called by all ranks together.

    Every rank draws all weights, in the constructor's order and in float32 on the CPU, and keeps its part: a seed gives the same ones at
    any number of processes. A process needs its part, and a few times the largest tensor while that is drawn (`tools/bench_start.py`).

    Args:
        make: The constructor; may hold stock models of `transformers`.
        document: DeepSpeed's configuration.
        bfloat16: Keep the weights in bfloat16; float32 otherwise. Buffers keep their precision.
        device: Where the module is to be.
    """
    import deepspeed

    class Divide(deepspeed.zero.Init):
        """Without its broadcast from rank 0: every rank has drawn the same numbers."""

        def _zero_init_param(self, param: Any) -> None:
            self._convert_to_deepspeed_param(param)
            param.partition()

    def partition(module: nn.Module) -> None:
        new = [p for p in module.parameters() if not hasattr(p, "ds_id")]
        for parameter in new:
            parameter.data = parameter.data.bfloat16() if bfloat16 else parameter.data
        if new:
            Divide(module=nn.ParameterList(new), config_dict_or_path=document)

    def registered(_parent: nn.Module, _name: str, child: nn.Module | None) -> None:
        if child is not None:
            partition(child)

    hook = register_module_module_registration_hook(registered)
    try:
        with freed_memory_given_back(), _initialized_whole():
            module = make()
    finally:
        hook.remove()
    partition(module)
    for buffer in module.buffers():
        buffer.data = buffer.data.to(device)
    return module


def shape_of(parameter: torch.Tensor) -> torch.Size:
    """The shape of a parameter, divided or not."""
    return getattr(parameter, "ds_shape", parameter.shape)


def write_whole(parameter: torch.Tensor, read: Callable[[], torch.Tensor] | None) -> None:
    """Write a parameter, divided or not. Called by all ranks together if it is divided.

    Args:
        parameter: Of any precision, on any device.
        read: On rank 0: gives what is written.
    """
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
        if read:
            parameter.copy_(read())


@contextmanager
def _initialized_whole() -> Iterator[None]:
    """Within it `transformers` initializes modules that are divided already: each is gathered for it."""
    initialize = PreTrainedModel._initialize_weights

    def gathered(self: PreTrainedModel, module: nn.Module, is_custom_code: bool = False) -> None:
        # what a module initializes beside its own: its children's
        touched = [*module.parameters(recurse=False), *(p for child in module.children() for p in child.parameters(recurse=False))]
        if getattr(module, "_is_hf_initialized", False):
            touched = []
        with _whole(touched):
            initialize(self, module, is_custom_code)

    PreTrainedModel._initialize_weights = gathered
    try:
        yield
    finally:
        PreTrainedModel._initialize_weights = initialize


@contextmanager
def _whole(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within it parameters are whole, in float32 on the CPU, where random numbers are drawn the same everywhere."""
    divided: list[Any] = list({id(parameter): parameter for parameter in parameters if hasattr(parameter, "ds_id")}.values())
    if not divided:
        yield
        return
    divided[0].all_gather(divided)
    before = [(parameter.device, parameter.dtype) for parameter in divided]
    for parameter in divided:
        parameter.data = parameter.data.float().cpu()
    yield
    for parameter, (device, dtype) in zip(divided, before):
        parameter.data = parameter.data.to(device, dtype)
    # no broadcast, as DeepSpeed's own context would do: every rank has drawn the same
    divided[0].partition(divided, has_been_updated=True)
