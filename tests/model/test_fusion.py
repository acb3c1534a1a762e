"""Compiled norms, rotary embedding, activations and loss: in which families, and that they change nothing but rounding."""

import functools
from copy import deepcopy

import pytest
import torch

from megavlm.model import fusion, loss
from megavlm.model.backbone import Backbone, make_causal_lm
from megavlm.model.families import EXACT
from megavlm.model.fusion import PARTS, fuse
from tests.model.test_families import VARIANTS, architecture_of, make
from tests.routing.layouts import VOCABULARY, make_pack, phases

MODULES_OF_TWO_LAYERS = {
    **{family: {"norm": 5, "rotary": 2, "mlp": 2} for family in EXACT},
    "qwen3": {"norm": 9, "rotary": 2, "mlp": 2},
    "exaone4": {"norm": 9, "rotary": 2, "mlp": 2},
    "olmo2": {"norm": 9, "rotary": 2, "mlp": 2},
    "glm4": {"norm": 9, "rotary": 2, "mlp": 2},
    "apertus": {"norm": 9, "rotary": 2},  # its MLP has no gate
    "arcee": {"norm": 5, "rotary": 2},
    "olmo": {"rotary": 2, "mlp": 2},  # its norms have no weight
    "seed_oss": {"norm": 5, "rotary": 2},  # its MLP has dropout
    "gemma2": {"norm": 9, "rotary": 2, "mlp": 2},
    "hyperclovax": {"norm": 9, "rotary": 2, "mlp": 2},
    "gemma3_text": {"norm": 13, "rotary": 2, "mlp": 2},
    "olmo3": {"norm": 9, "rotary": 2, "mlp": 2},
    "cohere": {"rotary": 2, "mlp": 2},  # its norms take a mean away
    "cohere2": {"rotary": 2, "mlp": 2},
    "phi": {"rotary": 2},
    "jais2": {"rotary": 2},  # torch's own LayerNorm, which is one kernel; no gate
    "starcoder2": {"rotary": 2},
    # experts are one module for all of them
    "mixtral": {"norm": 5, "rotary": 2},
    "olmoe": {"norm": 9, "rotary": 2},
    "qwen3_moe": {"norm": 9, "rotary": 2},
}


@pytest.fixture
def uncompiled(monkeypatch):
    """The formulas themselves, in eager mode."""
    monkeypatch.setattr(fusion, "compiled", lambda function: function)


@pytest.mark.parametrize("model_type", EXACT)
def test_what_is_changed_in_every_family(model_type, uncompiled):
    assert fuse(make_causal_lm(architecture_of(model_type, num_hidden_layers=2), VOCABULARY), PARTS) == MODULES_OF_TWO_LAYERS[model_type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("model_type", "fields"), [*((family, {}) for family in EXACT), *VARIANTS])
def test_the_formulas_are_those_of_the_family_bit_by_bit(model_type, fields, dtype, uncompiled):
    backbone, pack = make(architecture_of(model_type, **fields))
    backbone.to(dtype)
    changed = deepcopy(backbone)
    fuse(changed.causal_lm, PARTS)
    for found, expected in zip(sums_and_gradients(changed, pack), sums_and_gradients(backbone, pack), strict=True):
        assert found.equal(expected)


def test_one_model_is_changed_and_no_other(uncompiled):
    first, second = (make_causal_lm(architecture_of("qwen3"), VOCABULARY) for _ in range(2))
    fuse(first, PARTS)
    assert all("forward" not in vars(module) for module in second.modules())
    assert sum("forward" in vars(module) for module in first.modules()) == 4 * 6 + 1
    assert not fuse(second, ()) and not fuse(second, ["loss"])


def test_a_norm_of_another_formula_is_left_alone(uncompiled):
    class Centred(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = torch.nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x):
            return self.weight * torch.nn.functional.layer_norm(x, x.shape[-1:], eps=self.eps)

    assert not fuse(torch.nn.Sequential(Centred()), PARTS)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["qwen3", "gemma", "glm", "olmo2"])
def test_compiled_functions_change_nothing_but_rounding(model_type):
    """With the kernels that the C++ compiler makes: minutes."""
    assert_compiled_is_close(model_type)


@pytest.mark.parametrize("model_type", ["gemma", "glm"])
def test_traced_functions_change_nothing_but_rounding(model_type, monkeypatch):
    """Through all of `torch.compile` but the kernels."""
    traced = functools.cache(functools.partial(torch.compile, dynamic=True, fullgraph=True, backend="aot_eager"))
    for module in (fusion, loss):
        monkeypatch.setattr(module, "compiled", traced)
    assert_compiled_is_close(model_type)


def assert_compiled_is_close(model_type):
    """With packs of several shapes, some layers recomputed, and chunks of the loss that are empty."""
    plain = make(architecture_of(model_type))[0].causal_lm
    fast = Backbone(deepcopy(plain), phases("dense"), 1, 99, chunk_rows=20, activation_checkpointing=2, compiled=PARTS)
    slow = Backbone(plain, phases("dense"), 1, 99, chunk_rows=20)
    for rows in (11, 4, 30):
        pack = make_pack([[("TEXT", rows, 1)], [("TEXT", 3, 1)]], "dense")
        for found, expected in zip(sums_and_gradients(fast, pack), sums_and_gradients(slow, pack), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def sums_and_gradients(backbone, pack):
    backbone.zero_grad()
    sums = backbone(pack)
    sums.sum().backward()
    return [sums.detach(), *(parameter.grad.clone() for parameter in backbone.parameters() if parameter.grad is not None)]


def test_a_trial_changes_nothing(uncompiled):
    """The MLP of seed_oss has dropout, and a model may come into being with other random numbers after it."""
    causal_lm = make_causal_lm(architecture_of("seed_oss"), VOCABULARY)
    before, state = deepcopy(causal_lm.state_dict()), torch.get_rng_state()
    fuse(causal_lm, PARTS)
    assert torch.get_rng_state().equal(state)
    assert all(value.equal(before[name]) for name, value in causal_lm.state_dict().items())
