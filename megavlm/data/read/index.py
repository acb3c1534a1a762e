"""The index beside a shard, ``shard.tar.index.json``: how many samples it holds, and how long it was when that was counted."""

import json
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from megavlm.data.read.shards import read_shard
from megavlm.data.read.urls import is_local, local_path
from megavlm.settings import Settings
from megavlm.system.files import write_atomically

SUFFIX = ".index.json"


class ShardIndex(Settings):
    """What an index says of its shard."""

    format: int = 1
    bytes: int
    """Size of the shard; an index of another size is out of date."""
    samples: Annotated[int, Field(ge=0)]
    """Number of its samples."""


def write_index(path: Path) -> ShardIndex:
    """Count a local shard and write its index beside it."""
    index = ShardIndex(bytes=path.stat().st_size, samples=sum(1 for _ in read_shard(str(path))))
    write_atomically(path.with_name(path.name + SUFFIX), index.model_dump_json())
    return index


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
