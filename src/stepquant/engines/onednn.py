"""The oneDNN engine: convolutions and linear layers on int8 in plain torch modules, on CPUs with VNNI.

Inputs become uint8 levels by the arithmetic of the simulation, so the integers are those of the simulation; the
operator sums them in int32 and scales once. Scale and zero point of the present timestep's row are arguments of the
operator: switching rows costs nothing and compiles nothing. Symmetric levels are shifted by 128 to uint8.

Where each token has a scale of its own (linear layers), the operator scales by the weight's alone, and the token's
scale and zero point follow in floating point.

For asymmetric weights of 8 bits (`engines.integers`) one output channel of ones is added to every group; it gives
S = s_a * sum (a - z_a), and `y_o - (z_o - 128) * s_o * S` is the layer's output.

Not under `torch.compile`: the operators have no lowering there. The operators are a private part of torch, so they are
tried on small numbers before the first use, and the engine refuses every layer if they are missing or wrong.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepquant.engines.integers import CENTRE, IntegerLayer, needs_shift, refuse_integers
from stepquant.model.layer import QuantizedLayer, QuantizedMatmul
from stepquant.model.quantizer import DynamicQuantizer, InputQuantizer
from stepquant.numerics.affine import QParams, quantize
from stepquant.numerics.spec import QuantSpec

__all__ = ["OneDnnEngine", "OneDnnLayer"]

LEAST_CONV_WEIGHTS = 1 << 11
LEAST_LINEAR_WEIGHTS = 1 << 13
"""Layers with fewer weights stay simulated: calling an int8 operator takes longer than the arithmetic it saves."""

LEAST_PRODUCTS = 1 << 20
MOST_WEIGHTS_IN_FLOAT = 1 << 18
"""A linear layer of at most so many weights runs in floating point in calls of fewer multiplications than these, such
as those on a timestep embedding. It keeps a float32 weight beside its levels once it had such a call, 1 MiB at most:
restoring it at each would take 1.2 to 10 times as long (one Zen 5 core, 128 to 512 inputs and outputs, 1 to 3 rows)."""

MOST_SHAPES = 8
"""Packed weights that a layer keeps, one for each input shape that it was called with."""


def _conv(x: Tensor, scale: float, zero_point: int, weight: _Packed, at: _Place, dtype: torch.dtype) -> Tensor:
    """x: uint8 `[B, C, H, W]`."""
    found: Tensor = torch.ops.onednn.qconv2d_pointwise(
        x, scale, zero_point, weight.packed, weight.scale, weight.zero_point, weight.bias,
        list(at.stride), list(at.padding), list(at.dilation), at.groups, 1.0, 0, dtype, "none", [], "",
    )  # fmt: skip
    return found


def _linear(x: Tensor, scale: float, zero_point: int, weight: _Packed, dtype: torch.dtype) -> Tensor:
    """x: uint8 `[M, K]`."""
    found: Tensor = torch.ops.onednn.qlinear_pointwise(
        x, scale, zero_point, weight.packed, weight.scale, weight.zero_point, weight.bias,
        1.0, 0, dtype, "none", [], "",
    )  # fmt: skip
    return found


def _bytes(levels: Tensor, up: int) -> Tensor:
    """Levels as uint8, `up` higher. Overwrites its argument."""
    # By way of int32: the direct conversion is not vectorised.
    return (levels.add_(up) if up else levels).to(torch.int32).to(torch.uint8)


@dataclass(frozen=True)
class _Place:
    """Where a two-dimensional convolution looks. pads: what F.pad puts around the input before it, or None."""

    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1
    pads: tuple[int, ...] | None = None
    pad_mode: str = "constant"

    @classmethod
    def of(cls, geometry: Any, kernel: tuple[int, ...]) -> _Place:
        """A one-dimensional convolution becomes one of height 1."""
        if geometry.padding == "same":
            # As torch: of an odd total the right side gets one more.
            sides = [(d * (k - 1) // 2, -(-d * (k - 1) // 2)) for d, k in zip(geometry.dilation, kernel, strict=True)]
        else:
            sides = [(width, width) for width in geometry.padding]
        even = geometry.padding_mode == "zeros" and all(left == right for left, right in sides)
        pads = None if even else tuple(side for pair in reversed(sides) for side in pair)
        mode = "constant" if geometry.padding_mode == "zeros" else geometry.padding_mode
        padding = tuple(left for left, _ in sides) if even else (0,) * len(sides)
        ahead = (1,) * (2 - len(kernel))
        return cls(
            ahead + geometry.stride,
            (0,) * len(ahead) + padding,
            ahead + geometry.dilation,
            geometry.groups,
            pads,
            mode,
        )


@dataclass(frozen=True)
class _Packed:
    """A weight in oneDNN's own layout, and its constants: `[O]`, or more where channels of ones were added."""

    packed: Tensor
    scale: Tensor
    zero_point: Tensor
    bias: Tensor | None


def _pack_conv(levels: Tensor, scale: Tensor, bias: Tensor | None, at: _Place, shape: tuple[int, ...]) -> _Packed:
    """levels: int8 `[O, I, kH, kW]`. shape: the input's, without the batch."""
    # The layout depends on the input's true shape and on whether scale and zero point are trivial: if any of these is
    # not what the call brings, the operator packs the weight again at every call.
    packed = torch.ops.onednn.qconv_prepack(
        levels, scale, 0.5, CENTRE, list(at.stride), list(at.padding), list(at.dilation), at.groups, [1, *shape]
    )
    return _Packed(packed, scale, torch.zeros(len(scale), dtype=torch.int64), bias)


def _pack_linear(levels: Tensor, scale: Tensor, bias: Tensor | None) -> _Packed:
    """levels: int8 `[O, I]`."""
    packed = torch.ops.onednn.qlinear_prepack(levels, None)
    return _Packed(packed, scale, torch.zeros(len(scale), dtype=torch.int64), bias)


@functools.cache
def unavailable() -> str | None:
    """Why oneDNN's int8 operators cannot be used in this process, or None. Found out once."""
    supported = getattr(torch.cpu, "_is_vnni_supported", None)
    if supported is None:
        return f"torch {torch.__version__} does not tell whether the processor has int8 instructions (AVX-512 VNNI)."
    if not supported():
        return "The processor has no AVX-512 VNNI; without it these operators are slow and may saturate."
    try:
        right = _operators_are_right()
    except (AttributeError, RuntimeError, TypeError, NotImplementedError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        return f"torch {torch.__version__} has no usable int8 operators of oneDNN: {lines[0]}"
    if not right:
        return f"The int8 operators of oneDNN in torch {torch.__version__} give wrong numbers."
    return None


def _operators_are_right() -> bool:
    """A small convolution and a small linear layer, extreme levels among them, against the same in float64."""
    scale, zero_point = 0.25, 131
    step = torch.tensor([0.5, 2.0, 1.0])
    bias = torch.tensor([1.0, -2.0, 0.0])
    # Powers of two and small sums: float32 has no rounding to do, so the comparison is exact.
    x = (torch.arange(2 * 4 * 5 * 6) * 37 % 256).to(torch.uint8).reshape(2, 4, 5, 6)
    weight = (torch.arange(3 * 4 * 3 * 3) * 83 % 256 - 128).to(torch.int8).reshape(3, 4, 3, 3)
    at = _Place(padding=(1, 1))
    packed = _pack_conv(weight, step, bias, at, tuple(x.shape[1:]))
    found = _conv(x.contiguous(memory_format=torch.channels_last), scale, zero_point, packed, at, torch.float32)
    exact = F.conv2d(x.double() - zero_point, weight.double(), padding=1) * scale
    exact = exact * step.double().reshape(-1, 1, 1) + bias.double().reshape(-1, 1, 1)
    flat = weight.reshape(3, -1)
    rows = x.reshape(-1)[: 2 * 36].reshape(2, 36).contiguous()
    line = _linear(rows, scale, zero_point, _pack_linear(flat, step, bias), torch.float32)
    expected = (rows.double() - zero_point) @ flat.double().T * scale * step.double() + bias.double()
    return torch.equal(found.double(), exact) and torch.equal(line.double(), expected)


class OneDnnLayer(IntegerLayer):
    """A Linear, Conv1d or Conv2d on oneDNN's int8 operators.

    What oneDNN packs can be neither copied nor saved; it is made at the first call and after every copy, cast and
    `load_state_dict`. Scales are read then too. Returns float32, or the module's dtype if it has another. Convolutions
    return channels_last.
    """

    _cache: dict[Any, Any]

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__(layer)
        self._cache = {}
        self._is_linear = self.geometry.kind == "linear"
        self._place = _Place() if self._is_linear else _Place.of(self.geometry, tuple(self.levels.shape[2:]))
        self._shifted = needs_shift(self.weight_quantizer.spec)

    def _on_integers(self, x: Tensor) -> Tensor:
        if self._is_linear and self._too_small(x):
            return self._in_float(x)
        if isinstance(self.input_quantizer, DynamicQuantizer):
            return self._by_token(x, self.input_quantizer)
        rows = self._rows(self.input_quantizer)
        if len(rows) == 1:
            return self._run(x, rows[0])
        # One call for each row that occurs. Heads or frames may have been folded into the batch.
        repeat = x.shape[0] // len(rows)
        of_sample = torch.tensor(rows).repeat_interleave(repeat)
        result: Tensor | None = None
        for row in sorted(set(rows)):
            chosen = (of_sample == row).nonzero().reshape(-1)
            part = self._run(x[chosen], row)
            if result is None:
                if len(chosen) == len(x):
                    return part
                result = part.new_empty((len(x), *part.shape[1:]))
            result[chosen] = part
        assert result is not None
        return result

    def _by_token(self, x: Tensor, given: DynamicQuantizer) -> Tensor:
        """A linear layer where each token or sample has a scale and a zero point: they follow the sums."""
        params, up = given.current(x), CENTRE if given.spec.symmetric else 0
        levels = _bytes(quantize(x, params, given.spec), up).reshape(-1, x.shape[-1])
        packed = self._packed(())
        y = _linear(levels, 1.0, up, packed, torch.float32).reshape(*x.shape[:-1], -1)
        if not given.spec.symmetric:
            if "sums" not in self._cache:
                summed = (self._with_ones()[0] if self._shifted else self.levels).sum(1, dtype=torch.float32)
                self._cache["sums"] = -summed * packed.scale
            y = torch.addcmul(y, params.zero_point, self._cache["sums"])
        if self._shifted:
            y = self._unshifted(y.reshape(-1, y.shape[-1])).reshape(*x.shape[:-1], -1)
        y = y * params.scale
        return (y if self.bias is None else y + self.bias.float()).to(self.like.dtype)

    def _rows(self, given: InputQuantizer) -> list[int]:
        """The row of every sample, or the one row that all of them share."""
        if given.rows == 1:
            return [0]
        table = self._constants()[2]
        return [table[number] for number in given.clock.bin.tolist()]

    def _constants(self) -> tuple[list[float], list[int], list[int], list[tuple[QParams, QuantSpec]]]:
        """Scale and zero point of every row as uint8 levels have them; row of every bin; arithmetic of every row."""
        if "constants" not in self._cache:
            table = self.input_quantizer
            assert isinstance(table, InputQuantizer)
            up = CENTRE if table.spec.symmetric else 0
            rows = [
                (QParams(table.scale[row], table.zero_point[row]), spec) for row, spec in enumerate(table.row_specs)
            ]
            points = [int(value) + up for value in table.zero_point.tolist()]
            self._cache["constants"] = (table.scale.tolist(), points, table.row_of_bin.tolist(), rows)
        found: tuple[list[float], list[int], list[int], list[tuple[QParams, QuantSpec]]] = self._cache["constants"]
        return found

    def _levels_of(self, x: Tensor, row: int) -> Tensor:
        """The input's levels as uint8, symmetric ones shifted by 128."""
        params, spec = self._constants()[3][row]
        return _bytes(quantize(x, params, spec), CENTRE if spec.symmetric else 0)

    def _run(self, x: Tensor, row: int) -> Tensor:
        """The layer on one row of activation parameters."""
        scales, points, _, _ = self._constants()
        wanted = self.like.dtype
        # The extra channel is subtracted afterwards and must not be rounded to a short type before that.
        dtype = torch.bfloat16 if wanted == torch.bfloat16 and not self._shifted else torch.float32
        if self._is_linear:
            flat = self._levels_of(x.reshape(-1, x.shape[-1]), row)
            y = _linear(flat, scales[row], points[row], self._packed(()), dtype)
            y = self._unshifted(y) if self._shifted else y
            return y.reshape(*x.shape[:-1], y.shape[-1]).to(wanted)
        if self._place.pads is not None:
            x = F.pad(x, self._place.pads, mode=self._place.pad_mode)
        if x.ndim == 3:
            x = x.unsqueeze(2)
        levels = self._levels_of(x, row).contiguous(memory_format=torch.channels_last)
        y = _conv(levels, scales[row], points[row], self._packed(tuple(x.shape[1:])), self._place, dtype)
        y = self._unshifted(y) if self._shifted else y
        return (y.squeeze(2) if self.geometry.kind == "conv1d" else y).to(wanted)

    def _packed(self, shape: tuple[int, ...]) -> _Packed:
        """The packed weight for inputs of a shape, without the batch; () for a linear layer."""
        known: dict[tuple[int, ...], _Packed] = self._cache.setdefault("packed", {})
        if shape not in known:
            if len(known) >= MOST_SHAPES:
                known.pop(next(iter(known)))
            levels, scale, bias = self._with_ones() if self._shifted else (self.levels, self.weight_scale, self.bias)
            if isinstance(self.input_quantizer, DynamicQuantizer):
                bias = None  # a token's scale comes after the operator, and the bias after that
            scale, bias = scale.contiguous(), None if bias is None else bias.detach().float()
            if self._is_linear:
                known[shape] = _pack_linear(levels, scale, bias)
            else:
                levels = levels.unsqueeze(2) if levels.ndim == 3 else levels
                known[shape] = _pack_conv(levels, scale, bias, self._place, shape)
        return known[shape]

    def _with_ones(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Levels, scales and bias with a channel of ones, of scale 1 and without bias, at the end of every group."""
        groups = self._place.groups

        def widened(values: Tensor, last: int) -> Tensor:
            parts = values.reshape(groups, -1, *values.shape[1:])
            return torch.cat((parts, torch.full_like(parts[:, :1], last)), 1).flatten(0, 1)

        bias = None if self.bias is None else widened(self.bias.detach(), 0)
        return widened(self.levels, 1), widened(self.weight_scale, 1), bias

    def _unshifted(self, y: Tensor) -> Tensor:
        """Take the shift of the levels back out of `[B, O + groups, ...]`, with the sums in the added channels."""
        if "factor" not in self._cache:
            self._cache["factor"] = -self.shift.float() * self.weight_scale
        factor: Tensor = self._cache["factor"]
        groups = self._place.groups
        parts = y.reshape(len(y), groups, -1, *y.shape[2:])
        factor = factor.reshape(1, groups, -1, *(1,) * (y.ndim - 2))
        return torch.addcmul(parts[:, :, :-1], parts[:, :, -1:], factor).flatten(1, 2)

    def _too_small(self, x: Tensor) -> bool:
        weights = self.levels.numel()
        calls = x.numel() // x.shape[-1]
        return weights <= MOST_WEIGHTS_IN_FLOAT and calls * weights < LEAST_PRODUCTS

    def _in_float(self, x: Tensor) -> Tensor:
        """What the simulated layer computes."""
        if "weight" not in self._cache:
            self._cache["weight"] = self.weight
        return self.geometry.apply(self.input_quantizer(x), self._cache["weight"], self.bias)

    def _apply(self, fn: Any, recurse: bool = True) -> OneDnnLayer:
        self._cache = {}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._cache = {}
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": {}}


@dataclass(frozen=True)
class OneDnnEngine:
    """int8 in torch on CPUs with VNNI. Layers too small to gain are refused."""

    name: str = "onednn"

    def refuses(self, layer: QuantizedLayer | QuantizedMatmul, device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"The layer is on {device.type}; oneDNN runs on the CPU."
        reason = refuse_integers(layer)
        if reason is not None:
            return reason
        assert isinstance(layer, QuantizedLayer)
        if isinstance(layer.input_quantizer, DynamicQuantizer) and layer.geometry.kind != "linear":
            return "Each sample has a zero point of its own; oneDNN's convolutions have one for all."
        reason = unavailable()
        if reason is not None:
            return reason
        weights = layer.weight.numel()
        least = LEAST_LINEAR_WEIGHTS if layer.geometry.kind == "linear" else LEAST_CONV_WEIGHTS
        if weights < least:
            return (
                f"It has {weights} weights; below {least}, calling an int8 operator takes longer than the arithmetic "
                "it saves."
            )
        return None

    def remark(self, layer: QuantizedLayer | QuantizedMatmul) -> str | None:
        """That some calls of the layer run in floating point, and from how many rows on they do not."""
        assert isinstance(layer, QuantizedLayer)
        weights = layer.weight.numel()
        if layer.geometry.kind != "linear" or weights > MOST_WEIGHTS_IN_FLOAT or weights >= LEAST_PRODUCTS:
            return None
        return (
            f"With fewer than {-(-LEAST_PRODUCTS // weights)} rows at a call, such as timestep embeddings, it runs as "
            f"simulated arithmetic, and keeps {4 * weights} bytes of float32 weights for that beside its levels."
        )

    def pack(self, layer: QuantizedLayer | QuantizedMatmul) -> nn.Module:
        assert isinstance(layer, QuantizedLayer)
        return OneDnnLayer(layer)
