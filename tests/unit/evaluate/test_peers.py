"""Our figures beside those of torch-fidelity and clean-fid, on the same features and images.

Both packages import torchvision, which stepquant does not need: where one of them cannot be imported its tests are
skipped. What they are compared with here is compared with independent formulas in `test_distributions.py`,
`test_frechet.py`, `test_resizing.py` and `test_protocol.py`, which always run.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stepquant.evaluate.distributions import inception_score, kernel_distance, precision_recall
from stepquant.evaluate.features import Extracted
from stepquant.evaluate.frechet import FeatureStatistics, frechet_distance
from stepquant.evaluate.inception import InceptionFeatures, InceptionV3
from stepquant.evaluate.protocol import PROTOCOLS, resize_tensorflow1

RELATIVE = 1e-4
FIDELITY, CLEAN = PROTOCOLS["torch-fidelity"], PROTOCOLS["clean"]


def imported(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


def features(n: int, seed: int, dim: int = 7) -> Tensor:
    """Correlated, of a mean of their own, float32 as networks give them."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator)
    return torch.randn(n, dim, generator=generator) @ mixing + 0.5 * seed


def statistics(rows: Tensor) -> FeatureStatistics:
    found = FeatureStatistics(rows.shape[1])
    for batch in rows.split(16):
        found.update(batch)
    return found


def levels(n: int, *, rows: int, columns: int) -> Tensor:
    """uint8 [n, 3, rows, columns]."""
    generator = torch.Generator().manual_seed(rows)
    return torch.randint(0, 256, (n, 3, rows, columns), generator=generator, dtype=torch.uint8)


def test_frechet_distance_of_torch_fidelity() -> None:
    theirs = imported("torch_fidelity.metric_fid")
    candidate, reference = features(60, 1), features(45, 2)
    moments = [theirs.fid_features_to_statistics(rows.double()) for rows in (candidate, reference)]
    expected = theirs.fid_statistics_to_metric(*moments, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(statistics(candidate), statistics(reference)) == pytest.approx(expected, rel=RELATIVE)


@pytest.mark.parametrize("size", [12, 40])
def test_kernel_distance_of_torch_fidelity_with_the_same_subsets(size: int) -> None:
    theirs = imported("torch_fidelity.metric_kid")
    candidate, reference = features(50, 1), features(40, 2)
    found = kernel_distance(candidate, reference, replace(FIDELITY, subsets=6, subset_size=size))
    expected = theirs.kid_features_to_metric(
        candidate.double(), reference.double(), kid_subsets=6, kid_subset_size=size, kid_kernel="poly",
        kid_kernel_poly_degree=3, kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1, rng_seed=FIDELITY.seed,
        verbose=False,
    )  # fmt: skip
    assert found.mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=RELATIVE)
    assert found.std == pytest.approx(expected["kernel_inception_distance_std"], rel=RELATIVE)


@pytest.mark.parametrize("n", [40, 47])
def test_inception_score_of_torch_fidelity_with_the_same_shuffle(n: int) -> None:
    theirs = imported("torch_fidelity.metric_isc")
    logits = features(n, 1)
    found = inception_score(logits, FIDELITY)
    expected = theirs.isc_features_to_metric(logits, splits=10, shuffle=True, rng_seed=FIDELITY.seed)
    assert found.mean == pytest.approx(expected["inception_score_mean"], rel=RELATIVE)
    assert found.std == pytest.approx(expected["inception_score_std"], rel=RELATIVE)
    assert found.std > 0


def test_precision_and_recall_of_torch_fidelity() -> None:
    theirs = imported("torch_fidelity.metric_prc")
    candidate, reference = 0.8 * features(60, 1, dim=3), features(45, 2, dim=3) - 1.5
    found = precision_recall(candidate, reference, FIDELITY)
    expected = theirs.calculate_precision_recall_full(candidate.double(), reference.double(), FIDELITY.neighbours)
    assert (found.precision, found.recall) == pytest.approx(expected, rel=1e-6)
    assert 0 < found.recall != found.precision < 1


@pytest.mark.parametrize(("rows", "columns", "size"), [(20, 32, 45), (45, 31, 20)])
def test_resize_of_torch_fidelity(rows: int, columns: int, size: int) -> None:
    theirs = imported("torch_fidelity.interpolate_compat_tensorflow")
    images = levels(2, rows=rows, columns=columns).float()
    expected = theirs.interpolate_bilinear_2d_like_tensorflow1x(images, size=(size, size), align_corners=False)
    assert torch.allclose(resize_tensorflow1(images, size), expected, rtol=RELATIVE, atol=1e-3)


def test_inception_of_torch_fidelity_with_the_same_weights(tmp_path: Path) -> None:
    """From 8-bit images to features and logits. The weights are random: the published ones are not needed for this."""
    theirs = imported("torch_fidelity.feature_extractor_inceptionv3")
    network = InceptionV3()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    other = theirs.FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=tmp_path / "weights.pth"
    )
    images = levels(2, rows=40, columns=48)
    expected = Extracted(*other(images))
    found = InceptionFeatures(network).extract(FIDELITY.prepare(images.float() / 255, 299))
    assert float(expected.features.std(dim=0).mean()) > 0.01 * float(expected.features.mean()) > 0
    for ours, wanted in ((found.features, expected.features), (found.logits, expected.logits)):
        assert ours is not None
        assert wanted is not None
        assert float((ours - wanted).norm() / wanted.norm()) < RELATIVE


def test_frechet_distance_of_clean_fid() -> None:
    theirs = imported("cleanfid.fid")
    candidate, reference = features(60, 1), features(45, 2)
    rows = [features.double().numpy() for features in (candidate, reference)]
    moments = [(each.mean(axis=0), np.cov(each, rowvar=False)) for each in rows]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an argument of scipy's that is going away
        expected = theirs.frechet_distance(*moments[0], *moments[1])
    assert frechet_distance(statistics(candidate), statistics(reference)) == pytest.approx(
        float(expected), rel=RELATIVE
    )


@pytest.mark.parametrize("size", [12, 40])
def test_kernel_distance_of_clean_fid_with_the_same_subsets(size: int) -> None:
    theirs = imported("cleanfid.fid")
    candidate, reference = features(50, 1), features(40, 2)
    before = np.random.get_state()
    np.random.seed(CLEAN.seed)
    try:  # it draws from its second argument first, as ours does from the candidate
        expected = theirs.kernel_distance(
            reference.double().numpy(), candidate.double().numpy(), num_subsets=6, max_subset_size=size
        )
    finally:
        np.random.set_state(before)
    found = kernel_distance(candidate, reference, replace(CLEAN, subsets=6, subset_size=size))
    assert found.mean == pytest.approx(expected, rel=RELATIVE)


@pytest.mark.parametrize(("rows", "columns"), [(40, 64), (320, 301), (700, 299)])
def test_resize_of_clean_fid(rows: int, columns: int) -> None:
    theirs = imported("cleanfid.resize")
    (image,) = levels(1, rows=rows, columns=columns)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an argument of Pillow's that is going away
        expected = theirs.build_resizer("clean")(image.movedim(0, -1).numpy())
    found = CLEAN.prepare(image[None].float() / 255, 299)[0].movedim(0, -1) * 255
    assert found.shape == (299, 299, 3)
    assert torch.allclose(found, torch.tensor(expected), rtol=RELATIVE, atol=1e-3)
