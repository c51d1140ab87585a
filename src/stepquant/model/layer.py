"""Quantized layers: an ordinary operator with a quantizer before each of its operands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from stepquant.errors import ModelError
from stepquant.model.quantizer import WeightQuantizer

__all__ = ["Geometry", "Matmul", "QuantizedLayer", "QuantizedMatmul", "geometry_of"]


@dataclass(frozen=True)
class Geometry:
    """What a layer's operator is, apart from its weight: enough to run and to rebuild it.

    kind: linear, conv1d or conv2d. The other fields are empty for linear.
    padding: per spatial axis, or "same".
    """

    kind: Literal["linear", "conv1d", "conv2d"]
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    padding_mode: str = "zeros"

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The operator itself. x: `[..., in]` (linear) or `[B, in, *spatial]`."""
        if self.kind == "linear":
            return F.linear(x, weight, bias)
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            assert not isinstance(padding, str)
            pads = [side for width in reversed(padding) for side in (width, width)]
            x, padding = F.pad(x, pads, mode=self.padding_mode), 0
        conv = F.conv1d if self.kind == "conv1d" else F.conv2d
        return conv(x, weight, bias, self.stride, padding, self.dilation, self.groups)


def geometry_of(layer: nn.Module) -> Geometry:
    """The geometry of a float layer."""
    if isinstance(layer, nn.Linear):
        return Geometry("linear")
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        if isinstance(layer.padding, str) and layer.padding_mode != "zeros":
            raise ModelError(f"A convolution with padding={layer.padding!r} and {layer.padding_mode!r} is unsupported.")
        padding = "same" if layer.padding == "same" else () if layer.padding == "valid" else layer.padding
        if padding == ():
            padding = (0,) * len(layer.stride)
        return Geometry(
            "conv1d" if isinstance(layer, nn.Conv1d) else "conv2d",
            tuple(layer.stride),
            padding if isinstance(padding, str) else tuple(int(width) for width in padding),
            tuple(layer.dilation),
            layer.groups,
            layer.padding_mode,
        )
    raise ModelError(f"Only Linear, Conv1d and Conv2d layers are quantized, found {type(layer).__name__}.")


class QuantizedLayer(nn.Module):
    """A Linear, Conv1d or Conv2d whose weight and input pass through quantizers.

    weight: float; on the quantizer's grid once `on_grid` is set, and then used as it is.
    weight_quantizer, input_quantizer: a quantizer of `model.quantizer`, None for floating point. While calibrating,
        anything with the same call may sit here.
    """

    def __init__(self, geometry: Geometry, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.geometry = geometry
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.weight_quantizer: nn.Module | None = None
        self.input_quantizer: nn.Module | None = None
        self.on_grid = False

    def forward(self, x: Tensor) -> Tensor:
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        weight = self.weight
        if self.weight_quantizer is not None and not self.on_grid:
            weight = self.weight_quantizer(weight)
        return self.geometry.apply(x, weight, self.bias)

    def harden_(self) -> None:
        """Replace the weight by its quantized value, so that it need not be rounded again. Needs a WeightQuantizer."""
        if self.weight_quantizer is None or self.on_grid:
            return
        if not isinstance(self.weight_quantizer, WeightQuantizer):
            raise ModelError(
                f"A layer still holds {type(self.weight_quantizer).__name__} in its weight quantizer's place: the "
                "stage that put it there must harden it before the model is saved or measured."
            )
        self.weight.data = self.weight_quantizer(self.weight.data)
        self.on_grid = True

    @property
    def in_features(self) -> int:
        return self.weight.shape[1] * self.geometry.groups

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    in_channels = in_features
    out_channels = out_features

    def extra_repr(self) -> str:
        return f"{self.geometry.kind}, {list(self.weight.shape)}, bias={self.bias is not None}"


class Matmul(nn.Module):
    """`left @ right` as a module, so that the two matmuls of attention can be found and quantized.

    role: "scores" (queries by keys) or "values" (softmax output by values). The left operand of "values" is never
        negative, so its quantizer gets zero point 0.
    """

    def __init__(self, role: Literal["scores", "values"]) -> None:
        super().__init__()
        self.role = role

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return left @ right


class QuantizedMatmul(nn.Module):
    """`left @ right` with a quantizer before each operand."""

    def __init__(self, role: Literal["scores", "values"]) -> None:
        super().__init__()
        self.role = role
        self.input_quantizer: nn.Module | None = None
        self.second_quantizer: nn.Module | None = None

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        if self.input_quantizer is not None:
            left = self.input_quantizer(left)
        if self.second_quantizer is not None:
            right = self.second_quantizer(right)
        return left @ right
