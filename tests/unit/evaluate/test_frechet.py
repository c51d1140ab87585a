"""Oracles: closed forms for Gaussians, numpy's mean and covariance, scipy's square root, torchmetrics' FID."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from stepquant.errors import EvaluationError
from stepquant.evaluate.frechet import FeatureStatistics, frechet_distance


def draw(n: int, dim: int, seed: int) -> Tensor:
    """Correlated features with a mean, float64 `[n, dim]`."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    return torch.randn(n, dim, generator=generator, dtype=torch.float64) @ mixing + seed


def statistics(features: Tensor) -> FeatureStatistics:
    result = FeatureStatistics(features.shape[1])
    result.update(features)
    return result


def gaussian(mean: list[float], cov: Tensor) -> FeatureStatistics:
    return FeatureStatistics.from_moments(torch.tensor(mean), cov, 1000)


def test_moments_equal_numpys_and_do_not_depend_on_the_batches() -> None:
    features = draw(101, 5, seed=3)
    batched = FeatureStatistics(5)
    for batch in features.split(7):
        batched.update(batch)
    batched.update(features[:0])
    for found in (batched, statistics(features)):
        assert found.n == 101
        np.testing.assert_allclose(found.mean, features.mean(0), rtol=1e-12)
        np.testing.assert_allclose(found.cov, np.cov(features.numpy(), rowvar=False), rtol=1e-12, atol=1e-12)


def test_a_large_mean_costs_no_digits() -> None:
    small = draw(500, 3, seed=1)
    far = statistics(small + 1e8)
    # Sums of squares around 1e16 have no digits left for a variance of 1; 1e8 + x itself is stored to 1e-8.
    torch.testing.assert_close(far.cov, statistics(small).cov, rtol=1e-6, atol=1e-6)


def test_merge_equals_one_pass_and_leaves_the_other_alone() -> None:
    features = draw(60, 4, seed=2)
    left, right = statistics(features[:13]), statistics(features[13:])
    before = right.moments()
    left.merge(right)
    left.merge(FeatureStatistics(4))
    torch.testing.assert_close(left.cov, statistics(features).cov)
    torch.testing.assert_close(left.mean, statistics(features).mean)
    assert left.n == 60
    torch.testing.assert_close(right.moments()[:2], before[:2], rtol=0, atol=0)


def test_merging_into_an_empty_one_copies() -> None:
    right = statistics(draw(20, 3, seed=1))
    left = FeatureStatistics(3)
    left.merge(right)
    left.update(draw(20, 3, seed=9))
    assert right.n == 20
    torch.testing.assert_close(right.mean, draw(20, 3, seed=1).mean(0))


def test_moments_there_and_back() -> None:
    first = statistics(draw(30, 4, seed=5))
    again = FeatureStatistics.from_moments(*first.moments())
    torch.testing.assert_close(again.moments()[:2], first.moments()[:2])
    assert again.n == first.n
    again.update(draw(3, 4, seed=6))
    assert (again.n, first.n) == (33, 30)


def test_returned_moments_are_not_the_state() -> None:
    found = statistics(draw(30, 4, seed=5))
    mean, cov, _ = found.moments()
    kept = mean.clone(), cov.clone()
    mean.zero_()
    cov.zero_()
    torch.testing.assert_close(found.moments()[:2], kept)


def test_distance_of_commuting_gaussians() -> None:
    # |mu|^2 + sum (sqrt(a) - sqrt(b))^2 = 9 + 16 + (1 - 2)^2 + (3 - 5)^2
    a = gaussian([0.0, 0.0], torch.diag(torch.tensor([1.0, 9.0])))
    b = gaussian([3.0, 4.0], torch.diag(torch.tensor([4.0, 25.0])))
    assert frechet_distance(a, b) == pytest.approx(30.0, rel=1e-12)


def test_distance_of_two_dimensional_gaussians_that_do_not_commute() -> None:
    # In two dimensions tr (AB)^(1/2) = sqrt(tr AB + 2 sqrt(det A det B)). Here tr AB = 8 + 1 + 1 + 2 and both
    # determinants are 3.
    a = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    b = torch.tensor([[4.0, 1.0], [1.0, 1.0]])
    expected = 4 + 5 - 2 * (12 + 2 * 3) ** 0.5
    assert frechet_distance(gaussian([1.0, 1.0], a), gaussian([1.0, 1.0], b)) == pytest.approx(expected, rel=1e-12)


def test_distance_of_rank_one_gaussians() -> None:
    # On lines at an angle t, tr (AB)^(1/2) = |cos t| |a| |b|: orthogonal lines share nothing.
    a = gaussian([0.0, 0.0], torch.diag(torch.tensor([4.0, 0.0])))
    b = gaussian([0.0, 0.0], torch.diag(torch.tensor([0.0, 9.0])))
    assert frechet_distance(a, b) == pytest.approx(13.0, rel=1e-7)


def test_distance_is_symmetric_and_zero_only_for_equal_ones() -> None:
    a, b = statistics(draw(200, 6, seed=1)), statistics(draw(150, 6, seed=2))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)
    assert frechet_distance(a, b) > 1
    assert 0 <= frechet_distance(a, a) < 1e-10


def test_distance_equals_scipys_square_root() -> None:
    a, b = statistics(draw(300, 8, seed=1)), statistics(draw(300, 8, seed=4))
    root = scipy.linalg.sqrtm((a.cov @ b.cov).numpy()).real
    expected = float((a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace()) - 2 * np.trace(root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


class Flatten(nn.Module):
    num_features = 12

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def test_distance_equals_torchmetrics() -> None:
    real, fake = draw(90, 12, seed=1), draw(70, 12, seed=2)
    metric = FrechetInceptionDistance(feature=Flatten(), normalize=True)
    metric.update(real.view(-1, 3, 2, 2), real=True)
    metric.update(fake.view(-1, 3, 2, 2), real=False)
    assert frechet_distance(statistics(real), statistics(fake)) == pytest.approx(float(metric.compute()), rel=1e-6)


@pytest.mark.parametrize(("n", "expected"), [(3, True), (4, True), (5, False)])
def test_rank_deficient_when_there_are_no_more_images_than_features(n: int, expected: bool) -> None:
    found = statistics(draw(n, 4, seed=1))
    assert found.rank_deficient is expected
    assert bool(torch.linalg.matrix_rank(found.cov) < 4) is expected


def test_what_is_refused() -> None:
    found = FeatureStatistics(3)
    with pytest.raises(EvaluationError, match="no mean"):
        _ = found.mean
    with pytest.raises(EvaluationError, match=r"\(5, 2\), expected \[B, 3\]"):
        found.update(torch.zeros(5, 2))
    with pytest.raises(EvaluationError, match="finite"):
        found.update(torch.tensor([[0.0, float("nan"), 1.0]]))
    found.update(torch.zeros(1, 3))
    with pytest.raises(EvaluationError, match="at least 2 images, got n = 1"):
        frechet_distance(found, statistics(draw(9, 3, seed=1)))
    with pytest.raises(EvaluationError, match="of 3 and of 4 features"):
        frechet_distance(found, statistics(draw(9, 4, seed=1)))
    with pytest.raises(EvaluationError, match="of 3 and of 4 features"):
        found.merge(FeatureStatistics(4))
    with pytest.raises(EvaluationError, match="dim = 0"):
        FeatureStatistics(0)
    assert found.n == 1


@pytest.mark.parametrize(
    ("mean", "cov", "n", "message"),
    [
        (torch.zeros(2), torch.eye(3), 9, "shapes"),
        (torch.zeros(2, 1), torch.eye(2), 9, "shapes"),
        (torch.zeros(2), torch.eye(2), 1, "n = 1"),
        (torch.zeros(2), torch.eye(2) * float("inf"), 9, "not finite"),
        (torch.zeros(2), torch.tensor([[1.0, 0.5], [0.0, 1.0]]), 9, "not symmetric"),
    ],
)
def test_moments_that_are_refused(mean: Tensor, cov: Tensor, n: int, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        FeatureStatistics.from_moments(mean, cov, n)
