"""What Fréchet distances and their like compare: features of images.

`DigitFeatures` is the shipped extractor, a small classifier of handwritten digits for 32x32 images, so that an
evaluation of the shipped model needs no download. `ModuleFeatures` wraps any torch module. Networks whose weights are
given by file are in `evaluate.inception` and `evaluate.mobilenet`.

Distances in two feature spaces cannot be compared, so every extractor has an `identity`, a hash of its weights, that
belongs beside each figure.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib import resources
from typing import Any, Protocol, final, runtime_checkable

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from stepquant.errors import EvaluationError
from stepquant.evaluate.images import check_images

__all__ = [
    "DigitClassifier",
    "DigitFeatures",
    "Extracted",
    "Extracting",
    "Features",
    "ModuleFeatures",
    "extract",
    "input_size",
    "three_channels",
    "weights_identity",
]

_ASSET = "digit-classifier"


class Features(Protocol):
    """Turns images into vectors."""

    @property
    def name(self) -> str:
        """What the extractor is called in reports."""
        ...

    @property
    def dim(self) -> int:
        """D, the number of features of one image."""
        ...

    @property
    def identity(self) -> str:
        """Hash of the weights: figures with different identities must not be compared."""
        ...

    def __call__(self, images: Tensor) -> Tensor:
        """Features `[B, D]` float32 of images `[B, C, H, W]`, float in [0, 1]."""
        ...


@dataclass(frozen=True)
class Extracted:
    """What an extractor finds in images, all float32.

    features: `[B, D]`. logits: `[B, K]` of a classifier, for the Inception score. spatial: `[B, S]`, a few channels of
    a feature map with their places, for sFID. None where the extractor has none.
    """

    features: Tensor
    logits: Tensor | None = None
    spatial: Tensor | None = None


@runtime_checkable
class Extracting(Protocol):
    """Features that come with more than vectors, from one pass of the network."""

    def extract(self, images: Tensor) -> Extracted:
        """Images as for `Features.__call__`."""
        ...


def extract(features: Features, images: Tensor) -> Extracted:
    """All that these features have to say about images."""
    return features.extract(images) if isinstance(features, Extracting) else Extracted(features(images))


def input_size(features: Features) -> int | None:
    """Side of the squares that the extractor wants (its attribute `size`); None: images as they are."""
    size: int | None = getattr(features, "size", None)
    return size


def three_channels(images: Tensor) -> Tensor:
    """Grey images `[B, 1, H, W]` as RGB; RGB as it is. Raises EvaluationError for other numbers of channels."""
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise EvaluationError(f"Images have shape {tuple(images.shape)}, expected [B, 1, H, W] or [B, 3, H, W].")
    return images.expand(-1, 3, -1, -1)


def weights_identity(module: nn.Module) -> str:
    """SHA-256 (hex) over the class name and every name, dtype, shape and byte of the module's state."""
    digest = hashlib.sha256(type(module).__qualname__.encode())
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"|{name}:{value.dtype}:{tuple(value.shape)}|".encode())
        # Bytes, not numbers: numpy has no bfloat16, and -0.0 is not 0.0 here. A 0-d tensor cannot be viewed as bytes.
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _block(channels_in: int, channels_out: int, *, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    )


@final
class DigitClassifier(nn.Module):
    """Classifier of handwritten digits, 164 thousand parameters, 5.5 million multiplications an image.

    Input `[B, 1, 32, 32]`, float in [0, 1], white ink on black. There is no normalisation: black is 0, which is also
    what the convolutions pad with.
    """

    FEATURES = 64

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            _block(1, 16, stride=1),
            _block(16, 32, stride=2),
            _block(32, 64, stride=2),
            _block(64, 64, stride=1),
            _block(64, 64, stride=2),
        )
        self.embed = nn.Linear(64 * 4 * 4, self.FEATURES)
        self.classify = nn.Linear(self.FEATURES, 10)

    def features(self, images: Tensor) -> Tensor:
        """`[B, 64]`, before the last rectifier: a rectified feature is far from the Gaussian that Fréchet assumes."""
        hidden: Tensor = self.embed(self.trunk(images).flatten(1))
        return hidden

    def forward(self, images: Tensor) -> Tensor:
        """Logits `[B, 10]`."""
        logits: Tensor = self.classify(torch.relu(self.features(images)))
        return logits


@final
class DigitFeatures:
    """The 64 features of the shipped `DigitClassifier`: images `[B, 1, 32, 32]`, or 3 channels that are all equal.

    Features are computed in float32 without gradients, where the images are if that is `device`.
    """

    def __init__(self, *, device: torch.device | str = "cpu") -> None:
        """Load the weights that come with stepquant.

        device: where the images will be.

        Raises EvaluationError: the weights are missing, or are not the ones that their config.json describes.
        """
        self._module = _load_classifier().to(device)
        self._identity = weights_identity(self._module)
        self.config = _read_config()
        expected = self.config["identity"]
        if self._identity != expected:
            raise EvaluationError(
                f"The weights of {_ASSET} have identity {self._identity}, but its config.json says {expected}: "
                "install stepquant again."
            )

    @property
    def name(self) -> str:
        return _ASSET

    @property
    def dim(self) -> int:
        return DigitClassifier.FEATURES

    @property
    def identity(self) -> str:
        return self._identity

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features `[B, 64]`.

        Raises EvaluationError: images of another size, of colour, or outside [0, 1].
        """
        return self._module.features(_grey_32(images))

    @torch.no_grad()
    def extract(self, images: Tensor) -> Extracted:
        """Features, logits `[B, 10]`, and the first seven channels of the last feature map, `[B, 7 * 4 * 4]`.

        Seven as in sFID (Nash et al. 2021). Raises as a call does.
        """
        maps: Tensor = self._module.trunk(_grey_32(images))
        features: Tensor = self._module.embed(maps.flatten(1))
        logits: Tensor = self._module.classify(torch.relu(features))
        return Extracted(features, logits, maps[:, :7].flatten(1))

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """What the classifier makes of the same images, `[B, 10]`. Raises as a call does."""
        logits: Tensor = self._module(_grey_32(images))
        return logits

    def data_statistics(self) -> tuple[Tensor, Tensor, int]:
        """Mean `[64]` and unbiased covariance `[64, 64]`, float64, of the 60 000 training images of MNIST, and 60 000.

        In the order of `FeatureStatistics.from_moments`. `config["floors"]` has the distances of real images to them.

        Raises EvaluationError: the file is missing or damaged.
        """
        tensors = _read_tensors("data_statistics.safetensors")
        return tensors["mean"], tensors["cov"], int(tensors["n"])


@final
class ModuleFeatures:
    """Any torch module that turns images `[B, C, H, W]` in [0, 1] into features `[B, dim]`."""

    def __init__(self, module: nn.Module, name: str, *, dim: int) -> None:
        """module: in evaluation mode; it is used as it is, so scaling of its input belongs in it.

        Raises EvaluationError: a module in training mode, whose features would depend on the rest of the batch.
        """
        if any(part.training for part in module.modules()):
            raise EvaluationError(f"The module of features {name!r} is in training mode: call its eval() first.")
        self._module = module
        self._name = name
        self._dim = dim
        self._identity = weights_identity(module)

    @property
    def name(self) -> str:
        return self._name

    @property
    def dim(self) -> int:
        return self._dim

    @property
    def identity(self) -> str:
        """Of the weights as they were when this was made."""
        return self._identity

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features `[B, dim]` float32.

        Raises EvaluationError: images outside [0, 1], or a module that returns another shape.
        """
        check_images(images, what="Images")
        features = self._module(images)
        expected = (len(images), self._dim)
        if not isinstance(features, Tensor) or tuple(features.shape) != expected:
            found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise EvaluationError(f"Features {self._name!r} returned {found}, expected a tensor of shape {expected}.")
        return features.float()


def _grey_32(images: Tensor) -> Tensor:
    """float32 `[B, 1, 32, 32]`, or EvaluationError."""
    shape = tuple(images.shape)
    if images.ndim != 4 or shape[1] not in (1, 3) or shape[2:] != (32, 32):
        raise EvaluationError(f"{_ASSET} got images of shape {shape}, expected [B, 1, 32, 32] or [B, 3, 32, 32].")
    check_images(images, what="Images")
    grey = images[:, :1]
    if not torch.equal(images, grey.expand_as(images)):
        raise EvaluationError(f"{_ASSET} got colour images of shape {shape}, expected three equal channels.")
    return grey.float()


def _read_asset(file: str) -> bytes:
    path = resources.files("stepquant") / "assets" / _ASSET / file
    try:
        return path.read_bytes()
    except OSError as error:
        raise EvaluationError(f"{path} is missing: install stepquant again.") from error


def _read_config() -> dict[str, Any]:
    config: dict[str, Any] = json.loads(_read_asset("config.json"))
    return config


def _read_tensors(file: str) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(_read_asset(file))
    except safetensors.SafetensorError as error:
        raise EvaluationError(f"{file} of {_ASSET} is damaged: install stepquant again. ({error})") from error
    return tensors


def _load_classifier() -> DigitClassifier:
    classifier = DigitClassifier()
    # Stored in float16; copying into the module's float32 is exact.
    classifier.load_state_dict(_read_tensors("model.safetensors"))
    return classifier.eval()
