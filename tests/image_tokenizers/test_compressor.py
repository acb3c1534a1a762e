"""UniCompress: what goes in and out of the plug-in, what depends on what, and that a tiny one learns its data by heart."""

import pytest
import torch
from pydantic import ValidationError

from megavlm.image_tokenizers.compressor import PlugInSettings, Quantizer, pool
from megavlm.image_tokenizers.decompressor import PlugIn


def settings(**changes):
    sizes = {"num_dense_codes": 7, "height": 4, "width": 8, "embedding_width": 6, "has_codebook": False, "num_global": 3}
    sizes |= {"codebook_size": 11, "hidden_width": 16, "num_heads": 2, "num_layers": 2}
    return PlugInSettings(**sizes | changes)


def plug_in(**changes):
    torch.manual_seed(0)
    return PlugIn(settings(**changes)).double()


CODES = torch.randint(0, 7, (5, 4, 8), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("factor", "num_tokens"), [(2, 3 + 8), (4, 3 + 2)])
def test_shapes(factor, num_tokens):
    made = plug_in(factor=factor)
    assert made.settings.num_tokens == num_tokens and made.settings.num_dense == 32
    found = made(CODES)
    assert found["features"].shape == (5, num_tokens, 6) and found["indices"].shape == (5, num_tokens)
    regressed, logits = made.decompressor(found["features"], made.compressor.embedding(CODES.flatten(1)))
    assert regressed.shape == (5, 32, 6) and logits.shape == (5, 32, 7)
    indices = made.compress(CODES)
    assert indices.equal(found["indices"]) and indices.max() < 11
    restored = made.restore(indices)
    assert restored.shape == CODES.shape and restored.max() < 7


def test_pooled_tokens_are_the_means_of_their_blocks():
    dense = torch.arange(32.0).view(1, 4, 8, 1)
    # of rows 0 and 1, columns 0 and 1: (0 + 1 + 8 + 9) / 4
    assert pool(dense, 2)[0, :, 0].tolist() == [4.5, 6.5, 8.5, 10.5, 20.5, 22.5, 24.5, 26.5]
    assert pool(dense, 4)[0, :, 0].tolist() == [13.5, 17.5]
    made = plug_in()
    weight = made.compressor.embedding.weight
    expected = (weight[CODES[2, 0, 2]] + weight[CODES[2, 0, 3]] + weight[CODES[2, 1, 2]] + weight[CODES[2, 1, 3]]) / 4
    torch.testing.assert_close(made.compressor(CODES)[2, 3 + 1], expected)


def test_a_later_code_changes_no_earlier_prediction():
    made, tokens = plug_in(), torch.randn(1, 11, 6, dtype=torch.float64)
    dense = made.compressor.embedding(CODES[:1].flatten(1)).detach()
    before = made.decompressor(tokens, dense)
    for place in (0, 13, 31):
        changed = dense.clone()
        changed[:, place] += 1
        for was, now in zip(before, made.decompressor(tokens, changed)):
            differs = (was != now).any(2)[0]
            assert not differs[: place + 1].any(), "the code itself is not seen either"
            assert differs[place + 1 :].all()
    for token in (0, 10):
        other = tokens.clone()
        other[:, token] += 1
        assert (made.decompressor(other, dense)[1] != before[1]).any(2).all(), "every token is seen everywhere"


def test_generation_with_a_cache_follows_the_teacher_forced_predictions():
    made = plug_in()
    with torch.no_grad():
        tokens = made.compressor(CODES)
        restored = made.decompressor.generate(tokens, made.compressor.embedding)
        _, logits = made.decompressor(tokens, made.compressor.embedding(restored))
    assert restored.equal(logits.argmax(-1)) and len(restored.unique()) > 1


def test_entries_are_the_nearest_and_gradients_pass_straight_through():
    quantizer = Quantizer(3, 2)
    quantizer.entry_KD.data = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
    features = torch.tensor([[[1.0, 1.0], [3.0, 1.0], [1.9, 2.2]]], requires_grad=True)
    entries, indices, loss = quantizer(features)
    assert indices.tolist() == [[0, 1, 2]] and entries.tolist() == [[[0, 0], [4, 0], [0, 4]]]
    (entries * torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]])).sum().backward()
    assert features.grad.tolist() == [[[1, 2], [3, 4], [5, 6]]]
    # squared errors 1+1, 1+1, 1.9²+1.8² over six numbers, and a quarter of that again, over the variance
    expected = 1.25 * (4 + 1.9**2 + 1.8**2) / 6 / features.detach().var()
    torch.testing.assert_close(loss, expected)


def test_gradients_of_the_codes_reach_the_encoder():
    made = plug_in()
    made(CODES)["consistency"].backward()
    compressor = made.compressor
    for parameter in (compressor.query_GW, compressor.attention.in_proj_weight, compressor.into.weight, compressor.embedding.weight):
        assert parameter.grad.abs().sum() > 0
    assert made.quantizer.entry_KD.grad is None, "the codebook has a loss of its own"
    fixed = torch.randn(7, 6)
    around = PlugIn(settings(has_codebook=True), fixed)
    assert around.compressor.embedding.weight.equal(fixed) and not around.compressor.embedding.weight.requires_grad


def test_a_tiny_plug_in_learns_its_data_by_heart():
    torch.manual_seed(0)
    made = PlugIn(settings(codebook_size=32, hidden_width=32))
    optimizer = torch.optim.Adam(made.parameters(), 5e-3)
    for step in range(200):
        if step == 20:
            made.quantizer.begin_anew(made.compressor(CODES).detach(), torch.arange(32))
        found = made(CODES, quantised=step >= 20)
        optimizer.zero_grad()
        (found["consistency"] + found["regression"] + found["codebook"]).backward()
        optimizer.step()
    assert (made.restore(made.compress(CODES)) == CODES).float().mean() > 0.98
    assert found["regression"] < 0.2 and len(made.compress(CODES).unique()) > 10


def test_entries_begin_anew_on_features():
    quantizer, features = Quantizer(4, 2), torch.randn(3, 5, 2)
    untouched = quantizer.entry_KD.data[[0, 2]].clone()
    quantizer.begin_anew(features, torch.tensor([1, 3]))
    assert quantizer.entry_KD.data[[0, 2]].equal(untouched)
    nearest = (quantizer.entry_KD.data[[1, 3], None] - features.view(1, -1, 2)).norm(dim=2).min(1).values
    assert (nearest < 0.1).all()


@pytest.mark.parametrize(
    ("changes", "message"), [({"width": 6, "factor": 4}, "do not fill"), ({"num_heads": 3}, "no multiple"), ({"factor": 3}, "2 or 4")]
)
def test_sizes_that_do_not_fit(changes, message):
    with pytest.raises(ValidationError, match=message):
        settings(**changes)
