"""Oracles: formulas in numpy, and torchmetrics on one image at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.functional import mean_absolute_error
from torchmetrics.functional.image import structural_similarity_index_measure

from stepquant.errors import EvaluationError
from stepquant.evaluate.paired import PSNR_CAP, PairedMetrics, PairedResult, intervals, paired_columns


def pairs(n: int, *, channels: int = 3, size: int = 16) -> tuple[Tensor, Tensor]:
    """Candidates and references; the noise grows from image to image."""
    generator = torch.Generator().manual_seed(n)
    reference = torch.rand(n, channels, size, size, generator=generator)
    noise = torch.randn(reference.shape, generator=generator) * torch.linspace(0.02, 0.2, n).view(-1, 1, 1, 1)
    return (reference + noise).clamp(0, 1), reference


def measure(candidate: Tensor, reference: Tensor, *, seed: int = 0) -> PairedResult:
    metrics = PairedMetrics()
    metrics.update(candidate, reference)
    return metrics.result(seed=seed)


@pytest.mark.parametrize("channels", [1, 3])
def test_means_over_images(channels: int) -> None:
    candidate, reference = pairs(6, channels=channels)
    found = measure(candidate, reference)
    squared = (candidate - reference).double().square().flatten(1).mean(1).numpy()
    ssim = [
        float(structural_similarity_index_measure(candidate[i : i + 1], reference[i : i + 1], data_range=1.0))
        for i in range(6)
    ]
    assert found.psnr.mean == pytest.approx(np.mean(-10 * np.log10(squared)), rel=1e-5)
    assert found.ssim is not None
    assert found.ssim.mean == pytest.approx(np.mean(ssim), rel=1e-5)
    assert found.mae.mean == pytest.approx(float(mean_absolute_error(candidate, reference)), rel=1e-5)
    assert (found.n, found.identical) == (6, 0)


def test_batches_do_not_matter() -> None:
    candidate, reference = pairs(7)
    metrics = PairedMetrics()
    for ours, theirs in zip(candidate.split(3), reference.split(3), strict=True):  # the last batch has one image
        metrics.update(ours, theirs)
    assert metrics.n == 7
    together = measure(candidate, reference)
    for name in ("psnr", "ssim", "mae"):
        streamed, whole = getattr(metrics.result(), name), getattr(together, name)
        assert (streamed.mean, streamed.low, streamed.high) == pytest.approx((whole.mean, whole.low, whole.high))


def test_equal_images_are_capped_and_counted() -> None:
    candidate, reference = pairs(4)
    candidate[1] = reference[1]
    found = measure(candidate, reference)
    others = measure(candidate[[0, 2, 3]], reference[[0, 2, 3]])
    assert found.identical == 1
    assert found.psnr.mean == pytest.approx((3 * others.psnr.mean + PSNR_CAP) / 4)
    same = measure(reference, reference)
    assert (same.psnr.mean, same.psnr.low, same.psnr.high) == (100.0, 100.0, 100.0)
    assert same.ssim is not None
    assert same.ssim.mean == pytest.approx(1.0, abs=1e-5)
    assert (same.mae.mean, same.identical) == (0.0, 4)


def test_one_level_in_one_pixel_is_below_the_cap() -> None:
    reference = torch.zeros(1, 1, 32, 32)
    candidate = reference.clone()
    candidate[0, 0, 3, 4] = 1 / 255
    found = measure(candidate, reference)
    assert found.psnr.mean == pytest.approx(20 * math.log10(255) + 10 * math.log10(1024), rel=1e-5)  # 78.2 dB
    assert found.identical == 0


def test_interval_is_that_of_the_mean() -> None:
    # Each image has one constant error, so its MAE is that error; for means of 400 draws the normal interval is close.
    n = 400
    errors = torch.rand(n, generator=torch.Generator().manual_seed(1))
    found = measure(errors.view(-1, 1, 1, 1).expand(n, 1, 11, 11), torch.zeros(n, 1, 11, 11))
    half = 1.96 * float(errors.std()) / n**0.5
    assert found.mae.mean == pytest.approx(float(errors.mean()), rel=1e-5)
    assert found.mae.low == pytest.approx(float(errors.mean()) - half, abs=0.15 * half)
    assert found.mae.high == pytest.approx(float(errors.mean()) + half, abs=0.15 * half)


def test_seed_decides_the_interval_and_nothing_else() -> None:
    candidate, reference = pairs(9)
    first, again = measure(candidate, reference, seed=1), measure(candidate, reference, seed=1)
    other = measure(candidate, reference, seed=2)
    assert first == again
    assert first.psnr.mean == other.psnr.mean
    assert first.psnr.low != other.psnr.low


def test_one_pair_has_no_spread() -> None:
    found = measure(*(images[-1:] for images in pairs(3)))
    assert found.psnr.mean == found.psnr.low == found.psnr.high


def test_images_below_the_window_have_no_ssim() -> None:
    candidate, reference = pairs(4)
    small = measure(candidate[:, :, :, :10], reference[:, :, :, :10])
    assert small.ssim is None
    expected = (candidate[:, :, :, :10] - reference[:, :, :, :10]).abs().mean()
    assert small.mae.mean == pytest.approx(float(expected), rel=1e-5)


def test_a_column_more_changes_no_interval() -> None:
    columns = {"one": torch.rand(30, dtype=torch.float64), "two": torch.rand(30, dtype=torch.float64)}
    both = intervals(columns)
    alone = intervals({"one": columns["one"]})["one"]
    # Up to the order in which numpy adds up.
    assert (both["one"].low, both["one"].high) == pytest.approx((alone.low, alone.high), rel=1e-12)
    assert both["one"].low != pytest.approx(both["two"].low, rel=1e-3)


def test_a_distance_of_ones_own() -> None:
    candidate, reference = pairs(4)
    columns = paired_columns(candidate, reference, lambda a, b: (a - b).flatten(1).abs().amax(dim=1))
    expected = [float((a - b).abs().max()) for a, b in zip(candidate, reference, strict=True)]
    assert columns["lpips"].tolist() == pytest.approx(expected)
    assert list(paired_columns(candidate, reference)) == ["psnr", "ssim", "mae", "identical"]


def test_other_sizes_than_before_are_refused() -> None:
    metrics = PairedMetrics()
    metrics.update(*pairs(2))
    with pytest.raises(EvaluationError, match=r"\(3, 12, 12\), those before were \(3, 16, 16\)"):
        metrics.update(*pairs(2, size=12))
    assert metrics.n == 2


def test_half_precision_is_measured_in_single() -> None:
    candidate, reference = (images.half() for images in pairs(3))
    found, expected = measure(candidate, reference), measure(candidate.float(), reference.float())
    assert found == expected


@pytest.mark.parametrize(
    ("candidate", "reference", "message"),
    [
        (torch.zeros(2, 3, 16, 16), torch.zeros(2, 1, 16, 16), r"\(2, 3, 16, 16\) and \(2, 1, 16, 16\)"),
        (torch.zeros(3, 16, 16), torch.zeros(3, 16, 16), r"Candidate images have shape \(3, 16, 16\)"),
        (torch.zeros(0, 3, 16, 16), torch.zeros(0, 3, 16, 16), "at least one pixel"),
        (torch.zeros(1, 1, 16, 16), torch.full((1, 1, 16, 16), 1.5), "Reference images have values from 1.5"),
        (torch.full((1, 1, 16, 16), torch.nan), torch.zeros(1, 1, 16, 16), "Candidate images hold NaN"),
        (torch.zeros(1, 1, 16, 16).byte(), torch.zeros(1, 1, 16, 16), "divide 8-bit values by 255"),
    ],
)
def test_what_is_refused(candidate: Tensor, reference: Tensor, message: str) -> None:
    metrics = PairedMetrics()
    with pytest.raises(EvaluationError, match=message):
        metrics.update(candidate, reference)
    with pytest.raises(EvaluationError, match="no pairs"):
        metrics.result()
