"""Every route against the independent reference: any policy, selector and layout, training and decoding from any token on."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megavlm.data.pack.pack import Costing, build_pack
from megavlm.errors import MegavlmError
from megavlm.model.decoding import Decoder
from megavlm.routing.phases import Phases
from megavlm.routing.policies import LateDrop, Merge, MixtureOfDepths, Pyramid, RandomLTD, SharedBypass, SparseMLP, Tread, VisibleBypass
from tests.model.reference import CONTENT, Reference, recorded_chance
from tests.model.test_backbone import EXACT, assert_equals_reference, backbone_of
from tests.routing.layouts import DENSE, LAYOUTS, NUM_LAYERS, POLICIES, SHAPE, make_samples
from tests.routing.odd import odd_routes

BYPASSES = (
    (SparseMLP, {}),
    (VisibleBypass, {}),
    (Tread, {"first_layer": 1, "end_layer": -1}),
    (SharedBypass, {}),
    (RandomLTD, {}),
    (Pyramid, {"num_parts": 3}),
)
SHIPPED = {
    f"{policy.__name__}, {selector}, {share}": (policy(selector=selector, keep_ratio=share, **options), DENSE)
    for policy, options in BYPASSES
    for selector in ("random", "stratified", "stride", *CONTENT)
    for share in (0.4, 1.0)
    if selector in ("random", "stratified", "stride", "key_norm", "redundancy", "question_attention")
}
SHIPPED |= {"Merge, all": (Merge(at_layer=2, keep_ratio=1.0), DENSE), "gates, all": (MixtureOfDepths(keep_ratio=1.0), MixtureOfDepths())}
SHIPPED |= {
    "sparse_mlp_and_drop": (LateDrop(after_layer=2), SparseMLP(keep_ratio=0.3)),
    "visible_bypass_and_gates": (VisibleBypass(keep_ratio=0.4), MixtureOfDepths(keep_ratio=0.3)),
    "visible_bypass_and_merge": (Merge(at_layer=1), VisibleBypass()),
}
SHIPPED |= POLICIES


def make_costing(policies, strength=1.0):
    """Strengths other than 0 and 1 are those of a warm-up."""
    return Costing(Phases.always(*policies, NUM_LAYERS, strength), SHAPE)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
@settings(deadline=None, max_examples=4)
@given(layout=LAYOUTS, strength=st.sampled_from([0.0, 0.5, 1.0]))
def test_shipped_policies_with_every_selector(name, layout, strength):
    costing = make_costing(SHIPPED[name], strength)
    assert_equals_reference(backbone_of(costing.phases), make_samples(layout), costing, SHIPPED[name], strength)


@settings(deadline=None, max_examples=25)
@given(policies=odd_routes(), layout=LAYOUTS, strength=st.sampled_from([0.5, 1.0]))
def test_users_policies(policies, layout, strength):
    costing = make_costing(policies, strength)
    assert_equals_reference(backbone_of(costing.phases), make_samples(layout), costing, policies, strength)


@torch.no_grad()
def assert_decodes(policies, layout, begin_shares) -> int:
    """Decoding from any token on is the packed forward pass, or is refused; says at how many tokens they were compared."""
    samples, costing = make_samples(layout), make_costing(policies)
    backbone = backbone_of(costing.phases)
    with recorded_chance() as drawn:
        pack = build_pack(samples, costing, num_sources=1, lane=0, step=0, seed=0)
    reference = Reference(backbone, samples, policies, route=pack.route, drawn=drawn)
    expected = [reference.logits(h) for h in reference.streams()]
    lengths = [sample.num_tokens for sample in samples]
    begins = [1 + int(share * (length - 1)) for share, length in zip(begin_shares, lengths)]
    try:
        decoder = Decoder(model=backbone, samples=samples, prompt_lengths=begins, costing=costing, device=torch.device("cpu"))
    except MegavlmError as error:
        assert "looks at a whole image" in str(error) or "looks at the whole question" in str(error)
        return 0
    logits, num_compared = decoder.start(), 0
    for step in range(min(length - begin for length, begin in zip(lengths, begins)) + 1):
        for s, begin in enumerate(begins):
            torch.testing.assert_close(logits[s], expected[s][begin + step - 1], rtol=EXACT, atol=EXACT)
            num_compared += 1
        tokens = [sample.tokens[begin + step] if begin + step < n else 0 for sample, begin, n in zip(samples, begins, lengths)]
        if all(begin + step < n for begin, n in zip(begins, lengths)):
            logits = decoder.feed(torch.tensor(np.array(tokens)))
    return num_compared


BEGINS = st.lists(st.floats(0, 1), min_size=5, max_size=5)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
@settings(deadline=None, max_examples=4)
@given(layout=LAYOUTS, begins=BEGINS)
def test_decoding_shipped_policies_from_any_token_on(name, layout, begins):
    assert_decodes(SHIPPED[name], layout, begins)


@settings(deadline=None, max_examples=25)
@given(policies=odd_routes(), layout=LAYOUTS, begins=BEGINS)
def test_decoding_users_policies_from_any_token_on(policies, layout, begins):
    assert_decodes(policies, layout, begins)


PARTIAL = ("sparse_mlp", "sparse_mlp_and_drop", "visible_bypass", "visible_bypass_and_gates")
HALF_DRAWN = [[("text", 4, 1), ("IMAGE", 4, 4), ("TEXT", 2, 1)], [("image", 2, 3), ("text", 2, 1), ("IMAGE", 3, 3), ("text", 9, 1)]]


@pytest.mark.parametrize(
    "name", ["dense", "mixture_of_depths", "late_drop_and_gates", "pyramid_question", "kv_injection_both", "merge", *PARTIAL]
)
def test_going_on_from_the_middle_of_an_image_that_is_drawn(name):
    """Half of it given, none of it, all of it, and from the text before; what is read before is given."""
    assert sum(assert_decodes(SHIPPED[name], HALF_DRAWN, [0.2 + n / 12, 0.4 + n / 24]) for n in range(6)) > 100


@pytest.mark.parametrize(
    ("selector", "num_given", "message"),
    [
        ("key_norm", 5, "key_norm looks at a whole image"),
        ("redundancy", 5, "redundancy looks at a whole image"),
        ("question_attention", 9, "question_attention looks at the whole question"),
        ("key_norm", 9, None),
        ("key_norm", 0, "at least the first token"),
        ("key_norm", 99, "at most all"),
        ("stride", 5, None),
    ],
)
def test_decoding_where_what_is_missing_would_decide_is_refused(selector, num_given, message):
    samples, costing = make_samples([[("image", 2, 3), ("text", 4, 1), ("TEXT", 2, 1)]]), make_costing((Pyramid(selector=selector), DENSE))
    options = {"samples": samples, "prompt_lengths": [num_given], "costing": costing, "device": torch.device("cpu")}
    if message is None:
        Decoder(model=backbone_of(costing.phases), **options)
        return
    with pytest.raises(MegavlmError, match=message):
        Decoder(model=backbone_of(costing.phases), **options)
