"""Lanes: endless, deterministic streams of packs, dealt once and for all.

A lane's packs depend on the seed, the sources, ``num_lanes`` and its number, never on how many processes run (P1). In each epoch
of a source every sample comes up exactly once over all lanes (P2). The state of a lane is a few plain integers that belong to the pack
just yielded::

    {"pack": 12,                                     packs so far
     "counts": {"errors": 0, "skipped": 0, "truncated": 0, "split": 0},
     "sources": {"captions": {"mark": 2868309, "cursor": [epoch, place, index], "pass": 51234}, …},
     "waiting": [[source, epoch, shard, index, piece], …]}      the look-ahead, oldest first

The cursor is the next sample to read. Which source is read next is decided by stride scheduling (Waldspurger & Weihl 1995): each has
a pass that grows by tokens / share with every sample, and the lowest pass is next, so a lane's tokens follow the shares at any time
instead of wandering about them. Resuming reads the waiting samples again by their coordinates and skips to the cursors
within the current shards; `Lane.read_again` says how many samples that were.
"""

import logging
from collections.abc import Iterator

import numpy as np

from megavlm.data.pack.config import DataConfig, Mixture
from megavlm.data.pack.cursor import Cursor
from megavlm.data.pack.encode import EncodedSample, Encoder
from megavlm.data.pack.mixture import target_flops, token_shares
from megavlm.data.pack.overlong import encode_within
from megavlm.data.pack.pack import Costing, Pack, build_pack
from megavlm.data.pack.packer import choose
from megavlm.data.pack.sources import Source, State, adapt_state, fresh
from megavlm.data.read import formats
from megavlm.data.read.sample import Coordinates
from megavlm.data.read.shards import Members, read_shard
from megavlm.data.read.urls import Opener
from megavlm.errors import DataError
from megavlm.randomness import Purpose, stream

log = logging.getLogger(__name__)


COUNTS = ("errors", "skipped", "truncated", "split")
"""What a lane counts: data errors, and over-long samples by what became of them."""


class Lane:
    """An iterator of ``(pack, state)``; ``state`` resumes right after that pack. Ends where every source has a number of epochs.

    Args:
        number: Which lane, 0 … num_lanes-1.
        sources: The mixture.
        encoder: Turns samples into tokens.
        costing: Prices samples.
        mixture: Sampled layouts (`estimate_mixture`) that set shares and target cost.
        config: The recipe's ``data``.
        seed: The run's seed.
        state: Where to go on; None starts at the beginning.
    """

    def __init__(
        self,
        number: int,
        sources: list[Source],
        encoder: Encoder,
        costing: Costing,
        mixture: Mixture,
        config: DataConfig,
        seed: int,
        state: State | None = None,
    ):
        self.number, self.sources, self.encoder, self.costing = number, sources, encoder, costing
        self.mixture, self.config, self.seed = mixture, config, seed
        self.open_url = Opener(config.retries, config.cache_dir, config.cache_gib)
        self.shares = token_shares(mixture, config)
        state = self._adapted(state) if state else self._beginning()
        self.num_packs, self.counts = state["pack"], dict(state["counts"])
        entries = [state["sources"][source.name] for source in sources]
        self.passes = [entry["pass"] for entry in entries]
        self.cursors = [
            Cursor(source, i, number, config.num_lanes, seed, entry["cursor"], self.open_url)
            for i, (source, entry) in enumerate(zip(sources, entries, strict=True))
        ]
        self.read_again = {"look_ahead": 0, "heads": sum(entry["cursor"][2] for entry in entries)}
        self.waiting = self._read_waiting([Coordinates(*place) for place in state["waiting"]])
        self._finished = {number for number, entry in enumerate(entries) if entry["finished"]}
        # of the waiting samples, as far as they are known: lengths, and costs at a moment
        self._tokens, self._costs, self._moment = np.zeros(0, np.int64), np.zeros((0, costing.plan.num_stages + 1)), None
        self._target: tuple = (None, None)
        if state["pack"]:
            log.info(
                "lane %d goes on after pack %d: read again %d samples for the look-ahead, %d at the heads of shards",
                *(number, state["pack"], *self.read_again.values()),
            )

    def __iter__(self) -> Iterator[tuple[Pack, State]]:
        return self

    def __next__(self) -> tuple[Pack, State]:
        step = self.num_packs
        pack = build_pack(self.next_samples(), self.costing, len(self.sources), self.number, step, self.seed)
        return pack, self.state()

    def next_samples(self) -> list[EncodedSample]:
        """The samples of the next pack; the lane goes on behind it.

        Raises:
            StopIteration: When every source has come to its end.
        """
        while len(self.waiting) < self.config.look_ahead_samples and len(self._finished) < len(self.sources):
            self._draw()
        if not self.waiting:
            raise StopIteration
        step = self.num_packs
        self._price(step)
        rng = stream(self.seed, Purpose.PACKING, self.number, step)
        chosen = choose(self._costs, self._tokens, self._target_at(step), self.config.pack_tokens, rng)
        samples = [self.waiting[i] for i in chosen]
        for i in reversed(chosen):
            del self.waiting[i]
        self._tokens, self._costs = np.delete(self._tokens, chosen), np.delete(self._costs, chosen, axis=0)
        self.num_packs += 1
        return samples

    def state(self) -> State:
        """Plain integers from which an equal lane goes on."""
        return {
            "pack": self.num_packs,
            "counts": dict(self.counts),
            "sources": {
                source.name: {"mark": source.mark, "cursor": list(cursor.state), "pass": level, "finished": number in self._finished}
                for number, (source, cursor, level) in enumerate(zip(self.sources, self.cursors, self.passes))
            },
            "waiting": [sample.place for sample in self.waiting],
        }

    def _beginning(self) -> State:
        # lanes begin at different places of the alternation, or all of them would take the same turns
        offsets = stream(self.seed, Purpose.MIXTURE, self.number).random(len(self.sources))
        spread = max(self.mixture[source.name].mean_tokens for source in self.sources) / self.shares
        return {
            "pack": 0,
            "counts": dict.fromkeys(COUNTS, 0),
            "sources": {s.name: fresh(s, int(o * w)) for s, o, w in zip(self.sources, offsets, spread)},
            "waiting": [],
        }

    def _adapted(self, state: State) -> State:
        state, account = adapt_state(state, self.sources, self.config.when_sources_change)
        # all lanes find the same
        if account and self.number == 0:
            log.warning("going on although the sources have changed since the checkpoint:%s", account)
        return state

    def _price(self, step: int) -> None:
        """Add lengths and costs of the samples that are new, or of all where the route has moved on."""
        if self._moment != (moment := self.costing.moment(step)):
            self._moment, self._tokens, self._costs = moment, self._tokens[:0], self._costs[:0]
        if new := [sample.layout for sample in self.waiting[len(self._tokens) :]]:
            self._tokens = np.append(self._tokens, [layout.num_tokens for layout in new])
            self._costs = np.concatenate([self._costs, [self.costing.flops(layout, step) for layout in new]])

    def _target_at(self, step: int) -> np.ndarray:
        when = (self.costing.moment(step), frozenset(self._finished))
        if self._target[0] != when:
            active = np.array([number not in self._finished for number in range(len(self.sources))])
            shares = self.shares * (active if active.any() else True)
            target = target_flops(self.mixture, shares / shares.sum(), self.costing, self.config, step)
            self._target = (when, target)
        return self._target[1]

    def _draw(self) -> None:
        """Put the next sample of the source whose turn it is at the end of the look-ahead."""
        number = min((n for n in range(len(self.sources)) if n not in self._finished), key=lambda n: (self.passes[n], n))
        source, num_tokens = self.sources[number], self.mixture[self.sources[number].name].mean_tokens
        try:
            encoded = self._encode(*next(self.cursors[number]))
            num_tokens = sum(sample.num_tokens for sample in encoded) or num_tokens
            self.waiting += encoded
        except StopIteration:
            self._finished.add(number)
            log.info("lane %d has come to the end of source %s", self.number, source.name)
        except DataError as error:
            self.counts["errors"] += 1
            log.warning("lane %d, data error %d: %s", self.number, self.counts["errors"], error)
            if self.counts["errors"] > self.config.max_errors:
                raise
        self.passes[number] += round(num_tokens / self.shares[number])

    def _encode(self, key: str, members: Members, coordinates: Coordinates) -> list[EncodedSample]:
        source, config = self.sources[coordinates.source], self.config
        try:
            sample = formats.parse(key, members, source.config, coordinates, self.seed)
            encoded, action = encode_within(sample, self.encoder, config.pack_tokens, config.over_long)
        except DataError as error:
            error.source, error.shard, error.key = source.name, source.urls[coordinates.shard], key
            raise
        if action:
            self.counts[action] += 1
            # the first, second, fourth, eighth, …
            if self.counts[action].bit_count() == 1:
                place = f"source {source.name}, shard {source.urls[coordinates.shard]}, sample {key}"
                log.warning("lane %d, over-long sample %s (%d so far): %s", self.number, action, self.counts[action], place)
        return encoded

    def _read_waiting(self, places: list[Coordinates]) -> list[EncodedSample]:
        wanted: dict[tuple[int, int], dict[int, list[Coordinates]]] = {}
        for place in places:
            wanted.setdefault((place.source, place.shard), {}).setdefault(place.index, []).append(place)
        found, counts = {}, dict(self.counts)
        for (number, shard), by_index in wanted.items():
            last, source = max(by_index), self.sources[number]
            for index, (key, members) in enumerate(read_shard(source.urls[shard], source.name, self.open_url)):
                self.read_again["look_ahead"] += 1
                for place in by_index.get(index, ()):
                    pieces = self._encode(key, members, place._replace(piece=0))
                    found[place] = next(sample for sample in pieces if sample.coordinates == place)
                if index == last:
                    break
        self.counts = counts  # these were counted when they were first read
        return [found[place] for place in places]
