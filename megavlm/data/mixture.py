"""What the mixture is like: sampled layouts of every source, and what follows from them, shares and target costs."""

import logging
from functools import cached_property
from itertools import islice

import numpy as np

from megavlm.data import formats
from megavlm.data.encode import Encoder, GridOnly, Layout
from megavlm.data.index import read_index
from megavlm.data.overlong import encode_within
from megavlm.data.pack import Costing
from megavlm.data.sample import Coordinates
from megavlm.data.shards import read_shard
from megavlm.data.sources import Source
from megavlm.data.urls import Opener
from megavlm.errors import ConfigError, DataError
from megavlm.settings import Settings

log = logging.getLogger(__name__)

NUM_SAMPLED_SHARDS = 8


class SourceMixture(Settings):
    """What is known of one source."""

    num_samples: int | None
    """Samples of an epoch, where every shard has an index."""
    layouts: list[tuple[int, Layout]]
    """(count, layout): [count, [tokens, labelled tokens, [[length, task] of each image span]]]."""

    @cached_property
    def mean_tokens(self) -> float:
        counts = sum(count for count, _ in self.layouts)
        return sum(count * layout.num_tokens for count, layout in self.layouts) / counts


Mixture = dict[str, SourceMixture]


def estimate_mixture(
    sources: list[Source], encoder: Encoder, num_samples: int, max_tokens: int, over_long: str, open_url=Opener()
) -> Mixture:
    """Look at every source: all of it where indexes tell the layouts, else the first samples of shards spread over it.

    Deterministic. Images are not tokenized: their grids are enough.

    Args:
        sources: The sources.
        encoder: Of the run.
        num_samples: How many samples of a source are read where there is no index.
        max_tokens: Of a pack.
        over_long: What becomes of longer samples.
        open_url: Opens shards.
    """
    encoder = Encoder(
        encoder.vocabulary, GridOnly(encoder.image_tokenizer), encoder.unconditional_ratio, encoder.seed
    )
    return {
        source.name: _estimate(number, source, encoder, num_samples, max_tokens, over_long, open_url)
        for number, source in enumerate(sources)
    }


def _estimate(
    number: int, source: Source, encoder: Encoder, num_samples: int, max_tokens: int, over_long: str, open_url
) -> SourceMixture:
    indexes = [read_index(url) for url in source.urls]
    size = sum(index.samples for index in indexes) if all(indexes) else None
    counted: dict[Layout, int] = {}
    # some of shards spread over the source; where they are too short for that, more of them
    spread = np.linspace(0, len(source.urls) - 1, NUM_SAMPLED_SHARDS).round().astype(int).tolist()
    shards = list(dict.fromkeys([*spread, *range(len(source.urls))]))
    for shard in shards:
        reading = read_shard(source.urls[shard], source.name, open_url)
        for index, (key, members) in enumerate(islice(reading, -(-num_samples // min(len(shards), NUM_SAMPLED_SHARDS)))):
            place = Coordinates(number, 0, shard, index)
            try:
                sample = formats.parse(key, members, source.settings, place, encoder.seed)
                layouts = [piece.layout for piece in encode_within(sample, encoder, max_tokens, over_long)[0]]
            except DataError:
                continue  # counted and reported when a lane comes to it
            for layout in layouts:
                counted[layout] = counted.get(layout, 0) + 1
        if sum(counted.values()) >= num_samples:
            break
    if not counted:
        raise DataError(
            f"no usable sample of at most {max_tokens} tokens where the source was looked at",
            "run `megavlm data lint` on it",
            source.name,
            source.urls[shards[0]],
        )
    return SourceMixture(num_samples=size, layouts=[(count, layout) for layout, count in sorted(counted.items())])


def token_shares(mixture: Mixture, settings) -> np.ndarray:
    """Share of the tokens that each source of the recipe (a `DataConfig`) gets ``[num_sources]``; they sum to 1.

    Raises:
        ConfigError: If only some sources have `repeat`, or the size of one that has it is unknown.
    """
    by_size = [source.repeat is not None for source in settings.sources.values()]
    if any(by_size) and not all(by_size):
        raise ConfigError("data.sources: repeat is given for some sources only\n  do:    give it, or a weight, to all")
    weights = []
    for name, source in settings.sources.items():
        if source.repeat is None:
            weights.append(source.weight)
        elif mixture[name].num_samples is None:
            raise ConfigError(
                f"data.sources.{name}.repeat: the number of its samples is not known\n"
                "  do:    write indexes with `megavlm data index SHARDS`, or give weights"
            )
        else:
            weights.append(source.repeat * mixture[name].num_samples)
    weights = np.array(weights, np.float64) ** (1 / settings.temperature)
    if settings.weights == "samples" or any(by_size):
        weights *= [mixture[name].mean_tokens for name in settings.sources]
    return weights / weights.sum()


def target_flops(mixture: Mixture, shares: np.ndarray, costing: Costing, settings, step: int) -> np.ndarray:
    """The cost vector of every pack at this step: that of ``fill * pack_tokens`` tokens of the average mixture."""
    cost_per_token = 0.0
    for share, source in zip(shares, mixture.values(), strict=True):
        costs = sum(count * costing.flops(layout, step) for count, layout in source.layouts)
        cost_per_token = cost_per_token + share * costs / sum(count * layout.num_tokens for count, layout in source.layouts)
    return cost_per_token * settings.fill * settings.pack_tokens
