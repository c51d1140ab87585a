"""Fréchet distance between two sets of features, each seen as a Gaussian.

    d^2 = |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2))

Dowson and Landau 1982, equation 4; Heusel et al. 2017 for images ("FID" with Inception features). The number that is
reported everywhere, and returned here, is the square.

How to read it: the distance is biased upwards when there are few images, by an amount that falls as 1/n and depends on
the features (Bińkowski et al. 2018, section 4.1; Chong and Forsyth 2020). Compare only figures of the same number of
images, and compare them with what that number of *real* images gives.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from stepquant.errors import EvaluationError

__all__ = ["FeatureStatistics", "frechet_distance"]


class FeatureStatistics:
    """Mean and covariance of features that arrive in batches: float64, on the CPU, no features kept.

    Batches are combined by the pairwise update of Chan, Golub and LeVeque 1979, which does not cancel as the sum of
    squares does when the mean is large. The order of batches changes the result only by rounding.
    """

    def __init__(self, dim: int) -> None:
        """dim: D, the number of features of one image."""
        if dim < 1:
            raise EvaluationError(f"Feature statistics need at least one feature, got dim = {dim}.")
        self._n = 0
        self._mean = torch.zeros(dim, dtype=torch.float64)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64)  # sum of (x - mean)(x - mean)^T

    @classmethod
    def from_moments(cls, mean: Tensor, cov: Tensor, n: int) -> Self:
        """From mean `[D]`, unbiased covariance `[D, D]` and the number of images that they come from.

        Raises EvaluationError: other shapes, fewer than two images, values that are not finite, not symmetric.
        """
        if mean.ndim != 1 or tuple(cov.shape) != (mean.numel(), mean.numel()):
            shapes = f"{tuple(mean.shape)} and {tuple(cov.shape)}"
            raise EvaluationError(f"Mean and covariance have shapes {shapes}, expected [D] and [D, D].")
        if n < 2:
            raise EvaluationError(f"A covariance needs at least 2 images, got n = {n}.")
        statistics = cls(mean.numel())
        statistics._mean = mean.detach().to("cpu", torch.float64, copy=True)
        statistics._scatter = cov.detach().to("cpu", torch.float64) * (n - 1)
        statistics._n = n
        if not (statistics._mean.isfinite().all() and statistics._scatter.isfinite().all()):
            raise EvaluationError("Mean or covariance hold values that are not finite.")
        if not torch.allclose(statistics._scatter, statistics._scatter.T, rtol=1e-6):
            raise EvaluationError("The covariance is not symmetric.")
        return statistics

    def moments(self) -> tuple[Tensor, Tensor, int]:
        """`(mean, cov, n)`, the arguments of `from_moments`."""
        return self.mean, self.cov, self.n

    def update(self, features: Tensor) -> None:
        """Add a batch of features `[B, D]`.

        Raises EvaluationError: another shape, or values that are not finite (nothing is added then).
        """
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise EvaluationError(f"Features have shape {tuple(features.shape)}, expected [B, {self.dim}].")
        if len(features) == 0:
            return
        batch = features.detach().to("cpu", torch.float64)
        if not batch.isfinite().all():
            raise EvaluationError("Features hold values that are not finite: look at the images that they come from.")
        mean = batch.mean(dim=0)
        centred = batch - mean
        self._add(mean, centred.T @ centred, len(batch))

    def merge(self, other: FeatureStatistics) -> None:
        """Add what another one has seen (another process, say). `other` is left as it was.

        Raises EvaluationError: another number of features.
        """
        _check_same_dim(self, other)
        if other.n:
            self._add(other._mean, other._scatter, other.n)

    def _add(self, mean: Tensor, scatter: Tensor, n: int) -> None:
        total = self._n + n
        shift = mean - self._mean
        self._scatter = self._scatter + scatter + torch.outer(shift, shift) * (self._n * n / total)
        self._mean = self._mean + shift * (n / total)
        self._n = total

    @property
    def dim(self) -> int:
        """D, the number of features."""
        return self._mean.numel()

    @property
    def n(self) -> int:
        """Number of images seen."""
        return self._n

    @property
    def mean(self) -> Tensor:
        """`[D]` float64. Raises EvaluationError before the first image."""
        if self._n < 1:
            raise EvaluationError("There is no mean before the first image.")
        return self._mean.clone()

    @property
    def cov(self) -> Tensor:
        """Unbiased covariance `[D, D]` float64. Raises EvaluationError before the second image."""
        if self._n < 2:
            raise EvaluationError(f"A covariance needs at least 2 images, got n = {self._n}.")
        return self._scatter / (self._n - 1)

    @property
    def rank_deficient(self) -> bool:
        """Whether n <= D: the covariance then has directions that no image has seen, and the distance means little."""
        return self._n <= self.dim


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Squared Fréchet distance between the Gaussians of `a` and `b`; 0 for equal ones, never negative.

    tr (A B)^(1/2) is the sum of the square roots of the eigenvalues of the symmetric A^(1/2) B A^(1/2), which has the
    eigenvalues of A B. So nothing becomes complex and singular covariances need no offset on the diagonal, unlike with
    a general matrix square root of A B (`scipy.linalg.sqrtm`).

    Raises EvaluationError: different numbers of features, or fewer than two images in either.
    """
    _check_same_dim(a, b)
    cov_a, cov_b = a.cov, b.cov
    root = _symmetric_root(cov_a)
    product = root @ cov_b @ root
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(0.0, float(distance))


def _symmetric_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root


def _check_same_dim(a: FeatureStatistics, b: FeatureStatistics) -> None:
    if a.dim != b.dim:
        raise EvaluationError(
            f"Statistics of {a.dim} and of {b.dim} features cannot be compared: use the same features for both."
        )
