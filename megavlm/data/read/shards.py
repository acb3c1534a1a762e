"""Shards: naming and reading. A shard is a tar of samples, a JSONL file of one sample per line, or a JSON file with a list of them."""

import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from typing import BinaryIO

from megavlm.data.read.compression import decompressed
from megavlm.data.read.json_list import read_json_list
from megavlm.data.read.patterns import expand_patterns
from megavlm.data.read.place import reading_shard
from megavlm.data.read.tar import read_members
from megavlm.data.read.urls import WITHOUT_CACHE, Opener, is_local, local_path
from megavlm.errors import ConfigError, DataError

MAX_MEMBER_BYTES = 256 << 20
"""A larger member is not read at all: its sample is an error."""
PROBLEM = "__problem__"
"""Stands in the place of members that could not be read; the content says why."""
NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)
"""Key and extension: folders, and the file's name up to its first dot."""
OF_MACOS = re.compile(r"(.*/)?(\._[^/]*|\.DS_Store)|(.*/)?__MACOSX/.*", re.DOTALL)
"""What macOS puts beside files (AppleDouble); no one's data."""

Members = dict[str, bytes]


def expand_shards(name: str, shards: str | list[str]) -> list[str]:
    """The URLs of a source, braces expanded, in their order.

    Raises:
        ConfigError: If the patterns are none.
        DataError: If a local file is missing.
    """
    try:
        urls = expand_patterns(shards)
    except ValueError as error:
        what, _, remedy = str(error).rpartition("; ")
        raise ConfigError(f"{f'data.sources.{name}.shards' if name else 'shards'} {what}\n  do:    {remedy}") from error
    for url in urls:
        check_exists(url, name)
    return urls


def check_exists(url: str, source: str = "") -> None:
    """Raise a DataError if ``url`` is a local file that is not there."""
    if is_local(url) and not os.path.isfile(local_path(url)):
        if os.path.exists(local_path(url)):
            raise DataError("the shard is no regular file", "name the files themselves", source, url)
        raise DataError("the shard does not exist", "write the data first, or correct the path", source, url)


def read_shard(url: str, source: str = "", open_url: Callable[[str], BinaryIO] = WITHOUT_CACHE) -> Iterator[tuple[str, Members]]:
    """Yield ``(key, {extension: content})`` for every sample of a shard, in its order.

    Names are nothing but keys, nothing is written to disk or unpickled. A sample of which a member cannot be had comes with `PROBLEM`
    among its members.

    Raises:
        DataError: Where the shard cannot be opened or ends before its end.
    """
    read = _read_tar
    if is_lines(url):
        read = _read_lines if _path(url).endswith(".jsonl") else _read_list
    try:
        with reading_shard(source, url):
            check_exists(url)
            with open_url(url) as stream:
                yield from read(decompressed(stream))
    except DataError:
        # a copy in the cache may be what is broken
        if isinstance(open_url, Opener):
            open_url.forget(url)
        raise


def refuse_unread(members: Members) -> None:
    """Raise a DataError, without a place, if a member of a sample could not be had."""
    if PROBLEM in members:
        raise DataError(members[PROBLEM].decode("utf-8", "backslashreplace"), "write the shard again without it, or correct it")


def is_lines(url: str) -> bool:
    """Whether a shard is JSON, whose samples have places and no keys."""
    return _path(url).endswith((".jsonl", ".json"))


def _path(url: str) -> str:
    return url.partition("?")[0].lower().removesuffix(".gz")


def _read_tar(stream: BinaryIO) -> Iterator[tuple[str, Members]]:
    key, members = "", {}  # no key is empty
    for member in read_members(stream, MAX_MEMBER_BYTES):
        if OF_MACOS.fullmatch(member.name):
            continue
        name = NAME.fullmatch(member.name)
        if name is None:
            yield member.name, {PROBLEM: b"the file belongs to no sample: its name has no key and extension, such as 000017.json"}
            continue
        base, extension = name[1], name[2].lower()
        # a repeated extension begins another sample of the same name: nothing is lost
        if base != key or extension in members:
            if members:
                yield key, members
            key, members = base, {}
        if member.content is None:
            members[PROBLEM] = f"member {extension} {member.problem}".encode("utf-8", "backslashreplace")
        else:
            members[extension] = member.content
    if members:
        yield key, members


def _read_lines(stream: BinaryIO) -> Iterator[tuple[str, Members]]:
    number = 0
    while line := stream.readline(MAX_MEMBER_BYTES + 1):
        if len(line) > MAX_MEMBER_BYTES:
            raise tarfile.ReadError(f"line {number + 1} is longer than {MAX_MEMBER_BYTES} bytes")
        if line.strip():
            yield f"{number:08d}", {"json": line}
        number += 1


def _read_list(stream: BinaryIO) -> Iterator[tuple[str, Members]]:
    for number, record in enumerate(read_json_list(stream)):
        key = record.get("id") if isinstance(record, dict) else None
        # by an empty one nobody finds the sample
        yield f"{number:08d}" if key in (None, "") else str(key), {"json": json.dumps(record).encode()}
