"""What does not fit the machine is refused before it is allocated, with the memory that it needs."""

import resource

import pytest

from megavlm.errors import ConfigError
from megavlm.parts import fitness
from megavlm.parts.fitness import check_lanes, check_look_ahead, check_model
from megavlm.parts.parts import Parts
from megavlm.system import memory


def test_a_model_larger_than_the_memory(make_config, monkeypatch):
    parts = Parts(make_config())
    number = sum(parameter.numel() for parameter in parts.make_causal_lm().parameters())
    monkeypatch.setattr(fitness, "machine_bytes", lambda: 20 * number)
    check_model(parts, world_size=1)
    monkeypatch.setattr(fitness, "machine_bytes", lambda: 20 * number - 1)
    with pytest.raises(ConfigError, match=f"model.architecture: {number:,} parameters.*needs .* GiB"):
        check_model(parts, world_size=1)
    check_model(parts, world_size=2)


def test_nothing_is_allocated_for_the_question(make_config):
    wide = make_config({"model.architecture.intermediate_size": 10**9})
    with pytest.raises(ConfigError, match=r"needs 7,\d\d\d\.\d GiB"):
        check_model(Parts(wide), world_size=1)


def test_a_look_ahead_larger_than_the_memory(make_config, monkeypatch):
    parts = Parts(make_config({"data.look_ahead_samples": 10**6})).with_mixture()
    monkeypatch.setattr(fitness, "machine_bytes", lambda: 1 << 30)
    with pytest.raises(ConfigError, match="data.look_ahead_samples: holding 4,000,000 samples"):
        check_look_ahead(parts, world_size=1)


def test_lanes_of_one_process(make_config, monkeypatch):
    config = make_config({"data.num_lanes": 1024})
    check_lanes(config, world_size=2)
    with pytest.raises(ConfigError, match="data.num_lanes: each of 1 processes would run 1024 packs per step"):
        check_lanes(config, world_size=1)
    monkeypatch.setattr(memory.resource, "getrlimit", lambda _: (1024, 1024))
    with pytest.raises(ConfigError, match="this machine allows 1024"):
        check_lanes(config, world_size=2)


def test_open_files_are_allowed_where_the_machine_does(monkeypatch):
    given = []
    monkeypatch.setattr(memory.resource, "getrlimit", lambda _: (1024, 4096))
    monkeypatch.setattr(memory.resource, "setrlimit", lambda _, limits: given.append(limits))
    memory.allow_open_files(1000)
    memory.allow_open_files(3000)
    assert given == [(3000, 4096)]
    assert memory.machine_bytes() > resource.getpagesize()
