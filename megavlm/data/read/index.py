"""The index beside a shard, ``shard.tar.index.json``: how many samples it holds, how they are written, and its size then.

Tested by `tests/data/read/test_shards.py`.
"""

import json
import logging
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from megavlm.data.read.detect import detected, detected_in
from megavlm.data.read.shards import read_shard
from megavlm.data.read.urls import is_local, local_path
from megavlm.errors import ConfigError
from megavlm.settings import Settings
from megavlm.system.files import write_atomically

log = logging.getLogger(__name__)

SUFFIX = ".index.json"


class ShardIndex(Settings):
    """What an index says of its shard."""

    format: int = 1
    bytes: int
    """Size of the shard; an index of another size is out of date."""
    samples: Annotated[int, Field(ge=0)]
    """Number of its samples."""
    sample_format: str | None = None
    """How they are written, as in a recipe; None if nobody said so."""


DEFAULT_FORMAT = "megavlm"


def write_index(path: Path, sample_format: str | None = None) -> ShardIndex:
    """Count a local shard and write its index beside it.

    Args:
        path: Of the shard.
        sample_format: How its samples are written; if not given, what an index that is there says, or what its first sample looks like.
    """
    known = read_index(str(path))
    sample_format = sample_format or (known and known.sample_format)
    samples = 0
    for samples, (_, members) in enumerate(read_shard(str(path)), 1):
        if samples == 1:
            sample_format = sample_format or detected(members)
    index = ShardIndex(bytes=path.stat().st_size, samples=samples, sample_format=sample_format)
    write_atomically(path.with_name(path.name + SUFFIX), index.model_dump_json())
    return index


def format_of(urls: list[str], given: str | None, name: str = "the shards") -> str:
    """How the samples of some shards are written: as given, else as their indexes say, else as the first sample looks, else `megavlm`.

    Args:
        urls: The shards.
        given: By the user, who is right; indexes that say otherwise are named in the log.
        name: What the shards are called in messages.

    Raises:
        ConfigError: If nothing is given, and the indexes of two shards contradict each other.
    """
    said: dict[str, str] = {}
    for url in urls:
        if (index := read_index(url)) and index.sample_format:
            said.setdefault(index.sample_format, url)
    if given:
        for found, url in said.items():
            if found != given:
                log.warning("%s: the index of %s says format %s; %s is taken, as was asked for", name, url, found, given)
        return given
    if len(said) > 1:
        places = "".join(f"\n  {found}: {url}" for found, url in said.items())
        raise ConfigError(
            f"{name}: the indexes say different formats:{places}\n"
            "  do:    give the format, or correct the indexes with `megavlm data index SHARDS --format=FORMAT`"
        )
    return next(iter(said), None) or detected_in(urls[0]) or DEFAULT_FORMAT


def read_index(url: str) -> ShardIndex | None:
    """The index of a local shard; None if it has none, or one of another size."""
    if not is_local(url):
        return None
    path = Path(local_path(url))
    try:
        index = ShardIndex.model_validate(json.loads(path.with_name(path.name + SUFFIX).read_text()))
    except (OSError, ValueError, RecursionError, ValidationError):
        return None
    return index if path.is_file() and index.bytes == path.stat().st_size else None
