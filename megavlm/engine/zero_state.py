"""A ZeRO-3 engine's state as flat tensors divided over the ranks, by name; out of the engine and back into it.

Every tensor is flat, and divided as `megavlm.engine.shards` says. Names:

    value/NAME         float32 master of a parameter (the value itself, if it is frozen)
    exp_avg/NAME       Adam's first moment
    exp_avg_sq/NAME    Adam's second moment

Tested by `tests/engine/test_checkpoint.py`.
"""

from collections.abc import Callable

import torch
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import nn

from megavlm.engine.protocol import Engine, ZeroParameter
from megavlm.errors import MegavlmError

MOMENTS = ("exp_avg", "exp_avg_sq")


class Staging:
    """Host memory in which a copy of this rank's parts waits to be written; made once, used for every save.

    Args:
        rank: This process.
    """

    def __init__(self, rank: int):
        self.rank = rank
        self._buffers: dict[str, torch.Tensor] = {}

    def copy_from(self, engine: Engine) -> dict[str, torch.Tensor]:
        """Copy the engine's parts; when this returns, training may go on and change them."""
        create_missing_optimizer_state(engine)
        on_cuda = False
        for name, parameter in engine.module.named_parameters():
            begin, end = _bounds(self.rank, parameter)
            for key, partition in _partitions(name, parameter).items():
                local = partition.detach().flatten()[: end - begin]
                if key not in self._buffers:
                    # page-locked memory lets the copies of all tensors run without waiting for each other
                    self._buffers[key] = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
                self._buffers[key].copy_(local, non_blocking=True)
                on_cuda |= local.is_cuda
        if on_cuda:
            torch.cuda.current_stream().synchronize()
        return self._buffers


def numel_of(engine: Engine) -> dict[str, int]:
    """Elements of each tensor of the state, by name."""
    return {key: parameter.ds_numel for name, parameter in engine.module.named_parameters() for key in _keys(name, parameter)}


def install(read: Callable[[str, int, int], torch.Tensor], engine: Engine, rank: int) -> None:
    """Put a saved state into the engine, a tensor at a time: masters, moments, and the weights that the forward pass reads.

    Args:
        read: Gives the elements from one number to another, exclusive, of a tensor.
        engine: The DeepSpeed engine.
        rank: This process.
    """
    for name, parameter in engine.module.named_parameters():
        parts = {key: _padded(read(key, *_bounds(rank, parameter)), parameter) for key in _keys(name, parameter)}
        # the padding of the last partition is not stored; it takes no part in anything
        value = parts[f"value/{name}"]
        if not parameter.requires_grad:
            parameter.ds_tensor.data.copy_(value)
            continue
        safe_set_local_fp32_param(parameter, value)
        for moment in MOMENTS:
            safe_set_local_optimizer_state(parameter, parts[f"{moment}/{name}"], moment)
    zero = engine.optimizer
    for working, master in zip(zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat):
        working.data.copy_(master.data)
    # small parameters are kept whole on every rank: give them up, then gather the new values
    if zero.persistent_parameters:
        zero.persistent_parameters[0].partition(zero.persistent_parameters)
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def group_steps(engine: Engine) -> dict[str, int]:
    """Optimizer steps that each parameter group has taken, by the group's name."""
    create_missing_optimizer_state(engine)
    zero = engine.optimizer
    return {
        _group_name(zero, number): int(zero.optimizer.state[flat]["step"]) for number, flat in enumerate(zero.fp32_partitioned_groups_flat)
    }


def set_group_steps(engine: Engine, steps: dict[str, int]) -> None:
    """Set the step counter of every parameter group.

    Raises:
        MegavlmError: If the checkpoint has no group of that name.
    """
    create_missing_optimizer_state(engine)
    zero = engine.optimizer
    for number, flat in enumerate(zero.fp32_partitioned_groups_flat):
        name = _group_name(zero, number)
        if name not in steps:
            raise MegavlmError(
                f"the checkpoint has no parameter group {name!r}, only {', '.join(steps)}\n"
                "  do:    start a new run from its weights with --init-from"
            )
        zero.optimizer.state[flat]["step"].fill_(steps[name])


def create_missing_optimizer_state(engine: Engine) -> None:
    """Adam creates its state in its first step; an engine that has not taken one has none to read or to load into."""
    zero = engine.optimizer
    for flat in zero.fp32_partitioned_groups_flat:
        if not zero.optimizer.state[flat]:
            zero.optimizer.state[flat] = {
                "step": torch.zeros((), device=flat.device),
                **{moment: torch.zeros_like(flat) for moment in MOMENTS},
            }


def _group_name(zero, sub_group: int) -> str:
    # DeepSpeed cuts a large group into several flat ones
    return zero.optimizer.param_groups[zero.sub_group_to_group_id[sub_group]]["name"]


def _keys(name: str, parameter: ZeroParameter) -> list[str]:
    return [f"{kind}/{name}" for kind in (("value", *MOMENTS) if parameter.requires_grad else ("value",))]


def _partitions(name: str, parameter: ZeroParameter) -> dict[str, torch.Tensor]:
    if not parameter.requires_grad:
        return {f"value/{name}": parameter.ds_tensor}
    moments = {f"{moment}/{name}": safe_get_local_optimizer_state(parameter, moment) for moment in MOMENTS}
    return {f"value/{name}": safe_get_local_fp32_param(parameter)} | moments


def _bounds(rank: int, parameter: ZeroParameter) -> tuple[int, int]:
    """First and last element, exclusive, of this rank's part."""
    partition = parameter.ds_tensor.numel()
    return min(rank * partition, parameter.ds_numel), min((rank + 1) * partition, parameter.ds_numel)


def _padded(part: torch.Tensor, parameter: ZeroParameter) -> torch.Tensor:
    return nn.functional.pad(part, (0, parameter.ds_tensor.numel() - part.numel())).to(parameter.ds_tensor.device)
