"""Training with the options of the fast path: leaf modules and compiled functions, under real ZeRO-3 processes.

They change rounding, so runs with and without them are compared up to that; a run with them resumes bit by bit, and their checkpoints
are read without them.
"""

import functools
import shutil

import pytest
import torch

from megavlm.model import fusion, loss
from tests.distributed.ranks import run_ranks
from tests.distributed.test_training import DRAW_ONLY, NO_LOSS, READ_ONLY, SINGLE_TOKEN, TEXT_ONLY, _pack, assert_equal
from tests.distributed.work import train, train_on_each
from tests.routing.layouts import POLICIES

KINDS = [TEXT_ONLY, READ_ONLY, DRAW_ONLY, SINGLE_TOKEN, NO_LOSS, READ_ONLY + DRAW_ONLY, TEXT_ONLY, NO_LOSS]
ROUTED = ("mixture_of_depths", "kv_injection_both", "visible_bypass")


def train_traced(world, *args):
    """`train`, with compiled functions that take all of `torch.compile` but the kernels, which would take a C++ compiler minutes."""
    traced = functools.cache(functools.partial(torch.compile, dynamic=True, backend="aot_eager"))
    for module in (fusion, loss):
        module.compiled = traced
    return train(world, *args)


@pytest.mark.parametrize(
    ("world_size", "compiled"),
    [
        pytest.param(1, ["norm"], marks=pytest.mark.slow),
        pytest.param(2, ["norm", "rotary", "mlp", "loss"], marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
    ],
)
def test_a_fast_run_resumes_bit_by_bit_and_its_checkpoint_is_read_without(make_config, tmp_path, world_size, compiled):
    fast = {"engine.leaf_modules": True, "model.compiled": compiled}

    def config(name, overrides):
        routing = {"routing.generation": {"policy": "random_ltd", "keep_ratio": 0.5}}
        return make_config(routing | overrides, tmp_path / name)

    whole = run_ranks(world_size, train_traced, config("whole", fast), 6)
    run_ranks(world_size, train_traced, config("parts", fast), 4)  # the last checkpoint is that of step 3
    shutil.copytree(tmp_path / "parts", tmp_path / "plain")
    resumed = run_ranks(world_size, train_traced, config("parts", fast), 6)
    plain = run_ranks(world_size, train, config("plain", {}), 6)
    for rank in range(world_size):
        assert resumed[rank]["first"] == plain[rank]["first"] == 3
        assert resumed[rank]["norms"] == whole[rank]["norms"][3:] != plain[rank]["norms"]
        assert plain[rank]["norms"] == pytest.approx(whole[rank]["norms"][3:], rel=1e-4)
        assert_equal(resumed[rank]["weights"], whole[rank]["weights"])
        assert_equal(plain[rank]["restored"], resumed[rank]["restored"])


@pytest.mark.parametrize(
    ("world_size", "policies"),
    [(2, ROUTED), pytest.param(4, tuple(POLICIES), marks=[pytest.mark.slow, pytest.mark.timeout(1800)])],
)
def test_leaf_modules_change_nothing_but_rounding(make_config, tmp_path, world_size, policies):
    """Ranks with wildly different packs, a rank without images or labels, recomputed layers."""
    jobs = {}
    for policy in policies:
        understanding, generation = POLICIES[policy]
        steps = [[_pack(KINDS[(lane + 3 * step) % len(KINDS)], policy, lane, step) for lane in range(4)] for step in range(2)]
        for is_leaf in (True, False):
            overrides = {
                "routing.understanding": understanding.model_dump(),
                "routing.generation": generation.model_dump(),
                "optimizer.warmup_steps": 0,
                "engine.deepspeed": "zero3",
                "engine.leaf_modules": is_leaf,
                "model.activation_checkpointing": 2,
            }
            jobs[policy, is_leaf] = (make_config(overrides, tmp_path / f"{policy}-{is_leaf}"), steps)
    for rank in run_ranks(world_size, train_on_each, jobs, timeout_s=600):
        for policy in policies:
            whole, apart = rank[policy, True], rank[policy, False]
            assert whole["norms"] == pytest.approx(apart["norms"], rel=1e-5)
            for name, value in whole["weights"].items():
                if name.endswith("exp_avg"):
                    torch.testing.assert_close(value, apart["weights"][name], rtol=1e-3, atol=1e-7, msg=f"{policy} {name}")
