import gzip
import io
import tarfile

import pytest
import webdataset

from megavlm.data.read.shards import expand_shards, read_shard
from megavlm.errors import ConfigError, DataError


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / "a.tar"
    with webdataset.TarWriter(str(path), encoder=False, mtime=0) as writer:
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
    # at 0 and 1024 stand headers, behind them contents of 1 and 2 blocks
    for cut in (512, 1536 + 512):
        cut_shard.write_bytes(content[:cut])
        with pytest.raises(DataError, match="unexpected end of data"):
            list(read_shard(str(cut_shard)))


@pytest.mark.parametrize("place", [3, 130, 150])
def test_a_damaged_header_is_an_error(shard, place):
    """In name, size or checksum."""
    content = bytearray(shard.read_bytes())
    content[5 * 512 + place] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match="at byte 2560"):
        list(read_shard(str(shard)))


def test_missing_shard(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        expand_shards("train", str(tmp_path / "none-{0..1}.tar"))


def test_a_shard_named_twice(shard):
    with pytest.raises(ConfigError, match="more than once"):
        expand_shards("train", [str(shard), str(shard)])


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_of_every_kind_of_tar(tmp_path, format):
    names = ["a.json", "folder/" * 14 + "b.json", "folder/" * 14 + "c" * 60 + ".json", "\u00e4\u00df.json"]
    if format != tarfile.USTAR_FORMAT:
        names.append("d" * 300 + ".json")  # a member of its own holds this name
    with tarfile.open(tmp_path / "a.tar", "w", format=format) as tar:
        for name in names:
            header = tarfile.TarInfo(name)
            header.size, header.uid = len(name), 2**20
            tar.addfile(header, io.BytesIO(name.encode()[: len(name)]))
    wanted = [(name.removesuffix(".json"), {"json": name.encode()[: len(name)]}) for name in names]
    assert list(read_shard(str(tmp_path / "a.tar"))) == wanted


def test_a_negative_size_is_an_error(tmp_path, shard):
    header = tarfile.TarInfo("a.json")
    header.size = -600
    (tmp_path / "b.tar").write_bytes(shard.read_bytes()[: 5 * 512] + header.tobuf(tarfile.GNU_FORMAT) + shard.read_bytes()[5 * 512 :])
    with pytest.raises(DataError, match="cut short"):
        list(read_shard(str(tmp_path / "b.tar")))


def test_a_sparse_member_is_read_with_its_holes(tmp_path):
    # GNU's old format: one piece of 512 bytes at 1024 of a file of 2048
    header = bytearray(tarfile.TarInfo("a.json").tobuf(tarfile.GNU_FORMAT))
    header[124:136], header[156:157] = b"%011o\0" % 512, tarfile.GNUTYPE_SPARSE
    header[386:410], header[483:495] = b"%011o\0%011o\0" % (1024, 512), b"%011o\0" % 2048
    header[148:156] = b"%06o\0 " % (256 + sum(header[:148]) + sum(header[156:]))
    (tmp_path / "a.tar").write_bytes(bytes(header) + b"x" * 512 + bytes(1024))
    assert list(read_shard(str(tmp_path / "a.tar"))) == [("a", {"json": bytes(1024) + b"x" * 512 + bytes(512)})]
