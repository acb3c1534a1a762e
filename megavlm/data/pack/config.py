"""The settings of the packs, and what is known of the mixture they are built from. Tested by `tests/data/pack/test_lane.py`."""

from functools import cached_property
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from megavlm.data.pack.encode import Layout
from megavlm.data.read.source import SourceConfig
from megavlm.settings import Count, Name, Number, PathText, Positive, Settings, Share

MOST_TOKENS = 2**24
"""Of a pack."""


def _check_layouts(layouts: list[tuple[int, Layout]]) -> list[tuple[int, Layout]]:
    for _, layout in layouts:
        lengths = [length for length, _ in layout.spans]
        is_possible = 0 < layout.num_tokens <= MOST_TOKENS and sum(lengths) <= layout.num_tokens and min(lengths, default=1) > 0
        if not is_possible or not 0 <= min(layout[1:3]) <= max(layout[1:3]) <= layout.num_tokens or {t for _, t in layout.spans} - {0, 1}:
            raise ValueError("holds a layout that no sample has; leave data.mixture out, it is found again")
    return layouts


class SourceMixture(Settings):
    """What is known of one source."""

    num_samples: Positive | None
    """Samples of an epoch; None unless every shard has an index."""
    layouts: Annotated[list[tuple[Positive, Layout]], Field(min_length=1), AfterValidator(_check_layouts)]
    """(count, layout): [count, [tokens, labelled tokens, [[length, task] of each image span]]]."""

    @cached_property
    def mean_tokens(self) -> float:
        counts = sum(count for count, _ in self.layouts)
        return sum(count * layout.num_tokens for count, layout in self.layouts) / counts


Mixture = dict[str, SourceMixture]

OverLong = Literal["error", "skip", "truncate_text", "split_images"]
"""``error``: a data error. ``skip``: the sample is left out. ``truncate_text``: the longest texts lose their ends until the sample fits.
``split_images``: a document with several images is cut, before images, into pieces that fit; pieces without a loss are left out."""
WhenSourcesChange = Literal["strict", "allow_add", "allow_add_remove", "warn"]
"""Which changes of the sources a resume accepts; see `megavlm.data.pack.sources`."""


class DataConfig(Settings):
    """Sources, and how they become packs."""

    sources: Annotated[dict[Name, SourceConfig], Field(min_length=1, max_length=1000)]
    """Name → source."""
    num_lanes: Annotated[Positive, Field(le=2**16)] = 8
    """Independent streams of packs = packs per optimizer step. The world size must divide it."""
    pack_tokens: Annotated[Positive, Field(le=MOST_TOKENS)] = 8192
    """Upper bound of a pack's length in tokens (memory)."""
    pack_rows: Annotated[Positive, Field(le=MOST_TOKENS)] | None = None
    """Upper bound of a pack's rows per layer, averaged over the layers: what it holds for the backward pass. The bound holds at every
    moment of the route's schedule: where more is kept, packs are shorter. No sample may be longer.
    By default only `pack_tokens` bounds packs."""
    weights: Literal["samples", "tokens"] = "samples"
    """What the weights of the sources are shares of."""
    temperature: Annotated[Number, Field(ge=0.1, le=1000)] = 1.0
    """Weights are raised to 1/temperature: above 1 evens them out (arXiv 1907.05019)."""
    look_ahead_samples: Annotated[Positive, Field(le=10**6)] = 256
    """Samples that a lane holds to choose from. Also the longest wait of a sample, counted in packs of its lane."""
    over_long: OverLong = "error"
    """What happens to samples longer than a pack (`megavlm.data.pack.overlong`). All are counted."""
    fill: Annotated[Number, Field(ge=0.01, le=1)] = 0.985
    """The packs' target cost, as a share of the mean cost of `pack_tokens` tokens of the mixture."""
    unconditional_ratio: Share = 0.1
    """Share of generation prompts replaced by `<unconditional>`, for classifier-free guidance (Ho & Salimans 2022)."""
    num_workers: Annotated[Count, Field(le=1024)] = 0
    """Loader processes per rank; 0 builds packs in the training process."""
    prefetch_packs: Annotated[Positive, Field(le=1024)] = 4
    """Packs that each worker prepares ahead."""
    max_errors: Count = 0
    """Bad samples or shards that each lane counts, reports and passes over before it stops the run."""
    when_sources_change: WhenSourcesChange = "strict"
    """Which changes of the sources since the checkpoint a resume accepts: none, added ones, added and removed ones, or any."""
    retries: Annotated[Count, Field(le=100)] = 5
    """How often a broken HTTP connection is retried in a row."""
    cache_dir: PathText | None = None
    """Folder for local copies of remote shards. By default no copies are kept."""
    cache_gib: Annotated[Number, Field(gt=0, le=2**30)] = 100.0
    """Size limit of that folder; the least recently used copies are removed."""
    mixture_samples: Annotated[Positive, Field(le=10**6)] = 512
    """Samples of each source that are read to estimate the packs' target cost."""
    mixture: dict[str, SourceMixture] | None = None
    """What was found out about each source. Filled in at the start of a run and kept with it."""

    @property
    def sample_tokens(self) -> int:
        """Upper bound of a sample's length: it must fit into a pack at every moment."""
        return min(self.pack_tokens, self.pack_rows or self.pack_tokens)
