"""Rounding from Gram matrices: the loss is the layer's, the descent finds what brute force finds."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stepquant.api import Quantized, quantize
from stepquant.calibrate import gram, patches
from stepquant.calibrate.estimate import largest_inputs
from stepquant.calibrate.gram import RoundLayers, descended, layer_losses, round_layer_
from stepquant.calibrate.reconstruct import RoundBlocks
from stepquant.calibrate.rounding import SoftRounding
from stepquant.calibrate.stages import Place, Select
from stepquant.errors import CalibrationError, SpecError
from stepquant.methods.baseline import start
from stepquant.model.layer import QuantizedLayer, geometry_of
from stepquant.model.quantizer import WeightQuantizer
from stepquant.model.surgery import quantized_layers
from stepquant.model.transform import InputTransform
from stepquant.numerics.affine import choose_qparams, range_of
from stepquant.numerics.spec import QuantSpec
from stepquant.recipe import Recipe, recipe_from_dict
from stepquant.run import Run
from tiny import Interrupt, tiny_pipe

LAYERS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 4), (5, 3, 6)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), (3, 4, 5, 6)),
    "strided": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(0, 2), dilation=(1, 2)), (3, 4, 7, 6)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (3, 4, 5, 6)),
    "same": (lambda: nn.Conv2d(4, 6, 3, padding="same", dilation=2), (3, 4, 5, 6)),
    "reflected": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (3, 4, 5, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, groups=2, stride=2), (3, 4, 9)),
}


def hardened(layer: Any, spec: QuantSpec) -> tuple[QuantizedLayer, Tensor]:
    """A layer rounded to nearest, and its full-precision weight."""
    weight = layer.weight.detach().clone()
    made = QuantizedLayer(geometry_of(layer), weight.clone(), None)
    params = choose_qparams(*range_of(weight, spec), spec)
    made.weight_quantizer = WeightQuantizer(spec, params)
    made.harden_()
    return made, weight


def added_up(layer: QuantizedLayer, x: Tensor, weights: Tensor | None = None) -> gram._Gram:
    found = gram._Gram(layer)
    found.add(x, weights)
    return found


def gram_of(layer: QuantizedLayer, x: Tensor, weights: Tensor | None = None) -> Tensor:
    found = added_up(layer, x, weights).total
    assert found is not None
    return found


def brute_force(layer: QuantizedLayer, error: Tensor, x: Tensor) -> Tensor:
    """The squared output of the layer with `error` for a weight, summed over all but the outputs: `[O]`."""
    y = layer.geometry.apply(x, error, None)
    y = y.movedim(-1, 1) if layer.geometry.kind == "linear" else y
    return y.square().transpose(0, 1).flatten(1).sum(1)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("chunk", [1, 1 << 24])
def test_the_gram_loss_is_the_layer_loss(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patches, "CHUNK", chunk)
    make, shape = LAYERS[name]
    layer, _ = hardened(make(), QuantSpec(4, "channel"))
    x, error = torch.randn(shape, dtype=torch.float64), torch.randn(layer.weight.shape, dtype=torch.float64)
    if layer.geometry.kind == "linear":
        expected = (x @ error.T).square().flatten(0, 1).sum(0)
    else:
        expected = brute_force(layer, error, x)
    found = layer_losses(gram_of(layer, x), error.flatten(1))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_sample_weights_weigh_the_loss() -> None:
    layer, _ = hardened(nn.Conv2d(4, 6, 3, padding=1), QuantSpec(4, "channel"))
    x, error = torch.randn(3, 4, 5, 6, dtype=torch.float64), torch.randn(6, 4, 3, 3, dtype=torch.float64)
    weights = torch.tensor([0.0, 0.5, 2.5])
    expected = sum(float(w) * brute_force(layer, error, x[i : i + 1]) for i, w in enumerate(weights))
    found = layer_losses(gram_of(layer, x, weights), error.flatten(1))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    doubled = gram_of(layer, x.repeat_interleave(2, 0), weights)  # two parts of each sample
    torch.testing.assert_close(layer_losses(doubled, error.flatten(1)), 2 * found, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", LAYERS)
def test_the_loss_of_a_part_is_the_layers_beside_the_others(name: str) -> None:
    make, shape = LAYERS[name]
    layer, _ = hardened(make(), QuantSpec(4, "channel"))
    x, error = torch.randn(shape, dtype=torch.float64), torch.randn(layer.weight.shape, dtype=torch.float64)
    weights = torch.rand(len(x), dtype=torch.float64)
    whole = layer_losses(gram_of(layer, x, weights), error.flatten(1))
    for part in (slice(0, 1), slice(1, error.shape[1])):
        found = gram._Gram(layer, part, error)
        for row in range(len(x)):
            found.add(x[row : row + 1], weights[row : row + 1])
        assert found.total is not None
        losses = layer_losses(found.total, error[:, part].flatten(1), found.beside)
        torch.testing.assert_close(losses, whole, rtol=1e-12, atol=0)
        assert torch.equal(error.flatten(1)[:, found.inputs], error[:, part].flatten(1))


def test_parts_are_of_the_transformed_input() -> None:
    layer, weight = hardened(nn.Conv2d(4, 6, 3, padding=1), QuantSpec(4, "channel"))
    layer.input_transform = InputTransform(4, -3, scale=torch.rand(4) + 0.5, block=4)
    x, part, kept = torch.randn(3, 4, 5, 6), slice(1, 3), layer.weight.detach().clone()
    found = gram._Gram(layer, part, kept - weight)
    found.add(x, None)
    transformed = layer.input_transform(x)
    before, after = round_layer_(layer, weight, found)
    for loss, rounded in ((before, kept), (after, layer.weight.detach())):
        expected = brute_force(layer, rounded - weight, transformed).sum()
        assert loss == pytest.approx(float(expected), rel=1e-4)
    assert after < before
    changed = (layer.weight.detach() != kept).flatten(2).any(2).any(0)
    assert bool(changed[part].all())
    assert not bool(changed[0])
    assert not bool(changed[3])


def test_a_part_is_descended_beside_the_others() -> None:
    """What the others have done to the output is made up for, where the part alone would have nothing to gain."""
    u = torch.randn(1, 2, 40, dtype=torch.float64)
    u[0, 1] = u[0, 0]
    weight = torch.tensor([[0.4, 0.4]], dtype=torch.float64)
    matrix = u[:, 1:] @ u[:, 1:].mT
    now, other = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    e = -0.4 * u[0, :1]
    beside = gram.Beside(e @ u[0, 1:].mT, e.square().sum(1))
    assert not bool(descended(matrix, weight[:, 1:], now, other).any())
    assert bool(descended(matrix, weight[:, 1:], now, other, beside).all())


def problem(groups: int = 1, inputs: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Strongly correlated inputs, for which rounding to nearest is far from best."""
    u = torch.randn(groups, inputs, 40, dtype=torch.float64) + 3 * torch.randn(groups, 1, 40, dtype=torch.float64)
    weight = torch.randn(4 * groups, inputs, dtype=torch.float64)
    now = weight.round()
    return u @ u.mT, weight, now, torch.where(now > weight, now - 1, now + 1)


def test_no_single_turn_is_left_and_the_best_of_all_is_near() -> None:
    matrix, weight, now, other = problem()
    turned = descended(matrix, weight, now, other)
    found = layer_losses(matrix, torch.where(turned, other, now) - weight)
    for place in range(6):
        flipped = turned.clone()
        flipped[:, place] = ~flipped[:, place]
        losses = layer_losses(matrix, torch.where(flipped, other, now) - weight)
        assert bool((losses >= found * (1 - 2e-6)).all())
    everything = torch.stack(
        [
            layer_losses(matrix, torch.where(torch.tensor(choice), other, now) - weight)
            for choice in itertools.product((False, True), repeat=6)
        ]
    )
    nearest, best = everything[0], everything.min(0).values
    assert bool((found >= best - 1e-12).all())
    assert float(found.sum()) < 0.5 * float(nearest.sum())
    # Most of what can be gained is.
    assert float((found - best).sum()) < 0.3 * float((nearest - best).sum())


def test_groups_are_descended_on_their_own() -> None:
    matrix, weight, now, other = problem(groups=3)
    together = descended(matrix, weight, now, other)
    for group in range(3):
        rows = slice(4 * group, 4 * group + 4)
        alone = descended(matrix[group : group + 1], weight[rows], now[rows], other[rows])
        assert torch.equal(together[rows], alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_output_is_ever_worse_than_nearest(dtype: torch.dtype) -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        matrix, weight, now, other = (tensor.to(dtype) for tensor in problem(inputs=50))
        turned = descended(matrix, weight, now, other)
        before, after = (layer_losses(matrix, w - weight) for w in (now, torch.where(turned, other, now)))
        assert bool((after <= before).all())
        assert float(after.sum()) < 0.5 * float(before.sum())


@pytest.mark.parametrize("spec", [QuantSpec(3, "channel"), QuantSpec(2, "group", group_size=3), QuantSpec(4, "tensor")])
def test_a_rounded_layer_stays_on_its_grid(spec: QuantSpec) -> None:
    layer, weight = hardened(nn.Conv2d(4, 6, 3, padding=1), spec)
    nearest = layer.weight.detach().clone()
    x = torch.randn(8, 4, 5, 5) + 2 * torch.randn(8, 1, 5, 5)
    before, after = round_layer_(layer, weight, added_up(layer, x))
    assert not torch.equal(layer.weight, nearest)
    for found, rounded in ((before, nearest), (after, layer.weight)):
        expected = float(
            (layer.geometry.apply(x, rounded, None) - layer.geometry.apply(x, weight, None)).square().sum()
        )
        assert found == pytest.approx(expected, rel=1e-4)
    assert after < 0.9 * before
    quantizer = layer.weight_quantizer
    assert isinstance(quantizer, WeightQuantizer)
    assert torch.equal(quantizer.restore(quantizer.levels(layer.weight)), layer.weight)
    low, high = SoftRounding(quantizer, weight).candidates()
    flat = layer.weight.reshape(low.shape)
    assert bool(((flat == low) | (flat == high)).all())


@pytest.mark.parametrize("spec", [QuantSpec(3, "channel"), QuantSpec(2, "group", group_size=3), QuantSpec(4, "tensor")])
@pytest.mark.parametrize("part", [None, slice(1, 3)])
def test_feedback_is_taken_where_it_is_better_and_stays_on_the_grid(spec: QuantSpec, part: slice | None) -> None:
    conv = nn.Conv2d(4, 6, 3, padding=1)
    x, after = torch.randn(8, 4, 5, 5) + 2 * torch.randn(8, 1, 5, 5), {}
    for feedback in (False, True):
        layer, weight = hardened(conv, spec)
        found = gram._Gram(layer, part, layer.weight.detach() - weight)
        found.add(x, None)
        _, after[feedback] = round_layer_(layer, weight, found, feedback)
        expected = float(brute_force(layer, layer.weight.detach() - weight, x).sum())
        assert after[feedback] == pytest.approx(expected, rel=1e-4)
        quantizer = layer.weight_quantizer
        assert isinstance(quantizer, WeightQuantizer)
        assert torch.equal(quantizer.restore(quantizer.levels(layer.weight)), layer.weight)
    assert after[True] <= after[False] * (1 + 1e-5)


def test_open_layers_are_an_error() -> None:
    layer, weight = hardened(nn.Linear(6, 4), QuantSpec(4, "channel"))
    layer.on_grid = False
    with pytest.raises(CalibrationError, match="FitWeightRanges before"):
        round_layer_(layer, weight, added_up(layer, torch.eye(6)))


def recipe(*stages: Any, weights: int = 3) -> Recipe:
    beginning = start(Select(), Place(weights, None), samples=4, batch=2, ranges="minmax")
    return Recipe("gram", (*beginning, *stages))


@functools.cache
def done(*stages: Any) -> Quantized:
    """A run; the same stages run once for all tests."""
    return quantize(tiny_pipe()[0], recipe(*stages), steps=3)


def weights_of(quantized: Quantized) -> dict[str, Tensor]:
    layers = quantized_layers(quantized.pipe.unet)
    return {name: layer.weight for name, layer in layers.items() if isinstance(layer, QuantizedLayer)}


def test_the_stage_rounds_every_layer_and_never_worse() -> None:
    rounded, nearest = done(RoundLayers(samples=8, batch=3, together=2)), weights_of(done())
    figures = rounded.figures[-1]
    assert set(figures["losses"]) == set(nearest)
    assert figures["in_parts"] == []
    assert figures["evaluations"] > 0
    assert all(entry["after"] <= entry["before"] for entry in figures["losses"].values())
    before, after = (sum(entry[when] for entry in figures["losses"].values()) for when in ("before", "after"))
    assert after < 0.8 * before
    changed = [name for name, weight in weights_of(rounded).items() if not torch.equal(weight, nearest[name])]
    assert len(changed) > 0.8 * len(nearest)


@pytest.mark.parametrize("together", [1, 3])
def test_large_layers_are_rounded_in_parts(together: int) -> None:
    nearest = weights_of(done())
    whole, parts = (done(RoundLayers(samples=8, together=together, most_inputs=most)) for most in (6_000, 50))
    large = {name for name, weight in nearest.items() if weight[0].numel() > 50}
    figures = parts.figures[-1]
    assert set(figures["in_parts"]) == large
    assert large
    assert whole.figures[-1]["in_parts"] == []
    assert set(figures["losses"]) == set(nearest)
    assert all(not torch.equal(weights_of(parts)[name], nearest[name]) for name in large)

    def gained(figures: dict[str, Any]) -> float:
        before, after = (sum(figures["losses"][name][when] for name in large) for when in ("before", "after"))
        return before - after

    # Parts cannot turn weights of two parts back and forth, and reach nearly what the whole does.
    assert gained(figures) > 0.9 * gained(whole.figures[-1])
    if together == 1:  # else the inputs change between a layer's parts, as layers before it in the group are rounded
        assert all(entry["after"] <= entry["before"] for entry in figures["losses"].values())
    assert figures["evaluations"] > whole.figures[-1]["evaluations"]


def test_layers_are_rounded_with_feedback() -> None:
    plain, fed = (done(RoundLayers(samples=8, together=2, feedback=feedback)) for feedback in (False, True))
    sums = [sum(entry["after"] for entry in found.figures[-1]["losses"].values()) for found in (plain, fed)]
    assert sums[1] < sums[0]


def test_passes_of_parts_are_counted_before_the_run() -> None:
    stage = RoundLayers(samples=4, together=3, most_inputs=50)
    denoiser = tiny_pipe()[0].unet
    figures = done(stage).figures[-1]
    assert figures["evaluations"] == stage.passes(largest_inputs(denoiser)) * 4 // 2
    assert RoundLayers(together=2, most_inputs=100).passes((0, 100, 101, 99, 301, 0, 0)) == 1 + 2 + 4 + 0


def test_an_interrupted_stage_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    stage = RoundLayers(samples=4, together=4, most_inputs=50)
    with pytest.raises(KeyboardInterrupt):
        quantize(
            tiny_pipe()[0], recipe(stage), steps=3, run=Run(work=tmp_path, progress=Interrupt("layer by layer", 2))
        )
    assert list(tmp_path.glob("partial-*"))
    resumed = quantize(tiny_pipe()[0], recipe(stage), steps=3, run=Run(work=tmp_path), resume=True)
    undisturbed = done(stage)
    expected = weights_of(undisturbed)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights_of(resumed).items())
    assert resumed.figures[-1]["losses"] == undisturbed.figures[-1]["losses"]


def test_blocks_go_on_from_the_rounding_of_layers() -> None:
    layers = RoundLayers(samples=4, together=4)
    blocks: dict[str, Any] = {"batch": 4, "together": 4, "lr": 1e-9, "iterations": 1}
    rounded = weights_of(done(layers))
    kept = weights_of(done(layers, RoundBlocks(**blocks, keep_rounding=0.6)))
    forgotten = weights_of(done(layers, RoundBlocks(**blocks)))
    nearest = weights_of(done())
    assert all(torch.equal(kept[name], rounded[name]) for name in rounded)
    assert not all(torch.equal(forgotten[name], rounded[name]) for name in rounded)
    assert all(torch.equal(forgotten[name], nearest[name]) for name in nearest)


def test_blocks_in_bfloat16_learn_about_what_they_learn_in_float32() -> None:
    blocks: dict[str, Any] = {"batch": 4, "together": 8, "lr": 5e-2, "iterations": 12}
    wide, short = (done(RoundBlocks(**blocks, compute=compute)) for compute in ("float32", "bfloat16"))
    losses = [
        {when: sum(entry[when] for entry in found.figures[-1]["losses"].values()) for when in ("before", "after")}
        for found in (wide, short)
    ]
    assert losses[0]["after"] < 0.9 * losses[0]["before"]
    assert losses[1]["before"] == pytest.approx(losses[0]["before"], rel=0.3)  # measured in float32
    assert losses[1]["after"] == pytest.approx(losses[0]["after"], rel=0.1)
    found, other = weights_of(wide), weights_of(short)
    # The ends are at 8 bits and are fitted in float32: the first of them on the same inputs.
    assert torch.equal(found["conv_in"], other["conv_in"])
    assert not all(torch.equal(found[name], other[name]) for name in found)


def test_settings_are_plain_data_and_checked() -> None:
    made = recipe(RoundLayers(together=2), RoundBlocks(keep_rounding=0.6, compute="bfloat16"))
    kinds = {type(stage).__name__: type(stage) for stage in made.stages}
    assert recipe_from_dict(made.to_dict(), kinds) == made
    for name in ("samples", "batch", "together", "most_inputs"):
        with pytest.raises(SpecError, match=f"{name} of RoundLayers must be at least 1, found 0"):
            RoundLayers(**{name: 0})
    with pytest.raises(SpecError, match="keep_rounding must be from 0 to 1, found 2"):
        RoundBlocks(keep_rounding=2)
    with pytest.raises(SpecError, match="compute must be"):
        RoundBlocks(compute="float16")  # type: ignore[arg-type]
