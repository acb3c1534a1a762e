"""An image tokenizer that was carried into a folder is the same tokenizer, also to `transformers`."""

import shutil

import numpy as np
import pytest
import torch
import transformers

from megavlm.benchmarks import digits
from megavlm.image_tokenizers.build import build_image_tokenizer
from megavlm.image_tokenizers.carried import at_folder, carry_image_tokenizer
from megavlm.image_tokenizers.compressed import CompressedTokenizerConfig, save_plug_in
from megavlm.image_tokenizers.compressor import PlugInSettings
from megavlm.image_tokenizers.decompressor import PlugIn
from megavlm.image_tokenizers.pixel import PixelTokenizerConfig
from megavlm.image_tokenizers.vq import VQTokenizerConfig
from tests.image_tokenizers.test_vq import CLASSES, IMAGES, make_vq, save_whole


def carried(config, tmp_path):
    """The tokenizer of a copy, made after the original has gone."""
    before = build_image_tokenizer(config)
    known = config.model_copy(update={"fingerprint": before.fingerprint})
    codes = before.encode(IMAGES)
    carry_image_tokenizer(known, tmp_path / "out")
    shutil.rmtree(config.path)
    after = build_image_tokenizer(at_folder(known, tmp_path / "out"))
    assert after.fingerprint == before.fingerprint
    assert (after.encode(IMAGES) == codes).all()
    return before, after, codes


@pytest.mark.parametrize("family", CLASSES)
def test_the_vq_part_of_a_whole_model(family, tmp_path):
    save_whole(make_vq(family), family, tmp_path / "whole")
    config = VQTokenizerConfig(kind="vq", path=str(tmp_path / "whole"), height=4, width=4)
    before, after, codes = carried(config, tmp_path)
    model, report = getattr(transformers, CLASSES[family]).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    if family != "chameleon":
        assert (after.decode(codes) == before.decode(codes)).all()
    if family == "janus":
        with torch.no_grad():
            theirs = model.decode(torch.from_numpy(codes).flatten(1)).permute(0, 2, 3, 1)
        assert np.abs(after.decode(codes) - ((theirs + 1) * 127.5).clamp(0, 255).numpy()).max() <= 0.51


def test_a_plug_in_with_the_tokenizer_inside(tmp_path):
    make_vq("janus").save_pretrained(tmp_path / "plug_in" / "vq")
    settings = PlugInSettings(
        num_dense_codes=40, height=4, width=4, embedding_width=8, has_codebook=False, codebook_size=64, hidden_width=32, num_layers=1
    )
    torch.manual_seed(0)
    save_plug_in(PlugIn(settings), tmp_path / "plug_in")
    around = VQTokenizerConfig(kind="vq", path=str(tmp_path / "plug_in" / "vq"), height=4, width=4)
    before, after, codes = carried(CompressedTokenizerConfig(kind="compressed", path=str(tmp_path / "plug_in"), around=around), tmp_path)
    assert (after.decode(codes) == before.decode(codes)).all()


def test_pixels_need_no_folder(tmp_path):
    config = PixelTokenizerConfig(levels=17)
    carry_image_tokenizer(config, tmp_path / "out")
    assert not (tmp_path / "out").exists() and at_folder(config, tmp_path / "out") == config
    assert build_image_tokenizer(config).fingerprint == digits.TOKENIZER.fingerprint
