"""P1, P7, P8, P10 with real ZeRO-3 processes."""

import shutil

import pytest
import torch

from megavlm.data.pack.pack import build_pack
from tests.conftest import TINY
from tests.distributed.ranks import run_ranks
from tests.distributed.work import train, train_each, train_on_each, train_with_extra
from tests.model.test_experts import EXPERTS
from tests.routing.layouts import PATCHES, POLICIES, costing, make_samples


def assert_equal(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    different = [name for name in first if not first[name].equal(second[name])]
    assert not different, different


def in_lane_order(results: list[dict]) -> list[list]:
    """Ids of every step over all ranks."""
    steps = zip(*(result["ids"] for result in results))
    return [sorted(pair for rank in step for pair in rank) for step in steps]


@pytest.fixture
def config(make_config, tmp_path):
    def make(name, overrides=None):
        routing = {
            "routing.understanding": {"policy": "late_drop", "after_layer": 2},
            "routing.generation": {"policy": "random_ltd", "keep_ratio": 0.5},
        }
        return make_config(routing | (overrides or {}), tmp_path / name)

    return make


def test_data_gradients_and_weights_do_not_depend_on_the_world_size(config):
    """P1, P3 and P8: the same packs, and the same weights up to the order of float32 sums."""
    results = {w: run_ranks(w, train, config(f"w{w}"), 3) for w in (1, 2, 4)}
    for world_size in (2, 4):
        assert in_lane_order(results[world_size]) == in_lane_order(results[1])
        assert all(len(result["ids"][0]) == 4 // world_size for result in results[world_size])
        for loss, alone in zip(results[world_size][0]["losses"], results[1][0]["losses"]):
            for tag in ("loss/understanding", "loss/generation", "routing/flops_share"):
                assert loss[tag] == pytest.approx(alone[tag], rel=1e-5), tag
        assert results[world_size][0]["norms"] == pytest.approx(results[1][0]["norms"], rel=1e-4)
        for name, value in results[world_size][0]["weights"].items():
            if "exp_avg_sq" not in name:
                torch.testing.assert_close(value, results[1][0]["weights"][name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("world_size", [1, 2])
def test_resuming_is_bit_identical_to_never_having_stopped(config, world_size):
    """P10, the data included."""
    whole = run_ranks(world_size, train, config("whole"), 6)
    run_ranks(world_size, train, config("parts"), 4)  # the last checkpoint is that of step 3
    resumed = run_ranks(world_size, train, config("parts"), 6)
    assert resumed[0]["first"] == 3
    for rank in range(world_size):
        assert resumed[rank]["ids"] == whole[rank]["ids"][3:]
        assert resumed[rank]["norms"] == whole[rank]["norms"][3:]
        assert resumed[rank]["states"] == whole[rank]["states"]
        assert_equal(resumed[rank]["weights"], whole[rank]["weights"])


TEXT_ONLY = [[("TEXT", 30, 1)], [("text", 2, 1), ("TEXT", 9, 1)]]
READ_ONLY = [[("image", 4, 4), ("text", 3, 1), ("TEXT", 2, 1)]]
DRAW_ONLY = [[("text", 3, 1), ("IMAGE", 4, 4)], [("text", 1, 1), ("IMAGE", 1, 1)]]
NO_LOSS = [[("image", 4, 4)], [("text", 7, 1)]]
SINGLE_TOKEN = [[]]


FEW = (
    "random_ltd",
    "pyramid_question",
    "mixture_of_depths",
    "kv_injection_both",
    "merge_and_injection",
    "visible_bypass",
    "sparse_mlp",
    "patches",
)


@pytest.mark.parametrize("policies", [FEW, pytest.param(tuple(POLICIES | PATCHES), marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_ranks_with_wildly_different_packs_train_without_a_hang_and_as_one_process_does(config, policies):
    """P7: a rank without images, without one of the tasks, without a label, with a single token."""
    kinds = [TEXT_ONLY, READ_ONLY, DRAW_ONLY, SINGLE_TOKEN, NO_LOSS, READ_ONLY + DRAW_ONLY, TEXT_ONLY, NO_LOSS]

    def jobs(world_size):
        found = {}
        for policy in policies:
            understanding, generation = (POLICIES | PATCHES)[policy]
            overrides = {
                "routing.understanding": understanding.model_dump(),
                "routing.generation": generation.model_dump(),
                "optimizer.warmup_steps": 0,
            }
            steps = [
                [_pack(kinds[(lane + shift) % len(kinds)], policy, lane, step) for lane in range(4)] for step, shift in enumerate((0, 3))
            ]
            found[policy] = (config(f"{policy}-{world_size}", overrides), steps)
        return found

    alone, two, four = (run_ranks(w, train_on_each, jobs(w), timeout_s=600)[0] for w in (1, 2, 4))
    for policy in policies:
        assert all(norm > 0 for norm in alone[policy]["norms"])
        for together in (two[policy], four[policy]):
            assert together["norms"] == pytest.approx(alone[policy]["norms"], rel=1e-3), policy
            for name, value in together["weights"].items():
                if name.endswith("exp_avg"):
                    expected = alone[policy]["weights"][name]
                    torch.testing.assert_close(value, expected, rtol=1e-2, atol=1e-5, msg=f"{policy} {name}")


@pytest.mark.parametrize("families", [("qwen3_moe",), pytest.param(tuple(EXPERTS), marks=pytest.mark.slow)])
def test_ranks_whose_tokens_choose_few_experts_train_without_a_hang_and_as_one_process_does(config, families):
    """P7 and P8 with experts: a pack of a single token passes two or three of them, and the balance is one of the step's packs."""
    kinds = [SINGLE_TOKEN, READ_ONLY + DRAW_ONLY, TEXT_ONLY, NO_LOSS]

    def jobs(world_size):
        steps = [[_pack(kinds[(lane + step) % 4], "random_ltd", lane, step) for lane in range(4)] for step in range(2)]
        return {family: (config(f"{family}-{world_size}", with_experts(family)), steps) for family in families}

    alone, two, four = (run_ranks(w, train_on_each, jobs(w), timeout_s=300)[0] for w in (1, 2, 4))
    for family in families:
        for together in (two[family], four[family]):
            assert together["norms"] == pytest.approx(alone[family]["norms"], rel=1e-3), family
            for name, value in together["weights"].items():
                if name.endswith("exp_avg"):
                    expected = alone[family]["weights"][name]
                    torch.testing.assert_close(value, expected, rtol=1e-2, atol=1e-5, msg=f"{family} {name}")


def with_experts(family):
    architecture = {name: value for name, value in TINY["model.architecture"].items() if name != "head_dim"}
    return {
        "model.architecture": architecture | {"model_type": family} | EXPERTS[family],
        "model.activation_checkpointing": family == "olmoe",
        "loss.balance_weight": 0.5,
        "optimizer.warmup_steps": 0,
    }


def _pack(layout, policy, lane, step):
    if policy in PATCHES:
        layout = [[("IMAGE", 2, 2) if part == ("IMAGE", 1, 1) else part for part in sample] for sample in layout]
    return build_pack(make_samples(layout, seed=step), costing(policy), num_sources=2, lane=lane, step=step, seed=0)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_step_without_a_task_moves_its_parameters_by_momentum_and_decay_only(config, world_size):
    """DeepSpeed's stage 3 would apply the last gradient again."""
    absent = 2
    settings = config("a").optimizer
    history = run_ranks(world_size, train_with_extra, config("a"), 3, absent, True)[0]
    before, after = history[absent - 1], history[absent]
    (beta1, beta2), step = settings.betas, absent + 1
    exp_avg, exp_avg_sq = beta1 * before["exp_avg"], beta2 * before["exp_avg_sq"]
    direction = (exp_avg / (1 - beta1**step)) / ((exp_avg_sq / (1 - beta2**step)).sqrt() + settings.eps)
    value = before["value"] * (1 - after["lr"] * settings.weight_decay) - after["lr"] * direction
    torch.testing.assert_close(after["exp_avg"], exp_avg, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(after["exp_avg_sq"], exp_avg_sq, rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(after["value"], value, rtol=1e-5, atol=1e-7)


def test_without_the_remedy_the_stale_gradient_is_applied_again(config):
    """If this fails, DeepSpeed has mended it and `forget_gradients` can go."""
    history = run_ranks(1, train_with_extra, config("a"), 3, 2, False)[0]
    decayed = config("a").optimizer.betas[0] * history[1]["exp_avg"]
    assert not torch.allclose(history[2]["exp_avg"], decayed, rtol=1e-3, atol=1e-9)


PHASES = {
    "optimizer.num_steps": 6,
    "checkpoint.every_steps": 1,
    "checkpoint.keep_last": 9,
    "routing": {
        "phases": [
            {"fraction": 0.5, "understanding": {"policy": "late_drop", "after_layer": 2}, "generation": {"policy": "mixture_of_depths"}},
            {"fraction": 0.5, "generation": {"policy": "tread", "first_layer": 1, "end_layer": 3}, "optimizer": {"schedule": "wsd"}},
        ]
    },
}
"""A switch after step 3: other layers, other selectors, gates that are no longer called, a learning rate that warms up again."""


def test_data_and_weights_over_a_switch(make_config, tmp_path):
    """P1, P8, P9 and P10: at other world sizes, and resumed just before the switch, at it, and just after."""
    whole = run_ranks(2, train, make_config(PHASES, tmp_path / "whole"), 6)
    shares = [losses["routing/flops_share"] for losses in whole[0]["losses"]]
    assert not {round(share, 2) for share in shares[:3]} & {round(share, 2) for share in shares[3:]}, "the routes differ"

    def resumed_after(step, name):
        """The folder as it was after a step."""
        run = tmp_path / name
        shutil.copytree(tmp_path / "whole", run)
        for checkpoint in (run / "checkpoints").glob("step-*"):
            if int(checkpoint.name[5:]) > step:
                shutil.rmtree(checkpoint)
        return make_config(PHASES, run), 6

    again = run_ranks(2, train_each, {step: resumed_after(step, f"after-{step}") for step in (2, 3, 4)})
    for rank, results in enumerate(again):
        for step, resumed in results.items():
            assert resumed["first"] == step
            assert resumed["ids"] == whole[rank]["ids"][step:]
            assert resumed["norms"] == whole[rank]["norms"][step:]
            assert resumed["states"] == whole[rank]["states"]
            assert_equal(resumed["weights"], whole[rank]["weights"])

    (alone,) = run_ranks(1, train_each, {0: (make_config(PHASES, tmp_path / "alone"), 6), 3: resumed_after(3, "after-3-alone")})
    for step, result in alone.items():
        assert result["first"] == step
        assert in_lane_order([result]) == in_lane_order(whole)[step:]
        assert result["norms"] == pytest.approx(whole[0]["norms"][step:], rel=1e-3)
