"""LPIPS: a weighted distance between the activations of a classification network (Zhang et al. 2018).

    d(x, y) = sum over layers l of  mean over places of  sum over channels c of  w_lc (x_lc / |x_l| - y_lc / |y_l|)^2

The backbone is AlexNet or VGG-16 as torchvision publishes them; its file is given by path, and which of the two it is
follows from the shape of the first convolution. The weights w (version 0.1) come with torchmetrics.

Differs from the original: grey images count as RGB. Images are used at their own size.
"""

from __future__ import annotations

from pathlib import Path
from typing import final

import torch
from torch import Tensor, nn

from stepquant.errors import EvaluationError
from stepquant.evaluate.features import three_channels, weights_identity
from stepquant.evaluate.weights import fill_, read_weights

__all__ = ["DOWNLOADS", "Lpips"]

DOWNLOADS = {
    "alex": "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    "vgg": "https://download.pytorch.org/models/vgg16-397923af.pth",
}

_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
"""Of RGB in [-1, 1]; the authors' ScalingLayer: the mean and deviation of ImageNet, moved to that range."""

_EPSILON = 1e-8
"""Added to the squared norm, as torchmetrics does: activations may be 0."""

_TAPS = {"alex": (1, 4, 7, 9, 11), "vgg": (3, 8, 15, 22, 29)}
"""Rectifiers whose outputs are compared, by place in torchvision's `features`."""

_LEAST = {"alex": 31, "vgg": 16}
"""Side of the smallest image that still has a pixel at the last of them."""


def _alexnet() -> nn.Sequential:
    def pool() -> nn.Module:
        return nn.MaxPool2d(3, stride=2)

    return nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), pool(),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), pool(),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
    )  # fmt: skip


def _vgg16() -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = 3
    for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        if layers:
            layers.append(nn.MaxPool2d(2))
        for _ in range(count):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
    return nn.Sequential(*layers)


@final
class Lpips:
    """Callable on pairs of images, `[B, C, H, W]` each, in [0, 1] -> `[B]`; 0 for equal images."""

    def __init__(self, path: Path | str, *, device: torch.device | str = "cpu") -> None:
        """path: torchvision's AlexNet or VGG-16, classifier included or not.

        Raises MissingWeights if the file is not there, EvaluationError for another or a damaged one.
        """
        path = Path(path)
        what = "LPIPS's backbone (torchvision's AlexNet or VGG-16)"
        download = f"{DOWNLOADS['alex']} (AlexNet, the usual choice) or {DOWNLOADS['vgg']} (VGG-16)"
        tensors = read_weights(path, what=what, download=download)
        backbone = {name.removeprefix("features."): x for name, x in tensors.items() if name.startswith("features.")}
        first = backbone.get("0.weight")
        self._kind = "alex" if first is not None and first.shape[-1] == 11 else "vgg"
        self._layers = _alexnet() if self._kind == "alex" else _vgg16()
        fill_(self._layers, backbone, path=path, what=what)
        self._layers.eval().requires_grad_(False).to(device)
        self._weights = [weight.to(device) for weight in _linear_weights(self._kind)]
        self._device = device
        self.identity = weights_identity(self._layers)

    @property
    def name(self) -> str:
        """With its backbone, since figures of different ones cannot be compared."""
        return f"lpips-{self._kind}"

    @property
    def smallest(self) -> int:
        """Side of the smallest image that it takes."""
        return _LEAST[self._kind]

    @torch.no_grad()
    def __call__(self, candidate: Tensor, reference: Tensor) -> Tensor:
        if min(candidate.shape[2:]) < self.smallest:
            raise EvaluationError(
                f"{self.name} needs images of at least {self.smallest} x {self.smallest} pixels, got "
                f"{candidate.shape[2]} x {candidate.shape[3]}."
            )
        ours, theirs = self._activations(candidate), self._activations(reference)
        total = torch.zeros(len(candidate), device=self._device)
        for one, other, weight in zip(ours, theirs, self._weights, strict=True):
            total = total + ((_unit(one) - _unit(other)).square() * weight).sum(dim=1).mean(dim=(1, 2))
        return total

    def _activations(self, images: Tensor) -> list[Tensor]:
        shift, scale = (torch.tensor(values, device=self._device).view(3, 1, 1) for values in (_SHIFT, _SCALE))
        x = (three_channels(images).float().to(self._device) * 2 - 1 - shift) / scale
        found = []
        for place, layer in enumerate(self._layers):
            x = layer(x)
            if place in _TAPS[self._kind]:
                found.append(x)
        return found


def _unit(activations: Tensor) -> Tensor:
    """Every place's channels as a vector of length 1."""
    return activations / (activations.square().sum(dim=1, keepdim=True) + _EPSILON).sqrt()


def _linear_weights(kind: str) -> list[Tensor]:
    """w of every layer, `[1, C, 1, 1]`."""
    from torchmetrics.functional.image import lpips

    path = Path(str(lpips.__file__)).parent / "lpips_models" / f"{kind}.pth"
    tensors = read_weights(path, what="LPIPS", download="torchmetrics again: the file belongs to the package")
    return [tensors[f"lin{number}.model.1.weight"] for number in range(len(_TAPS[kind]))]
