import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

from megavlm.costs import ModelShape
from megavlm.data.pack.pack import build_pack
from megavlm.errors import ConfigError
from megavlm.model.backbone import Backbone, make_causal_lm
from megavlm.model.experts import balance_loss, balance_losses, expert_blocks
from megavlm.parts.parts import Parts
from tests.conftest import TINY
from tests.model.test_backbone import MIXED
from tests.routing.layouts import NUM_LAYERS, VOCABULARY, costing, make_pack, make_samples, phases

EXPERTS = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 3},
    "qwen3_moe": {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8},
}
SMALL = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2}
EVERY_FAMILY = pytest.mark.parametrize("family", EXPERTS)


def make_backbone(family, policy="dense", **options):
    torch.manual_seed(0)
    causal_lm = make_causal_lm({"model_type": family, "initializer_range": 0.2} | SMALL | EXPERTS[family], VOCABULARY)
    return Backbone(causal_lm, phases(policy), num_sources=1, max_labels=200, chunk_rows=200, **options).double()


def test_the_loss_is_that_of_transformers_for_one_layer_and_their_mean_for_several():
    generator = torch.Generator().manual_seed(0)
    layers = [torch.randn(tokens, 6, generator=generator) * 3 for tokens in (40, 40, 13)]
    routers = [(logits, logits.topk(2).indices) for logits in layers]
    theirs = [load_balancing_loss_func((logits,), 6, 2) for logits in layers]
    for router, expected in zip(routers, theirs):
        torch.testing.assert_close(balance_loss(*router), expected)
    torch.testing.assert_close(balance_losses(routers), [torch.stack(theirs).mean()[None]])
    assert balance_losses([]) == []


def test_equal_loads_cost_least():
    assert balance_loss(torch.zeros(16, 4), torch.tensor([[0, 1], [2, 3]] * 8)) == 2
    assert balance_loss(torch.tensor([[9.0, 9.0, 0.0, 0.0]]).expand(16, 4), torch.tensor([[0, 1]]).expand(16, 2)) > 3.9


@EVERY_FAMILY
@pytest.mark.parametrize("policy", ["dense", "late_drop", "random_ltd"])
def test_the_loss_is_of_the_tokens_that_pass_the_layer(family, policy):
    backbone, pack = make_backbone(family, policy), make_pack(MIXED, policy)
    seen = []
    for block in expert_blocks(backbone):
        block.gate.register_forward_hook(lambda _gate, _inputs, output: seen.append((output[0], output[2])))
    sums_G = backbone(pack)
    active = [sum(stage.sequences.lengths) for stage in pack.route.stages for _ in range(stage.first_layer, stage.end_layer)]
    assert [len(logits) for logits, _ in seen] == active
    expected = sum(balance_loss(*router) for router in seen) / NUM_LAYERS
    torch.testing.assert_close(sums_G[-1], expected)
    assert len(sums_G) == backbone.num_groups + 2
    sums_G[-1].backward()
    assert all(block.gate.weight.grad.abs().sum() > 0 for block in expert_blocks(backbone))
    assert not backbone.causal_lm.lm_head.weight.grad.any()


@EVERY_FAMILY
@pytest.mark.parametrize("policy", ["late_drop", "shared_bypass_stride", "kv_injection_both", "merge"])
def test_a_routed_pack_equals_its_samples_one_by_one(family, policy):
    backbone, samples = make_backbone(family, policy), make_samples(MIXED)
    with torch.no_grad():
        packs = [build_pack(some, costing(policy), num_sources=1, lane=0, step=0, seed=0) for some in (samples, *([s] for s in samples))]
        together, *alone = (backbone.hidden_states(pack)[0] for pack in packs)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("every", [True, 2])
def test_a_recomputed_layer_counts_once(every):
    found = []
    for checkpointing in (False, every):
        backbone = make_backbone("olmoe", "random_ltd", activation_checkpointing=checkpointing)
        sums_G = backbone(make_pack(MIXED, "random_ltd"))
        sums_G.sum().backward()
        found.append((sums_G.detach(), [parameter.grad for parameter in backbone.parameters()]))
    torch.testing.assert_close(*found)


@EVERY_FAMILY
def test_the_formula_counts_what_active_experts_multiply(family):
    backbone, tokens = make_backbone(family), 30
    config = backbone.causal_lm.config
    config._experts_implementation = "eager"
    with FlopCounterMode(display=False) as counter:
        expert_blocks(backbone)[0](torch.randn(1, tokens, 32, dtype=torch.float64))
    shape = ModelShape.of(config)
    assert (shape.num_experts, shape.active_experts) == tuple(list(EXPERTS[family].values())[:2])
    attention = 2 * 32 * (2 * shape.num_heads + 2 * shape.num_kv_heads) * shape.head_width
    assert counter.get_total_flops() == tokens * (shape.layer_flops_per_token - attention)


def test_float32_takes_one_call_for_all_experts_and_says_the_same():
    backbone, pack = make_backbone("qwen3_moe").float(), make_pack(MIXED, "dense")
    sums_G = backbone(pack)
    assert backbone.causal_lm.config._experts_implementation == "grouped_mm"
    torch.testing.assert_close(sums_G.double(), backbone.double()(pack).double(), rtol=1e-5, atol=1e-5)


def test_the_weight_is_the_architectures_unless_the_recipe_says_another(make_config):
    architecture = TINY["model.architecture"] | {"model_type": "qwen3_moe", "router_aux_loss_coef": 0.02} | EXPERTS["qwen3_moe"]
    assert Parts(make_config({"model.architecture": architecture})).balance_weights == [0.02]
    assert Parts(make_config({"model.architecture": architecture, "loss.balance_weight": 0.5})).balance_weights == [0.5]
    assert Parts(make_config()).balance_weights == []
    with pytest.raises(ConfigError, match=r"loss.balance_weight.*no experts"):
        make_config({"loss.balance_weight": 0.5})
