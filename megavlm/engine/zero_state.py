"""A ZeRO-3 engine's state as flat tensors sharded over the ranks, by name; out of the engine and back into it.

Every parameter is stored flat, sharded by ZeRO-3's own rule (ceil(numel / world size) elements per rank), which is
also the rule of a DTensor with ``Shard(0)``; that is what lets another world size read it. Names:

    value/NAME         float32 master of a parameter (the value itself, if it is frozen)
    exp_avg/NAME       Adam's first moment
    exp_avg_sq/NAME    Adam's second moment

Tested by `tests/engine/test_checkpoint.py`.
"""

import torch
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from megavlm.engine.protocol import Engine, ZeroParameter
from megavlm.errors import MegavlmError

MOMENTS = ("exp_avg", "exp_avg_sq")


class Staging:
    """Host memory in which a copy of this rank's shards waits to be written; made once, used for every save.

    Args:
        rank: This process.
        mesh: A mesh of all processes, on the CPU.
    """

    def __init__(self, rank: int, mesh: DeviceMesh):
        self.rank = rank
        self.mesh = mesh
        self._buffers: dict[str, torch.Tensor] = {}

    def copy_from(self, engine: Engine) -> dict[str, DTensor]:
        """Copy the engine's shards; when this returns, training may go on and change them."""
        create_missing_optimizer_state(engine)
        copies, on_cuda = {}, False
        for name, parameter in engine.module.named_parameters():
            for key, partition in _partitions(name, parameter).items():
                local = partition.detach().flatten()[: _local_size(self.rank, parameter)]
                if key not in self._buffers:
                    # page-locked memory lets the copies of all tensors run without waiting for each other
                    self._buffers[key] = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
                self._buffers[key].copy_(local, non_blocking=True)
                on_cuda |= local.is_cuda
                copies[key] = self._sharded(self._buffers[key], parameter)
        if on_cuda:
            torch.cuda.current_stream().synchronize()
        return copies

    def empty_like(self, engine: Engine) -> dict[str, DTensor]:
        """Tensors to load into, of this world's shapes."""
        return {
            key: self._sharded(torch.zeros(_local_size(self.rank, parameter), dtype=partition.dtype), parameter)
            for name, parameter in engine.module.named_parameters()
            for key, partition in _partitions(name, parameter).items()
        }

    def _sharded(self, local: torch.Tensor, parameter: ZeroParameter) -> DTensor:
        shape = torch.Size([parameter.ds_numel])
        return DTensor.from_local(local, self.mesh, [Shard(0)], run_check=False, shape=shape, stride=(1,))


def install(tensors: dict[str, DTensor], engine: Engine) -> None:
    """Put loaded shards into the engine: masters, moments, and the weights that the forward pass reads."""
    for name, parameter in engine.module.named_parameters():
        # the padding of the last partition is not stored; it takes no part in anything
        value = _padded(tensors[f"value/{name}"], parameter)
        if not parameter.requires_grad:
            parameter.ds_tensor.data.copy_(value)
            continue
        safe_set_local_fp32_param(parameter, value)
        for moment in MOMENTS:
            safe_set_local_optimizer_state(parameter, _padded(tensors[f"{moment}/{name}"], parameter), moment)
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


def _partitions(name: str, parameter: ZeroParameter) -> dict[str, torch.Tensor]:
    if not parameter.requires_grad:
        return {f"value/{name}": parameter.ds_tensor}
    moments = {f"{moment}/{name}": safe_get_local_optimizer_state(parameter, moment) for moment in MOMENTS}
    return {f"value/{name}": safe_get_local_fp32_param(parameter)} | moments


def _local_size(rank: int, parameter: ZeroParameter) -> int:
    partition = parameter.ds_tensor.numel()
    return max(0, min(partition, parameter.ds_numel - rank * partition))


def _padded(tensor: DTensor, parameter: ZeroParameter) -> torch.Tensor:
    local = tensor.to_local()
    padded = nn.functional.pad(local, (0, parameter.ds_tensor.numel() - local.numel()))
    return padded.to(parameter.ds_tensor.device)
