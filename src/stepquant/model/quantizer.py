"""The closed set of quantizers that a saved model may hold. None of them knows how its parameters were found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor, nn

from stepquant.errors import SpecError
from stepquant.model.clock import StepClock, keep_float32
from stepquant.numerics.affine import (
    MIN_SCALE,
    Levels,
    QParams,
    choose_qparams,
    dequantize,
    fake_quantize,
    grouped,
    quantize,
    range_of,
)
from stepquant.numerics.log2 import fake_quantize_log2
from stepquant.numerics.spec import QuantSpec, row_spec

__all__ = ["DynamicQuantizer", "InputQuantizer", "LogQuantizer", "WeightQuantizer"]


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


class _TimestepTable(nn.Module):
    """Rows of parameters and which of them each timestep bin uses.

    row_of_bin `[N]`: the row of each bin of the clock. One layer may use one row, another eight, another one per step.
    """

    scale: Tensor
    row_of_bin: Tensor
    clock: StepClock
    channel_axis = -1

    def _set_rows(self, clock: StepClock, row_of_bin: Tensor | None) -> None:
        if row_of_bin is None:
            row_of_bin = torch.zeros(clock.bins, dtype=torch.int64)
        if len(row_of_bin) != clock.bins:
            raise SpecError(f"row_of_bin must name a row for each of the {clock.bins} bins, found {len(row_of_bin)}.")
        # Not registered: the clock is the denoiser's submodule; a second path would double it in every state dict.
        object.__setattr__(self, "clock", clock)
        self.register_buffer("row_of_bin", row_of_bin.detach().to(torch.int64).clone())

    @property
    def rows(self) -> int:
        """Number of parameter sets."""
        return len(self.scale)

    def _now(self, x: Tensor, *tables: Tensor) -> tuple[Tensor, ...]:
        """The rows of tables `[R]` or `[R, C]` at the clock's present bin(s), broadcastable against x."""
        if self.rows == 1:
            return tuple(self._beside(table, x) for table in tables)
        row = self.row_of_bin.index_select(0, self.clock.bin)
        found = [table.index_select(0, row) for table in tables]
        if len(row) > 1:
            # Heads or frames may have been folded into the batch: each sample's parameters repeat for its parts.
            repeat = x.shape[0] // len(row)
            found = [values.repeat_interleave(repeat, 0) for values in found]
        return tuple(self._beside(values, x) for values in found)

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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:  # noqa: ARG002
        keep_float32(self, fn)
        return self


class InputQuantizer(_TimestepTable):
    """Static quantizer of an activation, per tensor or per channel, with a table over time.

    scale, zero_point `[R]` (spec.granularity "tensor") or `[R, C]` ("channel"): one row per parameter set.
    row_of_bin `[N]`: which row each timestep bin of the clock uses.
    channel_axis: where the C channels are in the activation; ignored per tensor.
    bits: of all rows, or a number for each row, 2 to 16; None: those of the spec. Rows with other bits than the spec
        have other levels, `-2^(bits-1)` to `2^(bits-1) - 1` or `0` to `2^bits - 1`. Equal bits up to 8 become the
        spec's.

    Raises SpecError for a spec of another granularity, for bits out of range, and for tables of another shape.
    """

    zero_point: Tensor
    qmin: Tensor
    qmax: Tensor

    difference: float = 0.0
    """Share by which the scale moves up and down for its gradient (`fake_quantize`); 0: straight through. Set while the
    scale learns, and no part of the state."""

    def __init__(
        self,
        spec: QuantSpec,
        clock: StepClock,
        params: QParams,
        row_of_bin: Tensor | None = None,
        *,
        channel_axis: int = -1,
        bits: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if spec.granularity not in ("tensor", "channel") or spec.dynamic or spec.logarithmic:
            raise SpecError(
                f"A static activation quantizer has evenly spaced levels and one scale per tensor or per channel, "
                f"found {spec}."
            )
        if spec.granularity == "channel" and (params.scale.ndim != 2 or params.scale.shape != params.zero_point.shape):
            raise SpecError(
                "A quantizer per channel needs scales and zero points [rows, channels], found shapes "
                f"{list(params.scale.shape)} and {list(params.zero_point.shape)}."
            )
        self.channel_axis = channel_axis
        shape = params.scale.shape if spec.granularity == "channel" else (-1,)
        self.register_buffer("scale", params.scale.detach().float().reshape(shape).clone())
        self.register_buffer("zero_point", params.zero_point.detach().float().reshape(shape).clone())
        self._set_rows(clock, row_of_bin)
        self._set_bits(spec, bits)

    def _set_bits(self, spec: QuantSpec, bits: int | Sequence[int] | None) -> None:
        given = (spec.bits,) * self.rows if bits is None else (bits,) * self.rows if isinstance(bits, int) else bits
        each = tuple(given)
        if len(each) != self.rows:
            raise SpecError(f"bits must be one number, or one for each of the {self.rows} rows, found {len(each)}.")
        specs = [row_spec(spec, found) for found in each]
        self.spec, self.row_bits = QuantSpec(**vars(spec)), None
        if len({*each}) <= 1 and max(each, default=0) <= 8:
            self.spec = replace(self.spec, bits=max(each, default=spec.bits))
            return
        self.row_bits = each
        # Follow from the bits, which the structure holds: no part of the state.
        low, high = [one.qmin for one in specs], [one.qmax for one in specs]
        self.register_buffer("qmin", torch.tensor(low, dtype=torch.float32), persistent=False)
        self.register_buffer("qmax", torch.tensor(high, dtype=torch.float32), persistent=False)

    spec: QuantSpec
    row_bits: tuple[int, ...] | None
    """Bits of each row; None where all have those of the spec."""

    @property
    def bits(self) -> tuple[int, ...]:
        """Bits of each row."""
        return (self.spec.bits,) * self.rows if self.row_bits is None else self.row_bits

    @property
    def row_specs(self) -> tuple[QuantSpec, ...]:
        """The spec of each row."""
        return tuple(row_spec(self.spec, bits) for bits in self.bits)

    def current(self, x: Tensor) -> QParams:
        """Parameters at the clock's present bin(s), broadcastable against x."""
        return QParams(*self._now(x, self.scale, self.zero_point))

    def levels(self, x: Tensor) -> QuantSpec | Levels:
        """Lowest and highest level at the clock's present bin(s): the spec, unless rows have bits of their own."""
        return self.spec if self.row_bits is None else Levels(*self._now(x, self.qmin, self.qmax))

    def forward(self, x: Tensor) -> Tensor:
        return fake_quantize(x, self.current(x), self.levels(x), difference=self.difference)


class LogQuantizer(_TimestepTable):
    """Static quantizer of an activation that is never negative, with levels at powers of two in some of its rows.

    scale `[R]`: the largest value of a row with levels at powers of two, the step between levels of the others.
    logarithmic `[R]`: bool, which rows have levels at powers of two (`numerics.log2`).
    row_of_bin `[N]`: which row each timestep bin of the clock uses.

    Raises SpecError for a spec without `logarithmic`, and for tables of another shape.
    """

    logarithmic: Tensor

    def __init__(
        self,
        spec: QuantSpec,
        clock: StepClock,
        scale: Tensor,
        logarithmic: Tensor,
        row_of_bin: Tensor | None = None,
    ) -> None:
        super().__init__()
        if not spec.logarithmic:
            raise SpecError(f"Levels at powers of two need a spec that says so (logarithmic=True), found {spec}.")
        if scale.ndim != 1 or scale.shape != logarithmic.shape:
            raise SpecError(
                f"A quantizer with levels at powers of two needs scales and choices [rows], found shapes "
                f"{list(scale.shape)} and {list(logarithmic.shape)}."
            )
        self.spec = spec
        self.register_buffer("scale", scale.detach().float().clone())
        self.register_buffer("logarithmic", logarithmic.detach().bool().clone())
        self._set_rows(clock, row_of_bin)

    def forward(self, x: Tensor) -> Tensor:
        scale, logarithmic = self._now(x, self.scale, self.logarithmic)
        # Both are computed and one is taken: asking which it is would stop an accelerator at every call.
        uniform = fake_quantize(x, QParams(scale, torch.zeros_like(scale)), self.spec)
        return torch.where(logarithmic, fake_quantize_log2(x, scale, self.spec), uniform)


class DynamicQuantizer(nn.Module):
    """Quantizer whose range is that of the tensor at hand: per tensor (of one sample) or per token (last axis).

    Per channel and token, x `[B, ..., C]` of N tokens a sample:

        s_c = max_n |x_nc|,   d_n = max_c |x_nc / s_c|,   x_hat_nc = s_c (d_n / qmax) round(qmax x_nc / (s_c d_n))

    Where a sample is a single token, s would be the token itself, and is 1.
    Source: LSGQuant (arXiv:2602.03182), the dynamic range adaptive quantizer.
    """

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__()
        if not spec.dynamic or spec.granularity not in ("tensor", "token", "channel_token"):
            raise SpecError(
                f"A dynamic quantizer works per tensor or per token, or per channel and token, found {spec}."
            )
        self.spec = spec

    def forward(self, x: Tensor) -> Tensor:
        if self.spec.granularity == "channel_token":
            return self._by_channel_and_token(x)
        return fake_quantize(x, self.current(x), self.spec)

    def current(self, x: Tensor) -> QParams:
        """Parameters of x itself, broadcastable against it: `[..., 1]` per token, `[B, 1, ...]` per tensor.

        Per channel and token there are two factors, and none of these.
        """
        if self.spec.granularity == "token":
            low, high = range_of(x.detach(), self.spec)
        else:
            flat = x.detach().reshape(x.shape[0], -1)
            shape = (x.shape[0],) + (1,) * (x.ndim - 1)
            low, high = flat.amin(1).reshape(shape), flat.amax(1).reshape(shape)
        return choose_qparams(low, high, self.spec)

    def levels(self, x: Tensor) -> QuantSpec:  # noqa: ARG002
        """Lowest and highest level, as `InputQuantizer.levels` tells them."""
        return self.spec

    def _by_channel_and_token(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        between = tuple(range(1, x.ndim - 1))
        sizes = wide.detach().abs()
        if x.shape[1:-1].numel() > 1:
            channels = sizes.amax(between, keepdim=True).clamp(min=MIN_SCALE)
        else:
            channels = torch.ones_like(sizes[:1])
        scale = ((sizes / channels).amax(-1, keepdim=True) / self.spec.qmax).clamp(min=MIN_SCALE)
        rounded = fake_quantize(wide / channels, QParams(scale, torch.zeros_like(scale)), self.spec)
        return (rounded * channels).to(x.dtype)
