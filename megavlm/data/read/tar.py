"""Members of a tar archive from a stream.

Plain headers are read here, because ``tarfile`` takes several times as long; at the first other thing (compression, links, sparse files, long
names, damage) the rest of the archive is handed to it. Not WebDataset's iterator, because it takes a shard that was cut or damaged
at a member's header for one that ends there; here every way of being incomplete is an error.
"""

import re
import tarfile
from collections.abc import Iterator
from typing import BinaryIO

BLOCK_BYTES = tarfile.BLOCKSIZE
PLAIN_TIMES = re.compile(rb"(\d+ [acm]time=[-\d.]+\n)*\0*")
"""Extended headers that say nothing but times with fractions, which WebDataset's writer gives to every member."""


def read_members(stream: BinaryIO, max_bytes: int) -> Iterator[tuple[str, int, bytes | None]]:
    """Yield ``(name, size, content)`` of the regular files in an archive; the content of one larger than ``max_bytes`` is None.

    Raises:
        tarfile.TarError: Where the archive is damaged or ends before its end. So do the errors of reading and decompression.
    """
    times, position = b"", 0
    while (header := stream.read(BLOCK_BYTES)) != bytes(BLOCK_BYTES):
        size = _plain_size(header)
        if size is None or size > max_bytes:
            yield from _read_slowly(_Joined(times + header, stream), position - len(times), max_bytes)
            return
        content, padding = stream.read(size), stream.read(-size % BLOCK_BYTES)
        if len(content) < size:
            raise tarfile.ReadError("unexpected end of data")
        member = header + content + padding if header[156:157] == tarfile.XHDTYPE else b""
        if member and not PLAIN_TIMES.fullmatch(content):
            yield from _read_slowly(_Joined(member, stream), position, max_bytes)
            return
        if not member:
            yield _name(header), size, content
        position += len(header) + len(content) + len(padding)
        times = member


def _plain_size(header: bytes) -> int | None:
    """The size of a member with a sound header of a regular file or of extended fields for one; None for everything else."""
    if len(header) < BLOCK_BYTES or header[156:157] not in (tarfile.REGTYPE, tarfile.XHDTYPE):
        return None
    try:
        checksum, size = int(header[148:156].strip(b" \0"), 8), int(header[124:136].strip(b" \0"), 8)
    except ValueError:
        return None
    # the sum counts its own field as blanks
    is_sound = checksum == sum(header) - sum(header[148:156]) + 8 * ord(" ")
    return size if is_sound and size >= 0 else None


def _name(header: bytes) -> str:
    name, prefix = (field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape") for field in (header[:100], header[345:500]))
    return f"{prefix}/{name}" if prefix else name


def _read_slowly(stream: "_Joined", begin: int, max_bytes: int) -> Iterator[tuple[str, int, bytes | None]]:
    try:
        with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_StrictHeader) as tar:
            for member in tar:
                # the archive would remember every header to the end
                tar.members.clear()
                if member.isfile() and member.size > max_bytes:
                    yield member.name, member.size, None
                elif member.isfile():
                    content = tar.extractfile(member).read()
                    if len(content) != member.size:
                        raise tarfile.ReadError("unexpected end of data")
                    yield member.name, member.size, content
    except _DamagedHeader as error:
        raise tarfile.ReadError(f"{error} at byte {begin + error.offset}") from error


class _Joined:
    """What was read already, and then the rest of the stream."""

    def __init__(self, begun: bytes, stream: BinaryIO):
        self.begun, self.stream = begun, stream

    def read(self, size: int) -> bytes:
        begun, self.begun = self.begun[:size], self.begun[size:]
        return begun + self.stream.read(size - len(begun))


class _DamagedHeader(tarfile.ReadError):
    offset: int


class _StrictHeader(tarfile.TarInfo):
    """Only a block of zeros ends an archive; ``tarfile`` lets a missing or damaged header end it too."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            damage = _DamagedHeader(str(error))
            damage.offset = tar.offset
            raise damage from error
