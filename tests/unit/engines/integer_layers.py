"""Quantized layers of every geometry for tests of integer engines, and what they compute in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stepquant.model.clock import StepClock
from stepquant.model.layer import QuantizedLayer, geometry_of
from stepquant.model.quantizer import DynamicQuantizer, InputQuantizer, WeightQuantizer
from stepquant.numerics.affine import choose_qparams, quantize, range_of
from stepquant.numerics.spec import QuantSpec

BINS = 4
ROW_OF_BIN = torch.tensor([0, 1, 0, 2])
EPSILON = 2.0**-24
"""Largest relative error of one float32 operation."""


def input_quantizer(spec: QuantSpec, clock: StepClock, rows: int = 3) -> InputQuantizer:
    """Rows with different scales and, for asymmetric levels, different zero points."""
    low, high = -torch.linspace(0.5, 3, rows), torch.linspace(2, 1, rows)
    params = choose_qparams(low, high, spec)
    return InputQuantizer(spec, clock, params, ROW_OF_BIN if rows == 3 else torch.zeros(BINS, dtype=torch.int64))


def quantized(
    layer: nn.Linear | nn.Conv1d | nn.Conv2d,
    weight: QuantSpec | None = None,
    given: QuantSpec | None = None,
    *,
    rows: int = 3,
) -> QuantizedLayer:
    """The hardened layer with a clock of its own. Weights are off-centre, so that zero points matter."""
    weight = QuantSpec(8, "channel") if weight is None else weight
    with torch.no_grad():
        layer.weight += 0.3 * layer.weight.std() * torch.randn(len(layer.weight), *(1,) * (layer.weight.ndim - 1))
    bias = None if layer.bias is None else layer.bias.detach().clone()
    made = QuantizedLayer(geometry_of(layer), layer.weight.detach().clone(), bias)
    made.weight_quantizer = WeightQuantizer(weight, choose_qparams(*range_of(made.weight, weight), weight))
    made.harden_()
    clock = StepClock(torch.arange(BINS - 1).float())
    made.input_quantizer = input_quantizer(QuantSpec(8) if given is None else given, clock, rows)
    return made.requires_grad_(False)


ALONE: dict[str, tuple[Any, tuple[int, ...]]] = {
    "conv2d": (lambda: nn.Conv2d(48, 48, 3, padding=1), (48, 48, 5)),
    "conv1d": (lambda: nn.Conv1d(48, 48, 3, padding=1), (48, 48)),
}
"""Samples without a batch, with as many rows as channels: that hides an axis that was mistaken for another."""


def assert_alone(layer: QuantizedLayer, packed: nn.Module, x: Tensor) -> None:
    """A sample without a batch gives what it gives in one."""
    found = packed(x)
    assert torch.equal(found, packed(x[None])[0])
    torch.testing.assert_close(found, layer(x), rtol=0, atol=1e-4)


def exact(layer: QuantizedLayer, x: Tensor) -> tuple[Tensor, Tensor]:
    """The layer's output from its integers, in float64, and the size of what was added up to it, both `[B, ...]`.

    size = s_a s_o sum |a - z_a| |q - z_o| + |b| + 2 |z_o - 128| s_o s_a sum |a - z_a|, the last term only where levels
    are shifted. Zero points found at run time may be taken out after the sum: |a - z_a| + 2 z_a in its place. An engine
    that sums exactly in integers, scales (three roundings), scales and adds the shift (four more) and adds the bias is
    at most `8 * EPSILON * size` away.
    """
    given, quantizer = layer.input_quantizer, layer.weight_quantizer
    assert isinstance(given, InputQuantizer | DynamicQuantizer)
    assert isinstance(quantizer, WeightQuantizer)
    params = given.current(x)
    values = (quantize(x, params, given.spec).double() - params.zero_point.double()) * params.scale.double()
    shape = (-1, *(1,) * (layer.weight.ndim - 1))
    scale, zero_point = (t.double().reshape(shape) for t in (quantizer.scale, quantizer.zero_point))
    weight = (quantizer.levels(layer.weight).double() - zero_point) * scale
    bias = None if layer.bias is None else layer.bias.double()
    y = layer.geometry.apply(values, weight, bias)
    shifted = quantizer.spec.bits == 8 and not quantizer.spec.symmetric
    sizes = weight.abs() + (2 * (zero_point - 128).abs() * scale if shifted else 0)
    reach = values.abs()
    if isinstance(given, DynamicQuantizer):
        reach = reach + 2 * params.zero_point.double() * params.scale.double()
    return y, layer.geometry.apply(reach, sizes, None if bias is None else bias.abs())


def assert_exact(layer: QuantizedLayer, packed: nn.Module, x: Tensor) -> None:
    """The packed layer is within rounding of the integers, and within accumulation rounding of the simulation."""
    found = packed(x)
    expected, size = exact(layer, x)
    simulated = layer(x)
    assert found.shape == simulated.shape
    assert found.dtype == simulated.dtype
    error = (found.double() - expected).abs()
    assert bool((error <= 8 * EPSILON * size).all()), float((error / size).max() / EPSILON)
    # The simulation rounds both operands, every product and every partial sum.
    terms = layer.weight[0].numel()
    apart = (found - simulated).abs()
    assert bool((apart <= (terms + 16) * EPSILON * size).all())
