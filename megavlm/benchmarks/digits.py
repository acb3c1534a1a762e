"""``digits``: 1,797 scanned handwritten digits (Alpaydin & Kaynak 1998; they ship with scikit-learn).

8x8 pixels of 17 grey levels. Every fifth image, by index, is held out. Each image gives one sample per task; its phrasing is drawn
once from a fixed seed.

Letters: N images, H and W pixels, C colours, P pixels in a row. Tested by `tests/evaluation/test_digits.py`.
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.svm import SVC
from webdataset.writer import TarWriter

from megavlm.data.read.sample import Record, Sample, Segment
from megavlm.errors import MegavlmError
from megavlm.evaluation.frechet import frechet_distance, mean_and_covariance
from megavlm.image_tokenizers.pixel import PixelTokenizer
from megavlm.image_tokenizers.protocol import ImageTokenizer
from megavlm.randomness import Purpose, stream
from megavlm.vocabulary import train_text_model

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
QUESTIONS = (
    "Which digit is this?",
    "What number is written here?",
    "Read the handwritten digit.",
    "Name the digit in the picture.",
    "What does the image show?",
)
REQUESTS = (
    "a handwritten {}",
    "Draw the digit {}.",
    "Write the number {} by hand.",
    "a picture of a {}",
    "Please draw a {}.",
)
TOKENIZER = PixelTokenizer(levels=17, height=8, width=8)
SHARDS_PER_SPLIT = {"train": 8, "test": 1}
HELD_OUT_EVERY = 5


@dataclass(frozen=True)
class Digits:
    """Some of the digits: codes ``[N, 8, 8]`` from 0 to 16, and the digit that each shows ``[N]``."""

    codes: np.ndarray
    labels: np.ndarray


def load(split: str) -> Digits:
    """The ``train`` or ``test`` digits, in their original order."""
    pixels_NP, labels_N = load_digits(return_X_y=True)
    held_out = np.arange(len(labels_N)) % HELD_OUT_EVERY == 0
    chosen = held_out if split == "test" else ~held_out
    return Digits(pixels_NP[chosen].reshape(-1, 8, 8).astype(np.int64), labels_N[chosen])


def write(folder: Path) -> dict[str, int]:
    """Write shards of both tasks and splits, and the text model trained on the training text.

    Args:
        folder: Folder to write to; made if it does not exist.

    Returns:
        Shard → number of its samples.

    Raises:
        MegavlmError: If the folder already holds shards.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if next(folder.glob("*.tar"), None):
        raise MegavlmError(f"{folder} already holds shards\n  do:    give another folder, or remove it first")
    written, texts = {}, []
    for split in ("train", "test"):
        digits = load(split)
        for t, (task, make) in enumerate((("understanding", _understanding), ("generation", _generation))):
            rng = stream(0, Purpose.SAMPLE, t, len(digits.labels))
            records = [make(int(label), rng) for label in digits.labels]
            if split == "train":
                texts += [segment.text for record in records for segment in record.segments if segment.text]
            order = rng.permutation(len(records))
            for shard, indices in enumerate(np.array_split(order, SHARDS_PER_SPLIT[split])):
                path = folder / f"{task}-{split}-{shard:02d}.tar"
                with TarWriter(str(path), encoder=False, mtime=0) as writer:
                    for i in indices:
                        writer.write(_members(f"{split}-{i:04d}", records[i], digits.codes[i]))
                written[path.name] = len(indices)
    train_text_model(texts, folder / "text.model", vocab_size=400)
    return written


def _understanding(label: int, rng: np.random.Generator) -> Record:
    segments = (
        Segment(image="img0"),
        Segment(text=str(rng.choice(QUESTIONS))),
        Segment(text=WORDS[label], loss=True),
    )
    return Record(task="understanding", segments=segments, meta={"answer": WORDS[label], "choices": WORDS})


def _generation(label: int, rng: np.random.Generator) -> Record:
    segments = (Segment(text=str(rng.choice(REQUESTS)).format(WORDS[label])), Segment(image="img0", loss=True))
    return Record(task="generation", segments=segments, meta={"label": label})


def _members(key: str, record: Record, codes_hw: np.ndarray) -> dict:
    png = io.BytesIO()
    Image.fromarray(TOKENIZER.decode(codes_hw[None])[0, ..., 0]).save(png, "PNG")
    document = record.model_dump_json(exclude_defaults=True).encode()
    return {"__key__": key, "json": document, "img0.png": png.getvalue()}


def prompts(num_drawings: int) -> tuple[list[str], np.ndarray]:
    """Requests to draw, evenly over digits and phrasings, and the digit that each asks for."""
    labels = np.arange(num_drawings) % len(WORDS)
    requests = [REQUESTS[i // len(WORDS) % len(REQUESTS)].format(WORDS[label]) for i, label in enumerate(labels)]
    return requests, labels


class Judge:
    """Recognises the digit in a drawing, and measures how far the distribution of drawings is from that of real digits.

    A support vector machine on the pixels of the real training digits. The distance is Fréchet's between Gaussians (as in FID,
    Heusel et al. 2017) on the 20 leading principal components of the training digits.
    """

    def __init__(self):
        train, self._test = load("train"), load("test")
        pixels = train.codes.reshape(len(train.codes), -1)
        self._machine = SVC(C=10, gamma=cast(Any, 0.001)).fit(pixels, train.labels)
        self._features = PCA(20, svd_solver="full").fit(pixels)
        self._train = pixels

    def accuracy(self, codes_Nhw: np.ndarray, labels_N: np.ndarray) -> float:
        """Share of the images that show the requested digit."""
        return float((self._machine.predict(codes_Nhw.reshape(len(codes_Nhw), -1)) == labels_N).mean())

    def accuracy_on_real(self) -> float:
        """The judge's own accuracy on the held-out real digits: the most that drawings can be expected to reach."""
        return self.accuracy(self._test.codes, self._test.labels)

    def distance(self, codes_Nhw: np.ndarray) -> float:
        """Fréchet distance to the held-out real digits."""
        return self._distance(codes_Nhw.reshape(len(codes_Nhw), -1))

    def distance_of_real(self) -> float:
        """The same distance for the real training digits: the value of perfect drawings."""
        return self._distance(self._train)

    def _distance(self, pixels: np.ndarray) -> float:
        drawn = self._features.transform(pixels)
        real = self._features.transform(self._test.codes.reshape(len(self._test.codes), -1))
        return frechet_distance(*mean_and_covariance(drawn), *mean_and_covariance(real))


class DigitsBenchmark:
    """The benchmark of digits that are read and drawn; see `megavlm.evaluation.benchmark.Benchmark`."""

    def __init__(self, samples: list[Sample], num_drawings: int, image_tokenizer: ImageTokenizer):
        self.questions = [sample for sample in samples if "answer" in sample.meta]
        self.requests, self._labels = prompts(num_drawings)

    def judge(self, images_NHWC: np.ndarray) -> dict[str, float]:
        # the judge looks at pixels, whatever the model's own codes are
        codes_Nhw, judge = TOKENIZER.encode(images_NHWC), Judge()
        return {
            "accuracy_by_judge": judge.accuracy(codes_Nhw, self._labels),
            "judge_accuracy_on_held_out_real_digits": judge.accuracy_on_real(),
            "frechet_distance": judge.distance(codes_Nhw),
            "frechet_distance_of_real_training_digits": judge.distance_of_real(),
        }
