"""The settings of a source: which shards, how they are written, and their share of the mixture.

Tested by `tests/data/read/test_formats.py`.
"""

from typing import Annotated

from pydantic import AfterValidator, Field

from megavlm.data.read.patterns import expand_patterns
from megavlm.settings import PathText, Positive, Settings, Share, Weight


def _check_patterns(patterns: str | list[str]) -> str | list[str]:
    expand_patterns(patterns)
    return patterns


ShardPatterns = Annotated[str | list[str], AfterValidator(_check_patterns)]


class SourceConfig(Settings):
    """A set of WebDataset shards with a weight in the mixture."""

    shards: ShardPatterns
    """URL or list of URLs; braces expand: `data/train-{0000..0015}.tar`. Also `file:`, `pipe:` and `http:`."""
    weight: Weight = 1.0
    """Share of the samples (or tokens, see `data.weights`) drawn from this source, relative to the other weights."""
    repeat: Weight | None = None
    """Replaces `weight`; give it to every source or to none. A sample of this source is seen this many times as often as a sample of a
    source with `repeat: 1`. Needs indexes (`megavlm data index`)."""
    epochs: Positive | None = None
    """The source ends after this many epochs (1 for evaluation). By default it is endless."""
    format: str | None = None
    """How samples are written: megavlm, img2dataset, llava, qa, text, interleaved, or `module:function`, or `file.py:function` (see
    `megavlm.data.read.formats`). By default as the shards' indexes say; where they do not, as the first sample looks."""
    generation_ratio: Share = 0.5
    """img2dataset, interleaved: share of the images that are drawn instead of read."""
    caption_requests: Annotated[list[str], Field(min_length=1)] = ["Describe the image.", "What does the image show?"]
    """img2dataset: the questions that a caption answers; one is drawn per sample."""
    image_root: PathText | None = None
    """llava, qa: folder of the images that the JSON names. Leave it out where they are in the tar."""
