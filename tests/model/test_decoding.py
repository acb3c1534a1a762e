"""Decoding along a route equals the packed forward pass over the whole sequence, token by token."""

import pytest
import torch

from megavlm.data.pack.pack import build_pack
from megavlm.model.decoding import Decoder
from tests.model.test_backbone import EVERY_POLICY, make_backbone
from tests.routing.layouts import costing, make_samples

EVERY_KIND = pytest.mark.parametrize("model_type", ["qwen3", "mistral"])
"""Layers that see everything, and layers with a sliding window."""
DRAWN = [
    [("text", 4, 1), ("IMAGE", 4, 4)],
    [("image", 2, 3), ("text", 2, 1), ("IMAGE", 3, 3)],
    [("text", 1, 1), ("IMAGE", 4, 4)],
]
READ = [
    [("image", 4, 4), ("text", 3, 1), ("TEXT", 4, 1)],
    [("image", 2, 3), ("image", 3, 1), ("text", 1, 1), ("TEXT", 5, 1)],
]


def decoder_of(backbone, samples, begins, policy, **options):
    device = torch.device("cpu")
    return Decoder(model=backbone, samples=samples, prompt_lengths=begins, costing=costing(policy), device=device, **options)


def logits_of_packed(backbone, samples, policy):
    """``[S][place, V]`` for every place."""
    pack = build_pack(samples, costing(policy), 1, 0, step=0, seed=0)
    h_TD, _ = backbone.hidden_states(pack)
    logits_TV = backbone.causal_lm.lm_head(backbone.causal_lm.model.norm(h_TD))
    return logits_TV.split(pack.sequences.lengths)


@EVERY_POLICY
@EVERY_KIND
@torch.no_grad()
def test_drawing(policy, model_type):
    backbone, samples = make_backbone(policy, model_type), make_samples(DRAWN)
    expected = logits_of_packed(backbone, samples, policy)
    begins = [sample.spans[-1].start for sample in samples]
    decoder = decoder_of(backbone, samples, begins, policy)
    logits = decoder.start()
    for step in range(min(sample.spans[-1].length for sample in samples)):
        for s, begin in enumerate(begins):
            torch.testing.assert_close(logits[s], expected[s][begin + step - 1], rtol=1e-11, atol=1e-11)
        logits = decoder.feed(torch.tensor([sample.tokens[begin + step] for sample, begin in zip(samples, begins)]))


@EVERY_POLICY
@torch.no_grad()
def test_placeholders_do_not_matter(policy):
    """What is decoded depends on the tokens fed, not on what stood in their place."""
    backbone, samples = make_backbone(policy), make_samples(DRAWN)
    begins = [sample.spans[-1].start for sample in samples]
    results = []
    for change in (0, 7):
        changed = []
        for sample, begin in zip(samples, begins):
            tokens = sample.tokens.copy()
            tokens[begin:] = (tokens[begin:] + change) % 150
            changed.append(type(sample)(**vars(sample) | {"tokens": tokens}))
        decoder = decoder_of(backbone, changed, begins, policy)
        logits = [decoder.start()]
        for step in range(5):
            logits.append(decoder.feed(torch.tensor([sample.tokens[b + step] for sample, b in zip(samples, begins)])))
        results.append(torch.stack(logits))
    assert results[0].equal(results[1])


@EVERY_POLICY
@EVERY_KIND
@torch.no_grad()
def test_answering(policy, model_type):
    backbone, samples = make_backbone(policy, model_type), make_samples(READ)
    expected = logits_of_packed(backbone, samples, policy)
    prompts = [sample.prompt() for sample in samples]
    lengths = [prompt.num_tokens for prompt in prompts]
    decoder = decoder_of(backbone, prompts, lengths, policy, num_more=8)
    logits = decoder.start()
    for step in range(4):
        for s, length in enumerate(lengths):
            torch.testing.assert_close(logits[s], expected[s][length + step - 1], rtol=1e-11, atol=1e-11)
        logits = decoder.feed(torch.tensor([sample.tokens[n + step] for sample, n in zip(samples, lengths)]))
