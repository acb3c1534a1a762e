"""Shards encoded once are the same samples with codes for images, whatever interrupts the encoding, and train as the raw ones do."""

import io
import json
import signal
import subprocess
import sys
import tarfile
import time

import pytest
import torch
from transformers import JanusVQVAE, JanusVQVAEConfig

from megavlm.config import load_config
from megavlm.data.read.index import read_index
from megavlm.data.read.shards import read_shard
from megavlm.data.read.source import SourceConfig
from megavlm.data.tools.lint import lint
from megavlm.data.tools.tokenize import MANIFEST, check_codes, encode_shard, encode_shards
from megavlm.errors import ConfigError, DataError
from megavlm.image_tokenizers.pixel import PixelTokenizer
from megavlm.image_tokenizers.vq import VQTokenizer
from megavlm.parts.parts import Parts
from tests.conftest import TINY
from tests.data.conftest import write_shard
from tests.data.read.test_sample import png

SMALL = {"base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1, "embed_dim": 8, "latent_channels": 8, "in_channels": 12}


@pytest.fixture(scope="module")
def vq(tmp_path_factory):
    """A folder with a VQ model for 8 x 8 pixels as 4 x 4 codes of 50."""
    folder = tmp_path_factory.mktemp("vq")
    torch.manual_seed(0)
    JanusVQVAE(JanusVQVAEConfig(**SMALL, out_channels=12, num_embeddings=50, num_patches=4)).save_pretrained(folder)
    return folder


def shards_of(folder):
    return [str(path) for task in ("generation", "understanding") for path in sorted(folder.glob(f"{task}-train-0[0-2].tar"))]


def test_killed_half_way_and_resumed_gives_the_same_bytes(digits_folder, vq, tmp_path):
    urls, tokenizer = shards_of(digits_folder), VQTokenizer(vq, 4, 4)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    for url in urls:
        encode_shard(url, whole / url.rsplit("/", 1)[-1], tokenizer)
    # the third shard does not come: that is where it is killed
    slow = [*urls[:2], f"pipe:sleep 30; cat {urls[2]}", *urls[3:]]
    command = [sys.executable, "-m", "megavlm", "data", "encode", json.dumps(slow), broken, f"--tokenizer={vq}", "--processes=1"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(broken.glob("*.tar.index.json"))) < 2 or not list(broken.glob(".*.encoding")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert {path.name for path in broken.glob("*.tar")} == {url.rsplit("/", 1)[-1] for url in urls[:2]}
    # as if the kill had come between a shard and its index
    (broken / "generation-train-01.tar.index.json").unlink()
    before = (broken / "generation-train-00.tar").stat().st_mtime_ns
    assert encode_shards(urls, broken, tokenizer, 1, devices=["cpu"]) == (4, 2)
    assert (broken / "generation-train-00.tar").stat().st_mtime_ns == before, "what is complete is not done again"
    for path in whole.iterdir():
        assert (broken / path.name).read_bytes() == path.read_bytes(), path.name
    assert {p.name for p in broken.iterdir()} == {p.name for p in whole.iterdir()} | {MANIFEST}
    with pytest.raises(ConfigError, match="codes of another image tokenizer"):
        encode_shards(urls, broken, PixelTokenizer(17, 8, 8), 1, devices=["cpu"])


def test_keys_order_and_everything_but_pixels_stay(vq, tmp_path):
    document = {"task": "text", "segments": [{"text": "x", "loss": True}], "meta": {"_a": 1}}
    samples = [
        ("b/2", {"img1.jpg": png(), "json": document, "img0.png": png((9, 9, 9)), "_private.bin": b"\x00"}),
        ("a/1" + "long" * 40, {"jpg": png(), "txt": b"a pair"}),
        ("c", {"img0.npy": b"codes already"}),
    ]
    with tarfile.open(tmp_path / "in.tar", "w") as tar:
        for key, members in samples:
            for name, content in members.items():
                content = content if isinstance(content, bytes) else json.dumps(content).encode()
                header = tarfile.TarInfo(f"{key}.{name}")
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))
    encode_shard(str(tmp_path / "in.tar"), tmp_path / "out.tar", VQTokenizer(vq, 4, 4))
    found = list(read_shard(str(tmp_path / "out.tar")))
    assert [key for key, _ in found] == [key for key, _ in samples]
    assert [list(members) for _, members in found] == [["img1.npy", "json", "img0.npy", "_private.bin"], ["npy", "txt"], ["img0.npy"]]
    assert json.loads(found[0][1]["json"]) == document and found[2][1]["img0.npy"] == b"codes already"
    assert read_index(str(tmp_path / "out.tar")).samples == 3
    report = lint([str(tmp_path / "out.tar")], SourceConfig(shards="none", format="img2dataset"))
    assert report.num_samples == 3 and {problem.key for problem in report.problems} == {"b/2", "c"}


def test_training_on_codes_sees_the_tokens_of_raw_images(digits_folder, vq, tmp_path):
    urls, tokenizer = shards_of(digits_folder), VQTokenizer(vq, 4, 4)
    for url in urls:
        encode_shard(url, tmp_path / url.rsplit("/", 1)[-1], tokenizer)

    def packs(folder):
        sources = {task: {"shards": f"{folder}/{task}-train-{{00..02}}.tar"} for task in ("generation", "understanding")}
        places = {"run_dir": "unused", "vocabulary.text_model": str(digits_folder / "text.model"), "data.sources": sources}
        image = {"vocabulary.image_tokenizer": {"kind": "vq", "path": str(vq), "height": 4, "width": 4}}
        lane = Parts(load_config("digits", TINY | places | image)).with_mixture().make_lane(1)
        return [next(lane)[0] for _ in range(6)]

    for raw, encoded in zip(packs(digits_folder), packs(tmp_path), strict=True):
        assert raw.keys == encoded.keys and raw.tokens_T.equal(encoded.tokens_T) and raw.image_tokens.sum() > 0


def test_codes_of_another_tokenizer_are_refused_where_they_are_used(digits_folder, vq, make_config, tmp_path):
    from megavlm.parts.resolve import resolve
    from megavlm.runs.folder import RunFolder
    from megavlm.system.world import World

    (tmp_path / "codes").mkdir()
    write_shard(tmp_path / "codes" / "a.tar", [])
    with pytest.raises(ConfigError, match="have the same name"):
        encode_shards(
            [str(tmp_path / "codes" / "a.tar"), str(tmp_path / "a.tar")], tmp_path / "x", VQTokenizer(vq, 4, 4), 1, devices=["cpu"]
        )
    (tmp_path / "codes" / MANIFEST).write_text(json.dumps({"fingerprint": "f", "codebook_size": 8192, "height": 8, "width": 8}))
    with pytest.raises(ConfigError, match="codebook_size: 8192 in the folder, 17 here"):
        check_codes([str(tmp_path / "codes" / "a.tar")], PixelTokenizer(17, 8, 8))
    config = make_config({"data.sources": {"a": {"shards": str(tmp_path / "codes" / "a.tar")}}})
    with pytest.raises(ConfigError, match="encode the shards again"):
        resolve(config, RunFolder(tmp_path / "run"), World(0, 1, 0, torch.device("cpu")))


def test_broken_images_are_named(vq, tmp_path):
    write_shard(tmp_path / "a.tar", [("k", {"json": {}, "img0.png": b"no png"})])
    with pytest.raises(DataError, match="cannot be read as an image") as caught:
        encode_shard(str(tmp_path / "a.tar"), tmp_path / "out.tar", VQTokenizer(vq, 4, 4))
    assert caught.value.key == "k" and not (tmp_path / "out.tar").exists()
    with pytest.raises(ConfigError, match="is no tar"):
        encode_shards(["https://host/x.jsonl"], tmp_path / "out", VQTokenizer(vq, 4, 4), 1, devices=["cpu"])
