"""Which process am I, and how do we talk? Found out from the environment, the same for every launcher."""

import os
import re
import socket
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
from torch import distributed

from megavlm.errors import ConfigError, MegavlmError
from megavlm.system.memory import allow_open_files

Value = TypeVar("Value")

if not torch.cuda.is_available():
    # before anything imports DeepSpeed: it would complain on standard output, where results go
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


@dataclass(frozen=True)
class World:
    """This process among all."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        distributed.barrier()

    def sum(self, values: np.ndarray) -> torch.Tensor:
        """The sum of float64 host values over all ranks, on the host: nothing waits for the device."""
        total = torch.from_numpy(np.asarray(values, np.float64)).clone()
        distributed.all_reduce(total, group=_host_group)
        return total

    def ask(self, values: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Begin to find out the largest of each host value over all ranks; likewise. What is returned waits for the answer."""
        work = distributed.all_reduce(values, distributed.ReduceOp.MAX, group=_host_group, async_op=True)
        assert work is not None  # it is asynchronous

        def answer() -> torch.Tensor:
            work.wait()
            return values

        return answer

    def to_device(self, values: torch.Tensor) -> torch.Tensor:
        """Host values on the device, which the host does not wait for."""
        if self.device.type == "cuda":
            values = values.pin_memory()
        return values.to(self.device, non_blocking=True)

    def gather(self, value) -> list:
        """Every rank's small Python object, on every rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        distributed.all_gather_object(values, value)
        return values

    def on_main(self, function: Callable[[], Value]) -> Value:
        """What ``function`` returns on rank 0, a small Python object, on every rank. Called by all ranks together.

        Raises:
            MegavlmError: On every rank, if rank 0 finds a mistake of the user's: nobody is left waiting. The others raise a ConfigError,
                which the command line shows of rank 0 only.
        """
        value, mistake = None, None
        if self.is_main:
            try:
                value = function()
            except MegavlmError as error:
                mistake = error
        value, message = self.gather((value, str(mistake) if mistake else None))[0]
        if mistake:
            raise mistake
        if message is not None:
            raise ConfigError(message)
        return value


def find_place(environment) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT for this process.

    As torchrun and the deepspeed launcher set them; under srun from SLURM's variables; alone: a world of one.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return {name: environment[name] for name in PLACE if name in environment}
    # a batch shell has SLURM_PROCID too; only a step that srun started has a SLURM_STEP_NUM_TASKS
    if "SLURM_STEP_NUM_TASKS" in environment and "SLURM_PROCID" in environment:
        nodes = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
        return {
            "RANK": environment["SLURM_PROCID"],
            "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
            "LOCAL_RANK": environment["SLURM_LOCALID"],
            "MASTER_ADDR": environment.get("MASTER_ADDR") or _first_node(nodes),
            # one job, one port, below the ephemeral ones: two jobs on a node do not meet
            "MASTER_PORT": environment.get("MASTER_PORT") or str(20000 + int(environment["SLURM_JOB_ID"]) % 12000),
        }
    port = str(_free_port())
    return {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def without_place(environment) -> dict[str, str]:
    """The environment for a process that is to be alone, or to start its own world, whatever world this one is in."""
    return {name: value for name, value in environment.items() if name not in (*PLACE, "SLURM_STEP_NUM_TASKS")}


def _first_node(nodes: str) -> str:
    """The first host of a SLURM node list such as ``gpu[007-010,12],login``."""
    if "[" not in nodes.split(",", maxsplit=1)[0]:
        return nodes.split(",", maxsplit=1)[0]
    try:
        shown = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        return shown.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError):  # a container without SLURM's clients
        found = re.match(r"([^\[]+)\[(\d+)", nodes)
        assert found is not None, nodes  # a bracket follows a name and begins with a number
        return found[1] + found[2]


def start(timeout_s: int) -> World:
    """Join the process group: NCCL with CUDA, gloo without.

    Args:
        timeout_s: A collective that takes longer is an error.
    """
    import deepspeed
    import deepspeed.ops

    place = find_place(os.environ)
    os.environ.update(place)
    allow_open_files(SOCKETS_PER_RANK * int(place["WORLD_SIZE"]) + OTHER_FILES, "a world of so many processes", "start fewer processes")
    local_rank = int(place.get("LOCAL_RANK", 0))
    has_cuda = torch.cuda.is_available()
    device = device_of(local_rank, torch.cuda.device_count() if has_cuda else 0)
    if has_cuda:
        torch.cuda.set_device(device)
        # DeepSpeed takes it for the number of the device
        os.environ["LOCAL_RANK"] = str(device.index)
    else:
        # or DeepSpeed compiles a shared-memory all-reduce for half a minute, at every first start
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if has_cuda else "gloo", timeout=timedelta(seconds=timeout_s), verbose=False)
    global _host_group
    _host_group = distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    return World(int(place["RANK"]), int(place["WORLD_SIZE"]), local_rank, device)


def device_of(local_rank: int, num_devices: int) -> torch.device:
    """The device of a process; a launcher may show each process its own one only."""
    return torch.device("cuda", local_rank % num_devices) if num_devices else torch.device("cpu")


OTHER_FILES = 256
"""What a process has open beside connections and shards, at most."""
SOCKETS_PER_RANK = 4
"""Connections to every other rank: two groups over host memory, here and in the checkpoint's thread, and on a CPU two more for ZeRO."""
_host_group: Any = None
"""All processes, talking from host memory; the main thread's."""
_host_groups: set[str] = set()
"""Names of those that `new_host_group` has made."""


def new_host_group(timeout_s: float) -> distributed.ProcessGroup:
    """All processes, talking over gloo from host memory, for a thread of its own. Called by all ranks together."""
    group = distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    assert isinstance(group, distributed.ProcessGroup)  # every rank is a member
    _host_groups.add(group.group_name)
    return group


def set_timeout(timeout_s: float) -> None:
    """From now on a collective may take only so long: in every group, for ZeRO talks over a clone of the default one that DeepSpeed makes.

    The groups of `new_host_group` keep their own.
    """
    # torch has no public names for these; torchtitan uses the same ones
    for group in distributed.distributed_c10d._world.pg_map:
        if group.group_name not in _host_groups:
            distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def stop() -> None:
    """Leave the process group."""
    if distributed.is_initialized():
        distributed.destroy_process_group()
