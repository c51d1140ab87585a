"""What engines on integers share: a layer's weight as int8 levels, and which layers integers can run.

With activation levels a (scale s_a, zero point z_a) and weight levels q (scale s_o, zero point z_o of output o):

    y = s_a * s_o * sum (a - z_a) * (q - z_o) + b

q - z_o lies in -(2^b - 1) .. 2^b - 1, which int8 holds up to 7 bits and for symmetric weights. For asymmetric weights
of 8 bits the levels are kept as q - 128 and the rest is a term of its own, exact in integers:

    sum (a - z_a) * (q - z_o) = sum (a - z_a) * (q - 128) - (z_o - 128) * sum (a - z_a)

Where s_a and z_a are a token's or a sample's own, the sum is the same and only what follows it differs. Inputs that are
scaled or rotated first, and low-rank branches beside the layer, are in floating point, around these sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepquant.engines.levels import LevelsLayer
from stepquant.errors import EngineError
from stepquant.model.layer import LowRankBranch, QuantizedLayer, QuantizedMatmul
from stepquant.model.quantizer import DynamicQuantizer, InputQuantizer, WeightQuantizer
from stepquant.model.transform import InputTransform
from stepquant.numerics.spec import QuantSpec

__all__ = ["IntegerLayer", "needs_shift", "refuse_integers"]

CENTRE = 128
"""Offset of unsigned levels of 8 bits from signed ones."""

MOST_TERMS = (2**31 - 1) // (255 * 255)
"""Terms of a sum of (a - z_a) * (q - z_o) that int32 is sure to hold."""


def needs_shift(spec: QuantSpec) -> bool:
    """Whether q - z of a weight may need nine bits."""
    return not spec.symmetric and spec.bits == 8


def refuse_integers(layer: QuantizedLayer | QuantizedMatmul) -> str | None:
    """Why a layer cannot run on int8 weights and 8-bit inputs, or None. Reads no tensor: it may be on meta."""
    if isinstance(layer, QuantizedMatmul):
        return "It is a matmul of two activations; this engine needs a weight."
    weight, given = layer.weight_quantizer, layer.input_quantizer
    if weight is None:
        return "Its weight is not quantized."
    if not isinstance(weight, WeightQuantizer):
        return f"Its weight quantizer is a {type(weight).__name__}, which only calibration has."
    if not layer.on_grid:
        return "Its weight has not been hardened."
    if weight.spec.granularity == "group":
        return "Its weight has a scale for each group of inputs; integer sums need one for each output."
    if layer.first_token is not None:
        return "Its first token passes by the input quantizer; this engine quantizes all tokens alike."
    if given is None:
        return "Its input is not quantized."
    if not isinstance(given, InputQuantizer | DynamicQuantizer):
        return f"Its input is quantized by a {type(given).__name__}; this engine needs evenly spaced levels."
    if given.spec.granularity not in ("tensor", "token"):
        return "Its input has a scale for each channel; integer sums need one for all channels."
    if given.spec.granularity == "token" and layer.geometry.kind != "linear":
        return "Its input has a scale for each of its lines; the sums of a convolution need one for all positions."
    if layer.split is not None:
        return "Its input has two quantizers, one for each part of a concatenation; integer sums need one."
    if isinstance(given, InputQuantizer) and max(given.bits) > 8:
        return f"Its input has {max(given.bits)} bits at some timesteps; this engine has at most 8."
    terms = layer.weight[0].numel()
    if terms > MOST_TERMS:
        return f"It sums {terms} products, and int32 is only sure to hold {MOST_TERMS} of them."
    return None


class IntegerLayer(LevelsLayer):
    """A hardened layer whose weight is kept as int8 levels. Abstract: subclasses say how it runs.

    levels: int8, in the weight's shape. shift `[O]`: int16; the weight is `(levels - shift) * scale`. Zero unless
        `needs_shift`, so that levels are q - z.
    The quantizers, the transform and the branch are the simulated layer's own modules. There are no gradients.
    """

    levels: Tensor
    shift: Tensor
    like: Tensor
    input_quantizer: InputQuantizer | DynamicQuantizer
    input_transform: InputTransform | None
    branch: LowRankBranch | None

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__()
        reason = refuse_integers(layer)
        if reason is not None:
            raise EngineError(f"A layer cannot be packed for integer arithmetic. {reason}")
        quantizer, given = layer.weight_quantizer, layer.input_quantizer
        assert isinstance(quantizer, WeightQuantizer)
        assert isinstance(given, InputQuantizer | DynamicQuantizer)
        self.geometry = layer.geometry
        self.shape = layer.weight.shape
        self.weight_quantizer = quantizer
        self.input_quantizer = given
        self.input_transform = layer.input_transform
        self.branch = layer.branch
        self.bias = layer.bias
        weight = layer.weight.detach()
        found = quantizer.levels(weight)
        if not torch.equal(quantizer.restore(found).to(weight.dtype), weight):
            raise EngineError(
                "The weight does not lie on the grid of its quantizer, so its levels would not restore it."
            )
        zero_point = quantizer.zero_point.to(torch.int16).reshape(-1).expand(len(weight))
        shifted = needs_shift(quantizer.spec)
        shift = zero_point - CENTRE if shifted else torch.zeros_like(zero_point)
        signed = found - _along_outputs(zero_point - shift, found)
        self.register_buffer("levels", signed.to(torch.int8))
        self.register_buffer("shift", shift.clone())
        # Follows `.half()` and `.to()`, and so tells the dtype that the weight would have by now.
        self.register_buffer("like", torch.empty(0, dtype=weight.dtype, device=weight.device))

    @property
    def weight(self) -> Tensor:
        """The simulated layer's weight, computed anew."""
        whole = self.levels.float() - _along_outputs(self.shift, self.levels).float()
        return (whole * _along_outputs(self.weight_scale, self.levels)).to(self.like.dtype)

    @property
    def weight_scale(self) -> Tensor:
        """Scale of each output, float32 `[O]`."""
        return self.weight_quantizer.scale.reshape(-1).expand(len(self.levels))

    def forward(self, x: Tensor) -> Tensor:
        self._check_no_gradient(x)
        if self.geometry.kind != "linear" and x.ndim == self.levels.ndim - 1:  # one sample without a batch
            return self(x[None]).squeeze(0)  # type: ignore[no-any-return]
        if self.input_transform is not None:
            x = self.input_transform(x)
        y = self._on_integers(x)
        return y if self.branch is None else y + self.branch(x)

    def _on_integers(self, x: Tensor) -> Tensor:
        """The layer without its branch, for an input behind its transform."""
        raise NotImplementedError

    def _check_no_gradient(self, x: Tensor) -> None:
        if torch.is_grad_enabled() and x.requires_grad:
            raise EngineError(
                f"{type(self).__name__} computes on integers and has no gradient, but its input asks for one: sample "
                'under torch.no_grad(), or load with engine="simulated".'
            )


def _along_outputs(values: Tensor, weight: Tensor) -> Tensor:
    """`[O]` in a shape that broadcasts against a weight `[O, ...]`."""
    return values.reshape(-1, *(1,) * (weight.ndim - 1))
