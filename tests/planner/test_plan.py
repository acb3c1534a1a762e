"""What a plan says follows from the recipe's real packs and the stock layers; where rates come from the data sheet, it says so."""

import json
import re
from dataclasses import asdict
from itertools import pairwise

import numpy as np
import pytest
import torch

from megavlm.cli.plan import PlanCommand
from megavlm.config import load_config
from megavlm.errors import ConfigError
from megavlm.parts.parts import Parts, situation_of
from megavlm.planner.layer import count_layer
from megavlm.planner.load import average_load, largest_load
from megavlm.planner.memory import memory_of
from megavlm.planner.plan import Planner
from megavlm.planner.rates import Curve, Host, from_document, from_file, from_sheet
from megavlm.planner.steptime import StepTime
from tests.model.test_backbone import MIXED, make_backbone
from tests.routing.layouts import make_pack

LIQUID = {"data.look_ahead_samples": 32}


@pytest.fixture(scope="module")
def liquid():
    return Planner(load_config("unified-7b", LIQUID), from_sheet("h100"), standard_data=True)


def test_the_average_pack_is_what_lanes_build(make_config):
    routed = {"policy": "random_ltd", "keep_ratio": 0.5}
    settings = {"routing.understanding": routed, "routing.generation": routed, "optimizer.num_steps": 99}
    config = Parts(make_config(settings)).with_mixture().config
    load, lane = average_load(situation_of(config)), Parts(config).make_lane(0)
    packs = [next(lane)[0] for _ in range(40)]
    assert load.tokens == pytest.approx(np.mean([pack.num_tokens for pack in packs]), rel=0.05)
    assert load.labels == pytest.approx(np.mean([len(pack.rows_M) for pack in packs]), rel=0.1)
    for s, stage in enumerate(load.stages):
        assert stage.rows == pytest.approx(np.mean([sum(pack.route.stages[s].sequences.lengths) for pack in packs]), rel=0.05)
        square = stage.samples_L @ stage.lengths_L.astype(float) ** 2
        assert square == pytest.approx(np.mean([np.square(pack.route.stages[s].sequences.lengths).sum() for pack in packs]), rel=0.1)


def test_what_a_layer_keeps_is_what_it_keeps_on_a_cpu():
    """The stand-in for the fused kernel keeps what the real attention keeps."""
    backbone, pack = make_backbone("dense", "llama").float(), make_pack(MIXED * 20, "dense")
    config = backbone.causal_lm.config
    counted = count_layer(config.to_json_string(use_diff=False), type(config), torch.float32)
    weights = {parameter.untyped_storage().data_ptr() for parameter in backbone.parameters()}
    kept = {}

    def pack_hook(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda x: x):
        backbone.hidden_states(pack)
    measured = sum(num_bytes for num_bytes, _ in kept.values()) / pack.num_tokens / config.num_hidden_layers
    assert counted.saved_bytes == pytest.approx(measured, rel=0.15)
    assert counted.input_bytes == 4 * config.hidden_size < counted.saved_bytes
    assert 0 < counted.forward_moved_bytes < counted.moved_bytes


def test_memory_is_shared_and_computing_again_saves_it(liquid):
    few, many = (liquid.outlook(world).memory for world in (64, 256))
    for part in ("parameters", "gradients", "optimizer"):
        assert getattr(few, part) == pytest.approx(4 * getattr(many, part))
    assert few.activations == many.activations and many.total == sum(asdict(many).values())
    held = [outlook.memory.activations for _, outlook in liquid.checkpointing(256)]
    assert held == sorted(held, reverse=True) and held[0] > 2 * held[-1]
    seconds = [outlook.time.total for _, outlook in liquid.checkpointing(256)]
    assert all(later >= earlier * (1 - 1e-9) for earlier, later in pairwise(seconds))


def test_the_route_and_the_number_of_gpus_show(liquid):
    routed, dense = liquid.outlook(256), liquid.outlook(256, dense=True)
    assert routed.time.products < dense.time.products and routed.tokens_per_s > dense.tokens_per_s
    assert routed.dense_equivalent_mfu > routed.executed_mfu
    assert 1 < liquid.imbalance.factor(8) < liquid.imbalance.factor(1024) < 1.2
    assert liquid.imbalance.factor(1) == pytest.approx(1, abs=0.01)
    # one pack of a step at least for every GPU
    assert [outlook.packs_per_step for outlook in liquid.table()] == [256] * 6 + [512, 1024]


def test_the_share_of_flops_is_that_of_the_packs(liquid):
    routed, dense = liquid.outlook(8), liquid.outlook(8, dense=True)
    tokens = [average_load(situation).tokens for situation in (liquid.situation, liquid.dense)]
    ratio = routed.dense_equivalent_mfu * routed.time.total / (dense.dense_equivalent_mfu * dense.time.total)
    assert ratio == pytest.approx(tokens[0] / tokens[1], rel=1e-6)
    assert dense.executed_mfu == pytest.approx(dense.dense_equivalent_mfu * (1 + 14 / 28 / 3), rel=0.05), "every second layer twice"


def test_where_it_does_not_fit_the_remedies_do():
    planner = Planner(load_config("unified-7b", LIQUID), from_sheet("l40s"), standard_data=True)
    assert not planner.outlook(4).fits
    remedies = list(planner.remedies(4))
    assert remedies and all(word.startswith("--") for word in remedies)
    more = next(int(remedy.split()[1].rstrip(":")) for remedy in remedies if remedy.startswith("--gpus"))
    assert planner.outlook(more).fits


def test_a_shared_pack_holds_less(liquid):
    model = liquid.model(liquid.config, liquid.situation)
    load = largest_load(average_load(liquid.situation), liquid.situation)
    alone, shared = (memory_of(model, load, 256, base_bytes=0, sequence_parallel=number) for number in (1, 4))
    assert shared.activations == alone.activations / 4 and shared.parameters == alone.parameters
    with pytest.raises(ConfigError, match="28 heads and 4 heads of keys cannot be divided over 3"):
        model.check_sequence_parallel(3)
    model.check_sequence_parallel(4)


def test_a_plan_without_measured_rates_says_so(tmp_path, capsys):
    PlanCommand().plan("unified-7b", gpus=256, standard_data=True, out=str(tmp_path / "plan.png"), **LIQUID)
    text = capsys.readouterr().out
    assert "extrapolated: the data sheet of H100" in text and "GPU-hours saved" in text
    assert re.search(r"^\| 1024 \| 1024 \|", text, re.MULTILINE)
    document = json.loads((tmp_path / "plan.json").read_text())
    assert document["is_measured"] is False and [row["world_size"] for row in document["table"]][-1] == 1024
    assert document["here"]["step_s"] == pytest.approx(sum(document["here"]["time"].values()))
    assert (tmp_path / "plan.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"gpu": "tpu"}, "--gpu=tpu is not among the data sheets"),
        ({"calibration": "nowhere.json"}, "is no calibration"),
        ({"gpus": 6, "sequence_parallel": 4}, "does not divide 6 GPUs"),
        ({"data.pack_tokens": 1024}, "a pack takes 1024"),
    ],
)
def test_what_cannot_be_planned_is_said(arguments, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        PlanCommand().plan("unified-7b", standard_data=True, out=str(tmp_path / "plan.png"), **arguments)


def test_a_curve_passes_through_what_was_measured():
    curve = Curve([((8.0, 64.0), 10.0), ((64.0, 64.0), 40.0)])
    assert curve(8, 64) == pytest.approx(10, rel=1e-3) and curve(64, 64) == pytest.approx(40, rel=1e-3)
    assert 10 < curve(20, 64) < 40


def test_a_calibration_is_read(tmp_path):
    document = {
        "device": "a device",
        "world_size": 2,
        "memory_bytes": 1e9,
        "peak_flops_per_s": None,
        "products": [[[1, 1, 1], 1e9]],
        "attention": [[[1, 1], 1e9]],
        "moved": [[[1], 1e9]],
        "logits": [[[1], 1e9]],
        "optimizer_s_per_parameter": 1e-9,
        "host": asdict(Host(step_s=0.5)),
        "collectives": {"bytes_per_s": 1e9, "between_nodes_bytes_per_s": 1e9, "begin_s": 0.0, "ranks_per_node": 2},
    }
    (tmp_path / "rates.json").write_text(json.dumps(document))
    rates = from_file(tmp_path / "rates.json")
    assert rates == from_document(document, str(tmp_path / "rates.json")) and rates.is_measured and "2 processes" in rates.origin
    (tmp_path / "rates.json").write_text("{}")
    with pytest.raises(ConfigError, match="is no calibration"):
        from_file(tmp_path / "rates.json")


def test_times_add_up():
    assert (StepTime(products=1, host=2) + StepTime(host=3).times(2)).total == 9
