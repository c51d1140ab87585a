"""The reference engine: packed storage, floating-point arithmetic, the simulated layer's result to the last bit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stepquant.engines.levels import LevelsLayer
from stepquant.errors import EngineError
from stepquant.model.layer import QuantizedLayer, QuantizedMatmul
from stepquant.model.quantizer import WeightQuantizer
from stepquant.numerics.packing import pack, unpack

__all__ = ["PackedLayer", "ReferenceEngine"]


class PackedLayer(LevelsLayer):
    """A quantized layer whose weight is kept as bit-packed levels and restored on every call.

    packed: uint8, `numerics.packing` of `level - qmin`. The quantizers are the simulated layer's own modules.
    """

    packed: Tensor
    like: Tensor

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__()
        quantizer = layer.weight_quantizer
        if not isinstance(quantizer, WeightQuantizer) or not layer.on_grid:
            raise EngineError("Only hardened layers with a quantized weight can be packed: call harden_() first.")
        self.geometry = layer.geometry
        self.shape = layer.weight.shape
        self.weight_quantizer = quantizer
        self.input_quantizer = layer.input_quantizer
        self.input_transform = layer.input_transform
        self.branch = layer.branch
        self.bias = layer.bias
        levels = quantizer.levels(layer.weight.detach())
        if not torch.equal(quantizer.restore(levels).to(layer.weight.dtype), layer.weight):
            raise EngineError(
                "The weight does not lie on the grid of its quantizer, so its levels would not restore it."
            )
        self.register_buffer("packed", pack(levels.to(torch.int64) - quantizer.spec.qmin, quantizer.spec.bits))
        # Follows `.half()` and `.to()`, and so tells the dtype that the weight would have by now.
        self.register_buffer("like", torch.empty(0, dtype=layer.weight.dtype, device=layer.weight.device))

    @property
    def weight(self) -> Tensor:
        """The simulated layer's weight, computed anew."""
        spec = self.weight_quantizer.spec
        levels = unpack(self.packed, spec.bits, self.shape.numel()).float() + spec.qmin
        return self.weight_quantizer.restore(levels.reshape(self.shape)).to(self.like.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.input_transform is not None:
            x = self.input_transform(x)
        beside = None if self.branch is None else self.branch(x)
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        y = self.geometry.apply(x, self.weight, self.bias)
        return y if beside is None else y + beside


@dataclass(frozen=True)
class ReferenceEngine:
    """Keeps weights bit-packed in memory. Slower than simulation by the unpacking of every weight at every call."""

    name: str = "reference"

    def refuses(self, layer: QuantizedLayer | QuantizedMatmul, device: torch.device) -> str | None:  # noqa: ARG002
        if isinstance(layer, QuantizedMatmul):
            return "It is a matmul and has no weight to pack."
        if layer.weight_quantizer is None:
            return "Its weight is not quantized."
        if not isinstance(layer.weight_quantizer, WeightQuantizer):
            return f"Its weight quantizer is a {type(layer.weight_quantizer).__name__}, which only calibration has."
        if not layer.on_grid:
            return "Its weight has not been hardened."
        if layer.first_token is not None:
            return "Its first token passes by the input quantizer; this engine quantizes all tokens alike."
        if layer.split is not None:
            return "Its input has two quantizers, one for each part of a concatenation; this engine has one."
        return None

    def pack(self, layer: QuantizedLayer | QuantizedMatmul) -> nn.Module:
        assert isinstance(layer, QuantizedLayer)
        return PackedLayer(layer)
