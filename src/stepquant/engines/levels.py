"""What layers have in common whose weight is kept as levels: what others read of a convolution or linear layer."""

from __future__ import annotations

import torch
from torch import nn

from stepquant.model.layer import Geometry
from stepquant.model.quantizer import WeightQuantizer

__all__ = ["LevelsLayer"]


class LevelsLayer(nn.Module):
    """Abstract: subclasses say how levels are kept and what runs them.

    geometry: what the layer does. shape: of the weight that the levels stand for. bias: `[O]` or None.
    """

    geometry: Geometry
    shape: torch.Size
    weight_quantizer: WeightQuantizer

    @property
    def in_features(self) -> int:
        return self.shape[1] * self.geometry.groups

    @property
    def out_features(self) -> int:
        return self.shape[0]

    in_channels = in_features
    out_channels = out_features

    def extra_repr(self) -> str:
        spec = self.weight_quantizer.spec
        return f"{self.geometry.kind}, {list(self.shape)}, {spec.bits} bits, bias={self.bias is not None}"
