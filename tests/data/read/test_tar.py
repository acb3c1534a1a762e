"""Our reader of plain headers agrees with ``tarfile`` on any archive, and takes no damaged one for a whole one."""

import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megavlm.data.read.compression import decompressed
from megavlm.data.read.tar import _sum, read_members

MAX_BYTES = 1200
names = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=120).map(lambda name: f"d/{name}.json")
kinds = st.sampled_from([tarfile.REGTYPE] * 6 + [tarfile.AREGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE])
members = st.lists(st.tuples(names, kinds, st.binary(max_size=1500), st.sampled_from([0, 5, 1.25])), max_size=6)
formats = st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])


def archive(entries, format, mode="w") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode, format=format) as tar:
        for name, kind, content, mtime in entries:
            header = tarfile.TarInfo(name)
            header.type, header.mtime = kind, mtime
            header.size = len(content) if header.isreg() else 0
            try:
                tar.addfile(header, io.BytesIO(content))
            except ValueError:  # the old format has no room for this name
                continue
    return file.getvalue()


def read(content: bytes) -> list[tuple[str, bytes | None]]:
    return [(member.name, member.content) for member in read_members(decompressed(io.BytesIO(content)), MAX_BYTES)]


def as_tarfile_reads(content: bytes) -> list[tuple[str, bytes | None]]:
    """Files with their contents, what is no file without one."""
    with tarfile.open(fileobj=io.BytesIO(content), ignore_zeros=True) as tar:
        return [
            (member.name, tar.extractfile(member).read() if member.isfile() and member.size <= MAX_BYTES else None)
            for member in tar
            if not member.isdir()
        ]


@settings(max_examples=150, deadline=None)
@given(members, formats, st.sampled_from(["w", "w:gz", "w:bz2", "w:xz"]))
def test_agrees_with_tarfile(entries, format, mode):
    content = archive(entries, format, mode)
    assert read(content) == as_tarfile_reads(content)


@settings(max_examples=60, deadline=None)
@given(st.lists(members, min_size=2, max_size=3), formats, st.sampled_from(["w", "w:gz", "w:bz2", "w:xz"]))
def test_archives_after_each_other_are_one(parts, format, mode):
    """As with ``cat a.tar b.tar``, compressed ones too."""
    content = b"".join(archive(entries, format, mode) for entries in parts)
    plain = b"".join(archive(entries, format) for entries in parts)
    assert read(content) == as_tarfile_reads(plain)


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_what_follows_the_end_and_is_no_archive_is_an_error(mode):
    content = archive([("a.json", tarfile.REGTYPE, b"1", 0)], tarfile.USTAR_FORMAT, mode)
    assert read(content + bytes(700)) == [("a.json", b"1")]
    for garbage in (b"x", b"<html>" * 300):
        with pytest.raises((tarfile.ReadError, OSError), match="what follows"):
            read(content + garbage)


def test_headers_that_promise_gigabytes_allocate_nothing():
    for kind in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE):
        header = tarfile.TarInfo("a")
        header.type, header.size = kind, 1 << 33
        with pytest.raises(tarfile.ReadError, match="extended header at byte 0 has 8589934592 bytes"):
            read(header.tobuf(tarfile.GNU_FORMAT))


@settings(max_examples=150, deadline=None)
@given(members, formats, st.data())
def test_what_is_cut_is_an_error(entries, format, data):
    content = archive(entries, format)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        tar.getmembers()
        end = tar.offset
    cut = content[: data.draw(st.integers(0, end))]
    with pytest.raises((tarfile.TarError, EOFError)):
        read(cut)


@settings(max_examples=150, deadline=None)
@given(members.filter(bool), formats, st.data())
def test_noise_is_an_error_or_what_tarfile_reads(entries, format, data):
    """A bit of a header flipped: the checksum finds it, or ``tarfile`` reads the same."""
    content = bytearray(archive(entries, format))
    content[data.draw(st.integers(0, 511))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        found = read(bytes(content))
    except (tarfile.TarError, EOFError, ValueError):
        return
    assert found == as_tarfile_reads(bytes(content))


@given(st.binary(min_size=256, max_size=256) | st.sampled_from([b"\xff" * 256, bytes(256)]))
def test_the_sum_of_half_a_header(half):
    assert _sum(half) == sum(half)
