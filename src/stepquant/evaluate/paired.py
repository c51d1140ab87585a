"""How far images are from their references, pair by pair: PSNR, SSIM and MAE.

The pairs are images of the quantized and of the full-precision model from the same seed, prompt and schedule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stepquant.errors import EvaluationError
from stepquant.evaluate.images import check_images

__all__ = ["PSNR_CAP", "Interval", "PairedMetrics", "PairedResult"]

PSNR_CAP = 100.0
"""dB. Stands for the infinite PSNR of equal images; a single value of 32x32 pixels that is off by 1/255 gives 78."""

_SSIM_WINDOW = 11
"""Pixels, Wang et al. 2004, section III-C. Smaller images have no place for it."""

_RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """Mean over images, and the ends of its 95 % bootstrap interval. With one image, all three are equal."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class PairedResult:
    """Figures of `n` pairs.

    identical: how many pairs are equal in every pixel; these count as `PSNR_CAP` dB.
    psnr: dB, of values in [0, 1], each image at most `PSNR_CAP`.
    ssim: at most 1, 1 for equal images.
    mae: mean absolute difference, of values in [0, 1].
    """

    n: int
    identical: int
    psnr: Interval
    ssim: Interval
    mae: Interval


class PairedMetrics:
    """Collects PSNR, SSIM and MAE of each pair; three numbers a pair are kept, no images.

    Each image's PSNR is capped at `PSNR_CAP` dB, since that of equal images is infinite and one of them would make the
    mean infinite. It is the mean of the PSNRs, not the PSNR of the mean squared error.
    """

    def __init__(self) -> None:
        self._rows: list[NDArray[np.float64]] = []  # each [B, 3]: psnr, ssim, mae
        self._identical = 0

    def update(self, candidate: Tensor, reference: Tensor) -> None:
        """Add pairs, `[B, C, H, W]` each, float in [0, 1], H and W at least 11.

        Raises EvaluationError: other or different shapes, values outside [0, 1] or NaN (nothing is added then).
        """
        _check_pair(candidate, reference)
        ours, theirs = candidate.detach().float(), reference.detach().float()
        difference = (ours - theirs).abs().flatten(1)
        columns = [_psnr(ours, theirs), _ssim(ours, theirs), difference.mean(dim=1)]
        self._rows.append(torch.stack(columns, dim=1).double().cpu().numpy())
        self._identical += int((difference.amax(dim=1) == 0).sum())

    @property
    def n(self) -> int:
        """Number of pairs seen."""
        return sum(len(rows) for rows in self._rows)

    def result(self, *, seed: int = 0) -> PairedResult:
        """Means and intervals of all pairs so far.

        seed: of the bootstrap; the same pairs and seed give the same intervals.

        Raises EvaluationError: no pairs.
        """
        if not self._rows:
            raise EvaluationError("There are no pairs to measure: call update first.")
        rows = np.concatenate(self._rows)
        psnr, ssim, mae = _intervals(rows, np.random.default_rng(seed))
        return PairedResult(n=len(rows), identical=self._identical, psnr=psnr, ssim=ssim, mae=mae)


def _check_pair(candidate: Tensor, reference: Tensor) -> None:
    check_images(candidate, what="Candidate images")
    check_images(reference, what="Reference images")
    if candidate.shape != reference.shape:
        shapes = f"{tuple(candidate.shape)} and {tuple(reference.shape)}"
        raise EvaluationError(f"Candidate and reference images have shapes {shapes}, expected equal ones.")
    if min(candidate.shape[2:]) < _SSIM_WINDOW:
        size = " x ".join(str(side) for side in candidate.shape[2:])
        raise EvaluationError(
            f"Images are {size} pixels, but the window of SSIM needs at least {_SSIM_WINDOW} x {_SSIM_WINDOW}."
        )


def _psnr(candidate: Tensor, reference: Tensor) -> Tensor:
    from torchmetrics.functional.image import peak_signal_noise_ratio

    decibel: Tensor = peak_signal_noise_ratio(candidate, reference, data_range=1.0, reduction="none", dim=(1, 2, 3))
    return decibel.clamp(max=PSNR_CAP)


def _ssim(candidate: Tensor, reference: Tensor) -> Tensor:
    from torchmetrics.functional.image import structural_similarity_index_measure

    similarity: Tensor = structural_similarity_index_measure(candidate, reference, data_range=1.0, reduction="none")
    return similarity


def _intervals(rows: NDArray[np.float64], generator: np.random.Generator) -> list[Interval]:
    """Percentile bootstrap (Efron 1979) over the rows of `[N, M]`: one interval a column."""
    n = len(rows)
    means = np.empty((_RESAMPLES, rows.shape[1]))
    for resample in means:
        # One draw at a time: an index of all resamples at once takes gigabytes at 50 000 images.
        resample[:] = rows[generator.integers(n, size=n)].mean(axis=0)
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    centre = [math.fsum(column) / n for column in rows.T]
    return [Interval(mean, float(a), float(b)) for mean, a, b in zip(centre, low, high, strict=True)]
