"""A quantized denoiser as one integer graph: its layers in a form that exporters understand, and the export itself.

`lower` copies a denoiser and puts a `GraphLayer` in the place of every layer that can run on integers. A GraphLayer
holds the layer's own levels as int8 and writes explicit quantize and dequantize operators (Q, DQ) when it is exported;
run by torch it computes what the layer computes. With one parameter set they carry its scale s and zero point z:

    y = conv(DQ(Q(x; s, z)), w) + b

Graph engines keep integer kernels for constant scales only. With several parameter sets the scale is therefore taken
out of the operators ("norm form"): g is the row of the present timestep bin, s_g is gathered from a table in the graph.

    y = s_g * conv(DQ(Q(x / s_g; 1, z)), w) + b                                rows with one zero point
    y = s_g * (conv(Q(x / s_g + z_g - c; 1, c), w) - c sum(w) + z_g w_p) + b_g rows with several
    b_g = b - (z_g - c) s_g sum(w)                                             c: the median of the z_g

In the last form z_g stands for 0, and so it is what should pad a convolution. That pads with 0, and so z_g times the
weights that meet padding, w_p, is added: a pass over the input less. The operator itself takes c sum(w) off, a number
for each channel; what is left of the zero points is small beside the result, which floating point of few bits between
operators needs. Graphs multiply by 1 / s_g where the simulation divides by s_g: an input within float32 rounding of the
border between two levels may come out on its other side.

Graphs in bfloat16 round s_g and 1 / s_g, too, by up to 0.4 %, the same for all values of a layer. There x s_g is
written x h + x r with h = bfloat16(s_g) and r = s_g - h, which leaves an error of 2^-17.

Weights are int8: q - z where that fits. Asymmetric weights of 8 bits may need nine bits there; they run as two
operators, the second with a single output channel, and the sum is exactly the same:

    conv(x, (q - z) * s_w) = conv(x, (q - c) * s_w) + (c - z) * s_w * conv(x, 1)

What scales or rotates a layer's input, and a low-rank branch beside it, stay in floating point around these operators.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepquant.engines.borders import MOST_PATTERNS, Border, border_of
from stepquant.errors import EngineError
from stepquant.model.clock import StepClock, clock_of
from stepquant.model.layer import QuantizedLayer, QuantizedMatmul
from stepquant.model.quantizer import InputQuantizer, LogQuantizer, WeightQuantizer
from stepquant.model.surgery import quantized_layers
from stepquant.model.transform import InputTransform

__all__ = [
    "BIN",
    "GraphInput",
    "GraphLayer",
    "GraphMatmul",
    "Lowered",
    "Outputs",
    "export",
    "filled",
    "lower",
    "plain_arithmetic",
    "refusal",
    "tensors_of",
]

OPSET = 18
CENTRE = 128
BIN = "stepquant_bin"
"""Name of the graph's input for the timestep bin, where the bin is not computed inside."""


def _quantized(x: Tensor, scale: float, zero_point: int, signed: bool, raised: bool) -> Tensor:
    """raised: the zero point stays in the result."""
    low, high = (-128, 127) if signed else (0, 255)
    levels = torch.div(x, scale).round_().add_(zero_point).clamp_(low, high)
    return levels.sub_(0 if raised else zero_point).mul_(scale)


def _dequantized(levels: Tensor, scale: Tensor, axis: int) -> Tensor:
    shape = [1] * levels.ndim
    shape[axis] = -1
    return levels.float() * scale.reshape(shape)


# Operators of our own, so that the exporter sees one node where it would see round, clamp and the rest.
_library: Any = torch.library.Library
_LIBRARY = _library("stepquant", "DEF")
_LIBRARY.define("quantized(Tensor x, float scale, int zero_point, bool signed, bool raised) -> Tensor")
_LIBRARY.define("dequantized(Tensor levels, Tensor scale, int axis) -> Tensor")
_LIBRARY.impl("quantized", _quantized, "CompositeExplicitAutograd")
_LIBRARY.impl("dequantized", _dequantized, "CompositeExplicitAutograd")
_MOVEDIM = "aten::movedim"
_quantize, _restore = torch.ops.stepquant.quantized, torch.ops.stepquant.dequantized


def _register_symbols() -> None:
    """Tell torch's exporter what our operators are in ONNX."""
    from torch.onnx import symbolic_helper

    exporter: Any = torch.onnx
    constant: Any = symbolic_helper._get_const

    def quantized(g: Any, x: Any, scale: Any, zero_point: Any, signed: Any, raised: Any) -> Any:
        kind = torch.int8 if constant(signed, "b", "signed") else torch.uint8
        s = g.op("Constant", value_t=torch.tensor(constant(scale, "f", "scale"), dtype=torch.float32))
        z = g.op("Constant", value_t=torch.tensor(constant(zero_point, "i", "zero_point"), dtype=kind))
        levels = g.op("QuantizeLinear", x, s, z)
        if constant(raised, "b", "raised"):
            z = g.op("Constant", value_t=torch.tensor(0, dtype=kind))
        return g.op("DequantizeLinear", levels, s, z).setType(x.type())

    def dequantized(g: Any, levels: Any, scale: Any, axis: Any) -> Any:
        restored = g.op("DequantizeLinear", levels, scale, axis_i=constant(axis, "i", "axis"))
        return restored.setType(scale.type().with_sizes(levels.type().sizes()))

    def movedim(g: Any, x: Any, source: Any, destination: Any) -> Any:
        # For negative axes torch's own form has negative numbers in the order, which ONNX does not have.
        rank: Any = symbolic_helper._get_tensor_rank(x)
        ends = (constant(value, "t", "dim").reshape(-1).tolist() for value in (source, destination))
        return g.op("Transpose", x, perm_i=_order_of(rank, *ends))

    exporter.register_custom_op_symbolic("stepquant::quantized", quantized, OPSET)
    exporter.register_custom_op_symbolic("stepquant::dequantized", dequantized, OPSET)
    exporter.register_custom_op_symbolic(_MOVEDIM, movedim, OPSET)


def _order_of(rank: int, source: list[int], destination: list[int]) -> list[int]:
    """The permutation of axes that `movedim` is."""
    goes = {to % rank: at % rank for at, to in zip(source, destination, strict=True)}
    others = (axis for axis in range(rank) if axis not in goes.values())
    return [goes[axis] if axis in goes else next(others) for axis in range(rank)]


def refused_for_hooks(layer: nn.Module) -> str | None:
    """Why no engine but `simulated` runs a layer that somebody watches or changes, as a sentence, or None."""
    if layer._forward_hooks or layer._forward_pre_hooks:
        return "It has a forward hook, which a layer of another kind in its place would not call."
    return None


def refusal(layer: QuantizedLayer | QuantizedMatmul) -> str | None:
    """Why a layer cannot run on integers in a graph, as a sentence, or None. Reads no values."""
    hooked = refused_for_hooks(layer)
    if hooked is not None:
        return hooked
    if isinstance(layer, QuantizedMatmul):
        operands = {"left operand": layer.input_quantizer, "right operand": layer.second_quantizer}
    else:
        operands = {"input": layer.input_quantizer}
        quantizer = layer.weight_quantizer
        if quantizer is None:
            return "Its weight is not quantized, so it runs in floating point inside the graph."
        if not isinstance(quantizer, WeightQuantizer):
            return f"Its weight quantizer is a {type(quantizer).__name__}, which only calibration has."
        if not layer.on_grid:
            return "Its weight has not been hardened."
        if quantizer.scale.ndim == 3 and quantizer.scale.shape[1] > 1:
            return (
                "Its weight has several scales in an output channel, and integer kernels have one: it runs as "
                "simulated arithmetic inside the graph."
            )
        if layer.first_token is not None:
            return (
                "Its first token passes by the input quantizer, and an integer kernel treats all tokens alike: it runs "
                "as simulated arithmetic inside the graph."
            )
        if layer.split is not None:
            return (
                "Its input has two quantizers, one for each part of a concatenation, and an integer kernel has one: it "
                "runs as simulated arithmetic inside the graph."
            )
    for name, found in operands.items():
        if isinstance(found, LogQuantizer):
            return (
                f"Its {name} has levels at powers of two, and integer kernels have evenly spaced ones: it runs as "
                "simulated arithmetic inside the graph."
            )
        if found is None:
            return f"Its {name} is not quantized, so it runs in floating point inside the graph."
        if not isinstance(found, InputQuantizer):
            return (
                f"The range of its {name} is found at run time ({type(found).__name__}): it runs as simulated "
                "arithmetic inside the graph."
            )
        if found.spec.granularity == "channel":
            return (
                f"Its {name} has a scale per channel, and integer kernels have one per tensor: it runs as simulated "
                "arithmetic inside the graph."
            )
        if max(found.bits) > 8:
            return (
                f"Its {name} has {max(found.bits)} bits at some timesteps, and integer kernels have at most 8: it runs "
                "as simulated arithmetic inside the graph."
            )
    return None


def present(values: Tensor, at: Tensor, beside: Tensor) -> Tensor:
    """The value at a place, `[1, 1, ...]` with as many axes as the tensor beside it.

    OpenVINO keeps the layout of convolutions through elementwise operators only where all operands have as many axes.
    """
    return values.index_select(0, at).reshape((1,) * beside.ndim)


class GraphInput(nn.Module):
    """A static quantizer, per tensor, as a graph has it.

    reciprocal, step: `_Factor`s 1 / s and s of the row that each timestep bin uses; None for constants.
    zero_point: c, where the rows' z differ. There, zeros `[rows]`: z; shift `[bins]`: z - c of the row that each bin
        uses. None where all are alike.
    low, high `[bins]`: ends of the row's levels in units of `factor`, where rows have different bits.
    limits: the same where they all have the same, fewer than 8; lowest, highest: by channel, where `channels` says so.
    shifted: whether the rows' zero points differ.
    """

    def __init__(
        self,
        quantizer: InputQuantizer,
        clock: StepClock,
        *,
        short: bool = False,
        channels: tuple[int, ...] | None = None,
    ) -> None:
        """short: the graph will be in bfloat16.
        channels: the shape of what the input is divided by right before, by channel; None if it is not.
        """
        super().__init__()
        object.__setattr__(self, "clock", clock)
        spec, scale, zero_point = quantizer.spec, quantizer.scale.cpu(), quantizer.zero_point.cpu()
        self.signed = spec.symmetric
        self.several = len(scale) > 1
        self.shifted = bool((zero_point != zero_point[0]).any())
        self.zero_point = int(zero_point.median())
        self.scale = 1.0 if self.several else float(scale[0])
        self.limits = None
        if quantizer.row_bits is None and spec.bits < 8:
            self.limits = ((spec.qmin - self.zero_point) * self.scale, (spec.qmax - self.zero_point) * self.scale)
        # Where the batch is free, OpenVINO 2026.4 joins a product by channel, a clamp between two numbers and the
        # rounding behind it into one operator, which mistakes the channels' factors. Limits by channel keep them apart.
        ends_by_channel: tuple[Tensor | None, Tensor | None] = (None, None)
        if self.limits is not None and channels is not None:
            ends_by_channel = (torch.full(channels, self.limits[0]), torch.full(channels, self.limits[1]))
        self.register_buffer("lowest", ends_by_channel[0])
        self.register_buffer("highest", ends_by_channel[1])
        row = quantizer.row_of_bin.cpu()
        self.register_buffer("row_of_bin", row if self.several else None)
        self.reciprocal = _Factor(scale.reciprocal()[row], short) if self.several else None
        self.step = _Factor(scale[row], short) if self.several else None
        self.register_buffer("shift", (zero_point - self.zero_point)[row] if self.shifted else None)
        self.register_buffer("zeros", zero_point if self.shifted else None)
        levels = [(spec.qmin, spec.qmax) for spec in quantizer.row_specs]
        ends = torch.tensor(levels, dtype=torch.float32) - self.zero_point
        mixed = quantizer.row_bits is not None
        self.register_buffer("low", ends[row, 0] if mixed else None)
        self.register_buffer("high", ends[row, 1] if mixed else None)

    clock: StepClock
    row_of_bin: Tensor | None
    shift: Tensor | None
    zeros: Tensor | None
    low: Tensor | None
    high: Tensor | None
    lowest: Tensor | None
    highest: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """x on its grid, divided by the present row's scale if rows have several; its levels, from 0, if `shifted`."""
        if self.reciprocal is not None:
            x = self.reciprocal(x, self.clock.bin)
        if self.shift is not None:
            x = x + present(self.shift, self.clock.bin, x)
        if self.lowest is not None and self.highest is not None:
            x = torch.minimum(torch.maximum(x, self.lowest), self.highest)
        elif self.limits is not None:
            x = x.clamp(*self.limits)
        if self.low is not None and self.high is not None:
            low, high = (present(ends, self.clock.bin, x) for ends in (self.low, self.high))
            x = torch.minimum(torch.maximum(x, low), high)
        quantized: Tensor = _quantize(x, self.scale, self.zero_point, self.signed, self.shifted)
        return quantized

    def zero(self, y: Tensor) -> Tensor:
        """The present row's zero point, beside y; for `shifted` rows."""
        assert self.shift is not None
        return present(self.shift, self.clock.bin, y) + self.zero_point

    def times_zero(self, values: Tensor, y: Tensor) -> Tensor:
        """The present row's zero point times values along y's last axis, with as many axes as y; for `shifted` rows."""
        assert self.zeros is not None
        assert self.row_of_bin is not None
        row = self.row_of_bin.index_select(0, self.clock.bin)
        return (self.zeros[:, None] * values).index_select(0, row).reshape(*(1,) * (y.ndim - 1), -1)

    def times_scale(self, y: Tensor) -> Tensor:
        """y in units of the input's scale, times the present row's; y itself if the scale is part of the operators."""
        scaled: Tensor = y if self.step is None else self.step(y, self.clock.bin)
        return scaled


class _Factor(nn.Module):
    """A factor for each timestep bin, `[bins]`; with `short` as the sum of two numbers that bfloat16 (nearly) holds."""

    values: Tensor
    rest: Tensor | None

    def __init__(self, values: Tensor, short: bool) -> None:
        super().__init__()
        rounded = values.bfloat16().float() if short else values
        self.register_buffer("values", rounded)
        self.register_buffer("rest", values - rounded if short else None)

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        scaled = x * present(self.values, at, x)
        return scaled if self.rest is None else scaled + x * present(self.rest, at, x)


class _GraphTransform(nn.Module):
    """An `InputTransform`; where it only scales, the axis of channels stays where it is."""

    def __init__(self, transform: InputTransform) -> None:
        super().__init__()
        self.whole = copy.deepcopy(transform) if transform.spec.block is not None else None
        shape = (-1, *[1] * (-1 - transform.channel_axis))
        self.register_buffer("scale", None if transform.scale is None else transform.scale.cpu().reshape(shape))

    scale: Tensor | None

    @property
    def channels(self) -> tuple[int, ...] | None:
        """The shape of what the input is divided by; None where a rotation comes behind it."""
        return None if self.whole is not None or self.scale is None else tuple(self.scale.shape)

    def forward(self, x: Tensor) -> Tensor:
        if self.whole is not None:
            rotated: Tensor = self.whole(x)
            return rotated
        assert self.scale is not None
        return x / self.scale


class GraphLayer(nn.Module):
    """A linear or convolution layer on int8 levels.

    levels: int8, `[O, I/groups, *kernel]`, for a linear layer `[I, O]`. scale `[O]`.
    rest `[O]`: (c - z) * s_w where q - z does not fit into int8; None if it fits everywhere.
    bias `[O]`, or `[rows, O]` where the rows' zero points differ. There, total `[O]`: c times the sum of the operator's
        weights; and taps `[O, *kernel]`: their sum over input channels, where it pads with zeros. total_of_ones and
        taps_of_ones: of the second operator. None otherwise.
    transform, branch: of the input, before its quantizer, and beside the operator, in floating point; None without.
    """

    levels: Tensor
    scale: Tensor
    ones: Tensor | None
    one: Tensor | None
    rest: Tensor | None
    bias: Tensor | None
    total: Tensor | None
    taps: Tensor | None
    total_of_ones: Tensor | None
    taps_of_ones: Tensor | None

    def __init__(self, layer: QuantizedLayer, clock: StepClock, name: str, *, short: bool = False) -> None:
        super().__init__()
        quantizer, source = layer.weight_quantizer, layer.input_quantizer
        assert isinstance(quantizer, WeightQuantizer)
        assert isinstance(source, InputQuantizer)
        self.geometry = layer.geometry
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.in_channels, self.out_channels = layer.in_features, layer.out_features
        self.transform = None if layer.input_transform is None else _GraphTransform(layer.input_transform)
        channels = None if self.transform is None else self.transform.channels
        self.input = GraphInput(source, clock, short=short, channels=channels)
        self.branch = copy.deepcopy(layer.branch)
        weight = layer.weight.detach()
        q = quantizer.levels(weight)
        if not torch.equal(quantizer.restore(q).to(weight.dtype), weight):
            raise EngineError(
                f"The weight of {name} does not lie on the grid of its quantizer, so its levels would not restore it. "
                "Quantize the model again, or load the checkpoint as it was saved."
            )
        count = layer.out_features
        scale = quantizer.scale.reshape(-1).expand(count).cpu().clone()
        zero_point = quantizer.zero_point.reshape(-1).expand(count).cpu()
        levels, rest = _int8_levels(q.cpu().reshape(count, -1).float(), zero_point)
        exact = (q.cpu().reshape(count, -1).double() - zero_point[:, None]) * scale[:, None].double()
        self.linear = layer.geometry.kind == "linear"
        levels = levels.T.contiguous() if self.linear else levels.reshape(weight.shape)
        self.register_buffer("levels", levels)
        self.register_buffer("scale", scale)
        ones = None
        if rest is not None:
            groups = layer.geometry.groups
            ones = torch.ones((weight.shape[1], 1) if self.linear else (groups, *weight.shape[1:]), dtype=torch.int8)
        self.register_buffer("ones", ones)
        self.register_buffer("one", None if ones is None else torch.ones(ones.shape[1 if self.linear else 0]))
        self.register_buffer("rest", None if rest is None else rest * scale)
        own = self._by_output(levels) * scale.double().reshape(-1, *[1] * (levels.ndim - 1))
        self._keep_sums("", own)
        self._keep_sums("_of_ones", None if ones is None else self._by_output(ones))
        self.register_buffer("bias", _bias_table(layer.bias, source, exact.sum(1), self.input))

    def _by_output(self, weights: Tensor) -> Tensor:
        return weights.T.double() if self.linear else weights.double()

    def _keep_sums(self, name: str, weights: Tensor | None) -> None:
        """What `_centred` needs of an operator, from its weights `[O, I, *kernel]`, where rows' zero points differ."""
        total = taps = None
        if self.input.shifted and weights is not None:
            total = self.input.zero_point * weights.flatten(1).sum(1)
            taps = weights.sum(1) if self._pads_zeros else None
        self.register_buffer(f"total{name}", total)
        self.register_buffer(f"taps{name}", taps)

    def forward(self, x: Tensor) -> Tensor:
        if not self.linear and x.ndim == self.levels.ndim - 1:  # one sample without a batch, which torch takes
            return self(x[None]).squeeze(0)  # type: ignore[no-any-return]
        if self.transform is not None:
            x = self.transform(x)
        y = self._on_levels(x)
        return y if self.branch is None else y + self.branch(x)

    def _on_levels(self, x: Tensor) -> Tensor:
        x, padding = self._padded(self._thinned(x))
        shape, x = x.shape[2:], self.input(x)
        y = self._operate(x, _restore(self.levels, self.scale, self._axis), padding)
        y = self._centred(y, self.total, self.taps, shape)
        if self.rest is not None:
            ones = self._operate(x, _restore(self.ones, self.one, self._axis), padding)
            ones = self._centred(ones, self.total_of_ones, self.taps_of_ones, shape)
            if self.geometry.groups > 1:
                ones = ones.repeat_interleave(self.out_features // self.geometry.groups, 1)
            y = y + ones * self._beside(self.rest, ones)
        y = self.input.times_scale(y)
        if self.bias is None:
            return y
        bias = self.bias
        if bias.ndim == 2:
            assert self.input.row_of_bin is not None
            row = self.input.row_of_bin.index_select(0, self.input.clock.bin)
            bias = bias.index_select(0, row)
        return y + self._beside(bias, y)

    @property
    def _axis(self) -> int:
        return 1 if self.linear else 0

    def _beside(self, values: Tensor, output: Tensor) -> Tensor:
        """`[O]` as it broadcasts against the output, with as many axes."""
        shape = [1] * output.ndim
        shape[-1 if self.linear else 1] = -1
        return values.reshape(shape)

    def _operate(self, x: Tensor, weight: Tensor, padding: tuple[int, ...]) -> Tensor:
        if self.linear:
            return x @ weight
        conv: Any = F.conv1d if self.geometry.kind == "conv1d" else F.conv2d
        stride = (1,) * len(padding) if self._thins else self.geometry.stride
        result: Tensor = conv(x, weight, None, stride, padding, self.geometry.dilation, self.geometry.groups)
        return result

    @property
    def _thins(self) -> bool:
        """Whether places that no kernel reaches are left out before the operator: a kernel of one, with a stride."""
        at = self.geometry
        if self.linear or any(size != 1 for size in self.levels.shape[2:]):
            return False
        return any(step != 1 for step in at.stride) and not isinstance(at.padding, str) and not any(at.padding)

    def _thinned(self, x: Tensor) -> Tensor:
        """The places that are read: OpenVINO takes them behind the quantizer by itself, and convolves in float32."""
        for axis, step in enumerate(self.geometry.stride if self._thins else (), start=2):
            if step > 1:
                x = x.index_select(axis, torch.arange(0, x.shape[axis], step))
        return x

    @property
    def _pads_zeros(self) -> bool:
        """Whether the operator pads with as many zeros before as after."""
        at = self.geometry
        return not self.linear and at.padding_mode == "zeros" and not isinstance(at.padding, str) and any(at.padding)

    def _border(self, taps: Tensor, shape: Sequence[int]) -> Border:
        """The weights that meet padding, for an input of this spatial shape."""
        at = self.geometry
        assert not isinstance(at.padding, str)
        sizes = list(map(int, shape))
        counts = [
            (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, padding, dilation in zip(
                sizes, taps.shape[1:], at.stride, at.padding, at.dilation, strict=True
            )
        ]
        return border_of(
            taps.double().numpy(), sizes, counts, stride=at.stride, padding=at.padding, dilation=at.dilation
        )

    def _centred(self, y: Tensor, total: Tensor | None, taps: Tensor | None, shape: Sequence[int]) -> Tensor:
        """What an operator gives for levels from 0, without most of what their zero point adds: `y - c sum + z border`.

        The border times a number for each place of the last axis, which rows have tables of: a graph would multiply
        constants out, and read one of the output's size in every call.
        """
        if total is not None:
            y = y - self._beside(total, y)
        if taps is None:
            return y
        border = self._border(taps, shape)
        base, *others = border.table
        if len(others) >= MOST_PATTERNS:
            return y + self.input.zero(y) * _constant(border.whole())
        for pattern, values in enumerate(others, start=1):
            there = torch.from_numpy((border.where == pattern).astype(np.float32))
            y = y + self.input.times_zero(there, y) * _constant((values - base)[..., None])
        return y + self.input.zero(y) * _constant(base[..., None]) if base.any() else y

    def _padded(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """x with the padding that the operator cannot do itself, and what is left for the operator."""
        geometry = self.geometry
        if self.linear:
            return x, ()
        if isinstance(geometry.padding, str):
            # As torch: dilation * (kernel - 1) zeros, the odd one at the end.
            widths = [step * (size - 1) for step, size in zip(geometry.dilation, self.levels.shape[2:], strict=True)]
            sides = [(width // 2, width - width // 2) for width in widths]
        else:
            sides = [(width, width) for width in geometry.padding]
        symmetric = all(before == after for before, after in sides)
        if geometry.padding_mode == "zeros" and symmetric and (not self.input.shifted or self.taps is not None):
            return x, tuple(before for before, _ in sides)
        if geometry.padding_mode == "circular":
            return _wrapped(x, sides), (0,) * len(sides)
        pads = [width for pair in reversed(sides) for width in pair]
        if any(pads):
            x = F.pad(x, pads, mode="constant" if geometry.padding_mode == "zeros" else geometry.padding_mode)
        return x, (0,) * len(sides)


def _constant(values: np.ndarray[Any, Any]) -> Tensor:
    """`[O, ...]` as what goes beside an output."""
    # From numpy: what torch computes while it is traced becomes a part of the graph.
    return torch.from_numpy(values.astype(np.float32))[None]


def _wrapped(x: Tensor, sides: list[tuple[int, int]]) -> Tensor:
    """Circular padding as a choice of places: OpenVINO convolves in float32 behind the slices that torch exports."""
    for axis, (before, after) in enumerate(sides, start=2):
        if before or after:
            size = x.shape[axis]
            x = x.index_select(axis, torch.arange(-before, size + after) % size)
    return x


class GraphMatmul(nn.Module):
    """A matmul of two quantized operands. Rows whose zero points differ are moved back before the product."""

    def __init__(self, layer: QuantizedMatmul, clock: StepClock, *, short: bool = False) -> None:
        super().__init__()
        assert isinstance(layer.input_quantizer, InputQuantizer)
        assert isinstance(layer.second_quantizer, InputQuantizer)
        self.role = layer.role
        self.left = GraphInput(layer.input_quantizer, clock, short=short)
        self.right = GraphInput(layer.second_quantizer, clock, short=short)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        product = self._operand(self.left, left) @ self._operand(self.right, right)
        return self.right.times_scale(self.left.times_scale(product))

    def _operand(self, quantizer: GraphInput, x: Tensor) -> Tensor:
        x = quantizer(x)
        return x if quantizer.shift is None else x - quantizer.zero(x)


def _int8_levels(q: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor | None]:
    """`q - c` as int8 `[O, N]`, and `c - z` `[O]` if that is not 0 everywhere. c = z in the channels where it fits."""
    shifted = q - zero_point[:, None]
    fits = (shifted.amin(1) >= -128) & (shifted.amax(1) <= 127)
    if bool(fits.all()):
        return shifted.to(torch.int8), None
    centre = torch.where(fits, zero_point, torch.full_like(zero_point, CENTRE))
    return (q - centre[:, None]).to(torch.int8), centre - zero_point


def _bias_table(bias: Tensor | None, source: InputQuantizer, sums: Tensor, given: GraphInput) -> Tensor | None:
    plain = None if bias is None else bias.detach().cpu().float()
    if not given.shifted:
        return plain
    scale, zero_point = source.scale.cpu().double(), source.zero_point.cpu().double()
    table = -((zero_point - given.zero_point) * scale)[:, None] * sums
    return (table if plain is None else table + plain).float()


@dataclass(frozen=True)
class Lowered:
    """A denoiser ready for export.

    module: the copy, float32, on the CPU, whose layers are GraphLayers where they can be. Called as the original.
    clock: its clock, which nothing sets but the caller.
    refusals: why each of the other quantized layers is not one.
    """

    module: nn.Module
    clock: StepClock
    refusals: Mapping[str, str]


def lower(denoiser: nn.Module, refuses: Any = refusal, *, short: bool = False) -> Lowered:
    """Copy a quantized, hardened denoiser into graph form. Weights that become levels are not copied.

    refuses: layer -> sentence or None. short: the graph will be in bfloat16, so scales of rows are written as sums of
    two such numbers. Raises EngineError for a denoiser that is not quantized or is packed.
    """
    clock = clock_of(denoiser)
    layers = quantized_layers(denoiser)
    if clock is None or not layers:
        raise EngineError(
            f"{type(denoiser).__name__} has no quantized layers in simulated form: give the denoiser of `quantize`, or "
            "of `load` with engine='simulated'."
        )
    own = copy.deepcopy(clock).cpu()
    own.bin = torch.zeros(1, dtype=torch.int64)
    memo: dict[int, Any] = {id(clock): own}
    refusals: dict[str, str] = {}
    for name, layer in layers.items():
        reason = refuses(layer)
        if reason is not None:
            refusals[name] = reason
        elif isinstance(layer, QuantizedLayer):
            memo[id(layer)] = GraphLayer(layer, own, name, short=short)
        else:
            memo[id(layer)] = GraphMatmul(layer, own, short=short)
    module = copy.deepcopy(denoiser, memo)
    # `nn.Module.to`, not the denoiser's own: diffusers overrides it.
    nn.Module.to(module, device="cpu", dtype=torch.float32)
    return Lowered(module.eval().requires_grad_(False), own, refusals)


def tensors_of(value: Any, name: str = "") -> tuple[dict[str, Tensor], Any]:
    """The tensors in nested arguments by dotted name, and the rest as JSON values with the names in their place.

    Raises EngineError for an argument that is neither a tensor nor plain data.
    """
    if isinstance(value, Tensor):
        return {name: value}, {"tensor": name}
    if value is None or isinstance(value, bool | int | float | str):
        return {}, {"value": value}
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        kind = "dict" if isinstance(value, dict) else type(value).__name__
        found: dict[str, Tensor] = {}
        inside: dict[str, Any] = {}
        for key, entry in items:
            tensors, inside[str(key)] = tensors_of(entry, f"{name}.{key}" if name else str(key))
            found |= tensors
        return found, {kind: inside}
    raise EngineError(
        f"Argument {name} is a {type(value).__name__}: a graph takes tensors, numbers, words and nested lists and "
        "dicts of these. Use engine='simulated' for such calls."
    )


def filled(form: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Undo `tensors_of`."""
    (kind, inside), *_ = form.items()
    if kind == "tensor":
        return tensors[inside]
    if kind == "value":
        return inside
    if kind == "dict":
        return {key: filled(entry, tensors) for key, entry in inside.items()}
    entries = [filled(entry, tensors) for entry in inside.values()]
    return tuple(entries) if kind == "tuple" else entries


@dataclass(frozen=True)
class Outputs:
    """What a denoiser returns.

    kind: "tensor", "tuple", or the class of a diffusers output, "module:Class". fields: of the class, or numbers.
    """

    kind: str
    fields: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The graph's outputs. Not the fields alone: an input may have the same name."""
        return ("output",) if self.kind == "tensor" else tuple(f"output.{field}" for field in self.fields)

    @classmethod
    def of(cls, value: Any) -> tuple[Outputs, tuple[Tensor, ...]]:
        """Raises EngineError for values that are not tensors."""
        if isinstance(value, Tensor):
            return cls("tensor", ("0",)), (value,)
        if type(value) in (tuple, list):
            named = {str(number): entry for number, entry in enumerate(value)}
            kind = "tuple"
        elif isinstance(value, dict):
            named = {key: entry for key, entry in value.items() if entry is not None}
            kind = f"{type(value).__module__}:{type(value).__qualname__}"
        else:
            raise EngineError(f"The denoiser returns a {type(value).__name__}: a graph returns tensors.")
        for name, entry in named.items():
            if not isinstance(entry, Tensor):
                raise EngineError(f"The denoiser's output {name} is a {type(entry).__name__}: a graph returns tensors.")
        return cls(kind, tuple(named)), tuple(named.values())

    def build(self, tensors: tuple[Tensor, ...]) -> Any:
        if self.kind == "tensor":
            return tensors[0]
        if self.kind == "tuple":
            return tensors
        # Looked up, never imported: the name may come from a file.
        module, _, name = self.kind.partition(":")
        found = getattr(sys.modules.get(module), name, None)
        if not (isinstance(found, type) and issubclass(found, dict)):
            raise EngineError(f"The graph returns a {self.kind}, which this process does not know: clear the cache.")
        return found(**dict(zip(self.fields, tensors, strict=True)))


class _Call(nn.Module):
    """The denoiser as a function of tensors only, as exporters want it."""

    def __init__(self, lowered: Lowered, form: Any, names: tuple[str, ...], bin_inside: bool) -> None:
        super().__init__()
        self.denoiser = lowered.module
        self.clock, self.form, self.names, self.bin_inside = lowered.clock, form, names, bin_inside
        self.outputs: Outputs | None = None

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        tensors = dict(zip(self.names, values, strict=True))
        if self.bin_inside:
            timestep = tensors[self.clock.argument].reshape(-1)[:1].float()
            self.clock.bin = (timestep > self.clock.edges).sum(0, keepdim=True)
        else:
            self.clock.bin = tensors[BIN]
        # Not called: the original's hook would set the clock in a way that has no graph.
        self.outputs, results = Outputs.of(self.denoiser.forward(**filled(self.form, tensors)))
        return results


def plain_arithmetic() -> torch.autocast:
    """The context in which a lowered denoiser runs and is traced: the caller's autocast would become its arithmetic."""
    return torch.autocast("cpu", enabled=False)


def export(
    lowered: Lowered, arguments: Mapping[str, Any], path: Path, *, bin_inside: bool, batched: tuple[str, ...] = ()
) -> Outputs:
    """Write the graph of one call as ONNX.

    arguments: by name, with example tensors. The graph has their shapes, but for the first axis of those in `batched`.
    bin_inside: compute the timestep bin from the timestep argument (of the first image), else it is the input `BIN`,
        int64 `[1]`; an input that nothing needs is left out.

    Raises EngineError if the denoiser has an operation that cannot be exported, naming it; OSError if the file cannot
    be written.
    """
    tensors, form = tensors_of(dict(arguments))
    if not bin_inside:
        tensors[BIN] = torch.zeros(1, dtype=torch.int64)
    # One tensor passed twice would be traced as one input.
    tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    call = _Call(lowered, form, tuple(tensors), bin_inside).eval()
    with torch.no_grad(), plain_arithmetic():
        outputs, _ = Outputs.of(lowered.module.forward(**filled(form, tensors)))
    named = (*batched, *(name for name in outputs.names if batched))
    try:
        with _alone_and_quiet(), warnings.catch_warnings(), torch.no_grad(), plain_arithmetic():
            # The exporter warns of shapes that it takes as constants: those are the ones that we fix.
            warnings.simplefilter("ignore")
            torch.onnx.export(
                call,
                tuple(tensors.values()),
                str(path),
                dynamo=False,
                opset_version=OPSET,
                input_names=list(tensors),
                output_names=list(outputs.names),
                dynamic_axes={name: {0: "batch"} for name in named},
            )
    except (EngineError, OSError):
        raise
    except ImportError as error:
        raise EngineError(f"Exporting a graph needs onnx: pip install onnx ({error})") from error
    except Exception as error:  # tracing runs the denoiser's own code, which can raise anything
        raise EngineError(
            f"{type(lowered.module).__name__} cannot be exported as a graph: {_first_lines(error)} Write that "
            "operation in other terms, or run the layers in torch: engine='simulated'."
        ) from error
    finally:
        lowered.clock.bin = torch.zeros(1, dtype=torch.int64)
    return outputs


_EXPORTING = threading.Lock()


@contextlib.contextmanager
def _alone_and_quiet() -> Iterator[None]:
    """Our operators known to torch's exporter, one export at a time, and no log of it.

    The exporter keeps its state in globals. It also switches its log on for every export (torch asks whether the
    function is true that would tell whether the log is on), and so a failed one prints the whole graph on stdout, where
    `--json` goes. So the switch is out of order meanwhile; output of other threads is not touched.
    """
    inside, switch = torch._C, "_jit_set_onnx_log_enabled"
    exporter: Any = torch.onnx
    with _EXPORTING:
        plain = getattr(inside, switch, None)
        if plain is not None:
            setattr(inside, switch, lambda _enabled: None)
        _register_symbols()
        try:
            yield
        finally:
            exporter.unregister_custom_op_symbolic(_MOVEDIM, OPSET)
            if plain is not None:
                setattr(inside, switch, plain)


def _first_lines(error: BaseException) -> str:
    """What an exporter says, without its dump of the graph."""
    text = " ".join(str(error).split("\n")[:2]).strip() or type(error).__name__
    return text if text.endswith(".") else text + "."
