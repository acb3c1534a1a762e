"""Lanes: endless, deterministic streams of packs, dealt once and for all.

A lane's packs depend on the seed, the sources, ``num_lanes`` and its number, never on how many processes run (P1). In each epoch
of a source every sample comes up exactly once over all lanes (P2). The state of a lane is a few plain integers that belong to the pack
just yielded::

    {"pack": 12,                                     packs so far
     "counts": {"errors": 0, "skipped": 0, "truncated": 0, "split": 0, "cut": 0, "squashed": 0},
     "sources": {"captions": {"mark": 2868309, "cursor": [epoch, place, index], "pass": 51234}, …},
     "waiting": [[source, epoch, shard, index, piece], …],      the look-ahead, oldest first
     "pieces": [[pieces, tokens], …]}                           of each: pieces of its document, and its length

The cursor is the next sample to read. Which source is read next is decided by stride scheduling (Waldspurger & Weihl 1995): each has
a pass that grows by tokens / share with every sample, and the lowest pass is next, so a lane's tokens follow the shares at any time
instead of wandering about them. Resuming reads the waiting samples again by their coordinates and skips to the cursors
within the current shards; `Lane.read_again` says how many samples that were. Where settings have changed since, waiting samples
are encoded and cut as these ask; of a document that was split and is now cut elsewhere, the rest is given up and counted as skipped,
so that nothing is seen twice.
"""

import logging
from collections.abc import Iterator

import numpy as np

from megavlm.data.pack.config import DataConfig, Mixture
from megavlm.data.pack.cursor import Cursor
from megavlm.data.pack.encode import EncodedSample, Encoder
from megavlm.data.pack.mixture import pack_bounds, pack_sizes, target_flops, token_shares
from megavlm.data.pack.overlong import encode_within
from megavlm.data.pack.pack import Costing, Pack, build_pack
from megavlm.data.pack.packer import choose
from megavlm.data.pack.sources import Source, State, adapt_state, fresh
from megavlm.data.read import formats
from megavlm.data.read.place import reading_sample
from megavlm.data.read.sample import Coordinates
from megavlm.data.read.shards import Members, read_shard
from megavlm.data.read.urls import Opener
from megavlm.errors import DataError
from megavlm.randomness import Purpose, stream
from megavlm.routing.phases import Moment

log = logging.getLogger(__name__)


COUNTS = ("errors", "skipped", "truncated", "split", "cut", "squashed")
"""What a lane counts: data errors, over-long samples by what became of them, images by what they lose (`ImageTokenizer.loss_of`)."""

Change = tuple[str, str]
"""What does not come as it is, and what happened to it, one of `COUNTS`."""
Pieces = dict[int, list[int] | None]
"""Pieces of one sample that wait: number → [pieces of the sample, tokens]."""


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
        *,
        mixture: Mixture,
        config: DataConfig,
        seed: int,
        state: State | None = None,
    ):
        self.number = number
        self.sources = sources
        self.encoder = encoder
        self.costing = costing
        self.mixture = mixture
        self.config = config
        self.seed = seed
        self.open_url = Opener(config.retries, config.cache_dir, config.cache_gib)
        self.shares = token_shares(mixture, config)
        state = self._adapted(state) if state else self._beginning()
        self.num_packs = state["pack"]
        self.counts = dict.fromkeys(COUNTS, 0) | state["counts"]
        entries = [state["sources"][source.name] for source in sources]
        self.passes = [entry["pass"] for entry in entries]
        self.cursors = [
            Cursor(source, i, number, config.num_lanes, seed=seed, state=entry["cursor"], open_url=self.open_url)
            for i, (source, entry) in enumerate(zip(sources, entries, strict=True))
        ]
        self.read_again = {"look_ahead": 0, "heads": sum(entry["cursor"][2] for entry in entries)}
        self.waiting = self._read_waiting(state)
        self._finished = {number for number, entry in enumerate(entries) if entry["finished"]}
        self._reopen()
        self._bounds = pack_bounds(config, costing)
        # of the waiting samples, as far as they are known: sizes and costs at a moment
        self._sizes = np.zeros((0, len(self._bounds)), np.int64)
        self._costs = np.zeros((0, costing.phases.num_stages + 1))
        self._moment: Moment | None = None
        self._target: tuple = (None, None)
        if state["pack"]:
            log.info(
                "lane %d resumes after pack %d: read again %d samples for the look-ahead, %d at the heads of shards",
                *(number, state["pack"], *self.read_again.values()),
            )

    def __iter__(self) -> Iterator[tuple[Pack, State]]:
        return self

    def __next__(self) -> tuple[Pack, State]:
        step = self.num_packs
        pack = build_pack(self.next_samples(), self.costing, len(self.sources), self.number, step=step, seed=self.seed)
        return pack, self.state()

    def next_samples(self) -> list[EncodedSample]:
        """The samples of the next pack; the lane moves on behind it.

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
        chosen = choose(self._costs, self._sizes, self._target_at(step), self._bounds, rng=rng)
        samples = [self.waiting[i] for i in chosen]
        for i in reversed(chosen):
            del self.waiting[i]
        self._sizes, self._costs = np.delete(self._sizes, chosen, axis=0), np.delete(self._costs, chosen, axis=0)
        self.num_packs += 1
        return samples

    def state(self) -> State:
        """Plain integers from which an equal lane resumes."""
        return {
            "pack": self.num_packs,
            "counts": dict(self.counts),
            "sources": {
                source.name: {"mark": source.mark, "cursor": list(cursor.state), "pass": level, "finished": number in self._finished}
                for number, (source, cursor, level) in enumerate(zip(self.sources, self.cursors, self.passes))
            },
            "waiting": [sample.place for sample in self.waiting],
            "pieces": [sample.piece for sample in self.waiting],
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
            "pieces": [],
        }

    def _adapted(self, state: State) -> State:
        state, account = adapt_state(state, self.sources, self.config.when_sources_change)
        # all lanes find the same
        if account and self.number == 0:
            log.warning("resuming, although the sources have changed since the checkpoint:%s", account)
        return state

    def _reopen(self) -> None:
        """Go on with sources that had ended and now have more epochs: level with the others, not behind them."""
        level = min((self.passes[number] for number in range(len(self.sources)) if number not in self._finished), default=0)
        for number in [number for number in self._finished if not self.cursors[number].is_at_end]:
            self._finished.discard(number)
            self.passes[number] = max(level, self.passes[number])

    def _price(self, step: int) -> None:
        """Add sizes and costs of the samples that are new, or of all where the route has moved on."""
        if self._moment != (moment := self.costing.phases.moment(step)):
            self._moment, self._sizes, self._costs = moment, self._sizes[:0], self._costs[:0]
        if new := [sample.layout for sample in self.waiting[len(self._sizes) :]]:
            self._sizes = np.concatenate([self._sizes, pack_sizes(new, self.config, self.costing, step)])
            self._costs = np.concatenate([self._costs, [self.costing.flops(layout, step) for layout in new]])

    def _target_at(self, step: int) -> np.ndarray:
        when = (self.costing.phases.moment(step), frozenset(self._finished))
        if self._target[0] != when:
            active = np.array([number not in self._finished for number in range(len(self.sources))])
            shares = self.shares * (active if active.any() else True)
            target = target_flops(self.mixture, shares / shares.sum(), self.costing, self.config, step=step)
            self._target = (when, target)
        return self._target[1]

    def _draw(self) -> None:
        """Put the next sample of the source whose turn it is at the end of the look-ahead."""
        number = min((n for n in range(len(self.sources)) if n not in self._finished), key=lambda n: (self.passes[n], n))
        source, num_tokens = self.sources[number], self.mixture[self.sources[number].name].mean_tokens
        try:
            key, members, place = next(self.cursors[number])
            encoded, changes = self._encode(key, members, place)
            self._count(changes, key, place)
            num_tokens = sum(sample.num_tokens for sample in encoded) or num_tokens
            self.waiting += encoded
        except StopIteration:
            self._finished.add(number)
            log.info("lane %d has come to the end of source %s", self.number, source.name)
        except DataError as error:
            self._count_error(error)
        self.passes[number] += round(num_tokens / self.shares[number])

    def _encode(self, key: str, members: Members, place: Coordinates) -> tuple[list[EncodedSample], list[Change]]:
        source, config = self.sources[place.source], self.config
        with reading_sample(source.name, source.urls[place.shard], key):
            sample = formats.parse(key, members, source.config, place, seed=self.seed)
            encoded, action = encode_within(sample, self.encoder, config.sample_tokens, config.over_long)
        changes = [] if action is None else [("over-long sample", action)]
        for image in sample.images.values():
            if image.dtype == np.uint8 and (loss := self.encoder.image_tokenizer.loss_of(image)):
                changes.append((f"image of {image.shape[1]} x {image.shape[0]} pixels", loss))
        return encoded, changes

    def _count(self, changes: list[Change], key: str, place: Coordinates) -> None:
        for what, action in changes:
            self.counts[action] += 1
            # the first, second, fourth, eighth, …
            if self.counts[action].bit_count() == 1:
                source = self.sources[place.source]
                where = f"source {source.name}, shard {source.urls[place.shard]}, sample {key}"
                log.warning("lane %d, %s %s (%d so far): %s", self.number, what, action, self.counts[action], where)

    def _count_error(self, error: DataError) -> None:
        self.counts["errors"] += 1
        log.warning("lane %d, data error %d: %s", self.number, self.counts["errors"], error)
        if self.counts["errors"] > self.config.max_errors:
            raise error

    def _read_waiting(self, state: State) -> list[EncodedSample]:
        """The samples of a state's look-ahead again, oldest first."""
        places = [Coordinates(*place) for place in state["waiting"]]
        before: dict[Coordinates, Pieces] = {}
        # runs that were begun with an earlier megavlm do not say what the pieces were
        for place, piece in zip(places, state.get("pieces") or [None] * len(places), strict=True):
            before.setdefault(place._replace(piece=0), {})[place.piece] = piece
        by_shard: dict[tuple[int, int], dict[int, list[Coordinates]]] = {}
        for place in before:
            by_shard.setdefault((place.source, place.shard), {}).setdefault(place.index, []).append(place)
        found: dict[Coordinates, list[EncodedSample]] = {}
        for (number, shard), by_index in by_shard.items():
            for key, members, place in self._read_places(number, shard, by_index):
                found[place] = self._encode_again(key, members, place, before[place])
        return [sample for place in before for sample in found.get(place, ())]

    def _read_places(self, number: int, shard: int, by_index: dict[int, list[Coordinates]]) -> Iterator[tuple[str, Members, Coordinates]]:
        """The samples of a shard that stand at some of its places."""
        source, last, index = self.sources[number], max(by_index), -1
        try:
            for index, (key, members) in enumerate(read_shard(source.urls[shard], source.name, self.open_url)):
                self.read_again["look_ahead"] += 1
                for place in by_index.get(index, ()):
                    yield key, members, place
                if index == last:
                    return
            raise DataError(
                f"the shard has {index + 1} samples, and sample {last + 1} was read from it before: it has changed",
                "restore it, or give a changed shard another name",
                source.name,
                source.urls[shard],
            )
        except DataError as error:
            self._count_error(error)

    def _encode_again(self, key: str, members: Members, place: Coordinates, before: Pieces) -> list[EncodedSample]:
        """The waiting pieces of a sample as the settings now are."""
        try:
            encoded, changes = self._encode(key, members, place)
        except DataError as error:
            self._count_error(error)
            return []
        same = [sample for sample in encoded if _is_same(sample, before)]
        if len(same) == len(before):
            return same
        num_pieces = next(iter(before.values()))
        if num_pieces and num_pieces[0] == len(before):
            # no piece of it has been in a pack: as good as new
            self._count(changes, key, place)
            return encoded
        self._count([("over-long sample", "skipped")], key, place)
        return []


def _is_same(sample: EncodedSample, before: Pieces) -> bool:
    piece = sample.coordinates.piece
    return piece in before and before[piece] in (None, [sample.num_pieces, sample.num_tokens])
