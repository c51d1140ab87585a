"""What can be seen without running the network: parameters and scales."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.doctor.findings import FLOAT16_MAX, Finding, Thresholds
from stepquant.model.layer import QuantizedLayer
from stepquant.model.quantizer import WeightQuantizer
from stepquant.model.surgery import quantized_layers
from stepquant.numerics.affine import MIN_SCALE, Levels, QParams, dequantize, grouped
from stepquant.numerics.spec import QuantSpec

__all__ = ["clipping_losses", "other_parameters", "static_findings"]


_WIDE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def clipping_losses(x: Tensor, params: QParams, spec: QuantSpec | Levels) -> tuple[float, float, float]:
    """What a quantizer cuts off.

        share   = how many of x's values lie outside of the range, by more than half a level
        lost    = |x - x_hat| / |x| over the values outside, norms being roots of sums of squares
        rounded = |x - x_hat| / |x| over the values inside

    The denominator is the norm of all of x in both. x and params as for `numerics.affine.quantize`.
    """
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    levels = torch.round(wide / params.scale).add_(params.zero_point)
    ends: Any = spec.qmin, spec.qmax
    inside = levels.clamp(*ends)
    outside = (levels != inside).to(wide.dtype)
    errors = (wide - dequantize(inside, params)).square()
    lost, whole = (errors * outside).sum(), errors.sum()
    share, lost, whole, energy = torch.stack(
        [part.double() for part in (outside.mean(), lost, whole, wide.square().sum())]
    ).tolist()
    if energy == 0:
        return share, 0.0, 0.0
    return share, (lost / energy) ** 0.5, (max(whole - lost, 0.0) / energy) ** 0.5


def static_findings(denoiser: nn.Module, originals: Mapping[str, nn.Module], limits: Thresholds) -> list[Finding]:
    """Faults of parameters and scales. originals: full-precision layers by name, where they are known."""
    found = _parameters(denoiser)
    for name, layer in quantized_layers(denoiser).items():
        for attribute in ("input_quantizer", "second_quantizer"):
            found += _activation_scales(name, getattr(layer, attribute, None))
        if not isinstance(layer, QuantizedLayer) or not isinstance(layer.weight_quantizer, WeightQuantizer):
            continue
        original = getattr(originals.get(name), "weight", None)
        exact = None if original is None else layer.folded(original.detach())
        weight = layer.weight.detach()
        if bool(torch.isfinite(weight).all()):
            found += _weight_scales(name, layer.weight_quantizer, weight, exact, limits)
    return found


def _parameters(denoiser: nn.Module) -> list[Finding]:
    found = []
    for name, tensor in denoiser.named_parameters():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        layer = name.rpartition(".")[0]
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            what = f"{bad} of {tensor.numel()} values of {name} are NaN or infinite."
            found.append(Finding.of("not_finite_weight", what, layer=layer, value=bad, threshold=0))
        elif tensor.dtype != torch.float16 and (largest := float(tensor.abs().amax())) > FLOAT16_MAX:
            what = f"{name} reaches {largest:.4g}, which float16 cannot hold."
            found.append(Finding.of("float16_overflow", what, layer=layer, value=largest, threshold=FLOAT16_MAX))
    return found


def other_parameters(parts: Mapping[str, nn.Module]) -> list[Finding]:
    """NaN and infinity in the weights of networks beside the denoiser, by the names of `doctor.layers.other_parts`."""
    found = []
    for part, network in parts.items():
        for name, tensor in network.named_parameters(prefix=part):
            # Passed over: what others have packed, and what is offloaded.
            if type(tensor.data) is not Tensor or tensor.dtype not in _WIDE or tensor.is_meta or not tensor.numel():
                continue
            if bool(torch.isfinite(torch.stack(tensor.detach().aminmax())).all()):  # a mask would be as large
                continue
            bad = int((~torch.isfinite(tensor)).sum())
            what = f"{bad} of {tensor.numel()} values of {name} are NaN or infinite."
            layer = name.rpartition(".")[0]
            found.append(Finding.of("not_finite_weight", what, layer=layer, value=bad, threshold=0))
    return found


def _activation_scales(name: str, quantizer: nn.Module | None) -> list[Finding]:
    scale = getattr(quantizer, "scale", None)
    if not isinstance(scale, Tensor):
        return []
    bad = ~torch.isfinite(scale) | (scale <= MIN_SCALE)
    if not bool(bad.any()):
        return []
    rows = bad.reshape(len(scale), -1).any(1).nonzero().flatten().tolist()
    what = f"Rows {rows} of the activation's {len(scale)} have a scale that is not finite or not above {MIN_SCALE:g}."
    value = float(scale[bad].reshape(-1)[0])
    return [Finding.of("degenerate_scale", what, layer=name, value=value, threshold=MIN_SCALE)]


def _weight_scales(
    name: str, quantizer: WeightQuantizer, weight: Tensor, exact: Tensor | None, limits: Thresholds
) -> list[Finding]:
    found: list[Finding] = []
    spec, params = quantizer.spec, quantizer.params
    scale = params.scale.reshape(-1)
    # A channel of zeros has the smallest scale for good reason; whether it should be zero, only the original can say.
    alive = grouped(weight if exact is None else exact, spec).abs().amax(-1).reshape(-1) > 0
    bad = ~torch.isfinite(scale) | ((scale <= MIN_SCALE) & alive)
    if bool(bad.any()):
        what = f"{int(bad.sum())} of the weight's {len(scale)} scales are not finite or not above {MIN_SCALE:g}."
        value = float(scale[bad][0])
        found.append(Finding.of("degenerate_scale", what, layer=name, value=value, threshold=MIN_SCALE))
        return found
    levels = grouped(quantizer.levels(weight).float(), spec)
    low = torch.minimum(levels.amin(-1, keepdim=True), params.zero_point)
    high = torch.maximum(levels.amax(-1, keepdim=True), params.zero_point)
    reached = ((high - low + 1) / (spec.qmax - spec.qmin + 1)).reshape(-1)
    narrow = (reached < limits.used_range) & alive
    if bool(narrow.any()):
        worst = float(reached[narrow].min())
        what = (
            f"{int(narrow.sum())} of the weight's {len(scale)} scales leave most levels unused; the worst reaches "
            f"{100 * worst:.0f} % of them."
        )
        found.append(Finding.of("unused_weight_levels", what, layer=name, value=worst, threshold=limits.used_range))
    if exact is not None and bool(torch.isfinite(exact).all()):
        share, lost, rounded = clipping_losses(grouped(exact, spec), params, spec)
        if lost > max(limits.clipped_loss, rounded):
            what = (
                f"{100 * share:.3g} % of the weights lie outside of their range, which costs {100 * lost:.0f} % of the "
                f"weight's norm; rounding inside the range costs {100 * rounded:.2g} %."
            )
            found.append(Finding.of("weight_clipping", what, layer=name, value=lost, threshold=limits.clipped_loss))
    return found
