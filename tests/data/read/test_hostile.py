"""Hostile shards: no crash, no execution, and every problem counted with its place."""

import io
import json
import pickle
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from megavlm.data.read import shards
from megavlm.data.read.shards import read_shard
from megavlm.data.read.source import SourceConfig
from megavlm.data.tools.lint import lint
from megavlm.errors import DataError
from tests.data.conftest import pair, write_shard

OURS = SourceConfig(shards="none")


class Bomb:
    def __reduce__(self):
        return (open, ("/tmp/megavlm-was-executed", "w"))


def pickled_codes() -> bytes:
    content = io.BytesIO()
    np.save(content, np.array([[Bomb()]], object), allow_pickle=True)
    return content.getvalue()


def bomb_png() -> bytes:
    """A few kilobytes that unpack to 900 megapixels."""
    content = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(content, "PNG")
    return content.getvalue()


def shard_with(path, member, content):
    good = pair("understanding", 2)
    write_shard(path, [("a", good), ("b", good | {member: content}), ("c", good)])


@pytest.mark.parametrize(
    ("member", "content", "message"),
    [
        ("img0.npy", pickled_codes(), "object"),
        ("img0.npy", pickle.dumps(Bomb()), "not an npy file"),
        ("img0.npy", b"\x93NUMPY\x01\x00\x06\x00{'x'\n", "not an npy file"),
        ("json", b"\xff\xfe{}", "broken JSON"),
        ("json", b"[" * 100_000, "broken JSON"),
        ("json", b'{"task": ' + b"9" * 10_000 + b"}", ""),
        ("json", b'{"task": "text", "segments": [], "x": 1}', "schema"),
        ("json", b"null", "schema"),
    ],
)
def test_a_bad_sample_is_named_and_the_others_are_read(tmp_path, member, content, message):
    shard_with(tmp_path / "a.tar", member, content)
    report = lint([str(tmp_path / "a.tar")], OURS)
    assert report.num_samples == 3 and [problem.key for problem in report.problems] == ["b"]
    assert message in str(report.problems[0]) and report.problems[0].shard.endswith("a.tar")
    assert not __import__("os").path.exists("/tmp/megavlm-was-executed")


def test_decompression_bombs_are_refused_before_they_unpack(tmp_path):
    members = pair("understanding", 2)
    del members["img0.npy"]
    write_shard(tmp_path / "a.tar", [("a", members | {"img0.png": bomb_png()})])
    report = lint([str(tmp_path / "a.tar")], OURS)
    assert "exceeds limit" in str(report.problems[0]) and report.problems[0].key == "a"


def test_members_beyond_the_limit_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MAX_MEMBER_BYTES", 1000)
    write_shard(tmp_path / "a.tar", [("a", pair("understanding", 2)), ("b", pair("understanding", 30))])
    report = lint([str(tmp_path / "a.tar")], OURS)
    assert [problem.key for problem in report.problems] == ["b"] and "the limit is 1000" in str(report.problems[0])


def add(tar, name, content=b"", kind=tarfile.REGTYPE, link=""):
    header = tarfile.TarInfo(name)
    header.size, header.type, header.linkname = len(content), kind, link
    tar.addfile(header, io.BytesIO(content))


def test_paths_links_and_devices_are_nothing_but_names(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "../../etc/passwd.json", b"{}")
        add(tar, "/abs/olute.json", b"{}")
        add(tar, "link.json", kind=tarfile.SYMTYPE, link="/etc/passwd")
        add(tar, "hard.json", kind=tarfile.LNKTYPE, link="../../etc/passwd.json")
        add(tar, "device.json", kind=tarfile.CHRTYPE)
        add(tar, "fifo.json", kind=tarfile.FIFOTYPE)
    before = sorted(p.name for p in tmp_path.iterdir())
    found = list(read_shard(str(tmp_path / "a.tar")))
    assert [key for key, members in found if shards.PROBLEM not in members] == ["../../etc/passwd", "/abs/olute"]
    # they do not vanish: each is an error of its sample
    assert [key for key, members in found if shards.PROBLEM in members] == ["link", "hard", "device", "fifo"]
    assert b"is no regular file but a symbolic link" in found[2][1][shards.PROBLEM]
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_repeated_keys_are_reported_and_lose_nothing(tmp_path):
    good = pair("understanding", 2)
    write_shard(tmp_path / "a.tar", [("a", good), ("a", good), ("b", good), ("a", good)])
    report = lint([str(tmp_path / "a.tar")], OURS)
    assert report.num_samples == 4 and [problem.key for problem in report.problems] == ["a", "a"]


@pytest.mark.parametrize("num", [3000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_very_many_empty_members(tmp_path, num):
    header = bytearray(tarfile.TarInfo("0000000.json").tobuf())
    with (tmp_path / "a.tar").open("wb") as file:
        for i in range(num):
            entry = tarfile.TarInfo(f"{i:07d}.json")
            file.write(entry.tobuf(tarfile.USTAR_FORMAT))
        file.write(bytes(1024))
    assert len(header) == 512
    report = lint([str(tmp_path / "a.tar")], OURS)
    assert report.num_samples == len(report.problems) == num


def test_a_tar_cut_at_every_block_is_an_error_until_its_end(tmp_path):
    write_shard(tmp_path / "a.tar", [(str(i), pair("understanding", 2)) for i in range(4)])
    whole = (tmp_path / "a.tar").read_bytes()
    wanted = list(read_shard(str(tmp_path / "a.tar")))
    with tarfile.open(tmp_path / "a.tar") as tar:
        last = max(-(-(member.offset_data + member.size) // 512) * 512 for member in tar)
    for end in range(0, len(whole), 512):
        (tmp_path / "cut.tar").write_bytes(whole[:end])
        found, problem = [], None
        try:
            for sample in read_shard(str(tmp_path / "cut.tar"), "s"):
                found.append(sample)
        except DataError as error:
            problem = error
        if end <= last:
            assert problem is not None and problem.shard.endswith("cut.tar"), end
            assert found == wanted[: len(found)], "nothing torn is passed on"
        else:  # the mark of the end is two empty blocks; one of them is enough
            assert found == wanted, end


@pytest.fixture(scope="module")
def good_shard(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "a.tar"
    write_shard(path, [(str(i), pair(task, 3)) for i, task in enumerate(["understanding", "generation"] * 3)])
    return path


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.binary(min_size=1, max_size=20)), min_size=1, max_size=6))
def test_random_damage_never_crashes(good_shard, damage):
    content = bytearray(good_shard.read_bytes())
    for place, patch in damage:
        place %= len(content)
        content[place : place + len(patch)] = patch
    path = good_shard.with_name("damaged.tar")
    path.write_bytes(content)
    report = lint([str(path)], OURS)
    assert all(problem.shard == str(path) and str(problem) for problem in report.problems)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=3000), st.sampled_from([".tar", ".jsonl", ".json"]))
def test_random_bytes_are_no_shard(good_shard, content, suffix):
    path = good_shard.with_name(f"random{suffix}")
    path.write_bytes(content)
    for format in ("megavlm", "llava", "text", "img2dataset", "interleaved"):
        lint([str(path)], SourceConfig(shards="none", format=format))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["task", "segments", "text", "image", "loss", "texts", "images", "conversations", "from", "value", "caption"]),
            inner,
            max_size=5,
        )
    ),
)


@settings(max_examples=300, deadline=None)
@given(JSON, st.sampled_from(["megavlm", "llava", "text", "img2dataset", "interleaved"]))
def test_any_json_is_a_sample_or_an_error(good_shard, document, format):
    path = good_shard.with_name("any.jsonl")
    path.write_bytes(json.dumps(document).encode() + b"\n")
    report = lint([str(path)], SourceConfig(shards="none", format=format))
    assert report.num_samples == 1 and len(report.problems) <= 1
