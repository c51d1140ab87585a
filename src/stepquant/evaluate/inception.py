"""Inception-v3 as FID uses it: the network of 2015-12-05, whose weights are given by file.

This is TensorFlow's published graph, which is not the Inception-v3 of torchvision: average pools leave their padding
out, the last block pools by maximum, and there are 1008 classes. Names in the state dict are those of the converted
weights that torch-fidelity and pytorch-fid share, so the file serves as it is.

Source: Szegedy et al. 2016 for the architecture, Heusel et al. 2017 for FID, Nash et al. 2021 for sFID. The spatial
features are the first 7 channels of `mixed_6/conv` of the graph, which is `Mixed_6d.branch1x1` here (17 x 17 places).
The logits leave out the bias of the last layer, as torch-fidelity and ADM do for the Inception score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepquant.evaluate.features import Extracted
from stepquant.evaluate.network_features import NetworkFeatures
from stepquant.evaluate.weights import fill_, read_weights

__all__ = ["DOWNLOAD", "FILE", "SHA256", "InceptionFeatures", "InceptionV3", "cached_file"]

FILE = "weights-inception-2015-12-05-6726825d.pth"
"""Its name as torch-fidelity publishes it."""

DOWNLOAD = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILE}"
SHA256 = "6726825d"
"""How the file's hash begins; it is part of the published name."""

Pool = Literal["average", "maximum", "halve"]


@dataclass(frozen=True)
class _Conv:
    """name in the block, output channels, kernel (rows, columns), and whether it halves the picture, unpadded."""

    name: str
    channels: int
    kernel: tuple[int, int] = (1, 1)
    halve: bool = False


@dataclass(frozen=True)
class _Branch:
    """A pool, convolutions one after the other, and then several side by side whose outputs are joined."""

    trunk: tuple[_Conv, ...] = ()
    heads: tuple[_Conv, ...] = ()
    pool: Pool | None = None


def _chain(prefix: str, *layers: tuple[int, int] | tuple[int, int, int], halve: bool = False) -> _Branch:
    """Convolutions `prefix_1`, `prefix_2`, ...; each as (channels, side) or (channels, rows, columns)."""
    convs = []
    for number, (channels, rows, *columns) in enumerate(layers, 1):
        name = prefix if len(layers) == 1 else f"{prefix}_{number}"
        kernel = (rows, columns[0] if columns else rows)
        convs.append(_Conv(name, channels, kernel, halve and number == len(layers)))
    return _Branch(tuple(convs))


def _pooled(channels: int, pool: Pool = "average") -> _Branch:
    return _Branch((_Conv("branch_pool", channels),), pool=pool)


def _block_a(pool: int) -> tuple[_Branch, ...]:
    return (
        _chain("branch1x1", (64, 1)),
        _chain("branch5x5", (48, 1), (64, 5)),
        _chain("branch3x3dbl", (64, 1), (96, 3), (96, 3)),
        _pooled(pool),
    )


def _block_b() -> tuple[_Branch, ...]:
    return (
        _chain("branch3x3", (384, 3), halve=True),
        _chain("branch3x3dbl", (64, 1), (96, 3), (96, 3), halve=True),
        _Branch(pool="halve"),
    )


def _block_c(c: int) -> tuple[_Branch, ...]:
    return (
        _chain("branch1x1", (192, 1)),
        _chain("branch7x7", (c, 1), (c, 1, 7), (192, 7, 1)),
        _chain("branch7x7dbl", (c, 1), (c, 7, 1), (c, 1, 7), (c, 7, 1), (192, 1, 7)),
        _pooled(192),
    )


def _block_d() -> tuple[_Branch, ...]:
    return (
        _chain("branch3x3", (192, 1), (320, 3), halve=True),
        _chain("branch7x7x3", (192, 1), (192, 1, 7), (192, 7, 1), (192, 3), halve=True),
        _Branch(pool="halve"),
    )


def _block_e(pool: Pool) -> tuple[_Branch, ...]:
    def forked(trunk: tuple[_Conv, ...], prefix: str) -> _Branch:
        return _Branch(trunk, (_Conv(f"{prefix}a", 384, (1, 3)), _Conv(f"{prefix}b", 384, (3, 1))))

    return (
        _chain("branch1x1", (320, 1)),
        forked((_Conv("branch3x3_1", 384),), "branch3x3_2"),
        forked((_Conv("branch3x3dbl_1", 448), _Conv("branch3x3dbl_2", 384, (3, 3))), "branch3x3dbl_3"),
        _pooled(192, pool),
    )


_STEM = (
    (_Conv("Conv2d_1a_3x3", 32, (3, 3), halve=True), 0),
    (_Conv("Conv2d_2a_3x3", 32, (3, 3)), 0),
    (_Conv("Conv2d_2b_3x3", 64, (3, 3)), 1),
    None,
    (_Conv("Conv2d_3b_1x1", 80), 0),
    (_Conv("Conv2d_4a_3x3", 192, (3, 3)), 0),
    None,
)
"""Convolutions with their padding; None is a maximum pool that halves the picture."""

_BLOCKS = {
    "Mixed_5b": _block_a(32),
    "Mixed_5c": _block_a(64),
    "Mixed_5d": _block_a(64),
    "Mixed_6a": _block_b(),
    "Mixed_6b": _block_c(128),
    "Mixed_6c": _block_c(160),
    "Mixed_6d": _block_c(160),
    "Mixed_6e": _block_c(192),
    "Mixed_7a": _block_d(),
    "Mixed_7b": _block_e("average"),
    "Mixed_7c": _block_e("maximum"),
}

_SPATIAL = "Mixed_6d"


class _Convolution(nn.Module):
    """Convolution without bias, batch norm, rectifier."""

    def __init__(self, channels_in: int, spec: _Conv, padding: tuple[int, int]) -> None:
        super().__init__()
        stride = 2 if spec.halve else 1
        self.conv = nn.Conv2d(channels_in, spec.channels, spec.kernel, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(spec.channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))


class _Mixed(nn.Module):
    """Branches side by side, their channels joined in order."""

    def __init__(self, channels_in: int, branches: Sequence[_Branch]) -> None:
        super().__init__()
        self._branches = tuple(branches)
        self.channels = 0
        for branch in branches:
            channels = channels_in
            for spec in branch.trunk:
                self._add(channels, spec)
                channels = spec.channels
            for spec in branch.heads:
                self._add(channels, spec)
            self.channels += sum(spec.channels for spec in branch.heads) or channels

    def _add(self, channels_in: int, spec: _Conv) -> None:
        rows, columns = spec.kernel
        padding = (0, 0) if spec.halve else (rows // 2, columns // 2)
        self.add_module(spec.name, _Convolution(channels_in, spec, padding))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._run(branch, x) for branch in self._branches], dim=1)

    def _run(self, branch: _Branch, x: Tensor) -> Tensor:
        if branch.pool == "average":
            x = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        elif branch.pool == "maximum":
            x = F.max_pool2d(x, 3, stride=1, padding=1)
        elif branch.pool == "halve":
            x = F.max_pool2d(x, 3, stride=2)
        for spec in branch.trunk:
            x = self.get_submodule(spec.name)(x)
        if branch.heads:
            x = torch.cat([self.get_submodule(spec.name)(x) for spec in branch.heads], dim=1)
        return x


@final
class InceptionV3(nn.Module):
    """Images `[B, 3, 299, 299]` in [0, 1] -> features `[B, 2048]`, logits `[B, 1008]`, spatial `[B, 7 * 17 * 17]`."""

    SIZE = 299
    FEATURES = 2048
    CLASSES = 1008
    SPATIAL_CHANNELS = 7

    def __init__(self) -> None:
        super().__init__()
        channels = 3
        for entry in _STEM:
            if entry is not None:
                spec, padding = entry
                self.add_module(spec.name, _Convolution(channels, spec, (padding, padding)))
                channels = spec.channels
        for name, branches in _BLOCKS.items():
            block = _Mixed(channels, branches)
            self.add_module(name, block)
            channels = block.channels
        self.fc = nn.Linear(channels, self.CLASSES)

    def forward(self, images: Tensor) -> Extracted:
        # 8-bit values, shifted as the graph does it: 128 is not the middle of 0 to 255.
        x = (images * 255 - 128) / 128
        for entry in _STEM:
            x = F.max_pool2d(x, 3, stride=2) if entry is None else self.get_submodule(entry[0].name)(x)
        spatial = x
        for name in _BLOCKS:
            block = self.get_submodule(name)
            if name == _SPATIAL:
                spatial = block.get_submodule("branch1x1")(x)[:, : self.SPATIAL_CHANNELS]
            x = block(x)
        features = x.mean(dim=(2, 3))
        return Extracted(features, features @ self.fc.weight.T, spatial.flatten(1))


def cached_file() -> Path:
    """Where torch keeps what it has downloaded, and torch-fidelity with it; `TORCH_HOME` moves it."""
    return Path(torch.hub.get_dir()) / "checkpoints" / FILE


@final
class InceptionFeatures(NetworkFeatures):
    """Features of `InceptionV3`; Fréchet distances of them are FID."""

    name = "inception-2015-12-05"
    dim = InceptionV3.FEATURES
    size = InceptionV3.SIZE

    @classmethod
    def from_file(cls, path: Path | str | None = None, *, device: torch.device | str = "cpu") -> InceptionFeatures:
        """From the published file, whose hash is checked. path: None for the one in torch's cache.

        Raises MissingWeights if it is not there, EvaluationError for any other file.
        """
        what = "Inception-v3 (2015-12-05)"
        file = cached_file() if path is None else Path(path)
        download = f"{FILE}, which torch-fidelity publishes ({DOWNLOAD}),"
        then = f"put it into {cached_file().parent} or give it as inception=FILE"
        tensors = read_weights(file, what=what, download=download, sha256=SHA256, then=then)
        module = InceptionV3()
        fill_(module, tensors, path=file, what=what)
        return cls(module, device=device)
