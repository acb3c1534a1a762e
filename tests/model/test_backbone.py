"""P5, P6 and exactness: packed and routed training against masks, one sample at a time, and altered futures."""

import copy
import functools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from torch.utils._python_dispatch import TorchDispatchMode

from megavlm.data.pack.pack import Costing, build_pack
from megavlm.errors import ConfigError
from megavlm.model.backbone import Backbone, make_causal_lm
from megavlm.routing.phases import Phases
from megavlm.routing.policies import Merge, Pyramid, RandomLTD, SharedBypass, SparseMLP, Tread, VisibleBypass
from megavlm.routing.route import Route, Stage
from megavlm.routing.selectors import DEVICE_SELECTORS, HOST_SELECTORS
from tests.model.reference import Reference, make_exact, recorded_chance
from tests.routing.layouts import LAYOUTS, NUM_LAYERS, POLICIES, SHAPE, VOCABULARY, costing, make_pack, make_samples, phases

ARCHITECTURES = {
    "qwen3": {"head_dim": 8},
    "qwen2": {"tie_word_embeddings": True},
    "llama": {},
    "mistral": {"sliding_window": 5},
}
EVERY_POLICY = pytest.mark.parametrize("policy", POLICIES)
MIXED = [
    [("image", 3, 4), ("text", 3, 1), ("TEXT", 2, 1)],
    [("text", 4, 1), ("IMAGE", 4, 4)],
    [("TEXT", 5, 1)],
    [],
    [("image", 1, 1), ("IMAGE", 2, 2), ("TEXT", 1, 1), ("image", 2, 3), ("TEXT", 2, 1)],
]


@functools.cache
def make_backbone(policy="dense", model_type="qwen3", chunk_rows=16, **options):
    return backbone_of(phases(policy), model_type, chunk_rows, **options)


def backbone_of(plan, model_type="qwen3", chunk_rows=16, **options):
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
    backbone = Backbone(causal_lm, plan, num_sources=1, max_labels=200, chunk_rows=chunk_rows, **options)
    for name, parameter in backbone.named_parameters():
        if "gates" in name or "norm" in name:  # as if trained: normalised keys all have the same norm otherwise
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    return make_exact(backbone).double()


def loss_and_gradients(backbone, loss):
    backbone.zero_grad()
    losses = loss()
    (losses * torch.tensor([0.3, 1.0, 2.0, 0.5])).sum().backward()
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in backbone.named_parameters()}
    return losses.detach(), gradients


def assert_close(first, second, tolerance):
    torch.testing.assert_close(first[0], second[0], rtol=tolerance, atol=tolerance)
    for name, gradient in first[1].items():
        torch.testing.assert_close(gradient, second[1][name], rtol=tolerance, atol=tolerance, msg=name)


# cross-entropy is float32 in the model, whatever its precision; all else is float64
TOLERANCE, EXACT = 2e-5, 1e-11


def assert_equals_reference(backbone, samples, costing, policies, strength=1.0):
    """The packed forward and backward pass against the independent reference."""
    with recorded_chance() as drawn:
        pack = build_pack(samples, costing, num_sources=1, lane=0, step=0, seed=0)
    reference = Reference(backbone, samples, policies, strength, pack.route, drawn)
    with torch.no_grad():
        streams = reference.streams()
        torch.testing.assert_close(backbone.hidden_states(pack)[0], torch.cat(streams), rtol=EXACT, atol=EXACT)
    # what the packer counted on is what took part
    for stage in pack.route.stages:
        for layer in range(stage.first_layer, stage.end_layer):
            travelling = [of_document[layer] for of_document in reference.travelling]
            assert [num for num in travelling if num] == stage.sequences.lengths
    routed = loss_and_gradients(backbone, lambda: backbone(pack))
    assert_close(routed, loss_and_gradients(backbone, reference.losses), TOLERANCE)


def assert_router_equals_masks(policy, layout, model_type="qwen3", strength=1.0):
    backbone, samples = make_backbone(policy, model_type), make_samples(layout)
    assert_equals_reference(backbone, samples, costing(policy, strength), POLICIES[policy], strength)


@EVERY_POLICY
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_router_equals_masks(policy, model_type):
    assert_router_equals_masks(policy, MIXED, model_type)


@EVERY_POLICY
@settings(deadline=None, max_examples=15)
@given(layout=LAYOUTS)
def test_router_equals_masks_on_any_layout(policy, layout):
    assert_router_equals_masks(policy, layout)


@EVERY_POLICY
def test_router_equals_masks_when_the_schedule_keeps_everything(policy):
    assert_router_equals_masks(policy, MIXED, strength=0.0)


@pytest.mark.parametrize(
    "policy", ["random_ltd", "pyramid_question", "kv_injection_both", "merge", "mixture_of_depths", "sparse_mlp", "visible_bypass"]
)
def test_activation_checkpointing_changes_nothing(policy):
    pack = make_pack(MIXED, policy)
    storing, recomputing = make_backbone(policy), make_backbone(policy, activation_checkpointing=True)
    every_second = make_backbone(policy, activation_checkpointing=2)
    first = loss_and_gradients(storing, lambda: storing(pack))
    assert_close(first, loss_and_gradients(recomputing, lambda: recomputing(pack)), 0.0)
    assert_close(first, loss_and_gradients(every_second, lambda: every_second(pack)), 0.0)


@pytest.mark.parametrize(("checkpointing", "times"), [(False, [1] * 6), (True, [2] * 6), (2, [1, 2] * 3), (4, [1, 1, 1, 2, 1, 1])])
def test_every_nth_layer_is_computed_again(checkpointing, times):
    backbone, counts = make_backbone(chunk_rows=7, activation_checkpointing=checkpointing), [0] * NUM_LAYERS

    def count(layer):
        counts[layer] += 1

    layers = backbone.causal_lm.model.layers
    hooks = [layers[i].register_forward_pre_hook(lambda *_, i=i: count(i)) for i in range(NUM_LAYERS)]
    loss_and_gradients(backbone, lambda: backbone(make_pack(MIXED, "dense")))
    for hook in hooks:
        hook.remove()
    assert counts == times[:NUM_LAYERS]
    shares = [times[0] - 1, sum(times[1:NUM_LAYERS]) / (NUM_LAYERS - 1) - 1, 1.0]
    assert backbone.recomputed_shares([(0, 1), (1, NUM_LAYERS)]) == pytest.approx(shares)


def test_guests_find_their_places_once_per_stage():
    pack, backbone = make_pack(MIXED, "kv_injection_both"), make_backbone("kv_injection_both")
    with torch.profiler.profile() as profile:
        backbone(pack)
    (searches,) = [event.count for event in profile.key_averages() if event.key == "aten::searchsorted"]
    assert searches == 2 * sum(bool(stage.injections) for stage in pack.route.stages)


def test_packed_equals_one_sample_at_a_time():
    samples = make_samples(MIXED)
    packed = build_pack(samples, costing("dense"), 1, 0, step=0, seed=0)
    alone = [build_pack([sample], costing("dense"), 1, 0, step=0, seed=0) for sample in samples]
    backbone = make_backbone()
    together = loss_and_gradients(backbone, lambda: backbone(packed))
    assert_close(together, loss_and_gradients(backbone, lambda: sum(backbone(pack) for pack in alone)), TOLERANCE)


def test_number_of_chunks_changes_nothing_and_is_the_same_for_every_pack():
    pack = make_pack(MIXED, "dense")
    whole, chunked = make_backbone(chunk_rows=200), make_backbone(chunk_rows=7)
    assert (whole.num_chunks, chunked.num_chunks) == (1, 29)
    first = loss_and_gradients(whole, lambda: whole(pack))
    assert_close(first, loss_and_gradients(chunked, lambda: chunked(pack)), TOLERANCE)


def test_everything_kept_is_bit_identical_to_no_router():
    """P5."""
    pack, backbone = make_pack(MIXED, "dense"), make_backbone()
    (stage,) = pack.route.stages
    everything = torch.arange(pack.num_tokens)
    first = loss_and_gradients(backbone, lambda: backbone(pack))
    pack.route = Route([Stage(a, b, stage.sequences, everything) for a, b in ((0, 2), (2, NUM_LAYERS))])
    assert_close(first, loss_and_gradients(backbone, lambda: backbone(pack)), 0.0)


@pytest.mark.parametrize("policy", [name for name in POLICIES if "inject" not in name and "gate" not in name and "depths" not in name])
def test_every_policy_without_parts_of_its_own_is_bit_identical_to_dense_when_it_keeps_everything(policy):
    """P5, choices of the device included."""
    dense, kept = make_pack(MIXED, "dense"), make_pack(MIXED, policy, strength=0.0)
    backbone = make_backbone(policy)
    first = loss_and_gradients(backbone, lambda: backbone(dense))
    assert_close(first, loss_and_gradients(backbone, lambda: backbone(kept)), 0.0)


@pytest.mark.parametrize("selector", [*HOST_SELECTORS, *DEVICE_SELECTORS])
@pytest.mark.parametrize("kind", [Pyramid, RandomLTD, Tread, SharedBypass, SparseMLP, VisibleBypass, Merge])
def test_a_share_of_one_is_bit_identical_to_dense(kind, selector):
    """P5, whatever the selector looks at."""
    options = {"at_layer": 1} if kind is Merge else {"selector": selector}
    options |= {"first_layer": 1, "end_layer": -1} if kind is Tread else {}
    everything = Phases.always(kind(keep_ratio=1.0, **options), POLICIES["dense"][1], NUM_LAYERS)
    kept = build_pack(make_samples(MIXED), Costing(everything, SHAPE), 1, 0, step=0, seed=0)
    backbone = make_backbone()
    first = loss_and_gradients(backbone, lambda: backbone(make_pack(MIXED, "dense")))
    assert_close(first, loss_and_gradients(backbone, lambda: backbone(kept)), 0.0)
    assert kept.flops.sum() == kept.dense_flops.sum()


@EVERY_POLICY
def test_no_prediction_depends_on_a_later_token_the_selection_included(policy):
    """P6: change each token; everything predicted at a row before it stays the same, bit for bit."""
    samples, backbone = make_samples(MIXED), make_backbone(policy)

    def predict(samples):
        pack = build_pack(samples, costing(policy), 1, 0, step=0, seed=0)
        with torch.no_grad():
            h_TD, _ = backbone.hidden_states(pack)
        return pack.rows_M.numpy(), h_TD

    rows_M, h_TD = predict(samples)
    offset, num_moved = 0, 0
    for number, sample in enumerate(samples):
        for place in range(1, sample.num_tokens):
            tokens = sample.tokens.copy()
            tokens[place] = (tokens[place] + 1) % VOCABULARY
            changed = [*samples]
            changed[number] = replace(sample, tokens=tokens)
            _, changed_TD = predict(changed)
            before = rows_M[(rows_M < offset + place) | (rows_M >= offset + sample.num_tokens)]
            assert h_TD[before].equal(changed_TD[before]), (number, place)
            num_moved += not h_TD.equal(changed_TD)
        offset += sample.num_tokens
    assert num_moved > 20, "the changes must be visible at all"


class NoReadBack(TorchDispatchMode):
    """Fails on operations that would make a GPU wait for its host: reading a value, or sizes that depend on values."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not any(name in str(function) for name in self.FORBIDDEN), f"{function} waits for the device"
        return function(*args, **(kwargs or {}))


@EVERY_POLICY
def test_routing_reads_nothing_back_from_the_device(policy):
    """P4, as far as a CPU can tell; on CUDA the sync debug mode tells."""
    pack, backbone = make_pack(MIXED, policy), make_backbone(policy)
    with NoReadBack():
        backbone(pack).sum().backward()
    with pytest.raises(AssertionError, match="waits"), NoReadBack():
        torch.ones(1).item()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@EVERY_POLICY
def test_routing_never_synchronises_the_device(policy):
    """P4 where a GPU is: forward and backward under torch's own alarm."""
    backbone = copy.deepcopy(make_backbone(policy)).to("cuda", torch.bfloat16)
    pack = make_pack(MIXED, policy).pin_memory().to(torch.device("cuda"))
    backbone(pack).sum().backward()  # kernels are chosen and memory is taken the first time
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        backbone(pack).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_mistakes_in_the_architecture_are_named():
    with pytest.raises(ConfigError, match="hiden_size"):
        make_causal_lm({"model_type": "qwen3", "hiden_size": 3}, 10)
    with pytest.raises(ConfigError, match="qwen33"):
        make_causal_lm({"model_type": "qwen33"}, 10)
