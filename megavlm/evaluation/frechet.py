"""The Fréchet distance between two sets of features, each taken for a Gaussian (as in FID, Heusel et al. 2017).

Letters: N things that have features, D features.

Tested by `tests/evaluation/sets/test_drawing_scores.py`.
"""

import numpy as np


def frechet_distance(first_mean_D: np.ndarray, first_cov_DD: np.ndarray, second_mean_D: np.ndarray, second_cov_DD: np.ndarray) -> float:
    """|m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½), squared feature units.

    The eigenvalues of C1 C2 are those of the symmetric R C2 R with R = C1^½, which rounding cannot make complex.

    Args:
        first_mean_D: Mean of the first set.
        first_cov_DD: Its covariance.
        second_mean_D: Mean of the second.
        second_cov_DD: Its covariance.
    """
    values_D, vectors_DD = np.linalg.eigh(first_cov_DD)
    root_DD = (vectors_DD * np.sqrt(values_D.clip(min=0))) @ vectors_DD.T
    root_trace = np.sqrt(np.linalg.eigvalsh(root_DD @ second_cov_DD @ root_DD).clip(min=0)).sum()
    mean_term = ((first_mean_D - second_mean_D) ** 2).sum()
    return float(mean_term + np.trace(first_cov_DD) + np.trace(second_cov_DD) - 2 * root_trace)


def mean_and_covariance(features_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean ``[D]`` and unbiased covariance ``[D, D]``, in float64."""
    features_ND = np.asarray(features_ND, np.float64)
    return features_ND.mean(0), np.cov(features_ND, rowvar=False).reshape(features_ND.shape[1], features_ND.shape[1])


class Moments:
    """Mean and covariance of features that arrive in batches.

    Args:
        origin_D: A point near the mean, such as the mean of the real features. Sums are taken around it, against cancellation.
    """

    def __init__(self, origin_D: np.ndarray):
        self.origin_D = np.asarray(origin_D, np.float64)
        self.count = 0
        self._sum_D = np.zeros_like(self.origin_D)
        self._products_DD = np.zeros((len(self.origin_D), len(self.origin_D)))

    def add(self, features_ND: np.ndarray) -> None:
        centred_ND = np.asarray(features_ND, np.float64) - self.origin_D
        self.count += len(centred_ND)
        self._sum_D += centred_ND.sum(0)
        self._products_DD += centred_ND.T @ centred_ND

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean ``[D]`` and unbiased covariance ``[D, D]`` of at least two features."""
        shift_D = self._sum_D / self.count
        return self.origin_D + shift_D, (self._products_DD - self.count * np.outer(shift_D, shift_D)) / (self.count - 1)
