"""Patterns of shard names: what they expand to, and what is no pattern, known without opening anything."""

import math
import re
from collections.abc import Iterator
from itertools import islice
from urllib.parse import urlparse

import braceexpand

MOST_SHARDS = 1_000_000
"""Most shards of one source; a pattern that gives more is a mistake."""
LONGEST_PATTERN = 10_000


def expand_patterns(patterns: str | list[str]) -> list[str]:
    """The URLs of patterns, braces expanded, in their order.

    Raises:
        ValueError: If a pattern is none, or they give no URL, too many, or one twice.
    """
    given = [patterns] if isinstance(patterns, str) else patterns
    urls = list(islice((url for pattern in given for url in _expanded(pattern)), MOST_SHARDS + 1))
    if not urls:
        raise ValueError("is empty; name at least one shard")
    if len(urls) > MOST_SHARDS:
        raise ValueError(f"names more than {MOST_SHARDS} shards; write larger shards, or correct the numbers in braces")
    if len(set(urls)) < len(urls):
        seen: set[str] = set()
        twice = next(url for url in urls if url in seen or seen.add(url))
        raise ValueError(f"names {twice} more than once; use the weight instead")
    for url in urls:
        _check_url(url)
    return urls


def _expanded(pattern: str) -> Iterator[str]:
    if len(pattern) > LONGEST_PATTERN:
        raise ValueError(f"has a pattern of {len(pattern)} characters; give several shorter ones")
    # a pipe is a command: its braces are the shell's
    if pattern.startswith("pipe:"):
        yield pattern
        return
    if num_expansions(pattern) > MOST_SHARDS:
        raise ValueError(f"names more than {MOST_SHARDS} shards; write larger shards, or correct the numbers in braces")
    try:
        yield from braceexpand.braceexpand(pattern)
    except ValueError as error:
        raise ValueError(f"has braces that do not match in {pattern!r}: {error}; close them, or escape them with \\") from error


def num_expansions(pattern: str) -> int:
    """To how many names a pattern expands, without expanding it: `braceexpand` holds all numbers of a range in memory."""
    counts: list[int] = []

    def of(text: str) -> int:
        return math.prod(counts[int(number)] for number in re.findall("\x01(\\d+)\x02", text))

    # from the innermost braces outwards, each giving way to the number of its count
    while braces := re.search(r"\{([^{}]*)\}", pattern):
        body = braces[1]
        if numbers := re.fullmatch(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?", body):
            first, last, step = (int(number or 1) for number in numbers.groups())
            counts.append(abs(last - first) // max(1, step) + 1)
        elif letters := re.fullmatch(r"([A-Za-z])\.\.([A-Za-z])", body):
            counts.append(abs(ord(letters[1]) - ord(letters[2])) + 1)
        else:
            counts.append(sum(of(item) for item in body.split(",")))
        pattern = f"{pattern[: braces.start()]}\x01{len(counts) - 1}\x02{pattern[braces.end() :]}"
    return of(pattern)


def _check_url(url: str) -> None:
    try:
        parts = urlparse(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"holds a URL that is none, {url!r}: {error}; correct it") from error
    if not url.strip():
        raise ValueError("holds an empty name; remove it")
    if parts.scheme in ("http", "https") and not host:
        raise ValueError(f"holds a URL without a host, {url!r}; correct it")
    if parts.scheme in ("", "file"):
        return
    # here, because it brings torch, and who reads files needs none
    from webdataset.gopen import gopen_schemes

    kinds = {"file", *(kind for kind in gopen_schemes if kind.isalpha())}
    if parts.scheme not in kinds:
        raise ValueError(f"holds a URL of an unknown kind, {url!r}; use a path, or one of {', '.join(sorted(kinds))}")
