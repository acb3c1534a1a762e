"""Captions against those of people: BLEU-4 and CIDEr-D, both over the whole set.

    {"image": "1.jpg", "captions": ["a dog runs", "a brown dog in the grass"]}

Words are runs of letters and digits, with an inner apostrophe, in lower case. The published scorers split words with the Penn Treebank
tokenizer, which treats "isn't" and the like otherwise: figures are close to theirs, not equal.

Tested by `tests/evaluation/sets/test_reading_scores.py`.
"""

import math
import re
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from megavlm.evaluation.sets.entries import BadEntries, Item, read_entries

SIGMA = 6.0
"""Width of CIDEr-D's Gaussian in the difference of lengths, in words."""
MAX_N = 4


class Captioned(BaseModel):
    """An image with captions by people."""

    image: str
    captions: list[str] = Field(min_length=1)
    group: str = ""


def read_captions(path: Path, prompt: str, bad: BadEntries) -> list[Item]:
    """The images of a set; ``prompt`` is asked about each."""
    return [Item(where, prompt, entry.captions, entry.image, entry.group) for where, entry in read_entries(path, Captioned, bad)]


def words(caption: str) -> list[str]:
    """The words of a caption."""
    return re.findall(r"[^\W_]+(?:'[^\W_]+)?", caption.lower())


def _grams(tokens: list[str], n: int) -> Counter:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def bleu(candidates: list[list[str]], references: list[list[list[str]]]) -> float:
    """BLEU-4 of a set, from 0 to 1 (Papineni et al. 2002), without smoothing.

    exp(min(0, 1 - r/c)) · (p1 p2 p3 p4)^¼. p_n is a share of the n-grams of all candidates: those that occur in a reference, each
    counted at most as often as in the reference that has it most. c: words of all candidates. r: words of the references closest in
    length, one per candidate; the shorter one if two are equally close.

    Args:
        candidates: Words of one caption per image.
        references: Words of each image's references.
    """
    log_precision = 0.0
    for n in range(1, MAX_N + 1):
        matched = total = 0
        for candidate, refs in zip(candidates, references):
            grams, most = _grams(candidate, n), Counter()
            for ref in refs:
                most |= _grams(ref, n)
            matched, total = matched + (grams & most).total(), total + grams.total()
        if matched == 0:
            return 0.0
        log_precision += math.log(matched / total) / MAX_N
    num_words = sum(map(len, candidates))
    closest = sum(min((abs(len(r) - len(c)), len(r)) for r in refs)[1] for c, refs in zip(candidates, references))
    return math.exp(min(0.0, 1 - closest / num_words) + log_precision)


def cider_d(candidates: list[list[str]], references: list[list[list[str]]]) -> list[float]:
    """CIDEr-D of each candidate (Vedantam et al. 2015), from 0 to 10; the set's score is the mean.

    For n = 1 to 4, g is the vector of an n-gram's count times log(I / number of images that have it in a reference), I images in the set::

        10/m · Σ_j exp(-(l_c - l_j)² / 2σ²) · min(g_c, g_j) · g_j / (|g_c| |g_j|)       σ = 6, l in words, m references

    averaged over n, without stemming. As in the published scorer, counts are not divided by the caption's length: in the paper's unclipped
    CIDEr the length cancels, but under the minimum it would not. With one image every weight is log 1 = 0, and so is the score.
    """
    scores = [0.0] * len(candidates)
    for n in range(1, MAX_N + 1):
        images_with = Counter(gram for refs in references for gram in set().union(*(_grams(r, n) for r in refs)))
        weigh = partial(_weighted, n=n, images_with=images_with, num_images=len(references))
        for i, (candidate, refs) in enumerate(zip(candidates, references)):
            g_c = weigh(candidate)
            for ref in refs:
                g_r = weigh(ref)
                norms = math.hypot(*g_c.values()) * math.hypot(*g_r.values())
                dot = sum(min(weight, g_r[gram]) * g_r[gram] for gram, weight in g_c.items() if gram in g_r)
                penalty = math.exp(-((len(candidate) - len(ref)) ** 2) / (2 * SIGMA**2))
                scores[i] += 10 / len(refs) * penalty * dot / norms / MAX_N if norms else 0.0
    return scores


def _weighted(tokens: list[str], n: int, images_with: Counter, num_images: int) -> dict[tuple[str, ...], float]:
    """The n-grams of a caption, each with its count times the logarithm of how rare it is."""
    return {gram: count * math.log(num_images / max(1, images_with[gram])) for gram, count in _grams(tokens, n).items()}


class CaptionScore:
    """BLEU-4 and CIDEr-D; they need the whole set, so single captions get no verdict."""

    def __init__(self):
        self._candidates: list[list[str]] = []
        self._references: list[list[list[str]]] = []

    def add(self, items: list[Item], answers: list[str]) -> list[dict[str, Any]]:
        self._candidates += [words(answer) for answer in answers]
        self._references += [[words(caption) for caption in item.truth] for item in items]
        return [{"caption": answer} for answer in answers]

    def result(self) -> dict[str, Any]:
        scores = cider_d(self._candidates, self._references)
        return {"cider_d": sum(scores) / len(scores), "bleu_4": bleu(self._candidates, self._references)}
