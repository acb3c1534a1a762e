"""A trained model in this one process, and the settings that say how it draws and is judged.

Tested by `tests/evaluation/sets/test_judge.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field

from megavlm.data.pack.encode import Encoder
from megavlm.data.pack.pack import Costing
from megavlm.data.read.source import ShardPatterns
from megavlm.evaluation.batches import BATCH_TOKENS
from megavlm.evaluation.prompts import Part
from megavlm.evaluation.sampling import draw_images
from megavlm.image_tokenizers.protocol import ImageTokenizer
from megavlm.model.backbone import Backbone
from megavlm.randomness import Purpose, integer_seed
from megavlm.runs.folder import RunFolder
from megavlm.settings import Count, Number, PathText, Positive, Settings


class EvaluationConfig(Settings):
    """How `megavlm evaluate` samples and what it judges with."""

    benchmark: PathText | None = None
    """The questions, the requests and their judge: digits, shapes, `module:Class` or `file.py:Class` (see `megavlm.evaluation.benchmark`).
    Without one held-out samples are judged by their losses, by exact match with their answers, and by a look at drawings."""
    shards: ShardPatterns | None = None
    """The held-out samples to judge with; without a benchmark, those of `validation` by default."""
    num_drawings: Annotated[Positive, Field(le=10**6)] = 200
    """Images to draw, evenly over the benchmark's prompts."""
    temperature: Annotated[Number, Field(ge=1e-4, le=1e4)] = 1.0
    """Softmax temperature of the drawing."""
    top_k: Count = 0
    """Draw among the k most likely codes; 0 is all of them."""
    guidance: Annotated[Number, Field(ge=0, le=1000)] = 1.0
    """Classifier-free guidance scale; 1 is none."""
    batch_tokens: Positive = BATCH_TOKENS
    """Tokens that are drawn, answered or scored together: bounds the memory of their caches (see docs/judging.md)."""
    route: Literal["dense", "trained"] = "dense"
    """Which tokens are active when the model is judged or draws: `dense` is all; `trained` is the policies of the training, in full."""
    guidance_route: Literal["dense", "trained"] | None = None
    """Likewise in the unconditional half of guidance; by default the same as `route`. `trained` beside a dense `route` guides away from the
    weaker model that the route makes (arXiv 2601.01608)."""


@dataclass(frozen=True)
class TrainedModel:
    """The weights of one checkpoint, with everything that is needed to use them."""

    folder: RunFolder
    """The run folder; results go there."""
    checkpoint: Path
    backbone: Backbone
    encoder: Encoder
    costing: Costing
    """Costing of the route that ``evaluation.route`` names."""
    device: torch.device
    config: EvaluationConfig
    seed: int
    """The run's seed."""
    guidance_costing: Costing | None = None
    """Costing of the route that ``evaluation.guidance_route`` names; None where that is the same."""

    @property
    def image_tokenizer(self) -> ImageTokenizer:
        return self.encoder.image_tokenizer

    def draw(self, prompts: Sequence[str | Sequence[Part]], *coordinates: int) -> np.ndarray:
        """Codes ``[len(prompts), h, w]``, sampled as the recipe's ``evaluation`` says.

        Args:
            prompts: What to draw: texts, or texts and images in order each.
            coordinates: Name the stream of random numbers, together with the run's seed.
        """
        config = self.config
        return draw_images(
            self.backbone,
            self.encoder,
            prompts,
            self.costing,
            device=self.device,
            seed=integer_seed(self.seed, Purpose.DRAWING, *coordinates),
            temperature=config.temperature,
            top_k=config.top_k,
            guidance=config.guidance,
            guidance_costing=self.guidance_costing,
            batch_tokens=config.batch_tokens,
        )
