"""What is analysed: a run's weights, and samples laid into packs.

Samples are the first ones of the run's own lanes, or of held-out shards that the caller names.

Tested by `tests/analysis/test_report.py`.
"""

from itertools import count
from pathlib import Path
from typing import Any

from megavlm.data.pack.encode import EncodedSample
from megavlm.data.pack.pack import Costing, Pack, build_pack
from megavlm.data.read.shards import expand_shards
from megavlm.errors import ConfigError
from megavlm.parts.parts import Parts
from megavlm.parts.trained import load_trained


class Subject:
    """A trained run to analyse.

    Args:
        run: The run folder, or one checkpoint in it.
        shards: Held-out shards in megavlm's own format, braces expand; by default the training's sources.
        num_packs: Packs to fill with samples.
        overrides: Settings to change, as on the command line.
    """

    def __init__(self, run: str | Path, shards: str | list[str] | None, num_packs: int, overrides: dict[str, Any] | None = None):
        self.model, parts = load_trained(run, (overrides or {}) | _sources_of(shards), in_float32=True)
        self.config = parts.config
        self.origin = "training sources" if shards is None else "held-out shards"
        self.groups = first_samples(parts, num_packs)

    def packs(self, costing: Costing | None = None) -> list[Pack]:
        """The samples as packs along a route, by default that of ``evaluation.route``; on the host."""
        return build_packs(self.groups, costing or self.model.costing, len(self.config.data.sources))


def build_packs(groups: list[list[EncodedSample]], costing: Costing, num_sources: int) -> list[Pack]:
    """One pack per group of samples; random choices are the same every time."""
    return [build_pack(group, costing, num_sources, lane, step=0, seed=0) for lane, group in enumerate(groups)]


def first_samples(parts: Parts, num_packs: int) -> list[list[EncodedSample]]:
    """The samples of the first packs of a configuration's only lane.

    Raises:
        ConfigError: If there is no sample.
    """
    parts = parts.replaced(data=parts.config.data.model_copy(update={"num_lanes": 1})).with_mixture()
    lane, groups = parts.make_lane(0), []
    try:
        while len(groups) < num_packs:
            groups.append(lane.next_samples())
    except StopIteration:
        pass
    if not groups:
        raise ConfigError("there are no samples to analyse\n  do:    name shards with samples, and num_packs of at least 1")
    return groups


def _sources_of(shards: str | list[str] | None) -> dict[str, Any]:
    """Every shard as a source of its own, read once. So tasks alternate, even if every shard holds only one."""
    if shards is None:
        return {}
    urls = expand_shards("held_out", list(shards) if isinstance(shards, tuple) else shards)
    sources = {f"held_out_{number}": {"shards": url, "epochs": 1} for number, url in zip(count(), urls)}
    return {"data.sources": sources, "data.mixture": None}
