"""Process groups: how many there are, how long each waits, and which device the checkpoint's thread uses."""

import threading

import torch
from torch import distributed

from megavlm.engine import checkpoint
from megavlm.engine.checkpoint import WRITING_TIMEOUT_S, Checkpointer
from megavlm.launch.train import make_trainer
from megavlm.parts import fitness
from megavlm.system.world import OTHER_FILES, SOCKETS_PER_RANK, World
from tests.distributed.ranks import run_ranks

NETWORK_TIMEOUT_S, STEP_TIMEOUT_S = 333, 222


def timeouts_s() -> list[float]:
    """Of every process group, DeepSpeed's included."""
    groups = distributed.distributed_c10d._world.pg_map
    return sorted(group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups)


def start_and_take_steps(world, config) -> list[list[float]]:
    trainer = make_trainer(config, world)
    found = [timeouts_s()]
    trainer.run()
    return [*found, timeouts_s()]


def test_every_group_gets_the_timeouts_of_the_recipe_and_there_are_few(make_config):
    overrides = {"engine.timeout_s": NETWORK_TIMEOUT_S, "engine.step_timeout_s": STEP_TIMEOUT_S}
    config = make_config(overrides | {"optimizer.num_steps": 1, "optimizer.warmup_steps": 0})
    for before, after in run_ranks(2, start_and_take_steps, config):
        assert len(before) <= SOCKETS_PER_RANK
        assert before.count(WRITING_TIMEOUT_S) == after.count(WRITING_TIMEOUT_S) == 1, "the checkpoint's thread has its own"
        assert set(before) == {NETWORK_TIMEOUT_S, WRITING_TIMEOUT_S}
        assert set(after) == {STEP_TIMEOUT_S, WRITING_TIMEOUT_S}


def devices_of_the_thread(world, folder, config) -> list:
    used = []
    checkpoint.torch.cuda.set_device = lambda device: used.append((threading.current_thread() is threading.main_thread(), str(device)))
    checkpointer = Checkpointer(folder, World(world.rank, world.size, 1, torch.device("cuda", 1)), config)
    checkpointer._writer.submit(int).result()
    checkpointer.close()
    return used


def test_the_thread_of_the_checkpoint_uses_the_device_of_its_rank(make_config, tmp_path):
    """Otherwise it would take memory of the first one."""
    assert run_ranks(1, devices_of_the_thread, tmp_path, make_config().checkpoint) == [[(False, "cuda:1")]]


def sums(world) -> tuple:
    total = world.sum([world.rank + 1.0, 0.5])
    return total.tolist(), str(total.device), world.ask(torch.tensor([world.rank, -world.rank]))().tolist()


def test_sums_and_agreements_over_host_memory():
    assert run_ranks(2, sums) == [([3.0, 1.0], "cpu", [1, 0])] * 2


def test_connections_to_many_processes_count_among_open_files(make_config, monkeypatch):
    asked = []
    monkeypatch.setattr(fitness, "allow_open_files", lambda number, *_words: asked.append(number))
    config = make_config({"data.num_lanes": 512})
    fitness.check_lanes(config, world_size=512)
    assert asked == [len(config.data.sources) + SOCKETS_PER_RANK * 512 + OTHER_FILES]
