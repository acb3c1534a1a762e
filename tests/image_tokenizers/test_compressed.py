"""The compressed tokenizer in the encoder, the packs, the backbone and the sampler."""

import json
import pickle

import numpy as np
import pytest
import torch

from megavlm.analysis.similarity import _as_read
from megavlm.benchmarks import digits
from megavlm.data.pack.encode import Encoder
from megavlm.data.pack.pack import build_pack
from megavlm.data.read.sample import Coordinates, Sample, Segment
from megavlm.errors import ConfigError, DataError, MegavlmError
from megavlm.evaluation.sampling import answer, draw_images
from megavlm.image_tokenizers.compressed import CompressedTokenizer
from megavlm.image_tokenizers.compressor import PlugInSettings
from megavlm.image_tokenizers.plug_in_training import Plan, train_plug_in
from megavlm.image_tokenizers.protocol import GridOnly
from megavlm.parts.parts import Parts
from tests.cli.test_main import megavlm
from tests.distributed.ranks import run_ranks
from tests.distributed.work import train

SETTINGS = PlugInSettings(
    num_dense_codes=17, height=8, width=8, embedding_width=8, has_codebook=False, codebook_size=64, hidden_width=32, num_layers=1
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A plug-in after a few steps."""
    out = tmp_path_factory.mktemp("plug_in") / "out"
    metrics = train_plug_in(digits.load("train").codes, digits.TOKENIZER, None, SETTINGS, out=out, plan=Plan(60, 32))
    assert metrics == json.loads((out / "metrics.json").read_text()) and (out / "reconstructions.png").stat().st_size > 5000
    return out


@pytest.fixture
def tokenizer(folder):
    return CompressedTokenizer(folder, digits.TOKENIZER)


@pytest.fixture
def config(folder, make_config):
    def make(understanding="continuous", **overrides):
        around = {"kind": "pixel", "levels": 17, "height": 8, "width": 8}
        compressed = {"kind": "compressed", "path": str(folder), "around": around, "understanding": understanding}
        return make_config({"vocabulary.image_tokenizer": compressed, "data.pack_tokens": 160} | overrides)

    return make


def sample(task="understanding", image=None):
    image = digits.load("test").codes[3] if image is None else image
    read = [Segment(image="i"), Segment(text="Which digit is this?"), Segment(text="seven", loss=True)]
    drawn = [Segment(text="a handwritten seven"), Segment(image="i", loss=True)]
    segments = tuple(read if task == "understanding" else drawn)
    return Sample("k", task, segments, {"i": image}, Coordinates(0, 0, 0, 0), {"answer": "seven", "choices": ["seven", "two"]})


def test_codes_are_global_separator_compressed(tokenizer):
    dense = digits.load("test").codes[:5]
    codes = tokenizer.compress(dense)
    assert codes.shape == (5, 1, 4 + 1 + 16) and (tokenizer.height, tokenizer.width) == (1, 21)
    assert (codes[:, 0, 4] == 64).all() and tokenizer.codebook_size == 65 and np.delete(codes[:, 0], 4, axis=1).max() < 64
    assert (tokenizer.encode(digits.TOKENIZER.decode(dense)) == codes).all()
    assert tokenizer.restore(codes).shape == (5, 8, 8) and tokenizer.decode(codes).shape == (5, 8, 8, 3)
    for image in (dense[2], digits.TOKENIZER.decode(dense)[2]):  # as shards hold it
        assert (tokenizer.encode_member("a", image, True)[0] == codes[2]).all()
        assert (digits.TOKENIZER.encode_member("a", image, True)[0] == dense[2]).all()
    again = pickle.loads(pickle.dumps(tokenizer))
    assert "plug_in" not in vars(again) and (again.compress(dense) == codes).all() and again.fingerprint == tokenizer.fingerprint


def test_features_are_what_is_quantised(tokenizer):
    dense = digits.load("test").codes[3]
    features = tokenizer.features(dense)
    assert features.places_R.tolist() == [0, 1, 2, 3, *range(5, 21)] and features.values_RF.shape == (20, 8)
    nearest = tokenizer.plug_in.quantizer.nearest(torch.from_numpy(features.values_RF)[None])[0]
    assert nearest.tolist() == tokenizer.compress(dense[None])[0, 0][features.places_R].tolist()


def test_the_sequence_and_its_features(config):
    encoder = Parts(config()).encoder
    vocabulary, encoded = encoder.vocabulary, encoder(sample())
    (span,) = encoded.spans
    image = encoded.tokens[span.start - 1 : span.start + span.length + 1]
    assert image[0] == vocabulary.boi and image[-1] == vocabulary.eoi and len(image) == 23
    assert image[5] == vocabulary.first_code + 64 == vocabulary.size - 1, "<img_sep> is the last id"
    assert encoder(sample("generation")).spans[0].features is None, "what is drawn is predicted as codes"
    pixels = encoder(sample(image=digits.TOKENIZER.decode(digits.load("test").codes[3:4])[0]))
    assert (pixels.tokens == encoded.tokens).all()
    with pytest.raises(DataError, match="has 4 x 4 codes, not 8 x 8"):
        encoder(sample(image=np.zeros((4, 4), np.int64)))
    discrete = Parts(config("discrete")).encoder
    assert discrete(sample()).spans[0].features is None


def test_the_backbone_reads_features_in_place_of_embeddings(config):
    made = config()
    encoder = Parts(made).encoder
    torch.manual_seed(0)
    causal_lm = Parts(made).make_causal_lm()
    backbone, costing = Parts(made).make_backbone(causal_lm), Parts(made).inference_costing
    samples = [encoder(sample("generation")), encoder(sample()), encoder(sample())]
    pack = build_pack(samples, costing, 2, 0, step=0, seed=0)
    embedding, plain = backbone._embed(pack), causal_lm.model.embed_tokens(pack.tokens_T)
    rows = torch.zeros(pack.num_tokens, dtype=torch.bool)
    rows[pack.feature_rows_R] = True
    assert rows.sum() == 40 and embedding[~rows].equal(plain[~rows])
    torch.testing.assert_close(embedding[rows], backbone.reader(pack.features_RF))
    first = samples[0].num_tokens + samples[1].spans[0].start
    features = encoder.image_tokenizer.features(digits.load("test").codes[3]).values_RF
    torch.testing.assert_close(embedding[first], backbone.reader(torch.from_numpy(features[0])))
    backbone(pack)[:-1].sum().backward()
    assert backbone.reader.weight.grad.abs().sum() > 0
    # nothing to read: the reader runs all the same, on no rows
    backbone.zero_grad()
    backbone(build_pack(samples[:1], costing, 2, 0, step=0, seed=0))[:-1].sum().backward()
    assert backbone.reader.weight.grad.abs().sum() == 0


def test_decoding_and_drawing(config):
    made = config()
    encoder = Parts(made).encoder
    torch.manual_seed(0)
    causal_lm = Parts(made).make_causal_lm()
    backbone, costing = Parts(made).make_backbone(causal_lm).eval(), Parts(made).inference_costing
    codes = draw_images(backbone, encoder, ["a seven", "a two"], costing, device=torch.device("cpu"), seed=0, temperature=3.0, guidance=2.0)
    assert codes.shape == (2, 1, 21) and (codes[:, 0, 4] == 64).all() and np.delete(codes[:, 0], 4, axis=1).max() < 64
    assert encoder.image_tokenizer.decode(codes).shape == (2, 8, 8, 3)
    prompts = [encoder(sample(image=digits.load("test").codes[i])).prompt() for i in (3, 4)]
    said = answer(backbone, encoder, prompts, costing, device=torch.device("cpu"), max_tokens=3)
    # another image of the same indices is another prompt: what is read are the features
    with torch.no_grad():
        backbone.reader.weight.mul_(-20)
    assert answer(backbone, encoder, prompts, costing, device=torch.device("cpu"), max_tokens=3) != said


def test_the_mixture_knows_the_compressed_length(config):
    mixture = Parts(config()).with_mixture().mixture
    assert {layout.spans[0][0] for source in mixture.values() for _, layout in source.layouts} == {21}
    vocabulary, tokenizer = Parts(config()).vocabulary, Parts(config()).image_tokenizer
    assert Encoder(vocabulary, GridOnly(tokenizer))(sample()).spans[0].length == 21, "of dense codes too"


def test_an_image_that_is_drawn_can_be_laid_out_as_one_that_is_read(config):
    encoder = Parts(config("discrete")).encoder
    drawn = encoder(sample("generation"))
    read, expected = _as_read(drawn, drawn.spans[0], encoder), encoder(sample())
    assert read.spans == expected.spans and (read.tokens[:-1] == expected.tokens[: read.num_tokens - 1]).all()


def test_a_run_with_features_trains_on_two_ranks(config):
    ranks = run_ranks(2, train, config(**{"checkpoint.every_steps": 100}), 2)
    weights = ranks[0]["weights"]
    assert weights["reader.weight/exp_avg"].abs().sum() > 0
    assert all(np.isfinite(norm) for norm in ranks[0]["norms"])


def test_mistakes(folder, tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="is one for 17 codes on 8 x 8, the tokenizer has 17 on 4 x 4"):
        CompressedTokenizer(folder, type(digits.TOKENIZER)(17, 4, 4))
    with pytest.raises(ConfigError, match="holds no plug-in"):
        CompressedTokenizer(tmp_path, digits.TOKENIZER)
    with pytest.raises(ConfigError, match="another plug-in than the run began with"):
        CompressedTokenizer(folder, digits.TOKENIZER, expected="0").compress(np.zeros((1, 8, 8)))
    with pytest.raises(MegavlmError, match="exists already"):
        train_plug_in(digits.load("train").codes, digits.TOKENIZER, None, SETTINGS, out=folder, plan=Plan(1))


def test_the_command(monkeypatch, digits_folder, tmp_path, capsys):
    shards = f"{digits_folder}/generation-train-00.tar"
    small = ["--steps=12", "--hidden_width=16", "--num_layers=1", "--codebook_size=16", "--embedding_width=4", "--batch_images=8"]
    text_model = f"--vocabulary.text_model={digits_folder}/text.model"
    megavlm(monkeypatch, "data", "compressor", "digits", shards, tmp_path / "out", "--factor=4", *small, text_model)
    shown = json.loads(capsys.readouterr().out)
    assert shown["tokens_per_image"] == 4 + 4 and shown["held_out"]["images"] == 9 and 0 <= shown["held_out"]["code_accuracy"] <= 1
    assert CompressedTokenizer(tmp_path / "out", digits.TOKENIZER).width == 9
    with pytest.raises(SystemExit):
        megavlm(monkeypatch, "data", "compressor", "digits", shards, tmp_path / "no", "--factor=3", *small, text_model)
    assert "factor Input should be 2 or 4" in capsys.readouterr().err
