"""The weight_only engine: weights of 2 to 8 bits, inputs in floating point (W8A16, W4A16).

NOT YET RUN ON A GPU: it is tested on CPUs, with the operators that run everywhere. `auto` therefore never takes it; ask
for it by name.

With q (scale s_o, zero point z_o) of the weight `[O, K]`, and 2^e_o the power of two below s_o:

    y = (s_o / 2^e_o) * sum_k x_k * ((q_ok - z_o) * 2^e_o) + b

The second factor of the sum has at most eight significant bits, which bfloat16 and float16 hold: the weight that is
multiplied is exact. The sum comes in the model's dtype; behind it everything is float32, the checkpoint's scales as
well, until the result is rounded to that dtype. The simulated layer rounds each s_o * (q - z_o) to it instead; that is
the difference between the two. The power of two keeps float16 from overflowing where the simulation does not.

A byte holds one level of 5 to 8 bits, or two of fewer. A weight is restored at every call by a few pointwise
operations, which torch.compile can fuse, and is dropped after it. That saves memory, and costs little where the product
has many rows, as of tokens or pixels. Nothing depends on the timestep.

Why not torch's own operators `_weight_int8pack_mm` and `_weight_int4pack_mm`? They go through the whole weight again
for every few rows, which suits a language model that writes one token. They have no convolutions. They want scales of
the input's dtype, or round the sum to it before a zero point can be taken out. Int4 levels are packed for one kind of
device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stepquant.engines.integers import CENTRE, needs_shift
from stepquant.engines.levels import LevelsLayer
from stepquant.engines.reference import ReferenceEngine
from stepquant.errors import EngineError
from stepquant.model.layer import QuantizedLayer, QuantizedMatmul
from stepquant.model.quantizer import WeightQuantizer
from stepquant.numerics.packing import pack, unpack

__all__ = ["WeightOnlyEngine", "WeightOnlyLayer"]

HALF_BYTE = 4
"""Bits of a level that two share a byte with."""

POWERS = (2.0**-24, 2.0**15)
"""Powers of two that float16 holds, and to which those below scales are clamped."""


class WeightOnlyLayer(LevelsLayer):
    """A hardened Linear, Conv1d or Conv2d whose weight is kept as levels. Not yet run on a GPU.

    levels: int8 in the weight's shape; of at most 4 bits uint8, `numerics.packing` of the levels less qmin.
    shift `[O]`: int16; the weight is `(levels - shift) * scale`. power `[O]`: 2^e, in the dtype of the model.
    """

    levels: Tensor
    shift: Tensor
    power: Tensor

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__()
        reason = _refusal(layer)
        if reason is not None:
            raise EngineError(f"A layer cannot be packed for the weight_only engine. {reason}")
        quantizer = layer.weight_quantizer
        assert isinstance(quantizer, WeightQuantizer)
        self.geometry = layer.geometry
        self.shape = layer.weight.shape
        self.weight_quantizer = quantizer
        self.input_transform = layer.input_transform
        self.branch = layer.branch
        self.bias = layer.bias
        weight, spec = layer.weight.detach(), quantizer.spec
        found = quantizer.levels(weight)
        zero_point = quantizer.zero_point.to(torch.int16).reshape(-1).expand(len(weight))
        self._halves = spec.bits <= HALF_BYTE
        self._shifted = self._halves or needs_shift(spec)
        # What is not shifted is kept as q - z, so that a call has nothing to subtract.
        offset = torch.full_like(zero_point, spec.qmin if self._halves else CENTRE) if self._shifted else zero_point
        kept = found - self._along_outputs(offset)
        self.register_buffer("levels", pack(kept, HALF_BYTE) if self._halves else kept.to(torch.int8))
        self.register_buffer("shift", zero_point - offset)
        mantissa, _ = torch.frexp(self.weight_scale)
        power = (self.weight_scale / (2 * mantissa)).clamp(*POWERS)
        # Follows `.half()` and `.to()`, and so tells the dtype that the weight would have by now.
        self.register_buffer("power", power.to(weight.dtype))
        if not torch.equal(self.weight, weight):
            raise EngineError(
                "The weight does not lie on the grid of its quantizer, so its levels would not restore it."
            )

    @property
    def weight(self) -> Tensor:
        """The simulated layer's weight, computed anew."""
        whole = self._unpacked().to(torch.int16) - self._along_outputs(self.shift)
        return (whole.float() * self._along_outputs(self.weight_scale)).to(self.power.dtype)

    @property
    def weight_scale(self) -> Tensor:
        """Scale of each output, float32 `[O]`."""
        return self.weight_quantizer.scale.reshape(-1).expand(self.shape[0])

    def forward(self, x: Tensor) -> Tensor:
        if self.input_transform is not None:
            x = self.input_transform(x)
        beside = None if self.branch is None else self.branch(x)
        product = self.geometry.apply(x, self._exact_weight(), None)
        axes = len(self.geometry.stride)
        y = product * (self.weight_scale / self.power).reshape(-1, *(1,) * axes)
        if self.bias is not None:
            y = y + self.bias.reshape(-1, *(1,) * axes)
        y = y.to(product.dtype)
        return y if beside is None else y + beside

    def _exact_weight(self) -> Tensor:
        """(q - z) * 2^e in the weight's shape, in the dtype of the model."""
        power = self._along_outputs(self.power)
        whole = self._unpacked() * power
        return whole - self._along_outputs(self.shift) * power if self._shifted else whole

    def _unpacked(self) -> Tensor:
        if self._halves:
            return unpack(self.levels, HALF_BYTE, self.shape.numel()).reshape(self.shape)
        return self.levels

    def _along_outputs(self, values: Tensor) -> Tensor:
        """`[O]` in a shape that broadcasts against the weight."""
        return values.reshape(-1, *(1,) * (len(self.shape) - 1))


def _refusal(layer: QuantizedLayer | QuantizedMatmul) -> str | None:
    """Why the engine cannot run a layer, or None. Reads no tensor: it may be on meta."""
    reason = ReferenceEngine().refuses(layer, torch.device("cpu"))
    if reason is not None:
        return reason
    assert isinstance(layer, QuantizedLayer)
    assert isinstance(layer.weight_quantizer, WeightQuantizer)
    if layer.input_quantizer is not None:
        return "Its input is quantized; this engine is for inputs in floating point."
    if layer.weight_quantizer.spec.granularity == "group":
        return "Its weight has a scale for each group of inputs; scales behind the product need one for each output."
    return None


@dataclass(frozen=True)
class WeightOnlyEngine:
    """Weights as levels, inputs in floating point. Not yet run on a GPU; only taken by name."""

    name: str = "weight_only"

    def refuses(self, layer: QuantizedLayer | QuantizedMatmul, device: torch.device) -> str | None:  # noqa: ARG002
        return _refusal(layer)

    def pack(self, layer: QuantizedLayer | QuantizedMatmul) -> nn.Module:
        assert isinstance(layer, QuantizedLayer)
        return WeightOnlyLayer(layer)
