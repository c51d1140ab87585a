"""AdaRound: learning which way each weight is rounded, and what a stage may learn in a quantized model.

Source: Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization", as in the public code of
BRECQ and Q-Diffusion:

    w_hat = scale * (clamp(floor(w / scale) + h(alpha) + zero_point, qmin, qmax) - zero_point)
    h(alpha) = clamp(1.2 * sigmoid(alpha) - 0.1, 0, 1)
    R(alpha) = sum(1 - |2 h - 1|^beta)
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from stepquant.errors import SpecError, nearest
from stepquant.model.layer import QuantizedLayer, QuantizedMatmul
from stepquant.model.quantizer import InputQuantizer, WeightQuantizer
from stepquant.numerics.affine import grouped

__all__ = [
    "ScaleGradient",
    "SoftRounding",
    "adam",
    "annealed_beta",
    "candidates_kept",
    "check_scale_gradient",
    "fix_scales_",
    "input_scales",
    "materialised",
    "relative_groups",
    "soften_",
]

ZETA, GAMMA = 1.1, -0.1
"""Stretch of the rectified sigmoid (Louizos et al. 2018; AdaRound eq. 23)."""

ENDS = -GAMMA / (ZETA - GAMMA), (1 - GAMMA) / (ZETA - GAMMA)
"""sigmoid(alpha) where h reaches 0 and 1, and its gradient ends."""

ScaleGradient = Literal["difference", "straight"]

DIFFERENCE = 0.01
"""Share by which a scale is moved up and down for its gradient: a choice of ours; 0.03 and 0.1 were level with it."""

AT_ONCE = 1 << 15
"""Numbers that operators on a processor take at once: what one of them leaves is still in its cache for the next."""


class SoftRounding(nn.Module):
    """Stands in a WeightQuantizer's place while rounding is learnt.

    alpha: float32, in the shape of `grouped(weight)`; the variable V of AdaRound.
    floor: lower level of every weight, before the zero point.
    """

    floor: Tensor

    def __init__(self, quantizer: WeightQuantizer, weight: Tensor, start: Tensor | None = None) -> None:
        """weight: the full-precision weight. start: h in [0, 1] to begin with; None begins at the weight itself."""
        super().__init__()
        self.quantizer = quantizer
        position = (grouped(weight.detach().float(), quantizer.spec) / quantizer.scale).contiguous()
        floor = torch.floor(position)
        self.register_buffer("floor", floor)
        fraction = position - floor if start is None else start
        # Inverse of h, kept off its flat ends so that every weight still has a gradient.
        fraction = fraction.contiguous().clamp(0.01, 0.99)
        self.alpha = nn.Parameter(-torch.log((ZETA - GAMMA) / (fraction - GAMMA) - 1))
        self.kept: tuple[Tensor, Tensor] | None = None

    def h(self) -> Tensor:
        """How far each weight is rounded up, in [0, 1]."""
        # hardtanh is clamp with a gradient of one pass instead of four.
        return F.hardtanh(torch.sigmoid(self.alpha).mul(ZETA - GAMMA).add_(GAMMA), 0.0, 1.0, inplace=True)

    def _values(self, up: Tensor) -> Tensor:
        spec, (scale, zero_point) = self.quantizer.spec, self.quantizer.params
        levels = torch.clamp(self.floor + up + zero_point, spec.qmin, spec.qmax)
        return (levels - zero_point) * scale

    def forward(self, weight: Tensor) -> Tensor:
        # What is clamped to one level whichever way it is rounded has two equal candidates, and so no gradient.
        if self.kept is None:
            soft = torch.lerp(*self.candidates(), self.h())
        else:
            apply: Any = _Between.apply
            soft = apply(self.alpha, *self.kept)
        return soft.reshape(weight.shape).to(weight.dtype)

    def rounded(self, weight: Tensor) -> Tensor:
        """The weight after hard rounding: up where alpha >= 0."""
        return self._values((self.alpha.detach() >= 0).to(self.floor.dtype)).reshape(weight.shape).to(weight.dtype)

    def candidates(self) -> tuple[Tensor, Tensor]:
        """Every weight rounded down and rounded up, both in the shape of `alpha`."""
        return self._values(torch.zeros_like(self.floor)), self._values(torch.ones_like(self.floor))

    def regulariser(self, beta: float) -> Tensor:
        """R(alpha): 0 when every h is 0 or 1."""
        return (1 - (2 * self.h() - 1).abs().pow(beta)).sum()

    @torch.no_grad()
    def regularise_(self, beta: float, factor: float) -> None:
        """Add the gradient of `factor * regulariser(beta)` to that of alpha, without its value.

        dR/dalpha = -2 beta |2 h - 1|^(beta - 1) sign(2 h - 1) (ZETA - GAMMA) s (1 - s),   s = sigmoid(alpha)

        and 0 where h is 0 or 1.
        """
        if self.alpha.grad is None:
            self.alpha.grad = torch.zeros_like(self.alpha)
        stretch = ZETA - GAMMA
        # 2 h - 1 = 2 stretch (s - 1/2): what the power makes of the constant goes into the factor.
        factor *= -2 * beta * stretch * (2 * stretch) ** (beta - 1)
        for alpha, grad in _pieces(self.alpha, self.alpha.grad):
            rising = torch.sigmoid(alpha)
            side = rising - 0.5
            # A power as exp(log) takes a quarter of the time; log(0) leaves exp(-inf) = 0.
            power = side.abs().log_().mul_(beta - 1).exp_().copysign_(side)
            inside = torch.ops.aten.hardtanh_backward(power, rising, *ENDS)
            grad.add_(torch.ops.aten.sigmoid_backward(inside, rising), alpha=factor)


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same parts of contiguous tensors of one size, as views: all of them at once on anything but a processor."""
    if tensors[0].numel() <= AT_ONCE or tensors[0].device.type != "cpu":
        return iter([tuple(tensor.view(-1) for tensor in tensors)])
    return zip(*(torch.split(tensor.view(-1), AT_ONCE) for tensor in tensors), strict=True)


class _Between(torch.autograd.Function):
    """low + h(alpha) span with its first derivative with respect to alpha; there is no second."""

    @staticmethod
    def forward(ctx: Any, alpha: Tensor, low: Tensor, span: Tensor) -> Tensor:
        found, rising = torch.empty_like(low), torch.empty_like(low)
        for one, base, width, into, kept in _pieces(alpha, low, span, found, rising):
            torch.sigmoid(one, out=kept)
            up = torch.mul(kept, ZETA - GAMMA).add_(GAMMA).clamp_(0, 1)
            torch.addcmul(base, width, up, out=into)
        ctx.save_for_backward(rising, span)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        rising, span = ctx.saved_tensors
        found = torch.empty_like(rising)
        for one, width, given, into in _pieces(rising, span, grad.contiguous(), found):
            through = torch.mul(width, given).mul_(ZETA - GAMMA)
            through = torch.ops.aten.hardtanh_backward(through, one, *ENDS)
            torch.ops.aten.sigmoid_backward.grad_input(through, one, grad_input=into)
        return found, None, None


@contextmanager
def candidates_kept(roundings: Iterable[SoftRounding]) -> Iterator[None]:
    """Inside, the lower candidate of every weight and its distance to the upper one stay in memory, instead of being
    computed in each forward call. Gradients are of the first order there."""
    kept = list(roundings)
    for rounding in kept:
        low, high = rounding.candidates()
        rounding.kept = low.contiguous(), high.sub_(low).contiguous()
    try:
        yield
    finally:
        for rounding in kept:
            rounding.kept = None


def adam(parameters: Any, lr: float = 1e-3) -> torch.optim.Adam:
    """Adam over parameters or groups of them, in one pass over each."""
    return torch.optim.Adam(parameters, lr=lr, fused=True)


def soften_(layer: QuantizedLayer, full_precision: Tensor, keep: float) -> SoftRounding:
    """Reopen a layer's rounding.

    The new variable starts at `h = r + keep * (u - r)`: r is the full-precision fraction, u the present rounding. 0
    forgets the present rounding, anything above 0.5 keeps its direction.
    """
    quantizer = layer.weight_quantizer
    assert isinstance(quantizer, WeightQuantizer)
    weight = full_precision.detach()
    position = grouped(weight.float(), quantizer.spec) / quantizer.scale
    floor = torch.floor(position)
    present = quantizer.levels(layer.weight).to(torch.float32)
    up = (grouped(present, quantizer.spec) - quantizer.zero_point - floor).clamp(0, 1)
    fraction = position - floor
    soft = SoftRounding(quantizer, weight, fraction + keep * (up - fraction))
    layer.weight_quantizer = soft
    layer.on_grid = False
    return soft


def harden_soft_(layer: QuantizedLayer) -> None:
    """Round a layer's weight for good and put its plain quantizer back."""
    soft = layer.weight_quantizer
    assert isinstance(soft, SoftRounding)
    layer.weight.data = soft.rounded(layer.weight.data)
    layer.weight_quantizer = soft.quantizer
    layer.on_grid = True


def annealed_beta(progress: float, warmup: float = 0.2, start: float = 20.0, end: float = 2.0) -> float | None:
    """beta at `progress` in [0, 1]: None during the warm-up (no regulariser), then linear from start to end."""
    if progress < warmup:
        return None
    return start + (end - start) * (progress - warmup) / (1 - warmup)


@contextmanager
def materialised(layers: Mapping[str, QuantizedLayer]) -> Iterator[None]:
    """Compute every soft weight once for several network calls.

    Inside, each layer holds its soft weight as a leaf that collects gradients; on leaving, the collected gradient goes
    through the rounding variable in one step. By linearity this is the gradient of calling the rounding every time.
    """
    soft = {name: layer for name, layer in layers.items() if isinstance(layer.weight_quantizer, SoftRounding)}
    before = {name: layer.weight for name, layer in soft.items()}
    outputs: dict[str, Tensor] = {}
    for name, layer in soft.items():
        assert layer.weight_quantizer is not None
        outputs[name] = layer.weight_quantizer(before[name])
        layer.weight = nn.Parameter(outputs[name].detach())
        layer.on_grid = True
    try:
        yield
        for name, layer in soft.items():
            if layer.weight.grad is not None:
                torch.autograd.backward(outputs[name], layer.weight.grad)
    finally:
        for name, layer in soft.items():
            layer.weight = before[name]
            layer.on_grid = False


def input_scales(
    layers: Mapping[str, QuantizedLayer | QuantizedMatmul], without: Container[str] = ()
) -> dict[str, InputQuantizer]:
    """The static activation quantizers of some layers, by `layer.attribute`; `without` some layers."""
    found: dict[str, InputQuantizer] = {}
    for name, layer in layers.items():
        if name in without:
            continue
        for attribute in ("input_quantizer", "second_quantizer"):
            quantizer = getattr(layer, attribute, None)
            if isinstance(quantizer, InputQuantizer):
                found[f"{name}.{attribute}"] = quantizer
    return found


def relative_groups(
    quantizers: Mapping[str, InputQuantizer], lr: float, gradient: ScaleGradient
) -> list[dict[str, object]]:
    """Adam parameter groups in which each quantizer's scale moves by about `lr` of itself per iteration.

    The scales learn from here on, until `fix_scales_`. gradient: how they get theirs, "straight" as in the papers (LSQ)
    or "difference", of results at scales that are one per cent larger and smaller (`numerics.affine.fake_quantize`).

    The rows of a quantizer are one parameter: each moves by about `lr` of their mean, a small row by more of itself
    than a large one, and Adam's moments go on moving rows whose timesteps a mini-batch did not have.

    Differs from the papers, which give every scale the same absolute learning rate (4e-4 in Q-Diffusion): scales of
    one network differ by orders of magnitude, and with few iterations a common rate leaves some untouched and
    throws others about.
    """
    groups: list[dict[str, object]] = []
    for quantizer in quantizers.values():
        quantizer.scale.requires_grad_(True)
        quantizer.difference = DIFFERENCE if gradient == "difference" else 0.0
        size = float(quantizer.scale.detach().abs().mean())
        groups.append({"params": [quantizer.scale], "lr": lr * size, "base_lr": lr * size})
    return groups


def fix_scales_(quantizers: Mapping[str, InputQuantizer]) -> None:
    """Scales that `relative_groups` opened learn no more."""
    for quantizer in quantizers.values():
        quantizer.scale.requires_grad_(False)
        quantizer.scale.grad = None
        vars(quantizer).pop("difference", None)


def check_scale_gradient(name: str, found: str) -> None:
    """Raise SpecError for a gradient of scales that there is not. name: of the stage."""
    known = get_args(ScaleGradient)
    if found not in known:
        raise SpecError(
            f"scale_gradient of {name} must be one of {', '.join(known)}, found {found!r}.{nearest(str(found), known)}"
        )


def cosine(progress: float) -> float:
    """Cosine decay from 1 to 0 over progress in [0, 1]."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
