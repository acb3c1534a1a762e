"""A VQ tokenizer of one's own: it learns, writes down how well, and its codes do not die."""

import json

import numpy as np
import pytest
import torch

from megavlm.data.read.sample import decode_image
from megavlm.data.read.shards import read_shard
from megavlm.data.read.source import SourceConfig
from megavlm.data.tools.images import read_images
from megavlm.errors import DataError, MegavlmError
from megavlm.image_tokenizers.vq import VQTokenizer, nearest_direction
from megavlm.image_tokenizers.vq_training import Codebook, Plan, codebook_metrics, reconstruction_metrics, train_tokenizer

PLAN = Plan(codebook_size=32, height=4, width=4, pixels=8, steps=120, batch_images=32, channels=32, learning_rate=3e-3)
SOURCE = SourceConfig(shards="none")


def test_training_learns_and_writes_down_how_well(digits_folder, tmp_path):
    urls = [str(digits_folder / f"generation-train-0{i}.tar") for i in range(4)]
    found = train_tokenizer(read_images(urls, SOURCE), tmp_path / "vq", PLAN)
    assert found == json.loads((tmp_path / "vq" / "metrics.json").read_text())
    images = np.stack([decode_image("img0", members) for _, members in read_shard(str(digits_folder / "generation-test-00.tar"))])
    tokenizer = VQTokenizer(tmp_path / "vq", 4, 4)
    decoded = tokenizer.decode(tokenizer.encode(images))
    mean = np.broadcast_to(images.mean((0, 1, 2)).round().astype(np.uint8), images.shape)
    assert decoded.shape == images.shape == (360, 8, 8, 3)
    assert reconstruction_metrics(images, decoded)["psnr_db"] > reconstruction_metrics(images, mean)["psnr_db"] + 3
    assert found["codes_used"] > 0.5 and found["perplexity"] > 8 and found["held_out_images"] == 36
    assert (tmp_path / "vq" / "reconstructions.png").stat().st_size > 2000
    with pytest.raises(MegavlmError, match="exists already"):
        train_tokenizer(read_images(urls, SOURCE), tmp_path / "vq", PLAN)


def test_dead_codes_come_back_where_the_error_is_largest():
    torch.manual_seed(0)
    near = torch.nn.functional.normalize(torch.tensor([1.0, 0.0]) + 0.01 * torch.randn(600, 2), dim=1)
    weight = torch.zeros(4, 2)
    codebook = Codebook(weight, near, seed=0)
    far = torch.tensor([0.0, 1.0]).expand(40, 2)
    z = torch.cat([near, far])
    alike = 0
    for step in range(200):
        codes = nearest_direction(z.T[None, :, :, None], weight).flatten()
        alike += codebook.update(z, codes, restart=step % 10 == 9)
        if step == 0:
            # all the others die, because only one is chosen
            weight[1:] = codebook.sum_VC[1:] = -torch.eye(2)[0]
    assert alike > 0 and weight.norm(dim=1).allclose(torch.ones(4))
    assert (weight @ torch.tensor([0.0, 1.0])).max() > 0.99 and (weight @ torch.tensor([1.0, 0.0])).max() > 0.99


def test_metrics_of_known_images_and_codes():
    images = np.zeros((2, 4, 4, 3), np.uint8)
    assert reconstruction_metrics(images, images)["psnr_db"] == pytest.approx(10 * np.log10(12 * 255**2), abs=0.01)
    assert reconstruction_metrics(images, images + 255)["psnr_db"] == 0
    assert codebook_metrics(np.array([0, 1, 2, 3] * 5), 8) == {"codes_used": 0.5, "perplexity": 4.0}


@pytest.mark.parametrize(("changes", "message"), [({"pixels": 9}, "cannot become 4 rows"), ({"channels": 48}, "a multiple of 32")])
def test_sizes_that_do_not_fit(changes, message):
    with pytest.raises(MegavlmError, match=message):
        Plan(**{"height": 4, "width": 4, "pixels": 8} | changes).model_config()


def test_too_few_images(tmp_path):
    from tests.data.conftest import write_shard

    write_shard(tmp_path / "a.tar", [("k", {"json": {"task": "text", "segments": [{"text": "a", "loss": True}]}})])
    with pytest.raises(DataError, match="there are 0 raw images"):
        train_tokenizer(read_images([str(tmp_path / "a.tar")], SOURCE), tmp_path / "out", PLAN)
    assert not (tmp_path / "out").exists()
