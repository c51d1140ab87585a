"""How far images are from their references, pair by pair: PSNR, SSIM, MAE, and LPIPS where its weights are at hand.

The pairs are images of the quantized and of the full-precision model from the same seed, prompt and schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stepquant.errors import EvaluationError
from stepquant.evaluate.images import check_images

__all__ = [
    "PSNR_CAP",
    "SSIM_WINDOW",
    "Distance",
    "Interval",
    "PairedMetrics",
    "PairedResult",
    "intervals",
    "paired_columns",
]

Distance = Callable[[Tensor, Tensor], Tensor]
"""Candidates and references `[B, C, H, W]` in [0, 1] -> one number a pair, `[B]`."""

PSNR_CAP = 100.0
"""dB. Stands for the infinite PSNR of equal images; a single value of 32x32 pixels that is off by 1/255 gives 78."""

SSIM_WINDOW = 11
"""Pixels, Wang et al. 2004, section III-C. Smaller images have no place for it, and no SSIM."""

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
    ssim: at most 1, 1 for equal images; None for images smaller than its window.
    mae: mean absolute difference, of values in [0, 1].
    """

    n: int
    identical: int
    psnr: Interval
    ssim: Interval | None
    mae: Interval


class PairedMetrics:
    """Collects PSNR, SSIM and MAE of each pair; three numbers a pair are kept, no images.

    Each image's PSNR is capped at `PSNR_CAP` dB, since that of equal images is infinite and one of them would make the
    mean infinite. It is the mean of the PSNRs, not the PSNR of the mean squared error.
    """

    def __init__(self) -> None:
        self._columns: dict[str, list[Tensor]] = {}
        self._size: tuple[int, ...] | None = None

    def update(self, candidate: Tensor, reference: Tensor) -> None:
        """Add pairs, `[B, C, H, W]` each, float in [0, 1], of the size of those before.

        Raises EvaluationError: other or different shapes, values outside [0, 1] or NaN (nothing is added then).
        """
        columns = paired_columns(candidate, reference)
        if self._size not in (None, tuple(candidate.shape[1:])):
            raise EvaluationError(f"Images are {tuple(candidate.shape[1:])}, those before were {self._size} [C, H, W].")
        self._size = tuple(candidate.shape[1:])
        for name, column in columns.items():
            self._columns.setdefault(name, []).append(column)

    @property
    def n(self) -> int:
        """Number of pairs seen."""
        return sum(len(column) for column in self._columns.get("psnr", []))

    def result(self, *, seed: int = 0) -> PairedResult:
        """Means and intervals of all pairs so far.

        seed: of the bootstrap; the same pairs and seed give the same intervals.

        Raises EvaluationError: no pairs.
        """
        if not self._columns:
            raise EvaluationError("There are no pairs to measure: call update first.")
        columns = {name: torch.cat(parts) for name, parts in self._columns.items()}
        identical = int(columns.pop("identical").sum())
        found = intervals(columns, seed=seed)
        return PairedResult(self.n, identical, psnr=found["psnr"], ssim=found.get("ssim"), mae=found["mae"])


def paired_columns(candidate: Tensor, reference: Tensor, lpips: Distance | None = None) -> dict[str, Tensor]:
    """One number a pair, `[B]` float64 on the CPU: psnr, ssim, mae, lpips, and identical (1 or 0).

    No ssim for images smaller than its window, no lpips without a network for it.
    Raises EvaluationError: other or different shapes, values outside [0, 1] or NaN.
    """
    _check_pair(candidate, reference)
    ours, theirs = candidate.detach().float(), reference.detach().float()
    difference = (ours - theirs).abs().flatten(1)
    columns = {"psnr": _psnr(ours, theirs)}
    if min(ours.shape[2:]) >= SSIM_WINDOW:
        columns["ssim"] = _ssim(ours, theirs)
    columns["mae"] = difference.mean(dim=1)
    if lpips is not None:
        columns["lpips"] = lpips(ours, theirs)
    columns["identical"] = difference.amax(dim=1) == 0
    return {name: column.double().cpu() for name, column in columns.items()}


def intervals(columns: Mapping[str, Tensor], *, seed: int = 0) -> dict[str, Interval]:
    """Mean and 95 % percentile bootstrap interval (Efron 1979) of each column `[N]`; the same resamples for all.

    Adding a column does not change the intervals of the others.
    """
    rows = torch.stack(list(columns.values()), dim=1).numpy()
    found = _intervals(rows, np.random.default_rng(seed))
    return dict(zip(columns, found, strict=True))


def _check_pair(candidate: Tensor, reference: Tensor) -> None:
    check_images(candidate, what="Candidate images")
    check_images(reference, what="Reference images")
    if candidate.shape != reference.shape:
        shapes = f"{tuple(candidate.shape)} and {tuple(reference.shape)}"
        raise EvaluationError(f"Candidate and reference images have shapes {shapes}, expected equal ones.")


def _psnr(candidate: Tensor, reference: Tensor) -> Tensor:
    from torchmetrics.functional.image import peak_signal_noise_ratio

    decibel: Tensor = peak_signal_noise_ratio(candidate, reference, data_range=1.0, reduction="none", dim=(1, 2, 3))
    return decibel.clamp(max=PSNR_CAP)


def _ssim(candidate: Tensor, reference: Tensor) -> Tensor:
    from torchmetrics.functional.image import structural_similarity_index_measure

    similarity: Tensor = structural_similarity_index_measure(candidate, reference, data_range=1.0, reduction="none")
    return similarity.reshape(-1)


def _intervals(rows: NDArray[np.float64], generator: np.random.Generator) -> list[Interval]:
    """Over the rows of `[N, M]`: one interval a column."""
    n = len(rows)
    means = np.empty((_RESAMPLES, rows.shape[1]))
    for resample in means:
        # One draw at a time: an index of all resamples at once takes gigabytes at 50 000 images.
        resample[:] = rows[generator.integers(n, size=n)].mean(axis=0)
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    centre = [math.fsum(column) / n for column in rows.T]
    return [Interval(mean, float(a), float(b)) for mean, a, b in zip(centre, low, high, strict=True)]
