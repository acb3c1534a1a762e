"""Which process am I: the environments of torchrun, srun, a batch shell, and none."""

import os

import deepspeed
import pytest
import torch
from torch import distributed

from megavlm.system import world
from megavlm.system.world import _first_node, device_of, find_place

SRUN = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_JOB_NODELIST": "gpu07,gpu09",
}


def test_torchrun_and_deepspeed():
    environment = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "5"}
    assert find_place(environment | SRUN) == environment


def test_srun():
    assert find_place(SRUN) == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "30567",
    }


def test_the_batch_shell_of_a_job_is_alone():
    environment = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_NODELIST": "gpu07"}
    assert find_place(environment)["WORLD_SIZE"] == "1"


@pytest.mark.parametrize(("nodes", "first"), [("gpu[007-010,12],login", "gpu007"), ("a-1,b[2-3]", "a-1"), ("n[5]", "n5"), ("solo", "solo")])
def test_first_node(nodes, first):
    assert _first_node(nodes) == first


def test_a_process_uses_its_own_device_also_where_it_sees_one_only():
    assert [str(device_of(rank, 4)) for rank in range(5)] == ["cuda:0", "cuda:1", "cuda:2", "cuda:3", "cuda:0"]
    assert str(device_of(7, 1)) == "cuda:0", "a launcher shows each process one device"
    assert str(device_of(7, 0)) == "cpu"


def test_deepspeed_learns_the_number_of_the_device(monkeypatch):
    """A launcher shows each process its own GPU only: it is number 0 there, whatever the process's number on the node is."""
    place = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _device: None)
    monkeypatch.setattr(deepspeed, "init_distributed", lambda **_options: None)
    monkeypatch.setattr(distributed, "new_group", lambda **_options: None)
    monkeypatch.setattr(world, "_host_group", None)
    started = world.start(60)
    assert (started.local_rank, str(started.device), os.environ["LOCAL_RANK"]) == (3, "cuda:0", "0")
