"""Drawing and answering with a model that is forced to know the answer."""

import numpy as np
import pytest
import torch

from megavlm.data.read.sample import Coordinates, Sample, Segment
from megavlm.evaluation.sampling import answer, draw_images
from megavlm.evaluation.understanding import sample_losses, scored_right, written_right
from megavlm.parts.parts import Parts


@pytest.fixture
def parts(make_config):
    config = make_config()
    encoder = Parts(config).encoder
    torch.manual_seed(0)
    causal_lm = Parts(config).make_causal_lm()
    costing = Parts(config).inference_costing
    return Parts(config).make_backbone(causal_lm).eval(), encoder, costing, torch.device("cpu")


def draw(parts, **settings):
    backbone, encoder, costing, device = parts
    return draw_images(backbone, encoder, ["a handwritten six", "draw a seven please"], costing, device=device, **settings)


def test_drawings_are_codes_and_depend_on_the_seed_only(parts):
    first = draw(parts, seed=1, temperature=2.0)
    assert first.shape == (2, 8, 8) and first.min() >= 0 and first.max() <= 16
    assert (first == draw(parts, seed=1, temperature=2.0)).all()
    assert (first != draw(parts, seed=2, temperature=2.0)).any()


def test_top_1_is_the_same_for_every_seed(parts):
    assert (draw(parts, seed=1, top_k=1) == draw(parts, seed=2, top_k=1)).all()


def test_guidance_of_one_is_none_and_more_changes_the_drawing(parts):
    assert (draw(parts, seed=1, top_k=1) != draw(parts, seed=1, top_k=1, guidance=30.0)).any()


def read(text):
    segments = (Segment(image="i"), Segment(text="Which digit is this?"), Segment(text=text, loss=True))
    meta = {"answer": text, "choices": ["zero", "seven"]}
    return Sample("k", "understanding", segments, {"i": np.zeros((8, 8), np.int64)}, Coordinates(0, 0, 0, 0), meta)


def test_losses_of_samples_do_not_depend_on_what_they_are_packed_with(parts):
    backbone, encoder, costing, device = parts
    samples = [encoder(read("zero")), encoder(read("seven"))]
    together = sample_losses(backbone, samples, costing, device=device)
    alone = [sample_losses(backbone, [sample], costing, device=device)[0] for sample in samples]
    assert together == pytest.approx(alone, rel=1e-5)


class AlwaysSays(torch.nn.Module):
    """An output head that prefers one token whatever it reads."""

    def __init__(self, token, vocabulary_size):
        super().__init__()
        self.logits_V = 5.0 * torch.eye(vocabulary_size)[token]

    def forward(self, h_MD):
        return self.logits_V.expand(len(h_MD), -1)


def test_scoring_and_writing_on_a_model_that_always_says_seven(parts):
    backbone, encoder, costing, device = parts
    (piece,) = encoder.vocabulary.encode_text("seven")
    backbone.causal_lm.lm_head = AlwaysSays(piece, encoder.vocabulary.size)
    prompts = [encoder(read("zero")).prompt()]
    assert answer(backbone, encoder, prompts, costing, device=device, max_tokens=3) == ["seven seven seven"]
    samples = [read("seven"), read("zero"), read("seven"), read("seven")]
    assert scored_right(backbone, samples, encoder, costing, device=device).tolist() == [True, False, True, True]
    assert not written_right(backbone, samples, encoder, costing, device=device).any(), "it does not end"
    backbone.causal_lm.lm_head = AlwaysSays(encoder.vocabulary.eos, encoder.vocabulary.size)
    assert answer(backbone, encoder, prompts, costing, device=device) == [""]
