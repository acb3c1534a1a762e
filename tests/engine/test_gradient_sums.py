"""Gradients in bfloat16 are summed in float32: a real optimizer step of 32 packs, against sums in float64."""

import json

import pytest
import torch

from megavlm.engine.deepspeed_file import read_deepspeed_file
from megavlm.parts.parts import Parts
from megavlm.routing.tasks import TASKS
from tests.distributed.ranks import run_ranks
from tests.distributed.work import train_on_each

NUM_PACKS = 32
BETA = 0.9
"""After the first step Adam's first moment is (1 - BETA) times the gradient."""


def gradient_in_float64(config, packs) -> dict[str, torch.Tensor]:
    """The gradient of a step: of each pack in bfloat16, by plain autograd, summed in float64."""
    torch.manual_seed(config.seed)
    parts = Parts(config)
    backbone = parts.make_backbone(parts.make_causal_lm())
    for parameter in backbone.parameters():  # the tables of the rotary embedding stay float32
        parameter.data = parameter.data.bfloat16()
    labels = torch.tensor(sum(pack.task_labels for pack in packs)).double()
    factor_G = torch.cat([(1 / labels.clamp(min=1)).repeat(len(config.data.sources)), torch.zeros(1)]).float()
    totals = {name: torch.zeros(parameter.shape, dtype=torch.float64) for name, parameter in backbone.named_parameters()}
    for pack in packs:
        backbone.zero_grad()
        (backbone(pack) * factor_G).sum().backward()
        for name, parameter in backbone.named_parameters():
            totals[name] += 0 if parameter.grad is None else parameter.grad.double()
    return totals


def test_a_step_of_many_packs(make_config, tmp_path):
    in_bfloat16 = tmp_path / "in_bfloat16.json"
    sums = {"communication_data_type": "bf16", "data_types": {"grad_accum_dtype": "bf16"}}
    in_bfloat16.write_text(json.dumps(read_deepspeed_file("zero3") | sums))
    of_the_run = {
        "data.num_lanes": NUM_PACKS,
        "model.dtype": "bfloat16",
        "optimizer.betas": [BETA, 0.95],
        "optimizer.gradient_clipping": 1e6,
        "loss.task_weights": dict.fromkeys(TASKS, 1.0),
    }
    default = make_config(of_the_run, tmp_path / "default")
    configs = {"default": default, "bfloat16": make_config(of_the_run | {"engine.deepspeed": str(in_bfloat16)}, tmp_path / "other")}
    resolved = Parts(default).with_mixture()
    packs = [next(resolved.make_lane(lane))[0] for lane in range(NUM_PACKS)]
    (steps,) = run_ranks(1, train_on_each, {name: (config, [packs]) for name, config in configs.items()})
    expected = gradient_in_float64(resolved.config, packs)
    whole = torch.cat([gradient.flatten() for gradient in expected.values()])

    def error_of(name: str) -> float:
        found = torch.cat([steps[name]["weights"][f"{key}/exp_avg"].double().flatten() for key in expected]) / (1 - BETA)
        return float((found - whole).norm() / whole.norm())

    errors = {name: error_of(name) for name in configs}
    assert errors["default"] < 1e-5, errors
    assert errors["bfloat16"] > 2e-3, errors
    assert steps["default"]["norms"] == pytest.approx([float(whole.norm())], rel=1e-5)
