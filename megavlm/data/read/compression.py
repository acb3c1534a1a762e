"""Streams that may be compressed, read to their last byte: several compressed files after each other are one, and what is none is an error.

Python's own readers take the first of several for all (``tarfile``), or pass over what follows (``bz2``, ``lzma``).

Tested by `tests/data/read/test_tar.py`.
"""

import bz2
import io
import lzma
import zlib
from typing import Any, BinaryIO

CHUNK_BYTES = 1 << 18
MAGIC = {
    b"\x1f\x8b": lambda: zlib.decompressobj(31),
    b"BZh": bz2.BZ2Decompressor,
    b"\xfd7zXZ\x00": lzma.LZMADecompressor,
}
ZSTANDARD = b"\x28\xb5\x2f\xfd"


def decompressed(stream: BinaryIO) -> BinaryIO:
    """The stream, or what is compressed in it with gzip, bzip2 or xz.

    Raises:
        OSError: If it is compressed in another way.
    """
    begin = b""
    while len(begin) < max(map(len, MAGIC)) and (more := stream.read(max(map(len, MAGIC)) - len(begin))):
        begin += more
    if begin.startswith(ZSTANDARD):
        raise OSError("it is compressed with Zstandard, which is not read here: write it again as tar, or compress it with gzip")
    joined = _Joined(begin, stream)
    is_compressed = any(begin.startswith(magic) for magic in MAGIC)
    return io.BufferedReader(_Decompressed(joined) if is_compressed else joined, CHUNK_BYTES)


class _Joined(io.RawIOBase):
    """What was read already, and then the rest of the stream."""

    def __init__(self, begin: bytes, stream: BinaryIO):
        self.begin = begin
        self.stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        content = self.begin or self.stream.read(len(buffer))
        self.begin = content[len(buffer) :]
        content = content[: len(buffer)]
        buffer[: len(content)] = content
        return len(content)


class _Decompressed(io.RawIOBase):
    def __init__(self, stream: io.RawIOBase):
        self.stream = stream
        self.decompressor: Any = None
        self.left = b""
        """Compressed bytes that were read and not used yet."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while True:
            if self.decompressor is None and not self._begin():
                return 0
            content = self._advance(len(buffer))
            if content:
                buffer[: len(content)] = content
                return len(content)

    def _begin(self) -> bool:
        """Begin the next compressed file; False at the end, before which zeros may stand."""
        while not self.left.lstrip(b"\0"):
            self.left = self.stream.read(CHUNK_BYTES) or b""
            if not self.left:
                return False
        self.left = self.left.lstrip(b"\0")
        self.left += self.stream.read(8) or b""
        make = next((make for magic, make in MAGIC.items() if self.left.startswith(magic)), None)
        if make is None:
            raise OSError("what follows the compressed file's end is not compressed")
        self.decompressor = make()
        return True

    def _advance(self, size: int) -> bytes:
        decompressor = self.decompressor
        is_exhausted = False
        if not self.left and getattr(decompressor, "needs_input", True):
            self.left = self.stream.read(CHUNK_BYTES) or b""
            is_exhausted = not self.left
        content = decompressor.decompress(self.left, size)
        # zlib gives back what it did not look at; the others keep it
        self.left = getattr(decompressor, "unconsumed_tail", b"")
        if decompressor.eof:
            self.left = decompressor.unused_data
            self.decompressor = None
        elif is_exhausted and not content:
            raise EOFError("the compressed file ends before its end")
        return content
