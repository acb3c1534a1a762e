"""Scores of drawings with a network of the user's: FID against features of real images, CLIP score against the prompts.

megavlm ships no network. A feature function takes images, uint8 RGB ``[N, H, W, 3]``, or a list of N texts, and returns ``[N, D]``. Figures
are comparable with published ones if the network is the same with the same preprocessing (for FID the pool features of Inception v3).

Letters: N images or texts, H and W their height and width, C colours, D features.

Tested by `tests/evaluation/sets/test_drawing_scores.py`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import AliasChoices, BaseModel, Field

from megavlm.errors import MegavlmError
from megavlm.evaluation.frechet import Moments, frechet_distance, mean_and_covariance
from megavlm.evaluation.sets.entries import BadEntries, Item, read_entries

CLIP_WEIGHT = 2.5
"""w of Hessel et al. 2021, which spreads the cosines of CLIP ViT-B/32 over 0 to 1."""


class Prompt(BaseModel):
    """One prompt to draw."""

    prompt: str = Field(min_length=1, validation_alias=AliasChoices("prompt", "caption", "text"))


def read_prompts(path: Path, bad: BadEntries) -> list[Item]:
    """The prompts of a set: one per line of a ``.txt`` file, or entries with ``prompt``."""
    if path.suffix == ".txt" and path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines()
        return [Item(f"line {number}", line.strip(), None) for number, line in enumerate(lines, 1) if line.strip()]
    return [Item(where, entry.prompt, None) for where, entry in read_entries(path, Prompt, bad)]


def real_moments(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of real features: an npy ``[N, D]``, or an npz with ``features``, or with ``mu`` and ``sigma``.

    Raises:
        MegavlmError: If it holds something else.
    """
    try:
        stored = np.load(path, allow_pickle=False)
        if isinstance(stored, np.ndarray):
            moments = mean_and_covariance(stored)
        elif "features" in stored:
            moments = mean_and_covariance(stored["features"])
        else:
            moments = stored["mu"].astype(np.float64), stored["sigma"].astype(np.float64)
    except (OSError, ValueError, KeyError, EOFError, IndexError) as error:
        raise MegavlmError(
            f"{path} holds no real features: {error}\n  do:    give an npy [N, D], or an npz with features, or with mu and sigma"
        ) from error
    if not np.isfinite(moments[1]).all():
        raise MegavlmError(f"{path} has no finite covariance\n  do:    give features of two images or more, without NaN")
    return moments


def call_features(function: Callable, inputs, num: int, option: str) -> np.ndarray:
    """Call a feature function and check its result: float64 ``[num, D]``."""
    features = np.asarray(function(inputs), np.float64)
    if features.ndim != 2 or len(features) != num or not np.isfinite(features).all():
        raise MegavlmError(
            f"{option} gave {features.shape} for {num} inputs, or numbers that are not finite\n"
            "  do:    give one row of finite numbers for each"
        )
    return features


class FidScore:
    """Fréchet distance between drawings and real images (FID, Heusel et al. 2017).

    Args:
        features: Images to features.
        real: Mean and covariance of real features.
    """

    def __init__(self, features: Callable[[np.ndarray], np.ndarray], real: tuple[np.ndarray, np.ndarray]):
        self.features = features
        self.real = real
        self._drawn = Moments(real[0])

    def add(self, items: list[Item], images_NHWC: np.ndarray) -> list[dict[str, Any]]:
        features = call_features(self.features, images_NHWC, len(items), "--features")
        if features.shape[1] != len(self.real[0]):
            raise MegavlmError(
                f"--features gives {features.shape[1]} numbers per image, but the real features have {len(self.real[0])}\n"
                "  do:    use the network that the real features come from"
            )
        self._drawn.add(features)
        return [{} for _ in items]

    def result(self) -> dict[str, Any]:
        """The distance; None for a single drawing. Publish none of fewer than ``feature_width`` drawings: their covariance is singular."""
        fid = frechet_distance(*self._drawn.result(), *self.real) if self._drawn.count > 1 else None
        return {"fid": fid, "feature_width": len(self.real[0])}


class ClipScore:
    """Likeness of drawings and prompts (CLIP-S, Hessel et al. 2021): 2.5 · max(cos, 0), averaged.

    Args:
        image_features: Images to features.
        text_features: Texts to features of the same width.
    """

    def __init__(self, image_features: Callable[[np.ndarray], np.ndarray], text_features: Callable[[list[str]], np.ndarray]):
        self.image_features = image_features
        self.text_features = text_features
        self._cosines: list[float] = []

    def add(self, items: list[Item], images_NHWC: np.ndarray) -> list[dict[str, Any]]:
        image_ND = call_features(self.image_features, images_NHWC, len(items), "--image_features")
        text_ND = call_features(self.text_features, [item.prompt for item in items], len(items), "--text_features")
        if image_ND.shape != text_ND.shape:
            raise MegavlmError(
                f"features of images are {image_ND.shape[1]} wide, of texts {text_ND.shape[1]}\n  do:    give both from one network"
            )
        norms_N = np.linalg.norm(image_ND, axis=1) * np.linalg.norm(text_ND, axis=1)
        cosines_N = (image_ND * text_ND).sum(1) / np.maximum(norms_N, 1e-12)
        self._cosines += cosines_N.tolist()
        return [{"cosine": cosine, "clip_score": CLIP_WEIGHT * max(cosine, 0.0)} for cosine in cosines_N.tolist()]

    def result(self) -> dict[str, Any]:
        """``cosine_x100`` is what many papers call CLIP score."""
        cosines = np.array(self._cosines)
        return {"clip_score": float(CLIP_WEIGHT * cosines.clip(min=0).mean()), "cosine_x100": float(100 * cosines.mean())}
