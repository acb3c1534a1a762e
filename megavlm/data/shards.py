"""Shards: opening, reading and writing. URLs and the tar writer are WebDataset's.

Reading is a loop of our own over ``tarfile``, because WebDataset's iterator takes a shard that was cut or damaged at a member's
header for one that ends there; here every way of being incomplete is an error.
"""

import os
import tarfile
from collections.abc import Iterator
from urllib.parse import urlparse

import braceexpand
import webdataset
from webdataset.tariterators import base_plus_ext

from megavlm.errors import ConfigError, DataError


def expand_shards(name: str, shards: str | list[str]) -> list[str]:
    """The URLs of a source, braces expanded, in their order.

    Raises:
        ConfigError: If the list is empty, has a shard twice or a local file is missing.
    """
    patterns = [shards] if isinstance(shards, str) else shards
    # a pipe is a command: its braces are the shell's
    urls = [u for p in patterns for u in ([p] if p.startswith("pipe:") else braceexpand.braceexpand(p))]
    if not urls:
        raise ConfigError(f"data.sources.{name}.shards is empty\n  do:    name at least one shard")
    if len(set(urls)) < len(urls):
        twice = next(url for url in urls if urls.count(url) > 1)
        raise ConfigError(f"data.sources.{name}.shards names {twice} more than once\n  do:    use the weight instead")
    for url in urls:
        check_exists(url, name)
    return urls


def check_exists(url: str, source: str = "") -> None:
    """Raise a DataError if ``url`` is a local file that is not there."""
    parts = urlparse(url)
    if parts.scheme in ("", "file") and not os.path.isfile(parts.path if parts.scheme else url):
        raise DataError("the shard does not exist", "write the data first, or correct the path", source, url)


def read_shard(url: str, source: str = "") -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield ``(key, {extension: content})`` for every sample of a shard, in its order.

    Only regular files count, names are nothing but keys, nothing is written to disk or unpickled.

    Raises:
        DataError: Where the shard cannot be opened or ends before its end.
    """
    try:
        with webdataset.gopen(url) as stream, _open_strictly(stream) as tar:
            key, members = None, {}
            for member in tar:
                if not member.isfile():
                    continue
                base, extension = base_plus_ext(member.name)
                if base is None:
                    continue
                if base != key:
                    if members:
                        yield key, members
                    key, members = base, {}
                content = tar.extractfile(member).read()
                if len(content) < member.size:
                    raise tarfile.ReadError("unexpected end of data")
                members[extension.lower()] = content
            if members:
                yield key, members
    except (tarfile.TarError, OSError, EOFError) as error:
        check_exists(url, source)
        raise DataError(
            f"the shard is unreadable or cut short: {error}", "copy or write it again", source, url
        ) from error


class _StrictHeader(tarfile.TarInfo):
    """Only a block of zeros ends an archive; ``tarfile`` lets a missing or damaged header end it too."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} at byte {tar.offset}") from error


def _open_strictly(stream) -> tarfile.TarFile:
    return tarfile.open(fileobj=stream, mode="r|*", tarinfo=_StrictHeader)
