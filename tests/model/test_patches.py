"""Blocks of codes as tokens, against `transformers` itself with embeddings that loops have put together."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megavlm.data.pack.encode import Layout
from megavlm.data.pack.pack import Costing, build_pack
from megavlm.data.pack.patches import layout_in_patches, sample_in_patches
from megavlm.errors import ConfigError, DataError, MegavlmError
from megavlm.model.attention import NAME
from megavlm.model.decoding import Decoder
from megavlm.parts.parts import Parts
from megavlm.routing.config import Phase
from megavlm.routing.phases import Phases
from megavlm.routing.policies import Dense, Patches
from megavlm.routing.tasks import Task
from tests.model.test_backbone import EXACT, TOLERANCE, VOCABULARY, NoReadBack, assert_close, loss_and_gradients, make_backbone
from tests.routing.layouts import EVEN, NUM_LAYERS, PATCHES, SHAPE, make_pack, make_samples

PAIRS = {"both": (2, 2), "read": (2, 1), "drawn": (1, 2), "of two sizes": (2, 4)}
FOURS = [[("image", 4, 2), ("text", 2, 1), ("TEXT", 2, 1)], [("text", 3, 1), ("IMAGE", 4, 8), ("TEXT", 1, 1)], [], [("IMAGE", 4, 4)]]
EVEN_PARTS = st.tuples(st.sampled_from(["image", "IMAGE"]), st.sampled_from([2, 4]), st.sampled_from([2, 4]))
TEXTS = st.tuples(st.sampled_from(["text", "TEXT"]), st.integers(1, 4), st.just(1))
EVEN_LAYOUTS = st.lists(st.lists(EVEN_PARTS | TEXTS, max_size=4), min_size=1, max_size=4)


def costing_of(sizes, strength=1.0):
    policies = [Patches(size=size) if size > 1 else Dense() for size in sizes]
    return Costing(Phases.always(*policies, NUM_LAYERS, strength), SHAPE)


def pack_of(samples, sizes, strength=1.0):
    return build_pack(samples, costing_of(sizes, strength), num_sources=1, lane=0, step=0, seed=0)


def units_of(sample, sizes):
    """What is one token: (ids, has a loss, task), by loops."""
    inside = {}
    for span in sample.spans:
        size = sizes[Task.GENERATION if span.has_loss else Task.UNDERSTANDING]
        for y in range(span.height):
            for x in range(span.width):
                inside[span.start + y * span.width + x] = (span.start, y // size, x // size)
    units = {}
    for place, token in enumerate(sample.tokens.tolist()):
        unit = units.setdefault(inside.get(place, place), ([], bool(sample.has_loss[place]), int(sample.tasks[place])))
        unit[0].append(token)
    return list(units.values())


def reference(backbone, samples, sizes):
    """Logits ``[units, V]`` of every sample, by `transformers` without cache or packs."""
    lm = backbone.causal_lm
    lm.config._attn_implementation = lm.model.config._attn_implementation = "sdpa"  # eager rounds its softmax to float32
    found = []
    for sample in samples:
        units = units_of(sample, sizes)
        embeddings = torch.stack([sum(lm.model.embed_tokens.weight[i] for i in ids) / len(ids) for ids, _, _ in units])
        found.append(lm(inputs_embeds=embeddings[None], use_cache=False).logits[0])
    lm.config._attn_implementation = lm.model.config._attn_implementation = NAME
    return found


def reference_losses(backbone, samples, sizes):
    sums = [0 * backbone.causal_lm.model.norm.weight.sum().float()] * 3
    for sample, logits in zip(samples, reference(backbone, samples, sizes)):
        for place, (ids, has_loss, task) in enumerate(units_of(sample, sizes)):
            for i in ids if has_loss else ():
                sums[task] = sums[task] + functional.cross_entropy(logits[place - 1].float(), torch.tensor(i))
    return torch.stack([*sums, torch.zeros(())])


def assert_equals_reference(samples, sizes, **options):
    backbone, pack = make_backbone(**options), pack_of(samples, sizes)
    with torch.no_grad():
        h_TD, _ = backbone.hidden_states(pack)
        logits_TV = backbone.causal_lm.lm_head(backbone.causal_lm.model.norm(h_TD))
        torch.testing.assert_close(logits_TV, torch.cat(reference(backbone, samples, sizes)), rtol=EXACT, atol=EXACT)
    found = loss_and_gradients(backbone, lambda: backbone(pack))
    assert_close(found, loss_and_gradients(backbone, lambda: reference_losses(backbone, samples, sizes)), TOLERANCE)


@pytest.mark.parametrize("sizes", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("options", [{}, {"chunk_rows": 7, "activation_checkpointing": True}, {"model_type": "llama"}])
def test_logits_losses_and_gradients(sizes, options):
    assert_equals_reference(make_samples(FOURS if 4 in sizes else EVEN), sizes, **options)


@settings(deadline=None, max_examples=15)
@given(layout=EVEN_LAYOUTS, sizes=st.sampled_from([(2, 2), (2, 1), (1, 2)]))
def test_any_layout(layout, sizes):
    assert_equals_reference(make_samples(layout), sizes)


@settings(deadline=None, max_examples=25)
@given(layout=EVEN_LAYOUTS, sizes=st.sampled_from([(2, 2), (2, 1), (1, 2)]))
def test_costs_and_counts_follow_from_the_samples_layouts(layout, sizes):
    samples = make_samples(layout)
    pack, dense = pack_of(samples, sizes), pack_of(samples, (1, 1))
    short = [sample_in_patches(sample, sizes) for sample in samples]
    assert [sample.layout for sample in short] == [layout_in_patches(sample.layout, sizes) for sample in samples]
    assert pack.sequences.lengths == [len(units_of(sample, sizes)) for sample in samples]
    expected = NUM_LAYERS * SHAPE.layers_flops(pack.sequences.lengths).sum() + len(pack.rows_M) * SHAPE.head_flops_per_row
    assert pack.flops.sum() == expected
    # every code is still learnt, and counted
    assert (pack.labels == dense.labels).all() and (pack.image_tokens == dense.image_tokens).all()
    assert pack.dense_flops.sum() == dense.flops.sum()
    costing = costing_of(sizes)
    assert sum(costing.rows(sample.layout, 0) for sample in samples) == NUM_LAYERS * sum(pack.sequences.lengths)
    kept = [sum(span.length for sample in short for span in sample.spans if span.task == task) for task in range(2)]
    assert pack.kept_tokens.tolist() == [kept]


def test_the_formula_agrees_with_torchs_counter():
    pack, backbone = pack_of(make_samples(EVEN * 4), (2, 2)), copy.deepcopy(make_backbone(chunk_rows=200)).float()
    with FlopCounterMode(display=False) as forward, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        backbone(pack)
    # the math kernel computes the whole square of scores, we count the causal half
    squares = sum(length**2 for length in pack.sequences.lengths)
    expected = pack.flops.sum() + NUM_LAYERS * SHAPE.layer_flops_per_square * squares
    assert forward.get_total_flops() == pytest.approx(expected, rel=0.01)


@torch.no_grad()
def test_no_prediction_depends_on_a_later_block():
    """P6: change each code; logits of units before its own stay the same, bit for bit."""
    sizes, samples, backbone = (2, 2), make_samples(EVEN), make_backbone()

    def streams(samples):
        pack = pack_of(samples, sizes)
        return backbone.hidden_states(pack)[0].split(pack.sequences.lengths)

    before, num_moved = streams(samples), 0
    for number, sample in enumerate(samples):
        for place in range(1, sample.num_tokens):
            tokens = sample.tokens.copy()
            tokens[place] = (tokens[place] + 1) % VOCABULARY
            changed = [*samples]
            changed[number] = replace(sample, tokens=tokens)
            unit = next(u for u, (ids, _, _) in enumerate(units_of(sample, sizes)) if sample.tokens[place] in ids)
            after = streams(changed)
            for other, (h, h_after) in enumerate(zip(before, after)):
                unmoved = slice(0, unit) if other == number else slice(None)
                assert h[unmoved].equal(h_after[unmoved])
            num_moved += not torch.equal(before[number], after[number])
    assert num_moved > 20


def test_the_finish_is_bit_identical_to_dense():
    samples, backbone = make_samples(EVEN), make_backbone()
    dense, finish = pack_of(samples, (1, 1)), pack_of(samples, (2, 2), strength=0.0)
    assert not finish.has_patches and finish.flops.sum() == dense.flops.sum()
    first = loss_and_gradients(backbone, lambda: backbone(dense))
    assert_close(first, loss_and_gradients(backbone, lambda: backbone(finish)), 0.0)


@pytest.mark.parametrize("policy", PATCHES)
def test_nothing_is_read_back_from_the_device(policy):
    """P4; and P7: a pack without images calls the same modules as often."""
    backbone, calls = copy.deepcopy(make_backbone()), []
    for name, module in backbone.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    of_packs = []
    for layout in (EVEN, [[("TEXT", 5, 1)]], [[]]):
        calls.clear()
        with NoReadBack():
            backbone(make_pack(layout, policy)).sum().backward()
        of_packs.append([*calls])
    assert of_packs[0] == of_packs[1] == of_packs[2] and len(of_packs[0]) > 20


def test_images_that_blocks_cannot_fill():
    with pytest.raises(DataError, match="an image of 3 x 4 codes cannot be filled with patches of 2 x 2"):
        sample_in_patches(make_samples([[("image", 3, 4)]])[0], (2, 2))
    with pytest.raises(DataError, match="an image of 9 codes"):
        layout_in_patches(Layout(20, 3, 2, ((9, Task.UNDERSTANDING),)), (2, 2))


def test_a_warm_up_is_refused():
    with pytest.raises(ConfigError, match="patches have no warm-up"):
        Phases([Phase(0, 10, Dense(), Patches(), warmup_steps=1.0)], NUM_LAYERS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"routing.generation": {"policy": "patches", "size": 3}}, "patches of 3 x 3 cannot fill images of 8 x 8 codes"),
        ({"routing.generation": {"policy": "patches"}, "evaluation.route": "trained"}, "no route to judge or draw along"),
        ({"routing.generation": {"policy": "patches"}, "evaluation.guidance_route": "trained"}, "no route to judge or draw along"),
    ],
)
def test_recipes_that_cannot_be_meant(make_config, settings, message):
    parts = Parts(make_config(settings))
    with pytest.raises(ConfigError, match=message):
        _ = parts.costing, parts.inference_costing, parts.guidance_costing


def test_patches_do_not_draw():
    samples = make_samples([[("text", 3, 1), ("IMAGE", 4, 4)]])
    options = {"samples": samples, "prompt_lengths": [5], "costing": costing_of((2, 2)), "device": torch.device("cpu")}
    with pytest.raises(MegavlmError, match="go along the dense route"):
        Decoder(model=make_backbone(), **options)
    with pytest.raises(MegavlmError, match="no dense twin"):
        pack_of(samples, (2, 2)).with_dense_route()
