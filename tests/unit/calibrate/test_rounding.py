"""The rounding variable of AdaRound: where it starts, what it rounds to, how it is annealed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from stepquant.calibrate.rounding import (
    SoftRounding,
    annealed_beta,
    cosine,
    harden_soft_,
    input_scales,
    relative_groups,
    soften_,
)
from stepquant.model.clock import StepClock
from stepquant.model.layer import QuantizedLayer, geometry_of
from stepquant.model.quantizer import InputQuantizer, WeightQuantizer
from stepquant.numerics.affine import QParams, choose_qparams, range_of
from stepquant.numerics.spec import QuantSpec

SPECS = [QuantSpec(4, "channel"), QuantSpec(3, "group", group_size=4), QuantSpec(8, "tensor", symmetric=True)]


def quantizer_of(weight: torch.Tensor, spec: QuantSpec) -> WeightQuantizer:
    return WeightQuantizer(spec, choose_qparams(*range_of(weight, spec), spec))


def by_hand() -> tuple[SoftRounding, torch.Tensor]:
    """scale 0.5, zero point 2, levels 0..7: representable values -1.0, -0.5, ..., 2.5."""
    weight = torch.tensor([[0.6, 0.9, -0.3, 3.0]])  # positions 1.2, 1.8, -0.6, 6.0
    return SoftRounding(WeightQuantizer(QuantSpec(3, "channel"), by_hand_params()), weight), weight


def by_hand_params() -> QParams:
    return QParams(torch.tensor([[0.5]]), torch.tensor([[2.0]]))


@pytest.mark.parametrize("spec", SPECS)
def test_begins_at_the_full_precision_weight(spec: QuantSpec) -> None:
    weight = torch.randn(6, 8)
    soft = SoftRounding(quantizer_of(weight, spec), weight)
    position = (weight.reshape(soft.floor.shape) / soft.quantizer.scale).reshape(weight.shape)
    away = (position - position.round()).abs() > 0.011  # closer ones are held off the flat ends of h
    # Values at the ends of the range may lie half a level outside, where levels are clamped.
    levels = (soft.floor + soft.h() + soft.quantizer.zero_point).reshape(weight.shape)
    inside = (levels > spec.qmin) & (levels < spec.qmax)
    assert int((away & inside).sum()) > 30
    torch.testing.assert_close(soft(weight)[away & inside], weight[away & inside], rtol=1e-4, atol=1e-5)
    assert bool(((soft(weight) - weight).abs() <= 0.51 * soft.quantizer.scale.max())[~inside].all())


def test_rounding_by_hand() -> None:
    soft, weight = by_hand()
    # h starts at 0.2, 0.8, 0.4, 0.0: nearest rounding; 3.0 is level 8, clamped to 7.
    torch.testing.assert_close(soft.h().flatten(), torch.tensor([0.2, 0.8, 0.4, 0.01]), rtol=0, atol=1e-6)
    assert soft.rounded(weight).tolist() == [[0.5, 1.0, -0.5, 2.5]]
    with torch.no_grad():
        soft.alpha.copy_(torch.tensor([[5.0, -5.0, 5.0, 5.0]]))  # the other way
    assert soft.h().tolist() == [[1.0, 0.0, 1.0, 1.0]]
    assert soft.rounded(weight).tolist() == [[1.0, 0.5, 0.0, 2.5]]
    assert torch.equal(soft(weight), soft.rounded(weight))


def test_the_regulariser_is_zero_only_when_hard() -> None:
    soft, _ = by_hand()
    with torch.no_grad():
        soft.alpha.copy_(torch.tensor([[5.0, -5.0, 5.0, -5.0]]))
    assert float(soft.regulariser(2.0).detach()) == 0.0
    with torch.no_grad():
        soft.alpha.zero_()  # h = 1/2 everywhere
    assert float(soft.regulariser(2.0).detach()) == 4.0
    start, _ = by_hand()
    # h = 0.2, 0.8, 0.4, 0.01: |2h - 1| = 0.6, 0.6, 0.2, 0.98
    expected = 4 - (0.6**2 + 0.6**2 + 0.2**2 + 0.98**2)
    assert float(start.regulariser(2.0).detach()) == pytest.approx(expected, abs=1e-5)


def test_the_regulariser_pushes_away_from_the_middle() -> None:
    soft, _ = by_hand()
    soft.regularise_(2.0, 1.0)
    gradient = soft.alpha.grad.flatten()
    assert gradient[0] > 0  # descending goes down from 0.2
    assert gradient[1] < 0  # and up from 0.8


def quantized_linear(spec: QuantSpec) -> tuple[QuantizedLayer, torch.Tensor]:
    linear = nn.Linear(16, 8)
    layer = QuantizedLayer(geometry_of(linear), linear.weight.detach().clone(), linear.bias.detach())
    layer.weight_quantizer = quantizer_of(linear.weight.detach(), spec)
    layer.harden_()
    return layer, linear.weight.detach()


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("keep", [0.6, 1.0])
def test_reopened_rounding_keeps_its_direction(spec: QuantSpec, keep: float) -> None:
    layer, weight = quantized_linear(spec)
    # Round some weights the wrong way, as a reconstruction may have done.
    soft = soften_(layer, weight, keep=0.0)
    with torch.no_grad():
        flipped = torch.rand(soft.alpha.shape) < 0.3
        soft.alpha.copy_(torch.where(flipped, -soft.alpha, soft.alpha))
    harden_soft_(layer)
    before = layer.weight.detach().clone()
    assert layer.on_grid
    assert isinstance(layer.weight_quantizer, WeightQuantizer)
    soften_(layer, weight, keep=keep)
    assert not layer.on_grid
    harden_soft_(layer)
    assert torch.equal(layer.weight, before)


def test_forgetting_the_rounding_goes_back_to_nearest() -> None:
    layer, weight = quantized_linear(QuantSpec(4, "channel"))
    nearest = layer.weight.detach().clone()
    soft = soften_(layer, weight, keep=0.6)
    with torch.no_grad():
        soft.alpha.copy_(-soft.alpha)
    harden_soft_(layer)
    assert not torch.equal(layer.weight, nearest)
    soften_(layer, weight, keep=0.0)
    harden_soft_(layer)
    assert torch.equal(layer.weight, nearest)


def test_a_reopened_layer_runs_and_learns() -> None:
    layer, weight = quantized_linear(QuantSpec(4, "channel"))
    soft = soften_(layer, weight, keep=0.6)
    layer(torch.randn(3, 16)).square().sum().backward()
    assert float(soft.alpha.grad.abs().sum()) > 0
    assert layer.weight.grad is None
    assert copy.deepcopy(layer)(torch.ones(1, 16)).equal(layer(torch.ones(1, 16)))


def test_beta_falls_from_20_to_2_after_the_warm_up() -> None:
    assert annealed_beta(0.0) is None
    assert annealed_beta(0.19) is None
    assert annealed_beta(0.2) == 20.0
    assert annealed_beta(0.6) == pytest.approx(11.0)
    assert annealed_beta(1.0) == pytest.approx(2.0)
    assert annealed_beta(0.0, warmup=0.0) == 20.0


def test_cosine_falls_from_1_to_0() -> None:
    assert cosine(0.0) == 1.0
    assert cosine(0.5) == pytest.approx(0.5)
    assert cosine(1.0) == cosine(1.5) == pytest.approx(0.0)


def test_scales_learn_relative_to_their_size() -> None:
    clock = StepClock(torch.arange(2.0))
    layers = {}
    for name, size in (("small", 0.001), ("large", 10.0)):
        layer, _ = quantized_linear(QuantSpec(4, "channel"))
        layer.input_quantizer = InputQuantizer(
            QuantSpec(8), clock, QParams(torch.full((3,), size), torch.zeros(3)), torch.arange(3)
        )
        layers[name] = layer
    scales = input_scales(layers)
    assert list(scales) == ["small.input_quantizer", "large.input_quantizer"]
    groups = relative_groups(scales, 0.01, "straight")
    assert [group["lr"] for group in groups] == pytest.approx([1e-5, 0.1])
    optimizer = torch.optim.Adam(groups)
    for quantizer in scales.values():
        assert quantizer.scale.requires_grad
        quantizer.scale.sum().backward()
    optimizer.step()  # Adam's first step is the learning rate
    for quantizer, before in zip(scales.values(), (0.001, 10.0), strict=True):
        torch.testing.assert_close(quantizer.scale.detach(), torch.full((3,), before * 0.99), rtol=1e-3, atol=0)
