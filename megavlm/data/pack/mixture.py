"""What the mixture is like: sampled layouts of every source, and what follows from them, shares and target costs.

Tested by `tests/data/pack/test_lane.py`.
"""

import logging
from collections.abc import Iterator
from itertools import islice

import numpy as np

from megavlm.data.pack.config import DataConfig, Mixture, SourceMixture
from megavlm.data.pack.encode import Encoder, Layout
from megavlm.data.pack.overlong import encode_within
from megavlm.data.pack.pack import Costing
from megavlm.data.pack.sources import Source
from megavlm.data.read import formats
from megavlm.data.read.index import read_index
from megavlm.data.read.place import reading_sample
from megavlm.data.read.sample import Coordinates
from megavlm.data.read.shards import read_shard
from megavlm.data.read.urls import Opener
from megavlm.errors import ConfigError, DataError
from megavlm.image_tokenizers.protocol import GridOnly

log = logging.getLogger(__name__)

NUM_SAMPLED_SHARDS = 8


def estimate_mixture(sources: list[Source], encoder: Encoder, config: DataConfig, open_url: Opener) -> Mixture:
    """Look at every source: all of it where indexes tell the layouts, else the first samples of shards spread over it.

    Deterministic. Images are not tokenized: their grids are enough.

    Args:
        sources: The sources.
        encoder: Of the run.
        config: How many samples of a source are read where there is no index, and what becomes of those longer than a pack.
        open_url: Opens shards.
    """
    encoder = Encoder(encoder.vocabulary, GridOnly(encoder.image_tokenizer), encoder.unconditional_ratio, encoder.seed)
    return {source.name: _estimate(number, source, encoder, config, open_url=open_url) for number, source in enumerate(sources)}


def _estimate(number: int, source: Source, encoder: Encoder, config: DataConfig, *, open_url: Opener) -> SourceMixture:
    num_samples = config.mixture_samples
    indexes = [index for url in source.urls if (index := read_index(url))]
    size = sum(index.samples for index in indexes) if len(indexes) == len(source.urls) else None
    counted: dict[Layout, int] = {}
    # some of shards spread over the source; where they are too short for that, more of them
    spread = np.linspace(0, len(source.urls) - 1, NUM_SAMPLED_SHARDS).round().astype(int).tolist()
    shards = list(dict.fromkeys([*spread, *range(len(source.urls))]))
    per_shard = -(-num_samples // min(len(shards), NUM_SAMPLED_SHARDS))
    for shard in shards:
        try:
            for layout in _layouts(number, source, shard, per_shard, encoder=encoder, config=config, open_url=open_url):
                counted[layout] = counted.get(layout, 0) + 1
        except DataError as error:
            if not config.max_errors:
                raise
            # counted when a lane comes to it
            log.warning("looking at source %s: %s", source.name, error)
        if sum(counted.values()) >= num_samples:
            break
    if not counted:
        raise DataError(
            f"no usable sample of at most {config.sample_tokens} tokens where the source was looked at",
            "run `megavlm data lint` on it",
            source.name,
            source.urls[shards[0]],
        )
    return SourceMixture(num_samples=size, layouts=[(count, layout) for layout, count in sorted(counted.items())])


def _layouts(
    number: int, source: Source, shard: int, num_samples: int, *, encoder: Encoder, config: DataConfig, open_url: Opener
) -> Iterator[Layout]:
    """The layouts of the first samples of a shard; bad samples are counted and reported when a lane comes to them.

    Raises:
        DataError: If the shard is broken.
    """
    url = source.urls[shard]
    for index, (key, members) in enumerate(islice(read_shard(url, source.name, open_url), num_samples)):
        place = Coordinates(number, 0, shard, index)
        try:
            with reading_sample(source.name, url, key):
                sample = formats.parse(key, members, source.config, place, seed=encoder.seed)
                pieces = encode_within(sample, encoder, config.sample_tokens, config.over_long)[0]
        except DataError:
            continue
        yield from (piece.layout for piece in pieces)


def token_shares(mixture: Mixture, config: DataConfig) -> np.ndarray:
    """Share of the tokens that each source of the recipe gets ``[num_sources]``; they sum to 1.

    Raises:
        ConfigError: If only some sources have `repeat`, or the size of one that has it is unknown.
    """
    by_size = [source.repeat is not None for source in config.sources.values()]
    if any(by_size) and not all(by_size):
        raise ConfigError("data.sources: repeat is given for some sources only\n  do:    give it, or a weight, to all")
    weights = []
    for name, source in config.sources.items():
        if source.repeat is None:
            weights.append(source.weight)
        elif (num_samples := mixture[name].num_samples) is None:
            raise ConfigError(
                f"data.sources.{name}.repeat: the number of its samples is not known\n"
                "  do:    write indexes with `megavlm data index SHARDS`, or give weights"
            )
        else:
            weights.append(source.repeat * num_samples)
    weights = np.array(weights, np.float64) ** (1 / config.temperature)
    if config.weights == "samples" or any(by_size):
        weights *= [mixture[name].mean_tokens for name in config.sources]
    return weights / weights.sum()


def target_flops(mixture: Mixture, shares: np.ndarray, costing: Costing, config: DataConfig, *, step: int) -> np.ndarray:
    """The cost vector of every pack at this step: that of ``fill`` of the tokens of the average mixture that are within the bounds."""
    cost_per_token = np.zeros(())
    for share, source in zip(shares, mixture.values(), strict=True):
        costs = sum(count * costing.flops(layout, step) for count, layout in source.layouts)
        cost_per_token = cost_per_token + share * costs / sum(count * layout.num_tokens for count, layout in source.layouts)
    num_tokens = config.pack_tokens
    if config.pack_rows:
        num_tokens = min(num_tokens, config.pack_rows / held_share(mixture, shares, costing, step))
    return cost_per_token * config.fill * num_tokens


def held_share(mixture: Mixture, shares: np.ndarray, costing: Costing, step: int) -> float:
    """Rows in a layer per token of the average mixture, averaged over the layers: 1 where everything is active."""
    rows = [sum(count * costing.rows(layout, step) for count, layout in source.layouts) for source in mixture.values()]
    tokens = [sum(count * layout.num_tokens for count, layout in source.layouts) for source in mixture.values()]
    return float(np.sum(shares * rows / tokens)) / costing.shape.num_layers


def pack_bounds(config: DataConfig, costing: Costing) -> np.ndarray:
    """Upper bounds of a pack's sizes: of its tokens, and, where it is bounded, of its rows summed over the layers."""
    return np.array([config.pack_tokens, *([config.pack_rows * costing.shape.num_layers] if config.pack_rows else [])])


def pack_sizes(layouts: list[Layout], config: DataConfig, costing: Costing, step: int) -> np.ndarray:
    """The sizes of samples at this step that `pack_bounds` bounds ``[num_samples, num_bounds]``."""
    sizes = [[layout.num_tokens for layout in layouts]]
    if config.pack_rows:
        sizes.append([costing.rows(layout, step) for layout in layouts])
    return np.array(sizes, np.int64).T
