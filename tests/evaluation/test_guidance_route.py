"""Guidance whose halves follow routes of their own, against the reference: one document at a time, with loops and masks."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megavlm.data.pack.pack import build_pack
from megavlm.evaluation.sampling import _samples, draw_images
from megavlm.parts.parts import Parts
from megavlm.routing.policies import Dense
from tests.model.reference import Reference, make_exact, recorded_chance
from tests.model.test_routes import make_costing

PROMPTS = ["a handwritten six", "draw a seven please", "nine"]
GUIDANCE = 3.0
ROUTES = {
    "random_ltd": {"policy": "random_ltd", "keep_ratio": 0.4},
    "visible_bypass": {"policy": "visible_bypass", "keep_ratio": 0.25},
    "sparse_mlp": {"policy": "sparse_mlp", "keep_ratio": 0.3},
}


def parts_of(make_config, generation, **evaluation):
    settings = {f"evaluation.{name}": value for name, value in evaluation.items()}
    return Parts(make_config({"routing.generation": generation, "routing.understanding": {"policy": "dense"}} | settings))


def backbone_of(parts):
    torch.manual_seed(0)
    backbone = parts.make_backbone()
    for parameter in backbone.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return make_exact(backbone).double().eval()


def logits_of(backbone, samples, policies):
    """Of the codes of every sample's last image ``[S][P, C]``, by the reference."""
    with recorded_chance() as drawn:
        pack = build_pack(samples, make_costing(policies), num_sources=1, lane=0, step=0, seed=0)
    reference = Reference(backbone, samples, policies, route=pack.route, drawn=drawn)
    spans = [sample.spans[-1] for sample in samples]
    return [reference.logits(h)[span.start - 1 : span.start + span.length - 1] for h, span in zip(reference.streams(), spans)]


@pytest.mark.parametrize("name", ROUTES)
@pytest.mark.parametrize(("route", "guidance_route"), [("dense", "trained"), ("trained", "dense")])
@torch.no_grad()
def test_every_code_is_the_most_likely_one_by_the_reference(make_config, name, route, guidance_route):
    parts = parts_of(make_config, ROUTES[name], route=route, guidance_route=guidance_route)
    backbone, encoder = backbone_of(parts), parts.encoder
    options = {"device": torch.device("cpu"), "seed": 0, "top_k": 1, "guidance": GUIDANCE}
    codes = draw_images(backbone, encoder, PROMPTS, parts.inference_costing, guidance_costing=parts.guidance_costing, **options)

    def complete(sample, codes_hw):
        tokens, span = sample.tokens.copy(), sample.spans[-1]
        tokens[span.start : span.start + span.length] = codes_hw.ravel() + encoder.vocabulary.first_code
        return replace(sample, tokens=tokens)

    halves = [[complete(*pair) for pair in zip(half, codes)] for half in _samples(encoder, PROMPTS, GUIDANCE)]
    policies = {"dense": (Dense(), Dense()), "trained": (Dense(), parts.config.routing.generation)}
    strong, weak = (logits_of(backbone, half, policies[of]) for half, of in zip(halves, (route, guidance_route)))
    of_codes = slice(encoder.vocabulary.first_code, encoder.vocabulary.size)
    for with_prompt, without, drawn in zip(strong, weak, codes):
        guided = (without + GUIDANCE * (with_prompt - without))[:, of_codes]
        chosen = guided.gather(1, torch.from_numpy(drawn.ravel())[:, None])[:, 0]
        assert (chosen >= guided.max(1).values - 1e-9).all()
    alike = draw_images(backbone, encoder, PROMPTS, parts.inference_costing, **options)
    assert (alike != codes).any(), "the other route must make a difference"


def test_without_a_route_of_its_own_nothing_is_decoded_apart(make_config):
    assert parts_of(make_config, ROUTES["random_ltd"]).guidance_costing is None
    assert parts_of(make_config, ROUTES["random_ltd"], route="trained", guidance_route="trained").guidance_costing is None


@torch.no_grad()
def test_the_same_route_named_twice_draws_the_same(make_config):
    """Two decoders are as good as one."""
    parts = parts_of(make_config, ROUTES["random_ltd"])
    backbone, costing = backbone_of(parts), parts.inference_costing
    options = {"device": torch.device("cpu"), "seed": 0, "temperature": 2.0, "guidance": GUIDANCE}
    one = draw_images(backbone, parts.encoder, PROMPTS, costing, **options)
    two = draw_images(backbone, parts.encoder, PROMPTS, costing, guidance_costing=costing, **options)
    assert np.array_equal(one, two)
