"""MobileNetV2 1.0 (Sandler et al. 2018) as a feature extractor, with folded batch norms and weights given by file.

A few percent of the cost of Inception-v3. Fréchet distances on it are not FID and must not be called so.

The weights are those of TensorFlow (`mobilenet_v2_1.0_224`), which transformers has as `google/mobilenet_v2_1.0_224`;
docs/evaluation.md has the lines that turn that into a file. torchvision's `mobilenet_v2` is another network: it pads
every side alike, has 1000 classes and takes images that are normalised by ImageNet's mean and deviation.

The file holds `stem.conv`, `blocks.<i>.seq.<j>.conv` (expand, depthwise, project; the first block does not expand),
`head.conv`, each with weight and bias, and `fc` with 1001 classes, the first of them background. Rectifiers stop at 6,
and projections have none. Padding is TensorFlow's "same": one pixel on every side, but at stride 2 on an even side only
at the right and the bottom.
"""

from __future__ import annotations

from pathlib import Path
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepquant.evaluate.features import Extracted
from stepquant.evaluate.network_features import NetworkFeatures
from stepquant.evaluate.weights import fill_, read_weights

__all__ = ["DOWNLOAD", "MobileNetFeatures", "MobileNetV2"]

DOWNLOAD = (
    "google/mobilenet_v2_1.0_224 of the hub, make a file of it with the lines in docs/evaluation.md (tensors from "
    "stem.conv.weight [32, 3, 3, 3] to fc.weight [1001, 1280]; torchvision's mobilenet_v2 does not fit)"
)

_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Expansion, channels, repetitions, stride of the first. Sandler et al. 2018, table 2."""


class _Convolution(nn.Module):
    """Convolution with TensorFlow's padding, and a rectifier that stops at 6 unless it projects."""

    def __init__(
        self, channels_in: int, channels: int, kernel: int = 1, *, stride: int = 1, depthwise: bool = False,
        linear: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels, kernel, stride=stride, groups=channels_in if depthwise else 1)
        self._linear = linear

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.conv.kernel_size[0], self.conv.stride[0]
        sides = []
        for length in (x.shape[3], x.shape[2]):  # F.pad begins with the last dimension
            total = max((-(-length // stride) - 1) * stride + kernel - length, 0)
            sides += [total // 2, total - total // 2]
        x = self.conv(F.pad(x, sides))
        return x if self._linear else F.relu6(x)


class _Block(nn.Module):
    """Expand, filter each channel, project; added to the input where the shape stays."""

    def __init__(self, channels_in: int, channels: int, *, expansion: int, stride: int) -> None:
        super().__init__()
        wide = channels_in * expansion
        layers = [] if expansion == 1 else [_Convolution(channels_in, wide)]
        layers.append(_Convolution(wide, wide, 3, stride=stride, depthwise=True))
        layers.append(_Convolution(wide, channels, linear=True))
        self.seq = nn.Sequential(*layers)
        self._residual = stride == 1 and channels_in == channels

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.seq(x)
        return x + found if self._residual else found


@final
class MobileNetV2(nn.Module):
    """Images `[B, 3, 224, 224]` in [0, 1] -> features `[B, 1280]` and logits `[B, 1001]`."""

    SIZE = 224
    FEATURES = 1280

    def __init__(self) -> None:
        super().__init__()
        self.stem = _Convolution(3, 32, 3, stride=2)
        blocks: list[_Block] = []
        channels = 32
        for expansion, width, repetitions, first in _STAGES:
            for number in range(repetitions):
                blocks.append(_Block(channels, width, expansion=expansion, stride=first if number == 0 else 1))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.head = _Convolution(channels, self.FEATURES)
        self.fc = nn.Linear(self.FEATURES, 1001)

    def forward(self, images: Tensor) -> Extracted:
        features = self.head(self.blocks(self.stem(images * 2 - 1))).mean(dim=(2, 3))
        return Extracted(features, self.fc(features))


@final
class MobileNetFeatures(NetworkFeatures):
    """Features of `MobileNetV2`."""

    name = "mobilenetv2"
    dim = MobileNetV2.FEATURES
    size = MobileNetV2.SIZE

    @classmethod
    def from_file(cls, path: Path | str, *, device: torch.device | str = "cpu") -> MobileNetFeatures:
        """Raises MissingWeights if the file is not there, EvaluationError for another or a damaged one."""
        what = "TensorFlow's MobileNetV2, as docs/evaluation.md lists its tensors (torchvision's does not fit)"
        tensors = read_weights(Path(path), what=what, download=DOWNLOAD)
        module = MobileNetV2()
        fill_(module, tensors, path=Path(path), what=what)
        return cls(module, device=device)
