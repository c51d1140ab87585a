"""The int_mm engine: linear layers and convolutions as one int8 matrix product, `torch._int_mm`.

For CUDA devices, where that is a cuBLASLt kernel. NOT YET RUN ON A GPU: it is tested on CPUs, where the same function
exists but the oneDNN engine is faster. `auto` therefore never takes it; ask for it by name.

With levels as int8, a (zero point z_a) of the input `[M, K]` and q (zero point z_o) of the weight `[O, K]`:

    y = s_a * s_o * (a @ q^T - z_o * sum_k a - z_a * sum_k q + K * z_a * z_o) + b

Everything in the bracket is exact in int32. Unsigned levels are kept less 128, and so are their zero points. Scales and
zero points stay tensors: gathered by the clock's bin, one for each sample if timesteps are mixed, or found from the
input where that has a scale for each token. No value travels to the host, so one graph serves all timesteps.

A convolution's row k runs over kernel positions and channels: the int8 levels that each output position looks at are
copied side by side. What pads it is the level that means 0. A kernel of k positions needs k bytes for every input
value meanwhile.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepquant.engines.integers import CENTRE, IntegerLayer, needs_shift, refuse_integers
from stepquant.model.layer import Geometry, QuantizedLayer, QuantizedMatmul
from stepquant.numerics.affine import quantize

__all__ = ["IntMmEngine", "IntMmLayer"]

LEAST_ROWS = 17
"""cuBLASLt takes no fewer rows; missing ones are filled up with zeros."""

MULTIPLE = 8
"""cuBLASLt wants numbers of inputs and outputs that this divides; missing ones are filled up with zeros."""


def _up_to(values: Tensor, rows: int, columns: int) -> Tensor:
    """`[M, K]` with rows and columns of zeros at its end."""
    missing = (0, columns - values.shape[1], 0, rows - values.shape[0])
    return F.pad(values, missing) if any(missing) else values


def _multiple(number: int) -> int:
    return -(-number // MULTIPLE) * MULTIPLE


def _sides(geometry: Geometry, kernel: tuple[int, ...]) -> list[tuple[int, int]]:
    """Padding before and after each spatial axis. Of an odd total the end gets one more, as in torch."""
    if isinstance(geometry.padding, str):
        widths = [step * (size - 1) for step, size in zip(geometry.dilation, kernel, strict=True)]
        return [(width // 2, width - width // 2) for width in widths]
    return [(width, width) for width in geometry.padding]


class IntMmLayer(IntegerLayer):
    """A Linear, or a Conv1d or Conv2d without groups. Not yet run on a GPU."""

    sums: Tensor

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__(layer)
        self._kernel = tuple(self.levels.shape[2:])
        self._shifted = needs_shift(self.weight_quantizer.spec)
        if len(self._kernel) == 2:
            # Kernel positions before channels in memory: the matrix of the product is then a view.
            self.levels = self.levels.contiguous(memory_format=torch.channels_last)
        self.register_buffer("sums", self.levels.flatten(1).sum(1).to(torch.int32))

    def _on_integers(self, x: Tensor) -> Tensor:
        convolution = self.geometry.kind != "linear"
        centre = 0 if self.input_quantizer.spec.symmetric else CENTRE
        sides = _sides(self.geometry, self._kernel) if convolution else []
        if self.geometry.padding_mode != "zeros":
            pads = [width for pair in reversed(sides) for width in pair]
            x, sides = F.pad(x, pads, mode=self.geometry.padding_mode), [(0, 0)] * len(sides)
        last = x.movedim(1, -1) if convolution else x
        params = self.input_quantizer.current(last)
        levels = quantize(last, params, self.input_quantizer.levels(last))
        if any(width for pair in sides for width in pair):
            pads = [0, 0, *(width for pair in reversed(sides) for width in pair)]
            levels = F.pad(levels.sub_(params.zero_point), pads).add_(params.zero_point)
        patches = self._patches(levels.sub_(centre).to(torch.int8))
        # One image in torch's own layout is column by column here; int8 kernels want the terms of a sum side by side.
        a = patches.reshape(-1, patches.shape[-1]).contiguous()
        rows, terms = a.shape
        weight = self._matrix()
        product = torch._int_mm(
            _up_to(a, max(rows, LEAST_ROWS), _multiple(terms)),
            _up_to(weight, _multiple(len(weight)), _multiple(terms)).t(),
        )[:rows, : len(weight)]
        sums = self.sums
        if self._shifted:
            shift = self.shift.to(torch.int32)
            product = product - shift * a.sum(1, keepdim=True, dtype=torch.int32)
            sums = sums - terms * shift
        whole = product.reshape(*patches.shape[:-1], -1)
        zero_point = (params.zero_point - centre).to(torch.int32)
        whole = whole - zero_point * sums
        y = whole.float() * (params.scale * self.weight_scale)
        if self.bias is not None:
            y = y + self.bias.float()
        y = y.to(self.like.dtype)
        return y.movedim(-1, 1) if convolution else y

    def _matrix(self) -> Tensor:
        """The weight's levels `[O, K]`, channels innermost."""
        return self.levels.movedim(1, -1).flatten(1)

    def _patches(self, levels: Tensor) -> Tensor:
        """`[B, *padded, C]` -> `[B, *positions, K]`: what each output position looks at, channels innermost."""
        geometry, kernel = self.geometry, self._kernel
        if all(size == 1 for size in kernel) and all(step == 1 for step in geometry.stride):
            return levels
        axes = []
        for axis, (size, stride, dilation) in enumerate(zip(kernel, geometry.stride, geometry.dilation, strict=True)):
            count = (levels.shape[1 + axis] - dilation * (size - 1) - 1) // stride + 1
            axes.append([slice(at * dilation, at * dilation + stride * (count - 1) + 1, stride) for at in range(size)])
        looked = [levels[(slice(None), *place)] for place in itertools.product(*axes)]
        return torch.cat(looked, -1)


@dataclass(frozen=True)
class IntMmEngine:
    """int8 matrix products for linear layers and convolutions. Not yet run on a GPU; only taken by name."""

    name: str = "int_mm"

    def refuses(self, layer: QuantizedLayer | QuantizedMatmul, device: torch.device) -> str | None:
        reason = refuse_integers(layer)
        if reason is not None:
            return reason
        assert isinstance(layer, QuantizedLayer)
        if layer.geometry.groups != 1:
            return f"It is a convolution with {layer.geometry.groups} groups; this engine has none."
        if device.type not in ("cpu", "cuda"):
            return f"The layer is on {device.type}; torch._int_mm runs on cpu and cuda."
        return None

    def pack(self, layer: QuantizedLayer | QuantizedMatmul) -> nn.Module:
        assert isinstance(layer, QuantizedLayer)
        return IntMmLayer(layer)
