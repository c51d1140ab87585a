"""Windows that learn the scales of hard weights: what learns, what stays, and what a checkpoint has of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from stepquant.api import Quantized, load, quantize, sample
from stepquant.calibrate import window_fitting
from stepquant.calibrate.judging import Judge
from stepquant.calibrate.stages import LayerRule
from stepquant.calibrate.weight_scales import closed_scale_, learnt_scale_, rescale_
from stepquant.calibrate.window_fitting import FitWindows
from stepquant.errors import SpecError
from stepquant.methods import METHODS
from stepquant.model.layer import Geometry, QuantizedLayer
from stepquant.model.quantizer import WeightQuantizer
from stepquant.model.surgery import quantized_layers
from stepquant.recipe import Recipe
from stepquant.run import Run

STEPS = 5


def windows(**settings: Any) -> FitWindows:
    given = {"window": 2, "iterations": 12, "learn_weights": False, "lr_weight_scales": 2e-2, "free_run": 1.0}
    return FitWindows(**{**given, **settings})


def fitted(*stages: Any, run: Run | None = None, resume: bool = False) -> Quantized:
    """Some layers have a scale for each output, convolutions of blocks one for each kernel."""
    rules = (LayerRule("*.conv[12]", 4, 8, group_size=9),)
    beginning = METHODS["rtn"](weights=4, activations=8, samples=4, batch=2, rules=rules).stages
    recipe = Recipe("scaled", (*beginning, *stages))
    return quantize(tiny.tiny_pipe()[0], recipe, steps=STEPS, run=run or Run(), resume=resume)


def layers_of(quantized: Quantized) -> dict[str, QuantizedLayer]:
    found = quantized_layers(quantized.pipe.unet)
    return {
        name: layer
        for name, layer in found.items()
        if isinstance(layer, QuantizedLayer) and isinstance(layer.weight_quantizer, WeightQuantizer)
    }


def parameters(layer: QuantizedLayer) -> tuple[Tensor, Tensor, Tensor]:
    quantizer: Any = layer.weight_quantizer
    return quantizer.levels(layer.weight), quantizer.scale, layer.weight.detach()


def test_scales_learn_and_levels_stay() -> None:
    before, after = (layers_of(fitted(*stages)) for stages in ((), (windows(),)))
    assert {layer.weight_quantizer.scale.ndim for layer in after.values()} == {2, 3}  # type: ignore[union-attr]
    assert before.keys() == after.keys()
    moved = []
    for name, layer in after.items():
        levels, scale, weight = parameters(layer)
        old_levels, old_scale, _ = parameters(before[name])
        assert torch.equal(levels, old_levels)
        assert layer.on_grid
        quantizer: Any = layer.weight_quantizer
        assert torch.equal(weight, quantizer.restore(levels))
        moved.append(float((scale / old_scale - 1).abs().max()))
        assert moved[-1] < 12 * 2e-2
    assert all(moved)


def test_scales_that_learn_lower_the_windows_loss() -> None:
    def ending(rate: float) -> float:
        stage = windows(window=STEPS, iterations=40, lr_weight_scales=rate)
        return sum(loss for _, loss in fitted(stage).figures[-1]["losses"][-10:])

    assert ending(5e-3) < 0.8 * ending(0.0)


@pytest.mark.parametrize("name", ["conv_in", "conv1", "to_q"])
def test_the_gradient_of_a_factor_is_that_of_the_scaled_weight(name: str) -> None:
    layer = next(layer for key, layer in layers_of(fitted()).items() if key.endswith(name))
    draw = torch.Generator().manual_seed(2)
    shape = (3, 5, layer.in_features) if layer.geometry.kind == "linear" else (3, layer.in_features, 4, 4)
    x, weight, clean = torch.randn(shape, generator=draw), layer.weight.detach(), layer.geometry
    factor = learnt_scale_(layer)
    assert factor.shape == (layer.out_features,)
    with torch.no_grad():
        factor.copy_(1 + 0.1 * torch.randn(factor.shape, generator=draw))
    layer.input_quantizer = None
    found = layer(x)
    upstream = torch.randn(found.shape, generator=draw)
    found.backward(upstream)
    twin = factor.detach().double().requires_grad_()
    scaled = weight.double() * twin.reshape(-1, *(1,) * (weight.ndim - 1))
    expected = clean.apply(x.double(), scaled, None if layer.bias is None else layer.bias.detach().double())
    expected.backward(upstream.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    assert factor.grad is not None
    torch.testing.assert_close(factor.grad.double(), twin.grad, rtol=1e-4, atol=1e-4)
    assert layer.weight.grad is None


def test_a_closed_scale_is_that_of_the_factor() -> None:
    for layer in layers_of(fitted()).values():
        levels, scale, _ = (value.clone() for value in parameters(layer))
        keys, clean = list(layer.state_dict()), layer.geometry
        factor = learnt_scale_(layer)
        with torch.no_grad():
            factor.copy_(torch.linspace(0.9, 1.1, len(factor)))
        closed_scale_(layer)
        expected = scale * torch.linspace(0.9, 1.1, len(factor)).reshape(-1, *(1,) * (scale.ndim - 1))
        torch.testing.assert_close(parameters(layer)[1], expected)
        assert torch.equal(parameters(layer)[0], levels)
        assert list(layer.state_dict()) == keys
        assert type(layer.geometry) is Geometry
        assert layer.geometry == clean


def test_a_layer_that_is_given_its_own_scales_is_as_before() -> None:
    for layer in layers_of(fitted()).values():
        levels, scale, weight = (value.clone() for value in parameters(layer))
        rescale_(layer, scale)
        assert all(
            torch.equal(one, other) for one, other in zip(parameters(layer), (levels, scale, weight), strict=True)
        )


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_what_is_judged_may_stay_in_part(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = layers_of(fitted()), layers_of(fitted(windows()))
    monkeypatch.setattr(Judge, "better", lambda self, candidate, other: candidate == share)
    judged = fitted(windows(judged=4))
    assert judged.figures[-1]["share"] == share
    for name, layer in layers_of(judged).items():
        levels, scale, weight = parameters(layer)
        old, new = parameters(before[name])[1], parameters(after[name])[1]
        torch.testing.assert_close(scale, old ** (1 - share) * new**share)
        quantizer: Any = layer.weight_quantizer
        assert torch.equal(levels, parameters(before[name])[0])
        assert torch.equal(weight, quantizer.restore(levels))


def test_a_checkpoint_has_what_was_learnt(tmp_path: Path) -> None:
    made = fitted(windows())
    expected = sample(made.pipe, seeds=[3], steps=STEPS)
    made.save(tmp_path / "saved")
    found = sample(load(tmp_path / "saved", engine="simulated"), seeds=[3], steps=STEPS)
    assert torch.equal(found, expected)


def test_an_interrupted_run_goes_on_to_the_same_scales(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_fitting, "KEEP_EVERY", 3)
    expected = layers_of(fitted(windows()))
    run = Run(work=tmp_path, progress=tiny.Interrupt("Fitting windows", 7))
    with pytest.raises(KeyboardInterrupt):
        fitted(windows(), run=run)
    resumed = layers_of(fitted(windows(), run=Run(work=tmp_path), resume=True))
    for name, layer in resumed.items():
        pairs = zip(parameters(layer), parameters(expected[name]), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"lr_weight_scales": -1.0}, "lr_weight_scales of FitWindows must be at least 0, found -1"),
        ({"learn_weights": True}, "either the rounding of weights or their scales"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(SpecError, match=named):
        windows(**settings)


@pytest.mark.parametrize("method", ["accuquant", "combined"])
def test_weights_alone_may_learn_their_scales(method: str) -> None:
    few = {
        "samples": 4,
        "batch": 2,
        "block_iterations": 0,
        "learn_weights": False,
        "lr_weight_scales": 1e-2,
        "window": 2,
    }
    few |= {"iterations": 2} if method == "accuquant" else {"window_iterations": 2, "compensation": False}
    recipe = METHODS[method](weights=4, activations=None, **few)
    assert any(isinstance(stage, FitWindows) for stage in recipe.stages)
    made = quantize(tiny.tiny_pipe()[0], recipe, steps=STEPS)
    assert bool(sample(made.pipe, seeds=[0], steps=STEPS).isfinite().all())
