"""Quantized layers: an ordinary operator with a quantizer before each of its operands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepquant.errors import ModelError, SpecError
from stepquant.model.first_token import FirstToken
from stepquant.model.quantizer import WeightQuantizer
from stepquant.model.transform import InputTransform

__all__ = ["Geometry", "LowRankBranch", "Matmul", "QuantizedLayer", "QuantizedMatmul", "geometry_of"]


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

    @property
    def channel_axis(self) -> int:
        """Axis of the input channels, counted from the end so that it holds for every number of leading axes."""
        return {"linear": -1, "conv1d": -2, "conv2d": -3}[self.kind]

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


class LowRankBranch(nn.Module):
    """A part of a layer's operator that is not quantized: `up (down x)`, of rank r, in floating point.

    down `[r, C, *kernel]`: the layer's operator with r outputs. up `[O, r]`: mixes these at every position.
    Parameters, so they have the model's dtype. Raises SpecError for shapes that do not go together.
    """

    def __init__(self, geometry: Geometry, down: Tensor, up: Tensor) -> None:
        super().__init__()
        if geometry.groups != 1:
            raise SpecError(f"A low-rank branch is for layers without groups, found {geometry.groups}.")
        if down.ndim < 2 or up.ndim != 2 or up.shape[1] != down.shape[0]:
            raise SpecError(
                f"A low-rank branch needs down [r, C, *kernel] and up [O, r], found {list(down.shape)} and "
                f"{list(up.shape)}."
            )
        self.geometry = geometry
        self.down = nn.Parameter(down, requires_grad=False)
        self.up = nn.Parameter(up, requires_grad=False)

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.geometry.apply(x, self.down, None)
        if self.geometry.kind == "linear":
            return F.linear(hidden, self.up)
        conv: Any = F.conv1d if self.geometry.kind == "conv1d" else F.conv2d
        result: Tensor = conv(hidden, self.up.reshape(*self.up.shape, *(1,) * len(self.geometry.stride)))
        return result

    def product(self) -> Tensor:
        """The weight that the branch stands for, `[O, C, *kernel]`."""
        return (self.up @ self.down.flatten(1)).reshape(-1, *self.down.shape[1:])


class QuantizedLayer(nn.Module):
    """A Linear, Conv1d or Conv2d whose weight and input pass through quantizers.

        y = operator(Q(x_t), Q(W_t - up down)) + up (down x_t) + b,    x_t = input_transform(x)

    weight: float; on the quantizer's grid once `on_grid` is set, and then used as it is.
    weight_quantizer, input_quantizer: a quantizer of `model.quantizer`, None for floating point. While calibrating,
        anything with the same call may sit here.
    input_transform: what happens to the input before anything else; its inverse is part of `weight`. None: nothing.
    branch: the part of the operator that stays in floating point; it is no part of `weight`. None: there is none.
    first_token: of a linear layer for tokens `[B, T, C]`: the first one passes by the input quantizer, and where it is
        the known one, its output is what it says. None: all tokens alike.
    split, second_quantizer: of a layer whose input is two tensors side by side: `input_quantizer` is for the first
        `split` channels, `second_quantizer` for the others. None: the input is one tensor.
    """

    def __init__(self, geometry: Geometry, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.geometry = geometry
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.weight_quantizer: nn.Module | None = None
        self.input_quantizer: nn.Module | None = None
        self.input_transform: InputTransform | None = None
        self.branch: LowRankBranch | None = None
        self.first_token: FirstToken | None = None
        self.second_quantizer: nn.Module | None = None
        self.split: int | None = None
        self.on_grid = False

    def forward(self, x: Tensor) -> Tensor:
        if self.first_token is None:
            return self._computed(x)
        first, others = x[:, :1], x[:, 1:]
        head = self.first_token(first, self._computed(first, rounded=False))
        return torch.cat([head, self._computed(others)], 1)

    def _computed(self, x: Tensor, *, rounded: bool = True) -> Tensor:
        """The formula above; rounded: whether the input passes through its quantizer."""
        if self.input_transform is not None:
            x = self.input_transform(x)
        beside = None if self.branch is None else self.branch(x)
        if rounded:
            x = self._rounded(x)
        weight = self.weight
        if self.weight_quantizer is not None and not self.on_grid:
            weight = self.weight_quantizer(weight)
        y = self.geometry.apply(x, weight, self.bias)
        return y if beside is None else y + beside

    def _rounded(self, x: Tensor) -> Tensor:
        first, second = self.input_quantizer, self.second_quantizer
        if self.split is None or (first is None and second is None):
            return x if first is None else first(x)
        axis = self.geometry.channel_axis
        parts = x.narrow(axis, 0, self.split), x.narrow(axis, self.split, self.in_features - self.split)
        pairs = zip(parts, (first, second), strict=True)
        return torch.cat([part if quantizer is None else quantizer(part) for part, quantizer in pairs], axis)

    def split_input_(self, at: int) -> None:
        """Have two quantizers for the input, the first for the channels before `at`.

        Raises SpecError unless the layer is a convolution without groups whose input has more than `at` channels.
        """
        if self.geometry.kind == "linear" or self.geometry.groups != 1:
            raise SpecError("Only the input of a convolution without groups may have two parts with a quantizer each.")
        if not 0 < at < self.in_features:
            raise SpecError(f"The input of {self.in_features} channels cannot be split at channel {at}.")
        self.split = at

    def folded(self, weight: Tensor) -> Tensor:
        """What `self.weight` stands for in full precision: W_t less the branch, of the full-precision `weight`."""
        wide = weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight
        if self.input_transform is not None:
            wide = self.input_transform.fold(wide)
        if self.branch is not None:
            wide = wide - self.branch.product().to(wide.dtype)
        return wide.to(weight.dtype)

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
