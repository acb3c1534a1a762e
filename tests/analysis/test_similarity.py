"""CKA where the answer is known, and the pairing of read and drawn images."""

import numpy as np
import pytest
import torch

from megavlm.analysis.similarity import _as_read, image_states, linear_cka, similarity_by_layer
from megavlm.analysis.subject import first_samples
from megavlm.parts.parts import Parts


def test_equal_rotated_scaled_and_shifted_states_are_the_same():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 20)) @ rng.normal(size=(20, 20))
    rotation, _ = np.linalg.qr(rng.normal(size=(20, 20)))
    for y in (x, x @ rotation, 7 * x + 3):
        assert linear_cka(x, y) == pytest.approx(1, abs=1e-12)
    assert linear_cka(x, x @ np.diag(10.0 ** rng.normal(size=20))) < 0.95, "another stretching is not the same"


def test_independent_states_are_near_zero_with_enough_samples():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 20000, 16))
    assert linear_cka(x, y) < 0.002
    assert linear_cka(x[:30], y[:30]) > 0.2, "with few samples it is not: D/N"


def test_both_forms_agree():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 49))
    y = x[:, :30] + rng.normal(size=(50, 30))
    small = linear_cka(x, y)
    assert small == pytest.approx(linear_cka(np.pad(x, ((0, 0), (0, 9))), y), abs=1e-12) and 0.1 < small < 0.99


@pytest.fixture
def drawn(make_config):
    config = Parts(make_config()).with_mixture().config
    torch.manual_seed(0)
    encoder = Parts(config).encoder
    causal_lm = Parts(config).make_causal_lm()
    samples = [s for group in first_samples(Parts(config), 4) for s in group if s.spans[0].has_loss]
    return Parts(config).make_backbone(causal_lm), encoder, samples, Parts(config).inference_costing


def test_pairs_are_the_same_codes_in_the_two_roles(drawn):
    _, encoder, samples, _ = drawn
    for sample in samples:
        read, span = _as_read(sample, sample.spans[0], encoder), sample.spans[0]
        (other,) = read.spans
        assert not other.has_loss and span.has_loss and other.start == 2 < span.start
        same = read.tokens[other.start : other.start + other.length] == sample.tokens[span.start : span.start + span.length]
        assert same.all()


def test_states_of_packs_are_those_of_transformers(drawn):
    backbone, _encoder, samples, costing = drawn
    states = image_states(backbone, samples[:2], [s.spans[0] for s in samples[:2]], costing, device="cpu")
    lm = backbone.causal_lm
    for n, sample in enumerate(samples[:2]):
        lm.model.config._attn_implementation = "eager"
        expected = lm.model(torch.from_numpy(sample.tokens)[None], output_hidden_states=True, use_cache=False).hidden_states
        here = slice(sample.spans[0].start, sample.spans[0].start + 64)
        for layer in range(4):  # the last one of transformers is normalised
            np.testing.assert_allclose(states[layer][n], expected[layer][0, here].detach(), rtol=1e-4, atol=1e-5)
    assert len(states) == 5


def test_a_model_that_sees_no_context_sees_both_roles_alike(drawn):
    """Without what attention brings, a state depends on its code alone; with it, on the prompt."""
    backbone, encoder, samples, costing = drawn
    normal = similarity_by_layer(backbone, encoder, samples, costing, device="cpu")
    assert normal[0] == pytest.approx(1, abs=1e-6) and all(0 < cka < 0.9999 for cka in normal[1:])
    for layer in backbone.causal_lm.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    assert similarity_by_layer(backbone, encoder, samples, costing, device="cpu") == pytest.approx([1] * 5, abs=1e-6)
