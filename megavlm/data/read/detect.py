"""What a sample's format is, by the look of it: nobody has to be told what the first sample shows."""

import json
from typing import Any

from megavlm.data.read.sample import IMAGE_TYPES
from megavlm.data.read.shards import Members, read_shard
from megavlm.data.read.urls import is_local
from megavlm.errors import DataError


def format_of_record(record: dict[str, Any], has_image: bool) -> str | None:
    """The format of a JSON object, or of a row of a table, by the names in it.

    Args:
        record: Name -> value.
        has_image: Whether an image belongs to it.
    """
    for name, sample_format in (("segments", "megavlm"), ("conversations", "llava"), ("question", "qa"), ("texts", "interleaved")):
        if record.get(name) is not None:
            return sample_format
    if has_image and "caption" in record:
        return "img2dataset"
    return "text" if not has_image and "text" in record else None


def detected(members: Members) -> str | None:
    """The format of a sample by its members; None if it looks like none."""
    has_image = any(name.rpartition(".")[2] in IMAGE_TYPES for name in members)
    found = format_of_record(_record(members.get("json", b"{}")), has_image)
    if found is None and "txt" in members:
        return "img2dataset" if has_image else "text"
    return found


def detected_in(url: str) -> str | None:
    """The format of a shard by its first sample; None if it is not a local file, or its begin cannot be read."""
    if not is_local(url):
        return None  # a pipe would run its command, a server be asked, only for this
    try:
        _, members = next(read_shard(url), ("", {}))
    except DataError:
        return None
    return detected(members)


def _record(content: bytes) -> dict[str, Any]:
    try:
        record = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}
