"""Our reader of plain headers agrees with ``tarfile`` on any archive, and takes no damaged one for a whole one."""

import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megavlm.data.read.tar import read_members

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


def as_tarfile_reads(content: bytes) -> list:
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        files = [(member, tar.extractfile(member).read()) for member in tar if member.isfile()]
    return [(member.name, member.size, found if member.size <= MAX_BYTES else None) for member, found in files]


@settings(max_examples=150, deadline=None)
@given(members, formats, st.sampled_from(["w", "w:gz"]))
def test_agrees_with_tarfile(entries, format, mode):
    content = archive(entries, format, mode)
    assert list(read_members(io.BytesIO(content), MAX_BYTES)) == as_tarfile_reads(content)


@settings(max_examples=150, deadline=None)
@given(members, formats, st.data())
def test_what_is_cut_is_an_error(entries, format, data):
    content = archive(entries, format)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        tar.getmembers()
        end = tar.offset
    cut = content[: data.draw(st.integers(0, end))]
    with pytest.raises((tarfile.TarError, EOFError)):
        list(read_members(io.BytesIO(cut), MAX_BYTES))


@settings(max_examples=150, deadline=None)
@given(members.filter(bool), formats, st.data())
def test_noise_is_an_error_or_what_tarfile_reads(entries, format, data):
    """A bit of a header flipped: the checksum finds it, or ``tarfile`` reads the same."""
    content = bytearray(archive(entries, format))
    content[data.draw(st.integers(0, 511))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        found = list(read_members(io.BytesIO(content), MAX_BYTES))
    except (tarfile.TarError, EOFError, ValueError):
        return
    assert found == as_tarfile_reads(bytes(content))
