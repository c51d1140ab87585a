"""Every layer of real networks, on the inputs that it had while an image was sampled: engines against the definition.

Whole networks are no test of an engine: one input on the border of two levels goes the other way, and the network
spreads it. So every layer gets what the simulation gave it, and is held to a bound that has two parts:

    16 e s_a sum |a - z_a| |w|  roundings e = 2^-24 of scales, bias and whole sums behind an exact integer sum
    s_a sum over near |w|       inputs that float32 may take over the border of two levels, by one level each (OpenVINO
                                multiplies by 1 / s_a where the simulation divides)

In bfloat16, inputs are rounded before they are quantized, to multiples of h = 2^(e - 7) with 2^e <= |x| < 2^(e+1).
Evenly spread, that moves x by h / 4 in the mean, and so over a border with probability h / (4 s_a), by one level.
Rounding y itself adds u^2 y^2 / 3 at most, u = 2^-8. So the square of a layer's error, in the mean over its outputs, is
held to

    2 s_a^2 sum h / (4 s_a) w^2 + 2 u^2 / 3 (y_0^2 + y^2 + b^2)     y_0 before the bias b, y with it: each rounded twice

with 2 for inputs that are copies of one another, as behind an up-sampling: they move together.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from integer_layers import EPSILON
from torch import Tensor, nn

from stepquant import quantize, sample
from stepquant.api import open_model
from stepquant.calibrate.stages import FitInputRanges, FitWeightRanges, Place, Record, Select
from stepquant.engines.base import engines, place
from stepquant.engines.openvino import has_bf16, has_vnni
from stepquant.model.clock import attach_clock, clock_of
from stepquant.model.families import find_denoiser
from stepquant.model.layer import QuantizedLayer, QuantizedMatmul
from stepquant.model.quantizer import InputQuantizer, WeightQuantizer
from stepquant.model.surgery import quantized_layers
from stepquant.numerics.affine import quantize as levels_of
from stepquant.recipe import Recipe

pytestmark = pytest.mark.skipif(not has_vnni(), reason="int8 layers need a processor with VNNI")

STEPS = 3
ROUNDINGS = 16
CENTRE = 128
SHORT_EPSILON = 2.0**-8
"""Largest relative error of one rounding to bfloat16."""
TOGETHER = 2
FACES = Path(__file__).resolve().parents[3] / "benchmarks" / "faces64_model.py"

Calls = dict[str, tuple[Tensor, ...]]


class Apart(nn.Module):
    """The layers of a network side by side, each with an input of its own."""

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        super().__init__()
        self.names = list(layers)
        self.layers = nn.ModuleList(layers.values())

    def forward(self, sample: Tensor, timestep: Any, inputs: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        return tuple(layer(*given) for layer, given in zip(self.layers, inputs, strict=True))


def recorded(pipe: Any, weights: int) -> tuple[Any, list[tuple[int, Calls]]]:
    """The pipeline's denoiser at 8-bit activations with a row for every step, and what its layers saw at each step."""
    ranges = FitInputRanges("minmax", samples=8, windows="step")
    recipe = Recipe("test", (Record(2, 2), Select(), Place(weights, 8), FitWeightRanges("minmax"), ranges))
    found = quantize(pipe, recipe, steps=STEPS)
    denoiser = find_denoiser(found.pipe)[1]
    clock = clock_of(denoiser)
    assert clock is not None
    steps: list[tuple[int, Calls]] = []

    def begins(_module: nn.Module, _args: Any, _kwargs: Any) -> None:
        steps.append((int(clock.bin), {}))

    handles = [denoiser.register_forward_pre_hook(begins, with_kwargs=True)]
    for name, layer in quantized_layers(denoiser).items():

        def sees(_module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            steps[-1][1].setdefault(name, tuple(value.detach().clone() for value in args))

        handles.append(layer.register_forward_pre_hook(sees))
    with torch.no_grad():
        sample(found.pipe, seeds=[5], steps=STEPS)
    for handle in handles:
        handle.remove()
    assert len({bin_ for bin_, _ in steps}) == STEPS
    return denoiser, steps


def timestep_in(clock: Any, bin_: int) -> int:
    """Some timestep of a bin."""
    return 0 if bin_ == 0 else int(clock.edges[bin_ - 1]) + 1


def operand(x: Tensor, quantizer: nn.Module | None) -> tuple[Tensor, Tensor, Tensor]:
    """A layer's input on its grid; how far float32 may move each element; 2 |z_a - 128| s_a.

    The last is the size of what engines add and take away again that hold levels less 128.
    """
    assert isinstance(quantizer, InputQuantizer)
    params = quantizer.current(x)
    scale, zero_point = params.scale.double(), params.zero_point.double()
    values = (levels_of(x, params, quantizer.levels(x)).double() - zero_point) * scale
    position = x.double() / scale
    near = (position - position.floor() - 0.5).abs() <= 4 * EPSILON * (position.abs() + 2 * CENTRE)
    return values, near * scale, 2 * (zero_point - CENTRE).abs() * scale


def expected_and_bound(layer: nn.Module, given: tuple[Tensor, ...], *, borders: bool) -> tuple[Tensor, Tensor]:
    """What a layer returns by its definition, in float64, and how far an engine may be from it."""
    if isinstance(layer, QuantizedMatmul):
        quantizers = (layer.input_quantizer, layer.second_quantizer)
        (left, moved_left, aside_left), (right, moved_right, aside_right) = map(operand, given, quantizers)
        sizes = left.abs() + aside_left, right.abs() + aside_right
        flips = moved_left @ (sizes[1] + moved_right) + sizes[0] @ moved_right
        # The product is in floating point: every partial sum is rounded.
        return left @ right, (ROUNDINGS + left.shape[-1]) * EPSILON * (sizes[0] @ sizes[1]) + flips
    assert isinstance(layer, QuantizedLayer)
    quantizer = layer.weight_quantizer
    assert isinstance(quantizer, WeightQuantizer)
    values, moved, aside = operand(given[0], layer.input_quantizer)
    shape = (-1, *(1,) * (layer.weight.ndim - 1))
    scale, zero_point = (t.double().reshape(shape) for t in (quantizer.scale, quantizer.zero_point))
    weight = (quantizer.levels(layer.weight).double() - zero_point) * scale
    # Weights of 8 bits may be held less 128, too.
    wide = weight.abs() + 2 * (zero_point - CENTRE).abs() * scale * (quantizer.spec.bits == 8)
    run, bias = layer.geometry.apply, None if layer.bias is None else layer.bias.double()
    constant = aside * wide.flatten(1).sum(1) + (0 if bias is None else bias.abs())
    if layer.geometry.kind != "linear":
        constant = constant.reshape(shape[: values.ndim - 1])
    bound = ROUNDINGS * EPSILON * (run(values.abs(), wide, None) + constant)
    return run(values, weight, bias), bound + (run(moved, weight.abs(), None) if borders else 0)


def check(pipe: Any, weights: int, engine: str) -> None:
    denoiser, steps = recorded(pipe, weights)
    clock, layers = clock_of(denoiser), quantized_layers(denoiser)
    assert clock is not None
    if engine == "openvino":
        taken = dict(layers)
        apart = Apart(taken)
        attach_clock(apart, clock)
        compiled, _ = place(apart, engine)
    else:
        known = engines()[engine]
        taken = {name: layer for name, layer in layers.items() if known.refuses(layer, torch.device("cpu")) is None}
        packed = {name: known.pack(layer) for name, layer in taken.items()}  # type: ignore[union-attr]
    assert len(taken) > 0.5 * len(layers)
    noticed = 0
    for bin_, calls in steps:
        given = [calls[name] for name in taken]
        with torch.no_grad():
            if engine == "openvino":
                found = compiled(torch.zeros(1), timestep_in(clock, bin_), given)
                other = compiled(torch.zeros(1), timestep_in(clock, (bin_ + 1) % STEPS), given)
            clock.bin = torch.tensor([bin_])
            if engine != "openvino":
                found = tuple(packed[name](*calls[name]) for name in taken)
                clock.bin = torch.tensor([(bin_ + 1) % STEPS])
                other = tuple(packed[name](*calls[name]) for name in taken)
                clock.bin = torch.tensor([bin_])
            for number, (name, layer) in enumerate(taken.items()):
                expected, bound = expected_and_bound(layer, given[number], borders=engine == "openvino")
                error = (found[number].double() - expected).abs()
                assert bool((error <= bound).all()), (name, bin_, float((error / bound).max()))
                noticed += bool(((other[number].double() - expected).abs() > bound).any())
    # The bound is no wider than what it is for: nearly every layer shows when it runs on the row of another step.
    assert noticed > 0.9 * STEPS * len(taken)


def short_operand(x: Tensor, quantizer: nn.Module | None) -> tuple[Tensor, Tensor]:
    """A layer's input on its grid, and the mean square of what rounding it to bfloat16 before that changes."""
    assert isinstance(quantizer, InputQuantizer)
    params = quantizer.current(x)
    scale, zero_point = params.scale.double(), params.zero_point.double()
    position = x.double() / scale
    inside = (position + zero_point > -1) & (position + zero_point < 2 * CENTRE)
    spacing = torch.where(x == 0, 0, 2.0 ** (torch.frexp(x.double()).exponent - 1 - 7))
    return operand(x, quantizer)[0], TOGETHER * spacing / 4 * scale * inside


def expected_and_mean_square(layer: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """What a layer returns by its definition, in float64, and the mean square of its error in bfloat16."""
    rounding = 2 * SHORT_EPSILON**2 / 3
    if isinstance(layer, QuantizedMatmul):
        quantizers = (layer.input_quantizer, layer.second_quantizer)
        (left, moved_left), (right, moved_right) = map(short_operand, given, quantizers)
        expected = left @ right
        moved = moved_left @ (right.square() + moved_right) + left.square() @ moved_right
        return expected, moved + 2 * rounding * expected.square()
    assert isinstance(layer, QuantizedLayer)
    assert isinstance(layer.weight_quantizer, WeightQuantizer)
    expected, _ = expected_and_bound(layer, given, borders=False)
    values, moved = short_operand(given[0], layer.input_quantizer)
    weight, run = layer.weight.double(), layer.geometry.apply
    bare = run(values, weight, None)
    squares = bare.square() + expected.square() + (expected - bare).square()
    return expected, run(moved, weight.square(), None) + rounding * squares


def check_short(pipe: Any, weights: int) -> None:
    denoiser, steps = recorded(pipe, weights)
    clock, layers = clock_of(denoiser), quantized_layers(denoiser)
    assert clock is not None
    apart = Apart(dict(layers))
    attach_clock(apart, clock)
    compiled, _ = place(apart, "openvino-bf16")
    noticed = 0
    for bin_, calls in steps:
        given = [calls[name] for name in layers]
        with torch.no_grad():
            found = compiled(torch.zeros(1), timestep_in(clock, bin_), given)
            other = compiled(torch.zeros(1), timestep_in(clock, (bin_ + 1) % STEPS), given)
            clock.bin = torch.tensor([bin_])
            for number, (name, layer) in enumerate(layers.items()):
                expected, mean_square = expected_and_mean_square(layer, given[number])
                error, wrong = ((one[number].double() - expected).square().mean() for one in (found, other))
                assert float(error) <= float(mean_square.mean()), (name, bin_, float(error / mean_square.mean()))
                noticed += float(wrong) > float(mean_square.mean())
    assert noticed > 0.8 * STEPS * len(layers)


@pytest.mark.slow
@pytest.mark.skipif(not has_bf16(), reason="the processor does not multiply bfloat16")
@pytest.mark.parametrize("weights", [8, 4])
def test_digits_in_bfloat16(weights: int) -> None:
    check_short(open_model("digits-unet"), weights)


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "weights"), [("openvino", 8), ("openvino", 4), ("onednn", 8), ("int_mm", 8)])
def test_digits(engine: str, weights: int) -> None:
    check(open_model("digits-unet"), weights, engine)


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.timeout(900)
@pytest.mark.parametrize("engine", ["openvino", "openvino-bf16", "onednn"])
def test_faces(engine: str) -> None:
    spec = importlib.util.spec_from_file_location("faces64_model", FACES)
    assert spec is not None
    assert spec.loader is not None
    model = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(model)
    if not model.WEIGHTS.exists():
        pytest.skip("the file of weights is not here")
    pipe = model.faces64_pipeline(model.load_faces64())
    if engine == "openvino-bf16":
        check_short(pipe, 8)
    else:
        check(pipe, 8, engine)
