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
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepquant.model.layer import QuantizedLayer, QuantizedMatmul
from stepquant.model.quantizer import InputQuantizer, WeightQuantizer
from stepquant.numerics.affine import grouped

__all__ = [
    "SoftRounding",
    "adam",
    "annealed_beta",
    "candidates_kept",
    "input_scales",
    "materialised",
    "relative_groups",
    "soften_",
]

ZETA, GAMMA = 1.1, -0.1
"""Stretch of the rectified sigmoid (Louizos et al. 2018; AdaRound eq. 23)."""


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
        position = grouped(weight.detach().float(), quantizer.spec) / quantizer.scale
        floor = torch.floor(position)
        self.register_buffer("floor", floor)
        fraction = position - floor if start is None else start
        # Inverse of h, kept off its flat ends so that every weight still has a gradient.
        fraction = fraction.clamp(0.01, 0.99)
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
        low, high = self.candidates() if self.kept is None else self.kept
        return torch.lerp(low, high, self.h()).reshape(weight.shape).to(weight.dtype)

    def rounded(self, weight: Tensor) -> Tensor:
        """The weight after hard rounding: up where alpha >= 0."""
        return self._values((self.alpha.detach() >= 0).to(self.floor.dtype)).reshape(weight.shape).to(weight.dtype)

    def candidates(self) -> tuple[Tensor, Tensor]:
        """Every weight rounded down and rounded up, both in the shape of `alpha`."""
        return self._values(torch.zeros_like(self.floor)), self._values(torch.ones_like(self.floor))

    def regulariser(self, beta: float) -> Tensor:
        """R(alpha): 0 when every h is 0 or 1."""
        apply: Any = _Regulariser.apply
        result: Tensor = apply(self.alpha, beta)
        return result


class _Regulariser(torch.autograd.Function):
    """R(alpha) together with its gradient, which shares most of the work with it.

        dR/dalpha = -2 beta |2 h - 1|^(beta - 1) sign(2 h - 1) (ZETA - GAMMA) s (1 - s),   s = sigmoid(alpha)

    and 0 where h is 0 or 1.
    """

    @staticmethod
    def forward(ctx: Any, alpha: Tensor, beta: float) -> Tensor:
        rising = torch.sigmoid(alpha)
        side = rising.mul(ZETA - GAMMA).add_(GAMMA).clamp_(0, 1).mul_(2).sub_(1)
        size = side.abs()
        power = size.pow(beta - 1)
        value = torch.addcmul(size.new_ones(()), power, size, value=-1).sum()
        ctx.factor = -2 * beta * (ZETA - GAMMA)
        ctx.save_for_backward(rising, power.copysign_(side))
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        rising, signed = ctx.saved_tensors
        ends = -GAMMA / (ZETA - GAMMA), (1 - GAMMA) / (ZETA - GAMMA)
        inside = torch.ops.aten.hardtanh_backward(signed * (ctx.factor * grad), rising, *ends)
        return torch.ops.aten.sigmoid_backward(inside, rising), None


@contextmanager
def candidates_kept(roundings: Iterable[SoftRounding]) -> Iterator[None]:
    """Inside, both candidates of every weight stay in memory, instead of being computed in each forward call."""
    kept = list(roundings)
    for rounding in kept:
        rounding.kept = rounding.candidates()
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


def relative_groups(quantizers: Mapping[str, InputQuantizer], lr: float) -> list[dict[str, object]]:
    """Adam parameter groups in which each quantizer's scale moves by about `lr` of itself per iteration.

    The rows of a quantizer are one parameter: each moves by about `lr` of their mean, a small row by more of itself
    than a large one, and Adam's moments go on moving rows whose timesteps a mini-batch did not have.

    Differs from the papers, which give every scale the same absolute learning rate (4e-4 in Q-Diffusion): scales of
    one network differ by orders of magnitude, and with few iterations a common rate leaves some untouched and
    throws others about.
    """
    groups: list[dict[str, object]] = []
    for quantizer in quantizers.values():
        quantizer.scale.requires_grad_(True)
        size = float(quantizer.scale.detach().abs().mean())
        groups.append({"params": [quantizer.scale], "lr": lr * size, "base_lr": lr * size})
    return groups


def cosine(progress: float) -> float:
    """Cosine decay from 1 to 0 over progress in [0, 1]."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
