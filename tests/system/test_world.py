"""Which process am I: the environments of torchrun, srun, a batch shell, and none."""

import pytest

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
