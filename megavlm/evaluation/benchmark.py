"""Benchmarks: their questions, requests and judges. A benchmark of your own is a class that the recipe names as ``module:Class`` or
``file.py:Class``.

Tested by `tests/cli/test_main.py`.
"""

from typing import Any, Protocol

import numpy as np

from megavlm.data.read.sample import Sample
from megavlm.errors import ConfigError
from megavlm.image_tokenizers.protocol import ImageTokenizer
from megavlm.system.user_code import import_attribute

BENCHMARKS = {
    "digits": "megavlm.benchmarks.digits:DigitsBenchmark",
    "shapes": "megavlm.benchmarks.shapes_benchmark:ShapesBenchmark",
}


class Benchmark(Protocol):
    """Made from the samples of ``evaluation.shards``, the number of drawings wanted, and the run's image tokenizer."""

    questions: list[Sample]
    """Samples to read: their ``meta`` has the right ``answer`` and all ``choices``, and may have a ``split`` and a ``kind``."""
    requests: list[str]
    """Prompts of the drawings."""

    def __init__(self, samples: list[Sample], num_drawings: int, image_tokenizer: ImageTokenizer): ...

    def judge(self, images_NHWC: np.ndarray) -> dict[str, Any]:
        """Judge the drawings of the requests, uint8 RGB images in the same order. Returns plain numbers, for JSON."""
        ...


def find_benchmark(name: str) -> type[Benchmark]:
    """The class of a benchmark by its name, or by ``module:Class`` or ``file.py:Class``.

    Raises:
        ConfigError: If there is no such benchmark.
    """
    try:
        return import_attribute(BENCHMARKS.get(name, name))
    except Exception as error:  # whatever the user's code raises
        raise ConfigError(
            f"evaluation.benchmark: there is no {name!r} ({type(error).__name__}: {error})\n"
            f"  do:    use one of {', '.join(BENCHMARKS)}, or module:Class, or file.py:Class"
        ) from error
