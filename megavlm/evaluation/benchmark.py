"""Benchmarks: what each asks of a model and how it judges the answer. One of your own is a class, named in the recipe as ``module:Class``."""

import importlib
from typing import Any, Protocol

import numpy as np

from megavlm.data.read.sample import Sample
from megavlm.errors import ConfigError
from megavlm.image_tokenizers.protocol import ImageTokenizer

BENCHMARKS = {
    "digits": "megavlm.benchmarks.digits:DigitsBenchmark",
    "shapes": "megavlm.benchmarks.shapes_benchmark:ShapesBenchmark",
}


class Benchmark(Protocol):
    """Made from the samples of ``evaluation.shards``, the number of drawings wanted, and the run's image tokenizer."""

    questions: list[Sample]
    """Samples to read: their ``meta`` has the right ``answer`` and all ``choices``, and may have a ``split`` and a ``kind``."""
    requests: list[str]
    """What to draw."""

    def __init__(self, samples: list[Sample], num_drawings: int, image_tokenizer: ImageTokenizer): ...

    def judge(self, images_NHWC: np.ndarray) -> dict[str, Any]:
        """What the drawings of the requests, in their order, are worth as uint8 RGB images: plain numbers, for JSON."""


def find_benchmark(name: str) -> type[Benchmark]:
    """The class of a benchmark by its name, or by ``module:Class``.

    Raises:
        ConfigError: If there is none.
    """
    module, _, attribute = BENCHMARKS.get(name, name).partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"evaluation.benchmark: there is no {name!r} ({error})\n  do:    use one of {', '.join(BENCHMARKS)}, or module:Class"
        ) from error
