"""P5, P6 and exactness: packed and routed training against masks, one sample at a time, and altered futures."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch.utils._python_dispatch import TorchDispatchMode

from megavlm.data.pack import build_pack
from megavlm.errors import ConfigError
from megavlm.model.backbone import Backbone, make_causal_lm
from megavlm.routing.route import Route, Stage
from tests.model.reference import reference_loss
from tests.routing.layouts import LAYOUTS, NUM_LAYERS, POLICIES, VOCABULARY, costing, make_pack, make_samples

ARCHITECTURES = {
    "qwen3": {"head_dim": 8},
    "qwen2": {"tie_word_embeddings": True},
    "llama": {},
}
EVERY_POLICY = pytest.mark.parametrize("policy", POLICIES)
MIXED = [
    [("image", 3, 4), ("text", 3, 1), ("TEXT", 2, 1)],
    [("text", 4, 1), ("IMAGE", 4, 4)],
    [("TEXT", 5, 1)],
    [],
    [("image", 1, 1), ("IMAGE", 2, 2), ("TEXT", 1, 1), ("image", 2, 3), ("TEXT", 2, 1)],
]


def make_backbone(model_type="qwen3", chunk_rows=16, **options):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
    }
    causal_lm = make_causal_lm({"model_type": model_type} | sizes | ARCHITECTURES[model_type], VOCABULARY)
    return Backbone(causal_lm, num_sources=1, max_labels=200, chunk_rows=chunk_rows, **options).double()


BACKBONE = make_backbone()


def loss_and_gradients(backbone, loss):
    backbone.zero_grad()
    losses = loss()
    (losses * torch.tensor([0.3, 1.0, 2.0])).sum().backward()
    return losses.detach(), {n: p.grad.clone() for n, p in backbone.named_parameters() if p.grad is not None}


def assert_close(first, second, tolerance):
    torch.testing.assert_close(first[0], second[0], rtol=tolerance, atol=tolerance)
    assert first[1].keys() == second[1].keys()
    for name, gradient in first[1].items():
        torch.testing.assert_close(gradient, second[1][name], rtol=tolerance, atol=tolerance, msg=name)


# cross-entropy is float32 in the model, whatever its precision; the rest of the comparison is float64
TOLERANCE = 2e-5


@EVERY_POLICY
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_router_equals_masks(policy, model_type):
    backbone, pack = make_backbone(model_type), make_pack(MIXED, policy)
    routed = loss_and_gradients(backbone, lambda: backbone(pack))
    assert_close(routed, loss_and_gradients(backbone, lambda: reference_loss(backbone, pack)), TOLERANCE)


@EVERY_POLICY
@settings(deadline=None, max_examples=15)
@given(layout=LAYOUTS)
def test_router_equals_masks_on_any_layout(policy, layout):
    pack = make_pack(layout, policy)
    routed = loss_and_gradients(BACKBONE, lambda: BACKBONE(pack))
    assert_close(routed, loss_and_gradients(BACKBONE, lambda: reference_loss(BACKBONE, pack)), TOLERANCE)


def test_activation_checkpointing_changes_nothing():
    pack, recomputing = make_pack(MIXED, "random_ltd"), make_backbone(activation_checkpointing=True)
    first = loss_and_gradients(BACKBONE, lambda: BACKBONE(pack))
    second = loss_and_gradients(recomputing, lambda: recomputing(pack))
    assert_close(first, second, 0.0)


def test_packed_equals_one_sample_at_a_time():
    samples = make_samples(MIXED)
    packed = build_pack(samples, costing("dense"), 1, 0, 0, 0)
    alone = [build_pack([sample], costing("dense"), 1, 0, 0, 0) for sample in samples]
    together = loss_and_gradients(BACKBONE, lambda: BACKBONE(packed))
    assert_close(together, loss_and_gradients(BACKBONE, lambda: sum(BACKBONE(pack) for pack in alone)), TOLERANCE)


def test_number_of_chunks_changes_nothing_and_is_the_same_for_every_pack():
    pack = make_pack(MIXED, "dense")
    whole, chunked = make_backbone(chunk_rows=200), make_backbone(chunk_rows=7)
    assert (whole.num_chunks, chunked.num_chunks) == (1, 29)
    first = loss_and_gradients(whole, lambda: whole(pack))
    assert_close(first, loss_and_gradients(chunked, lambda: chunked(pack)), TOLERANCE)


def test_everything_kept_is_bit_identical_to_no_router():
    """P5."""
    pack = make_pack(MIXED, "dense")
    (stage,) = pack.route.stages
    everything = torch.arange(pack.num_tokens)
    halves = [Stage(a, b, stage.sequences, everything) for a, b in ((0, 2), (2, NUM_LAYERS))]
    first = loss_and_gradients(BACKBONE, lambda: BACKBONE(pack))
    pack.route = Route(halves)
    assert_close(first, loss_and_gradients(BACKBONE, lambda: BACKBONE(pack)), 0.0)


@EVERY_POLICY
def test_no_prediction_depends_on_a_later_token_the_selection_included(policy):
    """P6: change each token; every row before it keeps its hidden state bit for bit."""
    samples = make_samples(MIXED)
    before = build_pack(samples, costing(policy), 1, 0, 0, 0)
    with torch.no_grad():
        h_TD = BACKBONE.hidden_states(before)
    offset = 0
    for number, sample in enumerate(samples):
        for place in range(1, sample.num_tokens):
            tokens = sample.tokens.copy()
            tokens[place] = (tokens[place] + 1) % VOCABULARY
            changed = [*samples]
            changed[number] = type(sample)(**(vars(sample) | {"tokens": tokens}))
            after = build_pack(changed, costing(policy), 1, 0, 0, 0)
            with torch.no_grad():
                changed_TD = BACKBONE.hidden_states(after)
            untouched = np.r_[0 : offset + place, offset + sample.num_tokens : before.num_tokens]
            assert h_TD[untouched].equal(changed_TD[untouched]), (number, place)
            assert not h_TD[offset + place].equal(changed_TD[offset + place])
        offset += sample.num_tokens


class NoReadBack(TorchDispatchMode):
    """Fails on operations that would make a GPU wait for its host: reading a value, or sizes that depend on values."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not any(name in str(function) for name in self.FORBIDDEN), f"{function} waits for the device"
        return function(*args, **(kwargs or {}))


@EVERY_POLICY
def test_routing_reads_nothing_back_from_the_device(policy):
    """P4, as far as a CPU can tell; on CUDA the sync debug mode tells."""
    pack = make_pack(MIXED, policy)
    with NoReadBack():
        BACKBONE(pack).sum().backward()
    with pytest.raises(AssertionError, match="waits"), NoReadBack():
        torch.ones(1).item()


def test_mistakes_in_the_architecture_are_named():
    with pytest.raises(ConfigError, match="hiden_size"):
        make_causal_lm({"model_type": "qwen3", "hiden_size": 3}, 10)
    with pytest.raises(ConfigError, match="qwen33"):
        make_causal_lm({"model_type": "qwen33"}, 10)
