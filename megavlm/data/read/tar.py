"""Members of a tar archive from a stream.

Not ``tarfile``: it takes several times as long, ends silently at the first mark of an end (half of ``cat a.tar b.tar``), and reads
extended headers of any size. Not WebDataset's iterator: it takes a shard that was cut or damaged at a member's header for one that ends
there. Here every way of being incomplete is an error, and what is no regular file is named.

    an archive's end      blocks of zeros; more members may follow, as with ``tar --ignore-zeros``; anything else that follows is an error
    names, sizes          USTAR, GNU (long names, sizes above 8 GiB) and POSIX (extended headers)
    directories           are passed over; links, devices and the like have a problem instead of a content
"""

import io
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK_BYTES = tarfile.BLOCKSIZE
ZEROS = bytes(BLOCK_BYTES)
MAX_HEADER_BYTES = 1 << 20
"""Of an extended header; names are a few kilobytes at most."""
NO_FILES = {
    tarfile.LNKTYPE: "a hard link: write the tar with --hard-dereference",
    tarfile.SYMTYPE: "a symbolic link: write the tar with --dereference",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
}
REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
EXTENDED = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
WITHOUT_CONTENT = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)
Fields = dict[str, bytes]


@dataclass(frozen=True, slots=True)
class Member:
    """A file in an archive."""

    name: str
    content: bytes | None
    """None if it cannot be had."""
    problem: str = ""
    """Why not."""


def read_members(stream: BinaryIO, max_bytes: int) -> Iterator[Member]:
    """Everything in an archive but its directories; what is no regular file or larger than ``max_bytes`` has a problem.

    Raises:
        tarfile.TarError: Where the archive is damaged or ends before its end. So do the errors of reading.
    """
    ended, everywhere, fields, before, position = False, {}, {}, b"", 0
    while header := stream.read(BLOCK_BYTES):
        begin = position
        position += BLOCK_BYTES
        if header == ZEROS[: len(header)]:
            _refuse(bool(before), f"nothing follows the extended header before byte {begin}")
            # of the mark, one whole block is enough
            ended = ended or len(header) == BLOCK_BYTES
            continue
        kind, name, size = _parsed(header, begin, ended)
        ended = False
        if kind in EXTENDED:
            _refuse(size > MAX_HEADER_BYTES, f"the extended header at byte {begin} has {size} bytes")
            content = _content(stream, size)
            found = _fields(kind, content)
            if kind == tarfile.XGLTYPE:
                everywhere |= found
            else:
                fields |= found
                before += header + content + bytes(-size % BLOCK_BYTES)
            position += _padded(size)
            continue
        if fields or everywhere:
            name, size = _extended(everywhere | fields, name, size)
        is_sparse = kind == tarfile.GNUTYPE_SPARSE or any(field.startswith("GNU.sparse.") for field in fields)
        size = 0 if kind in WITHOUT_CONTENT else size
        if is_sparse:
            rest = _rest_of_map(stream, header)
            header += rest
            position += len(rest)
        if size > max_bytes or (kind not in REGULAR and not is_sparse):
            _skip(stream, _padded(size))
            if kind != tarfile.DIRTYPE:
                yield Member(name, None, _problem(kind, size, max_bytes))
        elif is_sparse:
            yield _with_holes(before + header + _content(stream, size), name, max_bytes)
        else:
            yield Member(name, _content(stream, size))
        fields, before = {}, b""
        position += _padded(size)
    _refuse(not ended, "unexpected end of data")


def _parsed(header: bytes, position: int, ended: bool) -> tuple[bytes, str, int]:
    """Type, name and size of a header."""
    _refuse(len(header) < BLOCK_BYTES, "what follows the archive's end is no archive" if ended else "unexpected end of data")
    try:
        plain = _plain(header)
        if plain is not None:
            return plain
        # sizes and checksums written in other ways
        parsed = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError) as error:
        where = "what follows the archive's end is no archive" if ended else "damaged header"
        raise tarfile.ReadError(f"{where}: {error} at byte {position}") from error
    _refuse(parsed.size < 0, f"damaged header: negative size at byte {position}")
    return parsed.type, parsed.name, parsed.size


def _plain(header: bytes) -> tuple[bytes, str, int] | None:
    """Of nearly all headers; None for one that needs a closer look."""
    kind = header[156:157]
    if kind not in (tarfile.REGTYPE, tarfile.XHDTYPE):
        return None
    try:
        checksum, size = int(header[148:156].strip(b" \0"), 8), int(header[124:136].strip(b" \0"), 8)
    except ValueError:
        return None
    # the sum counts its own field as blanks
    if size < 0 or checksum != _sum(header[:256]) + _sum(header[256:]) - sum(header[148:156]) + 8 * ord(" "):
        return None
    name = _text(header[:100])
    return kind, f"{_text(header[345:500])}/{name}" if header[345] else name, size


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _sum(at_most_256: bytes) -> int:
    """Of bytes, as the lower half of Adler-32 has it: so few do not reach its modulus. Several times as fast as ``sum``."""
    return (zlib.adler32(at_most_256) & 0xFFFF) - 1


def _fields(kind: bytes, content: bytes) -> Fields:
    """What an extended header says of the next member, or of all that follow."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": content.split(b"\0", 1)[0]}
    if kind == tarfile.GNUTYPE_LONGLINK:
        return {"linkpath": content}
    fields: Fields = {}
    while content.strip(b"\0"):
        # "30 mtime=1700000000.123456789\n", the number counting all of it
        number = content[:20].split(b" ", 1)[0]
        length = int(number) if number.isdigit() else 0
        record, content = content[:length], content[length:]
        name, equals, value = record[len(number) + 1 : -1].partition(b"=")
        _refuse(len(record) < length or not record.endswith(b"\n") or not equals, "damaged extended header")
        fields[name.decode("utf-8", "surrogateescape")] = value
    return fields


def _extended(fields: Fields, name: str, size: int) -> tuple[str, int]:
    """Name and size with what extended headers say."""
    if path := fields.get("GNU.sparse.name") or fields.get("path"):
        name = path.decode("utf-8", "surrogateescape")
    if (length := fields.get("size")) is not None:
        _refuse(not length.isdigit() or len(length) > len(str(1 << 63)), "damaged extended header")
        size = int(length)
    return name, size


def _with_holes(archive: bytes, name: str, max_bytes: int) -> Member:
    """A sparse file, whose holes ``tarfile`` fills: from an archive of it alone."""
    with tarfile.open(fileobj=io.BytesIO(archive + bytes(-len(archive) % BLOCK_BYTES) + 2 * ZEROS), mode="r:") as tar:
        member = tar.next()
        if member is None or member.size > max_bytes:
            return Member(name, None, _problem(tarfile.REGTYPE, member.size if member else 0, max_bytes))
        file = tar.extractfile(member)
        content = file.read() if file else b""
    _refuse(len(content) != member.size, "unexpected end of data")
    return Member(name, content)


def _problem(kind: bytes, size: int, max_bytes: int) -> str:
    if kind in REGULAR:
        return f"has {size} bytes, the limit is {max_bytes}"
    return f"is no regular file but {NO_FILES.get(kind, f'of the unknown type {kind!r}')}"


def _content(stream: BinaryIO, size: int) -> bytes:
    content = stream.read(size)
    _refuse(len(content) < size, "unexpected end of data")
    _skip(stream, -size % BLOCK_BYTES)
    return content


def _skip(stream: BinaryIO, size: int) -> None:
    while size > 0:
        count = len(stream.read(min(size, 1 << 20)))
        _refuse(not count, "unexpected end of data")
        size -= count


def _rest_of_map(stream: BinaryIO, header: bytes) -> bytes:
    """The blocks that go on with the map of a sparse file (GNU)."""
    blocks = b""
    goes_on = header[156:157] == tarfile.GNUTYPE_SPARSE and header[482]
    while goes_on:
        _refuse(len(blocks) > MAX_HEADER_BYTES, "the map of a sparse file is too long")
        block = stream.read(BLOCK_BYTES)
        _refuse(len(block) < BLOCK_BYTES, "unexpected end of data")
        blocks += block
        goes_on = block[504]
    return blocks


def _padded(size: int) -> int:
    return size + -size % BLOCK_BYTES


def _refuse(is_damaged: bool, what: str) -> None:
    if is_damaged:
        raise tarfile.ReadError(what)
