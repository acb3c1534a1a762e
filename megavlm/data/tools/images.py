"""The images of shards, for what is trained on images alone: image tokenizers and their plug-ins.

Tested by `tests/evaluation/test_evaluate_shapes.py`.
"""

import logging
from collections.abc import Iterator
from itertools import islice

import numpy as np

from megavlm.data.read.source import SourceConfig
from megavlm.data.tools.lint import Report, read_samples
from megavlm.errors import DataError
from megavlm.image_tokenizers.protocol import ImageTokenizer

log = logging.getLogger(__name__)

IMAGES_AT_ONCE = 256


def read_images(urls: list[str], source: SourceConfig) -> Iterator[np.ndarray]:
    """The raw images of shards, uint8 RGB ``[H, W, 3]``; members that are codes are passed over.

    Raises:
        DataError: At the end, if a sample was broken.
    """
    return (image for image in _members(urls, source) if image.dtype == np.uint8)


def read_codes(urls: list[str], source: SourceConfig, tokenizer: ImageTokenizer, max_images: int) -> np.ndarray:
    """The dense codes of the images of shards ``[N, h, w]``, raw images being tokenized.

    Raises:
        DataError: If a sample is broken, or the codes are not the tokenizer's.
    """
    found: list[np.ndarray] = []
    images = islice(_members(urls, source), max_images)
    while batch := list(islice(images, IMAGES_AT_ONCE)):
        raw = [image for image in batch if image.dtype == np.uint8]
        encoded = iter(tokenizer.encode(raw) if raw else ())
        found += [next(encoded) if image.dtype == np.uint8 else image for image in batch]
        log.info("%d images read", len(found))
    if any(codes.shape != (tokenizer.height, tokenizer.width) or codes.max() >= tokenizer.codebook_size for codes in found):
        raise DataError(
            f"the shards hold other codes than the tokenizer's {tokenizer.codebook_size} on {tokenizer.height} x {tokenizer.width}",
            "give the tokenizer that made them",
            shard=urls[0],
        )
    return np.stack(found) if found else np.zeros((0, tokenizer.height, tokenizer.width), np.int64)


def _members(urls: list[str], source: SourceConfig) -> Iterator[np.ndarray]:
    report = Report()
    for sample in read_samples(urls, source, report):
        yield from sample.images.values()
    if report.problems:
        raise DataError(f"{len(report.problems)} problems, the first: {report.problems[0]}", "run `megavlm data lint`", shard=urls[0])
