"""What is drawn, answered or scored does not depend on the batch that it is in; a batch fits its limit."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megavlm.evaluation import sampling
from megavlm.evaluation.batches import batches
from megavlm.evaluation.sampling import answer
from megavlm.evaluation.understanding import sample_losses
from megavlm.parts.parts import Parts
from megavlm.parts.trained import to_bfloat16
from tests.evaluation.test_sampling import parts, read

__all__ = ["parts"]
PROMPTS = ["a six", "draw a seven please", "a handwritten two of many words", "zero", "eight"]


@given(lengths=st.lists(st.integers(1, 50), max_size=30), most=st.integers(1, 200), number=st.none() | st.integers(1, 9))
def test_batches_hold_everything_in_order_and_no_more_than_allowed(lengths, most, number):
    found = [lengths[batch] for batch in batches(lengths, most, number)]
    assert [length for batch in found for length in batch] == lengths
    for batch in found:
        assert len(batch) == 1 or max(batch) * len(batch) <= most
        assert len(batch) <= (number or len(batch))
    for batch, after in itertools.pairwise(found):
        grown = [*batch, after[0]]
        assert max(grown) * len(grown) > most or len(grown) > (number or len(grown)), "another one would have fitted"


def draw(parts, prompts=PROMPTS, **options):
    backbone, encoder, costing, device = parts
    return sampling.draw_images(backbone, encoder, prompts, costing, device=device, seed=3, temperature=2.0, **options)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_drawing_does_not_depend_on_its_batch(parts, guidance):
    parts[0].double()  # sums of another order must not decide between codes
    together = draw(parts, guidance=guidance)
    for batch_tokens in (1, 200, 400):
        assert (draw(parts, guidance=guidance, batch_tokens=batch_tokens) == together).all(), batch_tokens
    assert len({drawing.tobytes() for drawing in together}) == len(PROMPTS)


def test_the_drawings_are_those_of_torch_multinomial(parts, monkeypatch):
    """As they were drawn before there were batches."""
    expected, generator = draw(parts), torch.Generator().manual_seed(3)

    def what_multinomial_draws(_noise, like_BC):
        codes_B1 = torch.multinomial(like_BC, 1, generator=generator)
        return torch.full_like(like_BC, torch.inf).scatter(1, codes_B1, 1.0)

    monkeypatch.setattr(sampling._Noise, "next", what_multinomial_draws)
    assert (draw(parts) == expected).all()


def test_many_drawings_share_no_endless_noise(parts, monkeypatch):
    """Beyond a number of drawings another generator begins; the first ones stay what they were."""
    backbone, encoder, *_ = parts
    backbone.double()
    whole = draw(parts)
    monkeypatch.setattr(sampling, "NOISE_NUMBERS", 2 * encoder.image_tokenizer.codebook_size)
    cut = draw(parts)
    assert (cut[:2] == draw(parts, PROMPTS[:2])).all() and (cut[2:] != whole[2:]).any()
    assert (draw(parts, batch_tokens=1) == cut).all()


def test_answers_and_losses_do_not_depend_on_their_batch(parts):
    backbone, encoder, costing, device = parts
    backbone.double()
    samples = [encoder(read(text)) for text in ("zero", "seven", "zero seven zero", "seven")]
    losses = [sample_losses(backbone, samples, costing, device=device, batch_tokens=tokens) for tokens in (10**6, 1)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)
    prompts = [sample.prompt() for sample in samples]
    answers = [answer(backbone, encoder, prompts, costing, device=device, batch_tokens=tokens) for tokens in (10**6, 200, 1)]
    assert answers[0] == answers[1] == answers[2] and len(answers[0]) == 4


def test_the_decoder_never_holds_more_than_a_batch(parts, monkeypatch):
    held = []

    class Watched(sampling.Decoder):
        def __init__(self, **options):
            super().__init__(**options)
            held.append(self.capacity * len(self.place_B))

    monkeypatch.setattr(sampling, "Decoder", Watched)
    draw(parts, PROMPTS * 3, guidance=2.0, batch_tokens=500)
    assert len(held) > 1 and max(held) <= 500


def test_rounding_to_bfloat16_leaves_the_rotary_embedding_alone(make_config):
    backbone = Parts(make_config()).make_backbone()
    before = backbone.causal_lm.model.rotary_emb.inv_freq.clone()
    to_bfloat16(backbone)
    assert {parameter.dtype for parameter in backbone.parameters()} == {torch.bfloat16}
    assert backbone.causal_lm.model.rotary_emb.inv_freq.equal(before)
