"""A lane's way through a source: which parts of which shards, in which order. Tested by `tests/data/pack/test_lane.py`."""

from collections.abc import Iterator
from contextlib import suppress

from megavlm.data.pack.sources import Source
from megavlm.data.read.sample import Coordinates
from megavlm.data.read.shards import Members, read_shard
from megavlm.errors import DataError
from megavlm.randomness import Purpose, stream

Raw = tuple[str, Members, Coordinates]


def deal(num_shards: int, lane: int, num_lanes: int, seed: int, *, source_key: int, epoch: int) -> list[tuple[int, int, int]]:
    """The part of a source that a lane reads in an epoch: ``(shard, offset, stride)``, samples offset, offset+stride, ….

    Shards come in a random order. Each lane gets the same number of whole ones; those left over are cut into slices,
    one for every lane.
    """
    order = stream(seed, Purpose.SHARD_ORDER, source_key, epoch).permutation(num_shards)
    num_whole = num_shards // num_lanes * num_lanes
    parts = [(int(shard), 0, 1) for shard in order[lane:num_whole:num_lanes]]
    if left := order[num_whole:].tolist():
        stride = len(range(lane % len(left), num_lanes, len(left)))
        # slices rotate with the epoch, so that a lane does not meet the same samples again
        parts.append((left[lane % len(left)], (lane // len(left) + epoch) % stride, stride))
    return parts


class Cursor:
    """A lane's place in a source: an iterator of raw samples, endless unless the source has a number of epochs.

    ``state`` is ``[epoch, place, index]``: the part of the epoch being read and the sample of its shard to look at next.

    Args:
        source: What to read.
        number: Its place in the recipe.
        lane: Of which lane.
        num_lanes: Of how many.
        seed: The run's.
        state: Where to go on.
        open_url: Opens shards.
    """

    def __init__(self, source: Source, number: int, lane: int, num_lanes: int, *, seed: int, state: list[int], open_url):
        self.source = source
        self.number = number
        self.lane = lane
        self.num_lanes = num_lanes
        self.seed = seed
        self.state = list(state)
        self.open_url = open_url
        self._samples = self._read()

    def __next__(self) -> Raw:
        """The next sample: key, members and coordinates.

        Raises:
            DataError: For an unreadable shard. The cursor has then moved on to the next one.
            StopIteration: When all epochs are through.
        """
        try:
            return next(self._samples)
        except DataError:
            self.state = [self.state[0], self.state[1] + 1, 0]
            self._samples = self._read()
            raise

    @property
    def is_at_end(self) -> bool:
        """Whether all epochs are through."""
        return self.source.config.epochs is not None and self.state[0] >= self.source.config.epochs

    def _read(self) -> Iterator[Raw]:
        source, empty_epochs = self.source, 0
        while not self.is_at_end:
            epoch, begin, first = self.state
            num_found = 0
            parts = deal(len(source.urls), self.lane, self.num_lanes, self.seed, source_key=source.key, epoch=epoch)
            for place in range(begin, len(parts)):
                shard, offset, stride = parts[place]
                for index, (key, members) in enumerate(read_shard(source.urls[shard], source.name, self.open_url)):
                    if index >= first and index % stride == offset:
                        num_found += 1
                        self.state = [epoch, place, index + 1]
                        yield key, members, Coordinates(self.number, epoch, shard, index)
                self.state = [epoch, place + 1, 0]
                first = 0
            self.state = [epoch + 1, 0, 0]
            # a slice of a short shard may be empty, and so may a shard
            empty_epochs = 0 if num_found else empty_epochs + 1
            if empty_epochs > self.num_lanes + 1 and self._is_empty():
                raise DataError(
                    "no shard of the source holds a sample",
                    "fill the shards, or take the source out of the recipe",
                    source.name,
                )

    def _is_empty(self) -> bool:
        """Whether no shard has a sample; those that cannot be read have none."""
        for url in self.source.urls:
            with suppress(DataError):
                if next(read_shard(url, self.source.name, self.open_url), None) is not None:
                    return False
        return True
