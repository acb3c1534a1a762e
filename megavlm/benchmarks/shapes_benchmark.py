"""``shapes`` as a benchmark: questions, requests, and drawings judged exactly. Figures are per split, so held-out compositions stand apart.

The tokenizer limits what drawings can reach. So the same judgement of held-out images, encoded and decoded, is reported as the ceiling.

Letters: N images, H and W pixels, C colours, X pixels in a row.
"""

from collections.abc import Callable

import numpy as np
from sklearn.decomposition import PCA

from megavlm.benchmarks.shapes import Prompt, render, satisfies, scene
from megavlm.data.read.sample import Sample
from megavlm.errors import ConfigError
from megavlm.evaluation.frechet import frechet_distance, mean_and_covariance
from megavlm.image_tokenizers.protocol import ImageTokenizer

NUM_REAL = 1000
"""New scenes per split that the distance compares with; as many others define its principal components."""
OTHER_SEED = 1 << 20
"""Seed of these scenes; data is made with small seeds."""


class ShapesBenchmark:
    """The benchmark of scenes that are read and drawn; see `megavlm.evaluation.benchmark.Benchmark`.

    Requests are taken evenly from the splits of the samples.
    """

    def __init__(self, samples: list[Sample], num_drawings: int, image_tokenizer: ImageTokenizer):
        self.questions = [sample for sample in samples if sample.task == "understanding"]
        by_split: dict[str, list[Sample]] = {}
        for sample in samples:
            if sample.task == "generation":
                by_split.setdefault(sample.meta["split"], []).append(sample)
        if not by_split or not self.questions:
            raise ConfigError(
                "evaluation.shards: shapes needs questions and requests\n  do:    name shards of both tasks, as recipes/shapes.yaml does"
            )
        self._samples = [sample for group in by_split.values() for sample in group[: num_drawings // len(by_split)]]
        self._tokenizer = image_tokenizer
        self.requests = ["".join(s.text for s in sample.segments if s.text) for sample in self._samples]

    def judge(self, drawn: np.ndarray) -> dict:
        images = [next(iter(sample.images.items())) for sample in self._samples]
        restored = self._tokenizer.decode(np.stack([self._tokenizer.encode_member(*image, has_loss=True)[0] for image in images]))
        asked = [_prompt(sample) for sample in self._samples]
        splits = np.array([sample.meta["split"] for sample in self._samples])
        real = {str(split): [_real(split, drawn.shape[1], first) for first in (0, NUM_REAL)] for split in np.unique(splits)}

        def report(chosen: np.ndarray, known: np.ndarray, other: np.ndarray) -> dict:
            requests, distance = [asked[i] for i in np.flatnonzero(chosen)], _distance_to(known, other)
            return {
                "drawings": len(requests),
                **_judged(drawn[chosen], requests),
                "frechet_distance": distance(_flat(drawn[chosen])),
                "ceiling": {
                    **_judged(restored[chosen], requests),
                    "frechet_distance": distance(_flat(restored[chosen])),
                    "frechet_distance_of_real_images": distance(known[np.linspace(0, len(known) - 1, len(requests), dtype=int)]),
                },
            }

        pooled = [np.concatenate(parts) for parts in zip(*real.values())]
        return report(splits == splits, *pooled) | {"by_split": {split: report(splits == split, *real[split]) for split in real}}


def _judged(images_NHWC: np.ndarray, asked: list[Prompt]) -> dict:
    """Shares of the images that show everything requested, that show the shapes, and, where one was named, the relation."""
    verdicts = [satisfies(image, prompt) for image, prompt in zip(images_NHWC, asked)]
    related = [verdict["relation"] for verdict, prompt in zip(verdicts, asked) if prompt.relation]
    numbers = sorted({len(prompt.shapes) for prompt in asked})
    return {
        "shapes": _mean(verdict["shapes"] for verdict in verdicts),
        "relation": _mean(related),
        "accuracy_by_judge": _mean(verdict["all"] for verdict in verdicts),
        "accuracy_by_number_of_shapes": {
            str(n): _mean(verdict["all"] for verdict, prompt in zip(verdicts, asked) if len(prompt.shapes) == n) for n in numbers
        },
    }


def _distance_to(known_NX: np.ndarray, reference_NX: np.ndarray) -> Callable[[np.ndarray], float]:
    """Fréchet's distance to a reference, on the 20 leading principal components of the pixels of known real images."""
    features = PCA(20, svd_solver="full").fit(known_NX)
    reference = mean_and_covariance(features.transform(reference_NX))
    return lambda images_NX: frechet_distance(*mean_and_covariance(features.transform(images_NX)), *reference)


def _mean(values) -> float:
    return float(np.mean([*values])) if (values := [*values]) else 0.0


def _prompt(sample: Sample) -> Prompt:
    relation = sample.meta.get("relation")
    shapes = tuple(tuple(shape) for shape in sample.meta["shapes"])
    return Prompt("", shapes, (int(relation[0]), str(relation[1]), int(relation[2])) if relation else None)


def _real(split: str, pixels: int, first: int) -> np.ndarray:
    return _flat(np.stack([render(scene(OTHER_SEED, split, first + i), pixels) for i in range(NUM_REAL)]))


def _flat(images_NHWC: np.ndarray) -> np.ndarray:
    # half the resolution: it is about places and colours, not about sharp edges
    n, height, width, _ = images_NHWC.shape
    halved = images_NHWC.reshape(n, height // 2, 2, width // 2, 2, 3).mean((2, 4))
    return halved.reshape(n, -1) / 255
