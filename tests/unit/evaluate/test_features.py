from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from stepquant.errors import EvaluationError
from stepquant.evaluate import features
from stepquant.evaluate.features import DigitClassifier, DigitFeatures, Features, ModuleFeatures, weights_identity
from stepquant.evaluate.frechet import FeatureStatistics, frechet_distance

MNIST = Path(__file__).parents[4] / "shared" / "data" / "mnist.npz"


@pytest.fixture(scope="module")
def digits() -> DigitFeatures:
    return DigitFeatures()


@pytest.fixture(scope="module")
def mnist() -> tuple[Tensor, Tensor]:
    """2000 test images `[2000, 1, 32, 32]` and their labels: every fifth, because the file is sorted by digit."""
    if not MNIST.exists():
        pytest.skip(f"{MNIST} is not there")
    with np.load(MNIST) as archive:
        images, labels = torch.from_numpy(archive["test_x"][::5]), torch.from_numpy(archive["test_y"][::5])
    return nn.functional.pad(images, (2, 2, 2, 2))[:, None].float() / 255, labels.long()


def noise(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def test_identity_sees_names_values_shapes_and_class() -> None:
    torch.manual_seed(0)
    module = nn.Linear(2, 2)
    changed = copy.deepcopy(module)
    with torch.no_grad():
        changed.weight[1, 1] = torch.nextafter(changed.weight[1, 1], torch.tensor(9.0))
    others = [changed, nn.Sequential(module), copy.deepcopy(module).double(), copy.deepcopy(module).bfloat16()]
    identities = {weights_identity(each) for each in [module, *others]}
    assert len(identities) == 5
    assert weights_identity(copy.deepcopy(module)) == weights_identity(module)
    assert {len(identity) for identity in identities} == {64}


def test_identity_of_a_module_with_a_number(digits: DigitFeatures) -> None:
    assert weights_identity(nn.BatchNorm2d(3)) != weights_identity(nn.BatchNorm2d(4))
    assert digits.identity == DigitFeatures().identity


def test_shipped_features(digits: DigitFeatures) -> None:
    as_protocol: Features = digits
    found = as_protocol(noise(5, 1, 32, 32))
    assert (as_protocol.name, as_protocol.dim) == ("digit-classifier", 64)
    assert found.shape == (5, 64)
    assert (found.dtype, found.requires_grad) == (torch.float32, False)
    assert digits.identity == digits.config["identity"]
    # The weights that come with stepquant are small enough for a wheel.
    assert len(features._read_asset("model.safetensors")) < 1_000_000


def test_features_do_not_depend_on_the_batch_or_on_repeated_channels(digits: DigitFeatures) -> None:
    images = noise(4, 1, 32, 32)
    whole = digits(images)
    torch.testing.assert_close(torch.cat([digits(image[None]) for image in images]), whole)
    assert torch.equal(digits(images.repeat(1, 3, 1, 1)), whole)
    assert torch.equal(digits(images.double()), whole)


def test_logits_follow_from_the_features(digits: DigitFeatures) -> None:
    images = noise(3, 1, 32, 32)
    tensors = features._read_tensors("model.safetensors")
    weight, bias = tensors["classify.weight"].float(), tensors["classify.bias"].float()
    torch.testing.assert_close(digits.logits(images), digits(images).clamp(min=0) @ weight.T + bias)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 1, 28, 28), r"\(2, 1, 28, 28\), expected \[B, 1, 32, 32\]"),
        (torch.zeros(1, 32, 32), r"\(1, 32, 32\)"),
        (torch.zeros(2, 2, 32, 32), r"\(2, 2, 32, 32\)"),
        (noise(2, 3, 32, 32), "three equal channels"),
        (torch.full((2, 1, 32, 32), -1.0), r"expected \[0, 1\]"),
        (torch.full((2, 1, 32, 32), torch.nan), "hold NaN"),
    ],
)
def test_images_that_are_refused(images: Tensor, message: str, digits: DigitFeatures) -> None:
    for call in (digits, digits.logits):
        with pytest.raises(EvaluationError, match=message):
            call(images)


def test_data_statistics_belong_to_frechet(digits: DigitFeatures) -> None:
    data = FeatureStatistics.from_moments(*digits.data_statistics())
    assert (data.n, data.dim, data.rank_deficient) == (60_000, 64, False)
    black = FeatureStatistics(64)
    black.update(digits(noise(128, 1, 32, 32) * 0.01))
    floor = digits.config["floors"]["train_against_test"]
    assert frechet_distance(black, data) > 100 * floor


@pytest.mark.shared
def test_classifier_reads_digits(digits: DigitFeatures, mnist: tuple[Tensor, Tensor]) -> None:
    images, labels = mnist
    right = int((digits.logits(images).argmax(1) == labels).sum())
    assert right > 0.99 * 2000
    accuracy = digits.config["accuracy"]
    assert accuracy["test_correct"] > 0.993 * accuracy["test_n"]
    assert accuracy["test_correct"] <= right + 8000


@pytest.mark.shared
def test_distance_sees_damage(digits: DigitFeatures, mnist: tuple[Tensor, Tensor]) -> None:
    images = mnist[0][torch.randperm(2000, generator=torch.Generator().manual_seed(0))[:1024]]
    data = FeatureStatistics.from_moments(*digits.data_statistics())

    def distance(changed: Tensor) -> float:
        statistics = FeatureStatistics(64)
        statistics.update(digits(changed))
        return frechet_distance(statistics, data)

    grain = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    found = [distance((images + level * grain).clamp(0, 1)) for level in (0.0, 0.1, 0.2, 0.4)]
    assert found == sorted(found)
    floor = digits.config["floors"]["test_subset_1024_against_train"]
    assert abs(found[0] - floor["mean"]) < 10 * floor["sd"]
    assert found[-1] > 5 * found[0]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[:-8], "damaged"),
        (lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]), "have identity"),
    ],
)
def test_damaged_weights(damage: Callable[[bytes], bytes], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read = features._read_asset
    monkeypatch.setattr(features, "_read_asset", lambda name: damage(read(name)) if "model" in name else read(name))
    with pytest.raises(EvaluationError, match=message):
        DigitFeatures()


def test_missing_asset() -> None:
    with pytest.raises(EvaluationError, match=r"nothing\.bin is missing"):
        features._read_asset("nothing.bin")


class Mean(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean(dim=(2, 3)).double()


def test_any_module() -> None:
    wrapped: Features = ModuleFeatures(Mean().eval(), "mean colour", dim=3)
    images = noise(4, 3, 5, 5)
    torch.testing.assert_close(wrapped(images), images.mean(dim=(2, 3)))
    assert (wrapped.name, wrapped.dim, wrapped.identity) == ("mean colour", 3, weights_identity(Mean()))
    with pytest.raises(EvaluationError, match=r"'mean colour' returned \(4, 1\), expected a tensor of shape \(4, 3\)"):
        wrapped(images[:, :1])
    with pytest.raises(EvaluationError, match=r"expected \[0, 1\]"):
        wrapped(images * 255)


def test_any_module_must_not_be_training() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Dropout()).eval()
    module[1].train()
    with pytest.raises(EvaluationError, match="call its eval"):
        ModuleFeatures(module, "dropout", dim=4)


def test_module_that_returns_no_tensor() -> None:
    class Pair(nn.Module):
        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            return images, images

    with pytest.raises(EvaluationError, match="returned tuple"):
        ModuleFeatures(Pair().eval(), "pair", dim=4)(noise(1, 1, 2, 2))


def test_classifier_has_the_size_that_it_claims() -> None:
    model = DigitClassifier().eval()
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1000) == 164
    with FlopCounterMode(display=False) as counter:
        assert model(noise(1, 1, 32, 32)).shape == (1, 10)
    assert counter.get_total_flops() / 2 == pytest.approx(5.5e6, rel=0.01)
