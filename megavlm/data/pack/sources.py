"""Sources: named lists of shards with a share of the mixture, and what a checkpoint's state means after they changed.

Tested by `tests/data/pack/test_lane.py`.
"""

import zlib
from dataclasses import dataclass, field
from itertools import compress
from typing import NotRequired, TypedDict

from megavlm.data.pack.config import WhenSourcesChange
from megavlm.data.read.formats import find_format
from megavlm.data.read.index import format_of
from megavlm.data.read.shards import expand_shards
from megavlm.data.read.source import SourceConfig
from megavlm.errors import ConfigError

SourceState = TypedDict("SourceState", {"mark": int, "cursor": list[int], "pass": int, "finished": bool})
"""Where a lane is in one source: the mark of its list of shards, [epoch, place, index] of the next sample, and its turn in the mixture."""


class State(TypedDict):
    """The state of a lane: plain integers that belong to the pack just yielded; see `megavlm.data.pack.lane`."""

    pack: int
    counts: dict[str, int]
    sources: dict[str, SourceState]
    waiting: list[list[int]]
    pieces: NotRequired[list[list[int]]]
    """Not there in runs that an earlier version began."""


@dataclass(frozen=True)
class Source:
    """A source of a recipe: where it is and how it is read."""

    name: str
    urls: tuple[str, ...]
    config: SourceConfig
    key: int = field(init=False)
    """Names its random streams, so that they do not depend on the other sources."""
    mark: int = field(init=False)
    """Changes when the list of shards does."""

    def __post_init__(self):
        object.__setattr__(self, "key", zlib.crc32(self.name.encode()))
        object.__setattr__(self, "mark", zlib.crc32("\n".join(self.urls).encode()))


def make_sources(config: dict[str, SourceConfig]) -> list[Source]:
    """The sources of a recipe (name → `SourceConfig`), in its order, with their formats."""
    return [_make_source(name, source) for name, source in config.items()]


def _make_source(name: str, config: SourceConfig) -> Source:
    # what is known needs no look at the indexes, which may be many
    if config.format:
        find_format(config.format)
    urls = expand_shards(name, config.shards)
    sample_format = config.format or format_of(urls, None, f"data.sources.{name}")
    find_format(sample_format)
    return Source(name, tuple(urls), config.model_copy(update={"format": sample_format}))


def differences(state: State, sources: list[Source]) -> dict[str, list[str]]:
    """How the sources of a recipe differ from those of a lane's state: names that were added, removed, or have other shards."""
    saved, given = state["sources"], {source.name: source for source in sources}
    return {
        "added": [name for name in given if name not in saved],
        "removed": [name for name in saved if name not in given],
        "changed": [name for name in given if name in saved and saved[name]["mark"] != given[name].mark],
    }


ALLOWED: dict[WhenSourcesChange, tuple[str, ...]] = {
    "strict": (),
    "allow_add": ("added",),
    "allow_add_remove": ("added", "removed"),
    "warn": ("added", "removed", "changed"),
}


def adapt_state(state: State, sources: list[Source], policy: WhenSourcesChange) -> tuple[State, str]:
    """A lane's state for sources that may have changed since.

    Sources that are new, or whose list of shards changed, begin at their first epoch; their samples in the look-ahead
    are given up, as are those of removed sources. The others go on where they were.

    Args:
        state: Of a lane.
        sources: Of the recipe.
        policy: `strict`, `allow_add`, `allow_add_remove` or `warn`.

    Returns:
        The state, and an account of the differences, empty if there are none.

    Raises:
        ConfigError: With that account, if the policy does not allow them.
    """
    found = differences(state, sources)
    names = list(state["sources"])
    same_order = [s.name for s in sources] == names
    if not any(found.values()) and same_order:
        return state, ""
    lost = {*found["removed"], *found["changed"]}
    num_lost = sum(names[place[0]] in lost for place in state["waiting"])
    account = "".join(f"\n  {kind}: {', '.join(which)}" for kind, which in found.items() if which)
    account += f"\n  {num_lost} of {len(state['waiting'])} samples in the look-ahead come from shards that are gone" if num_lost else ""
    refused = [kind for kind, which in found.items() if which and kind not in ALLOWED[policy]]
    if refused:
        enough = next(name for name, allowed in ALLOWED.items() if all(which in allowed for which in found if found[which]))
        raise ConfigError(
            f"the sources have changed since the checkpoint:{account}\n"
            f"  do:    restore them, or go on with data.when_sources_change={enough}"
        )
    numbers = {source.name: number for number, source in enumerate(sources)}
    kept = {name: entry for name, entry in state["sources"].items() if name not in lost}
    # a new source starts level with the others, not behind them
    level = min((entry["pass"] for entry in kept.values()), default=0)
    adapted = {source.name: kept.get(source.name) or fresh(source, level) for source in sources}
    is_kept = [names[place[0]] not in lost for place in state["waiting"]]
    waiting = [[numbers[names[place[0]]], *place[1:]] for place in compress(state["waiting"], is_kept)]
    pieces = list(compress(state.get("pieces", ()), is_kept))
    return {**state, "sources": adapted, "waiting": waiting, "pieces": pieces}, account


def fresh(source: Source, level: int) -> SourceState:
    """The state of a source at its beginning; see `megavlm.data.pack.lane`."""
    return {"mark": source.mark, "cursor": [0, 0, 0], "pass": level, "finished": False}
