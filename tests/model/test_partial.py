"""Parts of stock layers, for every family that is computed exactly, against the whole layer."""

import pytest
import torch

from megavlm.errors import ConfigError
from megavlm.model import attention
from megavlm.model.attention import Context
from megavlm.model.ends import kind_of, rotary_tables
from megavlm.model.families import EXACT, read_exact
from megavlm.model.partial import in_parts
from megavlm.model.proof import random_model
from megavlm.parts import parts
from megavlm.routing.plan import FUSED_QUERIES
from megavlm.routing.route import Sequences
from megavlm.routing.router import Parts
from tests.model.test_families import architecture_of

NUM_ROWS = 9
SOME = torch.tensor([1, 2, 5, 8])
OTHERS = torch.tensor([0, 3, 4, 6, 7])


def layer_of(family: str):
    """Its first layer, and how to call it with the rows given."""
    causal_lm = random_model(read_exact(architecture_of(family), 32))
    causal_lm.model.config._experts_implementation = "eager"  # the only one in float64
    causal_lm.config._attn_implementation = causal_lm.model.config._attn_implementation = attention.NAME
    x_TD = torch.randn(NUM_ROWS, causal_lm.config.hidden_size, dtype=torch.float64)
    tables = rotary_tables(causal_lm.model, x_TD, torch.arange(NUM_ROWS))
    rotary = tuple(table[None] for table in tables[kind_of(causal_lm.model, 0)])
    layer = causal_lm.model.layers[0]

    @torch.no_grad()
    def call(parts: Parts) -> torch.Tensor:
        context = Context(Sequences.of(torch.tensor([4, 5]).numpy()))
        with in_parts(layer, parts):
            return layer(x_TD[None], attention_mask=None, position_embeddings=rotary, use_cache=False, context=context)[0]

    return layer, call, x_TD


@pytest.mark.parametrize("family", EXACT)
def test_rows_that_skip_the_mlp(family):
    """The others get what the whole layer gives; these get what it gives if its MLP is silent."""
    layer, call, x_TD = layer_of(family)
    whole, some = call(Parts(None, None)), call(Parts(None, SOME))
    handle = layer.mlp.register_forward_hook(lambda _module, _inputs, out: torch.zeros_like(out))
    without_mlp = call(Parts(None, None))
    handle.remove()
    torch.testing.assert_close(some[SOME], whole[SOME])
    assert some[OTHERS].equal(without_mlp[OTHERS]) and not some.allclose(whole) and not some[OTHERS].allclose(x_TD[OTHERS])
    assert call(Parts(None, None)).equal(whole), "nothing stays behind"


@pytest.mark.parametrize("family", [family for family in EXACT if family not in FUSED_QUERIES])
@pytest.mark.parametrize("asking_P", [SOME, torch.zeros(0, dtype=torch.int64)])
def test_rows_that_only_show_their_keys_and_values(family, asking_P):
    """Those that ask get what the whole layer gives, because they see the same; the others stay as they were."""
    _, call, x_TD = layer_of(family)
    whole, some = call(Parts(None, None)), call(Parts(asking_P, asking_P))
    torch.testing.assert_close(some[asking_P], whole[asking_P])
    silent = sorted(set(range(NUM_ROWS)) - set(asking_P.tolist()))
    assert some[silent].equal(x_TD[silent])


@pytest.mark.parametrize("family", FUSED_QUERIES)
def test_families_with_one_projection_for_all_are_those_that_are_refused(family):
    layer, _, _ = layer_of(family)
    assert not hasattr(layer.self_attn, "q_proj")


def test_they_are_refused_when_the_recipe_is_read(make_config):
    route = {"routing.generation": {"policy": "visible_bypass"}}
    config = make_config({"model.architecture": architecture_of("phi3"), **route})
    with pytest.raises(ConfigError, match="phi3 has one for all three"):
        _ = parts.Parts(config).phases
    _ = parts.Parts(make_config({"model.architecture": architecture_of("qwen2"), **route})).phases
