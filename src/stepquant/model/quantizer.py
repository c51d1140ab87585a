"""The closed set of quantizers that a saved model may hold. None of them knows how its parameters were found."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from stepquant.errors import SpecError
from stepquant.model.clock import StepClock, keep_float32
from stepquant.numerics.affine import (
    QParams,
    choose_qparams,
    dequantize,
    fake_quantize,
    grouped,
    quantize,
    range_of,
)
from stepquant.numerics.spec import QuantSpec

__all__ = ["DynamicQuantizer", "InputQuantizer", "WeightQuantizer"]


class WeightQuantizer(nn.Module):
    """Scales and zero points of one weight. Weights do not change over time, so there is no timestep table.

    scale, zero_point: float32, `[1, 1]` (tensor), `[O, 1]` (channel) or `[O, G, 1]` (group).
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, spec: QuantSpec, params: QParams) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("scale", params.scale.detach().float().clone())
        self.register_buffer("zero_point", params.zero_point.detach().float().clone())

    @property
    def params(self) -> QParams:
        return QParams(self.scale, self.zero_point)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight on its grid, in the weight's shape and dtype."""
        return fake_quantize(grouped(weight, self.spec), self.params, self.spec).reshape(weight.shape)

    def levels(self, weight: Tensor) -> Tensor:
        """Integer levels of the weight as int16, in the weight's shape."""
        return quantize(grouped(weight, self.spec), self.params, self.spec).reshape(weight.shape).to(torch.int16)

    def restore(self, levels: Tensor) -> Tensor:
        """Float32 weight of integer levels: the inverse of `levels` on the grid."""
        return dequantize(grouped(levels.float(), self.spec), self.params).reshape(levels.shape)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WeightQuantizer:  # noqa: ARG002
        keep_float32(self, fn)
        return self


class InputQuantizer(nn.Module):
    """Static quantizer of an activation, per tensor or per channel, with a table over time.

    scale, zero_point `[R]` (spec.granularity "tensor") or `[R, C]` ("channel"): one row per parameter set.
    row_of_bin `[N]`: which row each timestep bin of the clock uses. One layer may use one row, another eight, another
        one per step.
    channel_axis: where the C channels are in the activation; ignored per tensor.

    Raises SpecError for a spec of another granularity, and for tables of another shape.
    """

    scale: Tensor
    zero_point: Tensor
    row_of_bin: Tensor

    def __init__(
        self,
        spec: QuantSpec,
        clock: StepClock,
        params: QParams,
        row_of_bin: Tensor | None = None,
        *,
        channel_axis: int = -1,
    ) -> None:
        super().__init__()
        if spec.granularity not in ("tensor", "channel") or spec.dynamic:
            raise SpecError(f"A static activation quantizer has one scale per tensor or per channel, found {spec}.")
        if spec.granularity == "channel" and (params.scale.ndim != 2 or params.scale.shape != params.zero_point.shape):
            raise SpecError(
                "A quantizer per channel needs scales and zero points [rows, channels], found shapes "
                f"{list(params.scale.shape)} and {list(params.zero_point.shape)}."
            )
        if row_of_bin is None:
            row_of_bin = torch.zeros(clock.bins, dtype=torch.int64)
        if len(row_of_bin) != clock.bins:
            raise SpecError(f"row_of_bin must name a row for each of the {clock.bins} bins, found {len(row_of_bin)}.")
        self.spec = spec
        self.channel_axis = channel_axis
        # Not registered: the clock is the denoiser's submodule; a second path would double it in every state dict.
        object.__setattr__(self, "clock", clock)
        shape = params.scale.shape if spec.granularity == "channel" else (-1,)
        self.register_buffer("scale", params.scale.detach().float().reshape(shape).clone())
        self.register_buffer("zero_point", params.zero_point.detach().float().reshape(shape).clone())
        self.register_buffer("row_of_bin", row_of_bin.detach().to(torch.int64).clone())

    clock: StepClock

    @property
    def rows(self) -> int:
        """Number of parameter sets."""
        return len(self.scale)

    def current(self, x: Tensor) -> QParams:
        """Parameters at the clock's present bin(s), broadcastable against x."""
        if self.rows == 1:
            return QParams(self._beside(self.scale, x), self._beside(self.zero_point, x))
        row = self.row_of_bin.index_select(0, self.clock.bin)
        scale, zero_point = self.scale.index_select(0, row), self.zero_point.index_select(0, row)
        if len(row) > 1:
            # Heads or frames may have been folded into the batch: each sample's parameters repeat for its parts.
            repeat = x.shape[0] // len(row)
            scale, zero_point = scale.repeat_interleave(repeat, 0), zero_point.repeat_interleave(repeat, 0)
        return QParams(self._beside(scale, x), self._beside(zero_point, x))

    def _beside(self, values: Tensor, x: Tensor) -> Tensor:
        """`[K]` or `[K, C]` with axes of length 1 put in, so that it broadcasts against x; K is 1 or the batch."""
        if len(values) == 1 and values.ndim == 1:
            return values
        shape = [1] * x.ndim
        if len(values) > 1:
            shape[0] = len(values)
        if values.ndim == 2:
            shape[self.channel_axis] = values.shape[1]
        return values.reshape(shape)

    def forward(self, x: Tensor) -> Tensor:
        return fake_quantize(x, self.current(x), self.spec)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> InputQuantizer:  # noqa: ARG002
        keep_float32(self, fn)
        return self


class DynamicQuantizer(nn.Module):
    """Quantizer whose range is that of the tensor at hand: per tensor (of one sample) or per token (last axis)."""

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__()
        if not spec.dynamic or spec.granularity not in ("tensor", "token"):
            raise SpecError(f"A dynamic quantizer works per tensor or per token, found {spec}.")
        self.spec = spec

    def forward(self, x: Tensor) -> Tensor:
        if self.spec.granularity == "token":
            low, high = range_of(x.detach(), self.spec)
        else:
            flat = x.detach().reshape(x.shape[0], -1)
            shape = (x.shape[0],) + (1,) * (x.ndim - 1)
            low, high = flat.amin(1).reshape(shape), flat.amax(1).reshape(shape)
        return fake_quantize(x, choose_qparams(low, high, self.spec), self.spec)
