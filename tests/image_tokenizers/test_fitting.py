"""Images of other proportions: what stands out is cut, padded or squashed as the recipe says, and counted where something is lost."""

import io

import numpy as np
import pytest
from PIL import Image

from megavlm.data.tools.tokenize import MANIFEST, encode_shards
from megavlm.errors import ConfigError
from megavlm.image_tokenizers.fitting import fitted, loss_of
from megavlm.image_tokenizers.pixel import PixelTokenizer
from tests.data.conftest import write_shard

WIDE = np.zeros((8, 24, 3), np.uint8)
WIDE[:, 8:16] = 255  # black, white, black


def test_each_fit_does_what_it_says():
    crop, pad, squash = (fitted(WIDE, (8, 8), fit, Image.Resampling.BOX) for fit in ("crop", "pad", "squash"))
    assert crop.min() == 255
    assert pad[0].max() == pad[-1].max() == 0 and pad[4, 4, 0] == 255 and pad[4, 0, 0] == 0
    assert squash[:, 0].max() == 0 and squash[:, 4].min() == 255
    assert fitted(np.zeros((1, 5000, 3), np.uint8), (8, 8), "pad", Image.Resampling.BOX).shape == (8, 8, 3)


@pytest.mark.parametrize(("shape", "lost"), [((8, 8), False), ((16, 16), False), ((100, 101), False), ((8, 10), True), ((300, 2), True)])
def test_what_is_lost_is_known(shape, lost):
    image = np.zeros((*shape, 3), np.uint8)
    assert loss_of(image, (8, 8), "crop") == ("cut" if lost else None)
    assert loss_of(image, (8, 8), "squash") == ("squashed" if lost else None)
    assert loss_of(image, (8, 8), "pad") is None


def test_another_fit_is_another_tokenizer():
    assert PixelTokenizer(17, 8, 8).fingerprint == PixelTokenizer(17, 4, 4, "squash").fingerprint
    assert len({PixelTokenizer(17, 8, 8, fit).fingerprint for fit in ("crop", "pad", "squash")}) == 3


def wide_shard(path) -> None:
    content = io.BytesIO()
    Image.fromarray(WIDE).save(content, "PNG")
    segments = [{"image": "img0"}, {"text": "a", "loss": True}]
    samples = [(str(i), {"json": {"task": "understanding", "segments": segments}, "img0.png": content.getvalue()}) for i in range(3)]
    write_shard(path, samples)


def test_lanes_count_what_images_lose(tmp_path, make_lane_of, caplog):
    wide_shard(tmp_path / "a.tar")
    sources = {"s": {"shards": str(tmp_path / "a.tar"), "epochs": 1}}
    for fit, counted in (("squash", {"squashed": 3}), ("crop", {"cut": 3}), ("pad", {})):
        lane = make_lane_of(sources, fit)
        state = list(lane)[-1][1]
        assert {name: count for name, count in state["counts"].items() if count} == counted
        old = dict(state, counts={"errors": 0, "skipped": 0, "truncated": 0, "split": 0})
        assert make_lane_of(sources, fit, old).counts["cut"] == 0, "states of earlier runs do not have it"
    assert "image of 24 x 8 pixels cut (1 so far): source s, shard" in caplog.text


@pytest.fixture
def make_lane_of(digits_folder):
    from megavlm.config import load_config
    from megavlm.parts.parts import Parts
    from tests.conftest import TINY

    def make(sources, fit, state=None):
        places = {"run_dir": "unused", "vocabulary.text_model": str(digits_folder / "text.model"), "data.sources": sources}
        settings = {"data.num_lanes": 1, "vocabulary.image_tokenizer.fit": fit}
        return Parts(load_config("digits", TINY | places | settings)).with_mixture().make_lane(0, state)

    return make


def test_encode_counts_and_refuses_another_fit(tmp_path, caplog):
    wide_shard(tmp_path / "a.tar")
    urls = [str(tmp_path / "a.tar")]
    assert encode_shards(urls, tmp_path / "out", PixelTokenizer(17, 8, 8, "crop"), 1, devices=["cpu"]) == (1, 0)
    assert "3 of 3 images are cut" in caplog.text and (tmp_path / "out" / MANIFEST).is_file()
    with pytest.raises(ConfigError, match="another image tokenizer"):
        encode_shards(urls, tmp_path / "out", PixelTokenizer(17, 8, 8, "pad"), 1, devices=["cpu"])
