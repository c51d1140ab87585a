"""The int_mm engine: linear layers and 1x1 convolutions as one int8 matrix product, `torch._int_mm`.

For CUDA devices, where that is a cuBLASLt kernel. NOT YET RUN ON A GPU: it is tested on CPUs, where the same function
exists but the oneDNN engine is faster. `auto` therefore never takes it; ask for it by name.

With levels as int8, a (zero point z_a) of the input `[M, K]` and q (zero point z_o) of the weight `[O, K]`:

    y = s_a * s_o * (a @ q^T - z_o * sum_k a - z_a * sum_k q + K * z_a * z_o) + b

Everything in the bracket is exact in int32. Unsigned levels are kept less 128, and so are their zero points. Scales and
zero points stay tensors that are gathered by the clock's bin, one for each sample if timesteps are mixed: no value
travels to the host, so one graph serves all timesteps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepquant.engines.integers import CENTRE, IntegerLayer, refuse_integers
from stepquant.model.layer import Geometry, QuantizedLayer, QuantizedMatmul
from stepquant.numerics.affine import quantize

__all__ = ["IntMmEngine", "IntMmLayer"]

LEAST_ROWS = 17
"""cuBLASLt takes no fewer rows; missing ones are filled up with zeros."""

MULTIPLE = 8
"""cuBLASLt wants numbers of inputs and outputs that this divides."""


def _pointwise(geometry: Geometry) -> bool:
    """Whether an operator looks at one position at a time and at all channels. The kernel is looked at elsewhere."""
    if geometry.kind == "linear":
        return True
    still = geometry.padding in ("same", (0,) * len(geometry.stride))
    return still and geometry.groups == 1 and all(step == 1 for step in geometry.stride)


class IntMmLayer(IntegerLayer):
    """A Linear, or a Conv1d or Conv2d of kernel 1, stride 1 and without groups. Not yet run on a GPU."""

    sums: Tensor

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__(layer)
        flat = self.levels.reshape(len(self.levels), -1)
        self.register_buffer("sums", flat.sum(1).to(torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        self._check_no_gradient(x)
        convolution = self.geometry.kind != "linear"
        last = x.movedim(1, -1) if convolution else x
        params = self.input_quantizer.current(last)
        centre = 0 if self.input_quantizer.spec.symmetric else CENTRE
        levels = quantize(last, params, self.input_quantizer.levels(last)).sub_(centre).to(torch.int8)
        a = levels.reshape(-1, levels.shape[-1])
        missing = max(0, LEAST_ROWS - len(a))
        padded = F.pad(a, (0, 0, 0, missing)) if missing else a
        product = torch._int_mm(padded, self.levels.reshape(len(self.levels), -1).t())[: len(a)]
        shift = self.shift.to(torch.int32)
        whole = product - shift * a.sum(1, keepdim=True, dtype=torch.int32)
        whole = whole.reshape(*levels.shape[:-1], -1)
        zero_point = (params.zero_point - centre).to(torch.int32)
        whole = whole - zero_point * (self.sums - a.shape[1] * shift)
        y = whole.float() * (params.scale * self.weight_scale)
        if self.bias is not None:
            y = y + self.bias.float()
        y = y.to(self.like.dtype)
        return y.movedim(-1, 1) if convolution else y


@dataclass(frozen=True)
class IntMmEngine:
    """int8 matrix products for linear layers and 1x1 convolutions. Not yet run on a GPU; only taken by name."""

    name: str = "int_mm"

    def refuses(self, layer: QuantizedLayer | QuantizedMatmul, device: torch.device) -> str | None:
        reason = refuse_integers(layer)
        if reason is not None:
            return reason
        assert isinstance(layer, QuantizedLayer)
        shape = layer.weight.shape
        if any(width != 1 for width in shape[2:]) or not _pointwise(layer.geometry):
            return "It is a convolution that looks at more than one position or has groups; this engine has none."
        if device.type not in ("cpu", "cuda"):
            return f"The layer is on {device.type}; torch._int_mm runs on cpu and cuda."
        if device.type == "cuda" and (shape[0] % MULTIPLE or shape[1] % MULTIPLE):
            return (
                f"It has {shape[1]} inputs and {shape[0]} outputs, and on CUDA both must be multiples of {MULTIPLE} "
                "(by its documentation: this engine was not yet run on a GPU)."
            )
        return None

    def pack(self, layer: QuantizedLayer | QuantizedMatmul) -> nn.Module:
        assert isinstance(layer, QuantizedLayer)
        return IntMmLayer(layer)
