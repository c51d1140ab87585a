"""Oracles: torchmetrics on the same images and features, and brute force in numpy."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stepquant.errors import EvaluationError
from stepquant.evaluate.distributions import inception_score, kernel_distance, precision_recall
from stepquant.evaluate.frechet import FeatureStatistics, frechet_distance
from stepquant.evaluate.protocol import PROTOCOLS

PLAIN = PROTOCOLS["as-sampled"]
RELATIVE = 1e-4


class Small(nn.Module):
    """Six features of images [B, 3, 8, 8]."""

    num_features = 6

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 36, 6))

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.net(images)
        return found


@pytest.fixture
def network() -> nn.Module:
    return Small().eval().requires_grad_(False)


def images(n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(n, 3, 8, 8, generator=generator) + 0.3 * seed).clamp(0, 1)


def test_frechet_is_that_of_torchmetrics(network: nn.Module) -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    theirs = FrechetInceptionDistance(feature=network)
    theirs.update(images(40, 0), real=True)
    theirs.update(images(50, 1), real=False)
    sets = []
    for n, seed in ((50, 1), (40, 0)):
        statistics = FeatureStatistics(6)
        for batch in images(n, seed).split(7):
            statistics.update(network(batch))
        sets.append(statistics)
    assert frechet_distance(*sets) == pytest.approx(float(theirs.compute()), rel=RELATIVE)


def test_kernel_distance_of_all_is_that_of_torchmetrics(network: nn.Module) -> None:
    from torchmetrics.image.kid import KernelInceptionDistance

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = KernelInceptionDistance(feature=network, subsets=2, subset_size=40)
    theirs.update(images(40, 0), real=True)
    theirs.update(images(40, 1), real=False)
    found = kernel_distance(network(images(40, 1)), network(images(40, 0)), PLAIN)
    assert found.mean == pytest.approx(float(theirs.compute()[0]), rel=RELATIVE)
    assert (found.std, found.parts, found.size) == (0.0, 1, 40)


def test_kernel_distance_of_subsets_is_that_of_torchmetrics(
    network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchmetrics.image.kid import KernelInceptionDistance

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = KernelInceptionDistance(feature=network, subsets=5, subset_size=12)
    theirs.update(images(30, 0), real=True)
    theirs.update(images(40, 1), real=False)
    # torchmetrics draws the reference first; both sides get the subsets that ours draws.
    rng = np.random.RandomState(PLAIN.seed)
    drawn = []
    for _ in range(5):
        ours, reference = rng.choice(40, 12, replace=False), rng.choice(30, 12, replace=False)
        drawn += [torch.from_numpy(reference), torch.from_numpy(ours)]
    subsets = iter(drawn)
    monkeypatch.setattr(torch, "randperm", lambda _n: next(subsets))
    mean, std = theirs.compute()
    rules = replace(PLAIN, subsets=5, subset_size=12)
    found = kernel_distance(network(images(40, 1)), network(images(30, 0)), rules)
    assert found.mean == pytest.approx(float(mean), rel=RELATIVE)
    assert found.std == pytest.approx(float(std), rel=RELATIVE)
    assert (found.parts, found.size) == (5, 12)
    assert kernel_distance(network(images(40, 1)), network(images(30, 0)), rules) == found


def test_kernel_distance_is_unbiased() -> None:
    generator = torch.Generator().manual_seed(0)
    values = [
        kernel_distance(*torch.randn(2, 20, 3, generator=generator, dtype=torch.float64), PLAIN).mean
        for _ in range(200)
    ]
    assert min(values) < 0 < max(values)
    assert abs(np.mean(values)) < 3 * np.std(values) / 200**0.5


def test_kernel_distance_of_pairs_is_unbiased_and_that_of_other_sets_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    found: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(200):
        y, other = torch.randn(2, 20, 3, generator=generator, dtype=torch.float64)
        x = (y + other) / 2**0.5  # of the same distribution, and like its partner
        for paired, values in found.items():
            values.append(kernel_distance(x, y, PLAIN, paired=paired).mean)
    assert abs(np.mean(found[True])) < 3 * np.std(found[True]) / 200**0.5
    assert np.mean(found[False]) < -10 * np.std(found[False]) / 200**0.5


@pytest.mark.parametrize("size", [12, 1000])
def test_kernel_distance_of_pairs_prefers_nothing_to_the_reference(size: int) -> None:
    rules = replace(PLAIN, subsets=5, subset_size=size)
    y = torch.randn(40, 8, generator=torch.Generator().manual_seed(1))
    found = [kernel_distance(y * factor, y, rules, paired=True).mean for factor in (1.0, 1.1, 1.3)]
    assert found[0] == 0
    assert found == sorted(set(found))
    assert kernel_distance(y * 1.3, y, rules).mean < kernel_distance(y, y, rules).mean < 0  # why pairs are told
    with pytest.raises(EvaluationError, match=r"as many images on both sides: 40, 39\."):
        kernel_distance(y, y[:39], rules, paired=True)


@pytest.mark.parametrize("splits", [1, 10])
def test_inception_score_is_that_of_torchmetrics(
    network: nn.Module, monkeypatch: pytest.MonkeyPatch, splits: int
) -> None:
    from torchmetrics.image.inception import InceptionScore

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = InceptionScore(feature=network, splits=splits)
    theirs.update(images(60, 0))
    order = torch.from_numpy(np.random.RandomState(PLAIN.seed).permutation(60))
    monkeypatch.setattr(torch, "randperm", lambda _n: order)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the deviation of one split
        mean, std = theirs.compute()
    found = inception_score(network(images(60, 0)), replace(PLAIN, splits=splits))
    assert found.mean == pytest.approx(float(mean), rel=RELATIVE)
    assert (found.parts, found.size) == (splits, 60 // splits)
    if splits > 1:  # theirs divides by n - 1
        assert found.std == pytest.approx(float(std) * (9 / 10) ** 0.5, rel=1e-3)


def test_adm_splits_are_consecutive_and_the_last_is_what_is_left() -> None:
    logits = torch.randn(25, 4, generator=torch.Generator().manual_seed(3))
    rules = replace(PROTOCOLS["adm"], split_size=10)
    scores = []
    for part in (logits[:10], logits[10:20], logits[20:]):
        p = part.double().softmax(1).numpy()
        scores.append(np.exp(np.mean(np.sum(p * (np.log(p) - np.log(p.mean(0, keepdims=True))), 1))))
    found = inception_score(logits, rules)
    assert found.mean == pytest.approx(np.mean(scores), rel=1e-9)
    assert (found.parts, found.size) == (3, 10)


def test_certain_and_even_classes_score_their_number() -> None:
    logits = 1000 * torch.eye(5).repeat(20, 1)
    assert inception_score(logits, replace(PLAIN, splits=1)).mean == pytest.approx(5, rel=1e-6)


def brute_force(candidate: Tensor, reference: Tensor, k: int) -> tuple[float, float]:
    ours, theirs = candidate.double().numpy(), reference.double().numpy()

    def inside(points: np.ndarray, centres: np.ndarray) -> float:
        count = 0
        for point in points:
            for index, centre in enumerate(centres):
                others = np.delete(centres, index, axis=0)
                radius = np.sort(np.linalg.norm(others - centre, axis=1))[k - 1]
                if np.linalg.norm(point - centre) <= radius:
                    count += 1
                    break
        return count / len(points)

    return inside(ours, theirs), inside(theirs, ours)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_by_brute_force(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepquant.evaluate.distributions._ROWS", 7)
    generator = torch.Generator().manual_seed(1)
    candidate = 1.5 * torch.randn(40, 3, generator=generator) + 0.5
    reference = torch.randn(30, 3, generator=generator)
    found = precision_recall(candidate, reference, replace(PLAIN, neighbours=k))
    assert (found.precision, found.recall) == brute_force(candidate, reference, k)
    assert 0 < found.precision < 1
    assert found.precision != found.recall


def test_equal_sets_and_sets_far_apart() -> None:
    points = torch.randn(20, 4, generator=torch.Generator().manual_seed(1))
    same = precision_recall(points, points, PLAIN)
    assert (same.precision, same.recall) == (1.0, 1.0)
    apart = precision_recall(points, points + 100, PLAIN)
    assert (apart.precision, apart.recall) == (0.0, 0.0)


def test_a_collapsed_model_covers_only_its_own_image() -> None:
    """All radii are 0 then, so a distance of 0 must come out as exactly that."""
    collapsed = torch.randn(1, 4, generator=torch.Generator().manual_seed(1)).expand(20, 4)
    reference = torch.cat([collapsed[:5], torch.randn(15, 4, generator=torch.Generator().manual_seed(2))])
    found = precision_recall(collapsed, reference, PLAIN)
    assert (found.precision, found.recall) == (1.0, 0.25)


def test_too_few() -> None:
    points = torch.randn(3, 4)
    with pytest.raises(EvaluationError, match="at least 4 images, got n = 3"):
        precision_recall(points, points, PLAIN)
    with pytest.raises(EvaluationError, match="at least 2 images, got n = 1"):
        kernel_distance(points[:1], points, PLAIN)
    with pytest.raises(EvaluationError, match="10 splits needs as many images, got n = 3"):
        inception_score(points, PLAIN)
    with pytest.raises(EvaluationError, match="4 and of 3 features"):
        kernel_distance(points, points[:, :3], PLAIN)
