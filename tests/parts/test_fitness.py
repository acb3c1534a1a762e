"""What does not fit the machine is refused before it is allocated, with the memory that it needs."""

import resource

import pytest

from megavlm.errors import ConfigError
from megavlm.parts import fitness
from megavlm.parts.fitness import check_heads, check_lanes, check_look_ahead, check_model
from megavlm.parts.parts import Parts
from megavlm.routing.plan import RoutingPlan
from megavlm.routing.policies import Dense, Merge
from megavlm.system import memory


def test_a_model_larger_than_the_memory(make_config, monkeypatch):
    parts = Parts(make_config())
    sizes = [parameter.numel() for parameter in parts.make_causal_lm().parameters()]
    number, needed = sum(sizes), 20 * sum(sizes) + 8 * max(sizes)
    monkeypatch.setattr(fitness, "machine_bytes", lambda: needed)
    check_model(parts, world_size=1)
    monkeypatch.setattr(fitness, "machine_bytes", lambda: needed - 1)
    with pytest.raises(ConfigError, match=f"model.architecture: {number:,} parameters.*needs .* GiB"):
        check_model(parts, world_size=1)
    check_model(parts, world_size=2)


def test_nothing_is_allocated_for_the_question(make_config):
    wide = make_config({"model.architecture.intermediate_size": 10**9})
    with pytest.raises(ConfigError, match=r"needs \d,\d\d\d\.\d GiB"):
        check_model(Parts(wide), world_size=1)


def test_a_look_ahead_larger_than_the_memory(make_config, monkeypatch):
    parts = Parts(make_config({"data.look_ahead_samples": 10**6})).with_mixture()
    monkeypatch.setattr(fitness, "machine_bytes", lambda: 1 << 30)
    with pytest.raises(ConfigError, match="data.look_ahead_samples: holding 4,000,000 samples"):
        check_look_ahead(parts, world_size=1)


@pytest.mark.parametrize(
    ("width", "device", "dtype", "is_taken"),
    [
        (8, "cuda", "auto", True),
        (256, "cuda", "bfloat16", True),
        (12, "cuda", "auto", False),
        (264, "cuda", "bfloat16", False),
        (12, "cuda", "float32", True),
        (12, "cpu", "auto", True),
        (264, "cpu", "bfloat16", True),
    ],
)
def test_heads_that_the_fused_attention_does_not_take_are_refused_where_it_is_used(make_config, width, device, dtype, is_taken):
    """Nothing is put on the device for the question."""
    parts = Parts(make_config({"model.architecture.head_dim": width, "model.dtype": dtype}), device)
    if is_taken:
        check_heads(parts)
        return
    with pytest.raises(ConfigError, match=f"model.architecture: heads are {width} wide"):
        check_heads(parts)


@pytest.mark.parametrize(("width", "is_taken"), [(248, True), (249, False), (256, False)])
def test_a_merge_is_refused_where_its_bias_makes_heads_too_wide(width, is_taken):
    plan = RoutingPlan(Merge(at_layer=1), Dense(), 4)
    if is_taken:
        plan.check_head_width(width)
    else:
        with pytest.raises(ConfigError, match=f"merge adds 8 columns to attention heads; the model's are {width} wide"):
            plan.check_head_width(width)


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
    memory.allow_open_files(1000, "this", "have less")
    memory.allow_open_files(3000, "this", "have less")
    assert given == [(3000, 4096)]
    assert memory.machine_bytes() > resource.getpagesize()
