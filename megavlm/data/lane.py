"""Lanes: endless, deterministic streams of packs, dealt once and for all.

A lane's packs depend on the seed, the sources, ``num_lanes`` and its number, never on how many processes run (P1). In each epoch
of a source every sample comes up exactly once over all lanes (P2). The state of a lane is a few plain integers that belong to the pack
just yielded::

    {"pack": 12, "draws": 217, "errors": 0,
     "cursors": [[epoch, place, index], …],          one per source: the next sample to read
     "waiting": [[source, epoch, shard, index], …]}  the look-ahead, oldest first

Resuming reads the waiting samples again by their coordinates and skips to the cursors within the current shards.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from megavlm.data.encode import EncodedSample, Encoder
from megavlm.data.pack import Costing, Layout, Pack, build_pack
from megavlm.data.packer import choose
from megavlm.data.sample import Coordinates, parse_sample
from megavlm.data.shards import expand_shards, read_shard
from megavlm.errors import DataError
from megavlm.randomness import Purpose, stream

log = logging.getLogger(__name__)

State = dict[str, Any]
Mixture = list[tuple[float, Layout]]


@dataclass(frozen=True)
class Source:
    """A named list of shards with a weight in the mixture."""

    name: str
    urls: tuple[str, ...]
    weight: float


def make_sources(settings) -> list[Source]:
    """The sources of a recipe (name → `SourceConfig`), in its order."""
    return [
        Source(name, tuple(expand_shards(name, source.shards)), source.weight) for name, source in settings.items()
    ]


def deal(num_shards: int, lane: int, num_lanes: int, seed: int, source: int, epoch: int) -> list[tuple[int, int, int]]:
    """The part of a source that a lane reads in an epoch: ``(shard, offset, stride)``, samples offset, offset+stride, ….

    Shards come in a random order. Each lane gets the same number of whole ones; those left over are cut into slices,
    one for every lane.
    """
    order = stream(seed, Purpose.SHARD_ORDER, source, epoch).permutation(num_shards)
    num_whole = num_shards // num_lanes * num_lanes
    parts = [(int(shard), 0, 1) for shard in order[lane:num_whole:num_lanes]]
    if left := order[num_whole:].tolist():
        stride = len(range(lane % len(left), num_lanes, len(left)))
        # slices rotate with the epoch, so that a lane does not meet the same samples again
        parts.append((left[lane % len(left)], (lane // len(left) + epoch) % stride, stride))
    return parts


class Cursor:
    """A lane's place in a source: an endless iterator of raw samples.

    ``state`` is ``[epoch, place, index]``: the part of the epoch being read and the sample of its shard to look at next.
    """

    def __init__(self, source: Source, number: int, lane: int, num_lanes: int, seed: int, state: list[int]):
        self.source, self.number, self.lane, self.num_lanes, self.seed = source, number, lane, num_lanes, seed
        self.state = list(state)
        self._samples = self._read()

    def __next__(self) -> tuple[str, dict[str, bytes], Coordinates]:
        """The next sample: key, members and coordinates.

        Raises:
            DataError: For an unreadable shard. The cursor has then moved on to the next one.
        """
        try:
            return next(self._samples)
        except DataError:
            self.state = [self.state[0], self.state[1] + 1, 0]
            self._samples = self._read()
            raise

    def _read(self) -> Iterator[tuple[str, dict[str, bytes], Coordinates]]:
        empty_epochs = 0
        while True:
            epoch, place, first = self.state
            num_found = 0
            parts = deal(len(self.source.urls), self.lane, self.num_lanes, self.seed, self.number, epoch)
            for place in range(place, len(parts)):
                shard, offset, stride = parts[place]
                for index, (key, members) in enumerate(read_shard(self.source.urls[shard], self.source.name)):
                    if index >= first and index % stride == offset:
                        num_found += 1
                        self.state = [epoch, place, index + 1]
                        yield key, members, Coordinates(self.number, epoch, shard, index)
                self.state = [epoch, place + 1, 0]
                first = 0
            self.state = [epoch + 1, 0, 0]
            # a slice of a short shard may be empty, but not in every rotation
            empty_epochs = 0 if num_found else empty_epochs + 1
            if empty_epochs > self.num_lanes + 1:
                raise DataError(
                    f"lane {self.lane} finds no samples in {empty_epochs} epochs",
                    "fill the shards, or take the source out of the recipe",
                    self.source.name,
                )


class Lane:
    """An iterator of ``(pack, state)``; ``state`` resumes right after that pack.

    Args:
        number: Which lane, 0 … num_lanes-1.
        num_lanes: How many there are.
        sources: The mixture.
        encoder: Turns samples into tokens.
        costing: Prices samples.
        mixture: Sampled layouts (`estimate_mixture`) that set the target cost.
        settings: The recipe's `DataConfig`.
        seed: The run's seed.
        state: Where to go on; None starts at the beginning.
    """

    def __init__(
        self,
        number: int,
        num_lanes: int,
        sources: list[Source],
        encoder: Encoder,
        costing: Costing,
        mixture: Mixture,
        settings,
        seed: int,
        state: State | None = None,
    ):
        self.number, self.sources, self.encoder, self.costing = number, sources, encoder, costing
        self.mixture, self.settings, self.seed = mixture, settings, seed
        state = state or {"pack": 0, "draws": 0, "errors": 0, "cursors": [[0, 0, 0]] * len(sources), "waiting": []}
        self.num_packs, self.num_draws, self.num_errors = state["pack"], state["draws"], state["errors"]
        self.cursors = [
            Cursor(source, i, number, num_lanes, seed, cursor)
            for i, (source, cursor) in enumerate(zip(sources, state["cursors"], strict=True))
        ]
        self.waiting = self._read_again([Coordinates(*c) for c in state["waiting"]])
        self._weights = np.array([source.weight for source in sources])

    def __iter__(self) -> Iterator[tuple[Pack, State]]:
        return self

    def __next__(self) -> tuple[Pack, State]:
        while len(self.waiting) < self.settings.look_ahead_samples:
            self._draw()
        step = self.num_packs
        chosen = choose(
            np.stack([self.costing.flops(Layout.of(sample), step) for sample in self.waiting]),
            np.array([sample.num_tokens for sample in self.waiting]),
            target_flops(self.mixture, self.costing, self.settings, step),
            self.settings.pack_tokens,
            stream(self.seed, Purpose.PACKING, self.number, step),
        )
        samples = [self.waiting[i] for i in chosen]
        pack = build_pack(samples, self.costing, len(self.sources), self.number, step, self.seed)
        taken = set(chosen)
        self.waiting = [sample for i, sample in enumerate(self.waiting) if i not in taken]
        self.num_packs += 1
        return pack, self.state()

    def state(self) -> State:
        """Plain integers from which an equal lane goes on."""
        return {
            "pack": self.num_packs,
            "draws": self.num_draws,
            "errors": self.num_errors,
            "cursors": [list(cursor.state) for cursor in self.cursors],
            "waiting": [list(sample.coordinates) for sample in self.waiting],
        }

    def _draw(self) -> None:
        """Let chance choose a source and put its next sample at the end of the look-ahead."""
        chance = stream(self.seed, Purpose.MIXTURE, self.number, self.num_draws).random() * self._weights.sum()
        number = int(np.searchsorted(np.cumsum(self._weights), chance, side="right"))
        self.num_draws += 1
        try:
            key, members, coordinates = next(self.cursors[number])
            self.waiting.append(self._encode(key, members, coordinates))
        except DataError as error:
            self.num_errors += 1
            log.warning("lane %d, data error %d: %s", self.number, self.num_errors, error)
            if self.num_errors > self.settings.max_errors:
                raise

    def _encode(self, key: str, members: dict[str, bytes], coordinates: Coordinates) -> EncodedSample:
        source = self.sources[coordinates.source]
        try:
            sample = self.encoder(parse_sample(key, members, coordinates))
            if sample.num_tokens > self.settings.pack_tokens:
                raise DataError(
                    f"the sample has {sample.num_tokens} tokens, a pack at most {self.settings.pack_tokens}",
                    "raise data.pack_tokens or shorten the sample",
                )
        except DataError as error:
            error.source, error.shard, error.key = source.name, source.urls[coordinates.shard], key
            raise
        return sample

    def _read_again(self, waiting: list[Coordinates]) -> list[EncodedSample]:
        wanted: dict[tuple[int, int], dict[int, list[Coordinates]]] = {}
        for place in waiting:
            wanted.setdefault((place.source, place.shard), {}).setdefault(place.index, []).append(place)
        found = {}
        for (source, shard), places in wanted.items():
            last = max(places)
            for index, (key, members) in enumerate(read_shard(self.sources[source].urls[shard], self.sources[source].name)):
                for place in places.get(index, ()):
                    found[place] = self._encode(key, members, place)
                if index == last:
                    break
        return [found[place] for place in waiting]


def estimate_mixture(sources: list[Source], encoder: Encoder, num_samples: int) -> Mixture:
    """Layouts of the first samples of every source, with weights: what an average sample of the mixture is like.

    Returns:
        ``(weight, layout)`` per sample; the weights sum to 1.
    """
    total = sum(source.weight for source in sources)
    mixture = []
    for number, source in enumerate(sources):
        layouts = []
        for key, members in read_shard(source.urls[0], source.name):
            try:
                layouts.append(Layout.of(encoder(parse_sample(key, members, Coordinates(number, 0, 0, len(layouts))))))
            except DataError:
                continue  # counted and reported when a lane comes to it
            if len(layouts) == num_samples:
                break
        if not layouts:
            raise DataError(
                "the first shard has no usable sample", "run `megavlm data inspect` on it", source.name, source.urls[0]
            )
        share = source.weight / total / len(layouts)
        mixture += [(share, layout) for layout in layouts]
    return mixture


def target_flops(mixture: Mixture, costing: Costing, settings, step: int) -> np.ndarray:
    """The cost vector of every pack at this step: that of ``fill * pack_tokens`` tokens of the average mixture."""
    costs = sum(weight * costing.flops(layout, step) for weight, layout in mixture)
    mean_tokens = sum(weight * layout.num_tokens for weight, layout in mixture)
    return costs * (settings.fill * settings.pack_tokens / mean_tokens)
