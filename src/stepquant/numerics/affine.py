"""Uniform affine quantization: the one place where stepquant rounds and clamps.

    q     = clamp(round(x / scale) + zero_point, qmin, qmax)
    x_hat = (q - zero_point) * scale

`round` is to the nearest level, ties to even, as in torch. Everything is a pure function of its arguments; scales and
zero points are float32 (zero points hold whole numbers) and broadcast against x.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from stepquant.errors import SpecError
from stepquant.numerics.spec import QuantSpec

__all__ = [
    "Levels",
    "QParams",
    "choose_qparams",
    "dequantize",
    "fake_quantize",
    "from_groups",
    "grouped",
    "quantize",
    "range_of",
]

# Smallest scale: keeps an all-zero tensor or channel away from 0 / 0 and leaves it exactly zero.
MIN_SCALE = 1e-8


class QParams(NamedTuple):
    """scale: real value of one level, > 0. zero_point: the level that means 0. Both broadcast against the tensor."""

    scale: Tensor
    zero_point: Tensor


class Levels(NamedTuple):
    """Lowest and highest level, inclusive, as tensors that broadcast against x: where samples have different bits."""

    qmin: Tensor
    qmax: Tensor


def grouped(x: Tensor, spec: QuantSpec) -> Tensor:
    """View a weight `[O, ...]` so that elements sharing a scale lie in the last axis.

    tensor: `[1, N]`; channel: `[O, N/O]`; group: `[O, G, group_size]`; token, channel_token: `[..., C]`
    as it is.
    """
    if spec.granularity == "tensor":
        return x.reshape(1, -1)
    if spec.granularity in ("token", "channel_token"):
        return x
    rows = x.reshape(x.shape[0], -1)
    if spec.granularity == "channel":
        return rows
    size = spec.group_size
    assert size is not None
    if rows.shape[1] % size:
        raise SpecError(
            f"group_size {size} does not divide the {rows.shape[1]} weights of an output channel (weight shape "
            f"{list(x.shape)}): choose a divisor of {rows.shape[1]}."
        )
    return rows.reshape(x.shape[0], -1, size)


def from_groups(x: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Undo `grouped`."""
    return x.reshape(shape)


def range_of(x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Smallest and largest element per group of elements sharing a scale, keeping a last axis of 1."""
    view = grouped(x, spec)
    return view.amin(-1, keepdim=True), view.amax(-1, keepdim=True)


def choose_qparams(low: Tensor, high: Tensor, spec: QuantSpec) -> QParams:
    """Scale and zero point that cover [low, high], widened to contain 0 so that 0 is a level.

    Asymmetric: scale = (high - low) / (2^b - 1), zero_point = round(-low / scale).
    Symmetric: scale = max(|low| / 2^(b-1), |high| / (2^(b-1) - 1)), zero_point = 0.
    Nonnegative: scale = high / (2^b - 1), zero_point = qmin = 0.
    """
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    if spec.symmetric:
        scale = torch.maximum(low.abs() / -spec.qmin, high / spec.qmax).clamp(min=MIN_SCALE)
        return QParams(scale, torch.zeros_like(scale))
    if spec.nonnegative:
        scale = (high / spec.qmax).clamp(min=MIN_SCALE)
        return QParams(scale, torch.zeros_like(scale))
    scale = ((high - low) / (spec.qmax - spec.qmin)).clamp(min=MIN_SCALE)
    zero_point = (spec.qmin - torch.round(low / scale)).clamp(spec.qmin, spec.qmax)
    return QParams(scale, zero_point)


def quantize(x: Tensor, params: QParams, spec: QuantSpec | Levels) -> Tensor:
    """Levels of x as whole numbers in x's floating dtype (float32 for half precision)."""
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    # In place on the fresh quotient: four temporaries of the tensor's size less.
    ends: Any = spec.qmin, spec.qmax  # two numbers or two tensors
    result: Tensor = torch.div(x, params.scale).round_().add_(params.zero_point).clamp_(*ends)
    return result


def dequantize(levels: Tensor, params: QParams) -> Tensor:
    """Real values of levels."""
    return (levels - params.zero_point) * params.scale


def fake_quantize(x: Tensor, params: QParams, spec: QuantSpec | Levels, *, difference: float = 0.0) -> Tensor:
    """Quantize and dequantize, with gradients to x and scale; the zero point gets none.

        dx_hat/dx     = 1 inside the range, 0 outside
        dx_hat/dscale = (q - zero_point) - x / scale inside the range, (q - zero_point) outside

    Source: the LSQ gradient without its rescaling (Esser et al. 2020, eq. 3), as in the public code of Q-Diffusion.

    It holds on average over values that are spread evenly between levels. Where many lie together, as at the least
    value of SiLU or GELU, they all gain or lose by the same level's move, and the LSQ gradient does not see that.
    With `difference` d above 0 the gradient is what the result changes by:

        dx_hat/dscale = (x_hat(scale (1 + d)) - x_hat(scale (1 - d))) / (2 d scale)

    The result has x's dtype.
    """
    if torch.is_grad_enabled() and (x.requires_grad or params.scale.requires_grad):
        apply: Any = _FakeQuantize.apply
        result: Tensor = apply(x, params.scale, params.zero_point, spec, difference)
        return result
    return quantize(x, params, spec).sub_(params.zero_point).mul_(params.scale).to(x.dtype)


class _FakeQuantize(torch.autograd.Function):
    """Saves x and the result only, which the layers on both sides keep anyway.

    Which elements are inside the range is computed again for the gradient, without a bool mask: on CPUs, comparing into
    one and multiplying by it take several times as long.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec | Levels, difference: float
    ) -> Tensor:
        ctx.ends, ctx.difference = (spec.qmin, spec.qmax), difference
        y: Tensor = _shifted(x, scale, zero_point).clamp_(*ctx.ends).sub_(zero_point).mul_(scale)
        ctx.save_for_backward(x, scale, zero_point, y)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, scale, zero_point, y = ctx.saved_tensors
        shifted = _shifted(x, scale, zero_point)
        wide = grad.to(shifted.dtype)
        grad_x = _inside(wide, shifted, *ctx.ends)
        grad_scale = None
        if ctx.needs_input_grad[1] and ctx.difference:
            above, below = (
                _shifted(x, at, zero_point).clamp_(*ctx.ends).sub_(zero_point).mul_(at)
                for at in (scale * (1 + ctx.difference), scale * (1 - ctx.difference))
            )
            terms = above.sub_(below).mul_(wide)
            grad_scale = terms.sum_to_size(scale.shape).div_(2 * ctx.difference * scale).to(scale.dtype)
        elif ctx.needs_input_grad[1]:
            # (q - z) is y / scale everywhere, and x / scale only counts inside the range.
            terms = (wide * y).addcmul_(grad_x, x.to(wide.dtype), value=-1)
            grad_scale = terms.sum_to_size(scale.shape).div_(scale).to(scale.dtype)
        return (grad_x.to(x.dtype) if ctx.needs_input_grad[0] else None), grad_scale, None, None, None


def _inside(grad: Tensor, levels: Tensor, qmin: int | Tensor, qmax: int | Tensor) -> Tensor:
    """The gradient where levels, whole numbers, are in the range, and 0 elsewhere."""
    if isinstance(qmin, Tensor) or isinstance(qmax, Tensor):
        ends: Any = qmin, qmax
        clipped = levels.clamp(*ends)
        return torch.eq(clipped, levels, out=clipped).mul_(grad)
    # The gradient of a clamp whose ends lie between levels: one pass.
    result: Tensor = torch.ops.aten.hardtanh_backward(grad, levels, qmin - 0.5, qmax + 0.5)
    return result


def _shifted(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """round(x / scale) + zero_point before it is clipped, in float32 or wider."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return torch.div(wide, scale).round_().add_(zero_point)
