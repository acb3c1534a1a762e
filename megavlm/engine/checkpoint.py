"""Checkpoints: sharded, written by all ranks, complete or invisible, loadable at any world size that divides the lanes.

    checkpoints/step-00000500/
        manifest.json   step, world size, size and SHA-256 of every other file; its presence marks a complete checkpoint
        state.json      optimizer steps, and the state of every data lane
        tensors/        torch.distributed.checkpoint: per parameter its float32 value and both Adam moments

Every parameter is stored flat, sharded by ZeRO-3's own rule (ceil(numel / world size) elements per rank), which is also the rule of a
DTensor with ``Shard(0)``; that is what lets another world size read it. A checkpoint is written under a temporary
name, synced to disk, and renamed last.
"""

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from megavlm.engine.distributed import World
from megavlm.errors import MegavlmError

log = logging.getLogger(__name__)

MOMENTS = ("exp_avg", "exp_avg_sq")


class Checkpointer:
    """Saves and restores the whole state of a run.

    Args:
        folder: Where checkpoints live.
        world: The processes.
        keep_last: Complete checkpoints that stay.
    """

    def __init__(self, folder: Path, world: World, keep_last: int):
        self.folder, self.world, self.keep_last = folder, world, keep_last
        self._mesh = init_device_mesh(world.device.type, (world.size,))

    def save(self, step: int, engine, lanes: dict[int, Any]) -> Path:
        """Write a checkpoint of the state after ``step`` optimizer steps. Called by all ranks together.

        Args:
            step: Steps done.
            engine: The DeepSpeed engine.
            lanes: State of each of this rank's data lanes.
        """
        final = self.folder / f"step-{step:08d}"
        temporary = self.folder / f".writing-step-{step:08d}"
        if self.world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(final, ignore_errors=True)
            temporary.mkdir(parents=True)
        self.world.barrier()
        writer = dcp.FileSystemWriter(temporary / "tensors", sync_files=True)
        dcp.save(self._tensors(engine), storage_writer=writer)
        all_lanes = {str(lane): state for states in self.world.gather(lanes) for lane, state in states.items()}
        if self.world.is_main:
            state = {"step": step, "optimizer_steps": _optimizer_steps(engine), "lanes": all_lanes}
            _write_synced(temporary / "state.json", json.dumps(state))
        self.world.barrier()
        mine = sorted(p for p in temporary.rglob("*") if p.is_file())[self.world.rank :: self.world.size]
        described = {str(p.relative_to(temporary)): {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in mine}
        files = {name: entry for part in self.world.gather(described) for name, entry in part.items()}
        if self.world.is_main:
            manifest = {"format": 1, "step": step, "world_size": self.world.size, "files": dict(sorted(files.items()))}
            _write_synced(temporary / "manifest.json", json.dumps(manifest, indent=1))
            _sync_folder(temporary / "tensors")
            _sync_folder(temporary)
            temporary.rename(final)
            _sync_folder(self.folder)
            for old in complete_checkpoints(self.folder)[: -self.keep_last]:
                shutil.rmtree(old)
        self.world.barrier()
        return final

    def restore(self, path: Path, engine) -> dict[str, Any]:
        """Put a checkpoint into the engine. Called by all ranks together.

        Returns:
            ``{"step": …, "optimizer_steps": …, "lanes": {"0": state, …}}``.

        Raises:
            MegavlmError: If a file is missing or differs from the manifest.
        """
        problems = self.world.gather(verify(path) if self.world.is_main else [])[0]
        if problems:
            raise MegavlmError(
                f"checkpoint {path} is damaged: {'; '.join(problems)}\n  do:    remove it; the one before it is used then"
            )
        state = json.loads((path / "state.json").read_text())
        _prepare_optimizer_state(engine, state["optimizer_steps"])
        tensors = self._tensors(engine)
        dcp.load(tensors, storage_reader=dcp.FileSystemReader(path / "tensors"))
        for name, parameter in engine.module.named_parameters():
            # the padding of the last partition is not stored; it takes no part in anything
            value = _padded(tensors[f"value/{name}"].to_local(), parameter)
            if not parameter.requires_grad:
                parameter.ds_tensor.data.copy_(value)
                continue
            safe_set_local_fp32_param(parameter, value)
            for moment in MOMENTS:
                safe_set_local_optimizer_state(
                    parameter, _padded(tensors[f"{moment}/{name}"].to_local(), parameter), moment
                )
        _refresh_working_precision(engine)
        return state

    def _tensors(self, engine) -> dict[str, DTensor]:
        tensors = {}
        for name, parameter in engine.module.named_parameters():
            trained = parameter.requires_grad
            value = safe_get_local_fp32_param(parameter) if trained else parameter.ds_tensor
            tensors[f"value/{name}"] = self._sharded(value, parameter)
            for moment in MOMENTS if trained else ():
                moment_part = safe_get_local_optimizer_state(parameter, moment)
                tensors[f"{moment}/{name}"] = self._sharded(moment_part, parameter)
        return tensors

    def _sharded(self, partition: torch.Tensor, parameter: nn.Parameter) -> DTensor:
        begin = self.world.rank * parameter.ds_tensor.numel()
        size = max(0, min(parameter.ds_tensor.numel(), parameter.ds_numel - begin))
        local = partition.detach().flatten()[:size].clone()
        return DTensor.from_local(
            local, self._mesh, [Shard(0)], run_check=False, shape=torch.Size([parameter.ds_numel]), stride=(1,)
        )


def complete_checkpoints(folder: Path) -> list[Path]:
    """All complete checkpoints of a run, oldest first. What is latest is found by looking, never trusted to a pointer."""
    return sorted(manifest.parent for manifest in folder.glob("step-*/manifest.json"))


def verify(path: Path) -> list[str]:
    """What is wrong with a checkpoint, one line per file; empty if nothing is."""
    files = json.loads((path / "manifest.json").read_text())["files"]
    problems = []
    for name, entry in files.items():
        file = path / name
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif file.stat().st_size != entry["bytes"]:
            problems.append(f"{name} has {file.stat().st_size} bytes instead of {entry['bytes']}")
        elif _sha256(file) != entry["sha256"]:
            problems.append(f"{name} has another SHA-256 than when it was written")
    return problems


def load_weights(path: Path, module: nn.Module) -> None:
    """Read a checkpoint's weights into a module in this one process, without DeepSpeed.

    Args:
        path: A complete checkpoint.
        module: With the same parameters as the one that was trained.
    """
    if problems := verify(path):
        raise MegavlmError(f"checkpoint {path} is damaged: {'; '.join(problems)}\n  do:    use another checkpoint")
    parameters = dict(module.named_parameters())
    flat = {f"value/{name}": torch.empty(p.numel(), dtype=torch.float32) for name, p in parameters.items()}
    dcp.load(flat, storage_reader=dcp.FileSystemReader(path / "tensors"), no_dist=True)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(flat[f"value/{name}"].view(parameter.shape))


def _optimizer_steps(engine) -> int:
    zero = engine.optimizer
    return int(zero.optimizer.state[zero.fp32_partitioned_groups_flat[0]]["step"])


def _prepare_optimizer_state(engine, steps: int) -> None:
    """Adam creates its state in its first step; a fresh engine has none to load into."""
    zero = engine.optimizer
    for flat in zero.fp32_partitioned_groups_flat:
        zero.optimizer.state[flat] = {
            "step": torch.tensor(float(steps)),
            **{moment: torch.zeros_like(flat) for moment in MOMENTS},
        }


def _refresh_working_precision(engine) -> None:
    """Copy the float32 masters into the partitions that the forward pass reads."""
    zero = engine.optimizer
    for working, master in zip(zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat):
        working.data.copy_(master.data)
    # small parameters are kept whole on every rank: give them up, then gather the new values
    if zero.persistent_parameters:
        zero.persistent_parameters[0].partition(zero.persistent_parameters)
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def _padded(local: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    return nn.functional.pad(local, (0, parameter.ds_tensor.numel() - local.numel()))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
