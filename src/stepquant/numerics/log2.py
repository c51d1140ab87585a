"""Levels at powers of two: half of the levels lie below the square root of the range, where most of a softmax lies.

    q     = clamp(round(-log2(x / scale)), 0, 2^b - 1)                 scale: the largest value, level 0
    x_hat = scale * 2^-q    for q < 2^b - 1,    0 for the last level

The last level means 0, so 0 is a level as it is for uniform quantization, and what is much smaller than the least power
of two becomes 0 rather than that power. Rounding is to the nearest exponent: the border between two neighbours is their
geometric mean.

Source: the formula is TCAQ-DM's (arXiv:2412.16700), without its last line; that the last level means 0 is ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stepquant.numerics.spec import QuantSpec

__all__ = ["dequantize_log2", "fake_quantize_log2", "quantize_log2"]


def quantize_log2(x: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    """Levels of x >= 0 as whole numbers in x's floating dtype (float32 for half precision)."""
    # log2(0) is -inf, which is the last level once it is clamped.
    return _exponents(x, scale).clamp_(spec.qmin, spec.qmax)


def dequantize_log2(levels: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    """Real values of levels."""
    # `torch.pow` of a scalar and not `exp2`, which has no ONNX form. Both are exact for whole exponents.
    values = torch.pow(2.0, -levels) * scale
    return torch.where(levels == spec.qmax, torch.zeros_like(values), values)


def fake_quantize_log2(x: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    """Quantize and dequantize, in x's dtype, with a straight-through gradient to x; the scale gets none.

    dx_hat/dx = 1 where the level is not clamped, 0 elsewhere
    """
    if torch.is_grad_enabled() and x.requires_grad:
        apply: Any = _FakeQuantizeLog2.apply
        result: Tensor = apply(x, scale, spec)
        return result
    return dequantize_log2(quantize_log2(x, scale, spec), scale, spec).to(x.dtype)


def _exponents(x: Tensor, scale: Tensor) -> Tensor:
    """round(-log2(x / scale)) before it is clipped, in float32 or wider."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return torch.log2((wide / scale).clamp(min=0)).neg().round()


class _FakeQuantizeLog2(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
        levels = _exponents(x, scale)
        ctx.save_for_backward((levels >= spec.qmin) & (levels <= spec.qmax))
        return dequantize_log2(levels.clamp(spec.qmin, spec.qmax), scale, spec).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return grad * inside, None, None
