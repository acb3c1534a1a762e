import gzip

import pytest
import webdataset

from megavlm.data.shards import expand_shards, read_shard
from megavlm.errors import ConfigError, DataError


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / "a.tar"
    with webdataset.TarWriter(str(path), encoder=False) as writer:
        for i in range(3):
            writer.write({"__key__": f"{i:03d}", "json": b"{}", "img0.npy": bytes(700)})
    return path


def test_reads_keys_and_members_in_order(shard):
    samples = list(read_shard(str(shard)))
    assert [key for key, _ in samples] == ["000", "001", "002"]
    assert samples[0][1] == {"json": b"{}", "img0.npy": bytes(700)}


@pytest.mark.parametrize("prefix", ["", "file:", "pipe:cat "])
def test_urls(shard, prefix):
    assert len(list(read_shard(prefix + str(shard)))) == 3


def test_compressed(shard):
    packed = shard.with_suffix(".tar.gz")
    packed.write_bytes(gzip.compress(shard.read_bytes()))
    assert len(list(read_shard(str(packed)))) == 3


def test_a_shard_cut_anywhere_is_an_error_that_names_it(shard):
    content = shard.read_bytes()
    # data ends at 3 samples * (header + 1 block + header + 2 blocks); then come blocks of zeros
    for cut in range(0, 3 * 5 * 512 + 1, 256):
        cut_shard = shard.with_name("cut.tar")
        cut_shard.write_bytes(content[:cut])
        with pytest.raises(DataError, match="cut short") as caught:
            list(read_shard(str(cut_shard), "train"))
        assert "source train, shard " + str(cut_shard) in str(caught.value)


def test_a_damaged_header_is_an_error(shard):
    content = bytearray(shard.read_bytes())
    content[5 * 512 + 150] ^= 0xFF
    shard.write_bytes(content)
    with pytest.raises(DataError, match="invalid header at byte 2560"):
        list(read_shard(str(shard)))


def test_missing_shard(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        expand_shards("train", str(tmp_path / "none-{0..1}.tar"))


def test_a_shard_named_twice(shard):
    with pytest.raises(ConfigError, match="more than once"):
        expand_shards("train", [str(shard), str(shard)])
