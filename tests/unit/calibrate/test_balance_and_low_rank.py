"""Balancing, rotating, low-rank branches and the choice of softmax levels, against closed forms and brute force."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stepquant.api import Quantized, quantize
from stepquant.calibrate import balance
from stepquant.calibrate.balance import (
    BalanceChannels,
    RotateChannels,
    salience_scale,
    smooth_scale,
    spearman,
    timestep_scale,
)
from stepquant.calibrate.dynamic import DynamicInputs
from stepquant.calibrate.gram import RoundLayers
from stepquant.calibrate.layer_inputs import captured, output_error, refit_, transformed_patches
from stepquant.calibrate.low_rank import AddLowRank, nearest_of_rank
from stepquant.calibrate.patches import columns, transformed_products
from stepquant.calibrate.softmax_levels import ChooseSoftmaxLevels, power_law_gain
from stepquant.calibrate.stages import FitInputRanges, Place, Select
from stepquant.errors import SpecError
from stepquant.methods.baseline import start
from stepquant.model.layer import QuantizedLayer, geometry_of
from stepquant.model.quantizer import DynamicQuantizer, InputQuantizer, LogQuantizer, WeightQuantizer
from stepquant.model.surgery import quantized_layers
from stepquant.model.transform import InputTransform
from stepquant.numerics.affine import choose_qparams, fake_quantize, range_of
from stepquant.numerics.spec import QuantSpec
from stepquant.recipe import Recipe
from tiny_dit import tiny_dit_pipe

STEPS = 3
FF = "transformer.transformer_blocks.0.ff.net.0.proj"
PATCH = "transformer.pos_embed.proj"
VALUES = "transformer.transformer_blocks.0.attn1.processor.values"


def ran(*stages: Any, activations: int | None = 4, weights: int | None = 4) -> Quantized:
    """Round to nearest at four bits with these stages before the ranges of activations."""
    beginning = start(Select(), Place(weights, activations, ends="same"), samples=2, batch=2, ranges="minmax")
    return quantize(tiny_dit_pipe(), Recipe("test", (*beginning, *stages)), steps=STEPS)


def layers_of(quantized: Quantized) -> dict[str, Any]:
    return dict(quantized_layers(quantized.pipe.denoiser))


def figures_of(quantized: Quantized, stage: str) -> dict[str, Any]:
    return next(entry for entry in quantized.figures if entry["stage"] == stage)


# ---- scales


def test_smooth_scales_by_hand() -> None:
    activation, weight = torch.tensor([8.0, 2.0]), torch.tensor([2.0, 0.5])
    torch.testing.assert_close(smooth_scale(activation, weight, 0.5), torch.tensor([2.0, 2.0]))
    torch.testing.assert_close(smooth_scale(activation, weight, 1.0), activation)
    torch.testing.assert_close(smooth_scale(activation, weight, 0.0), 1 / weight)
    # A channel that never carries anything keeps a finite scale, and so does a layer of zeros.
    assert bool((smooth_scale(torch.tensor([8.0, 0.0]), torch.zeros(2), 0.5) > 0).all())


def test_rank_correlation_by_hand() -> None:
    a = torch.tensor([1.0, 5.0, 3.0, 4.0])
    assert spearman(a, a.exp()) == pytest.approx(1)
    assert spearman(a, -a) == pytest.approx(-1)
    # No ties: 1 - 6 sum d^2 / (n (n^2 - 1)), ranks of the other are 1, 0, 2, 3: d = (-1, 3, -1, -1).
    assert spearman(a, torch.tensor([2.0, 1.0, 3.0, 4.0])) == pytest.approx(1 - 6 * 12 / (4 * 15))
    # Ties share their mean rank: ranks 0.5, 0.5, 2 against 0, 1, 2.
    assert spearman(torch.tensor([1.0, 1.0, 2.0]), torch.tensor([1.0, 2.0, 3.0])) == pytest.approx(math.sqrt(3) / 2)
    assert spearman(torch.ones(3), torch.tensor([1.0, 2.0, 3.0])) == 0


def test_salience_weighs_steps_that_disagree_with_the_weight() -> None:
    weight = torch.tensor([1.0, 2.0, 3.0])
    agrees, disagrees = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([30.0, 20.0, 10.0])
    eta = 1 / (1 + math.exp(-2))  # of the step with rho = -1, beside one with rho = 1
    expected = ((1 - eta) * agrees + eta * disagrees).div(weight).sqrt()
    torch.testing.assert_close(salience_scale(torch.stack([agrees, disagrees]), weight), expected)


def test_timestep_scales_by_hand() -> None:
    # r_t = (4, 1) and (2, 1); weighted by 4 and 8, and by 1 and 4.
    peaks = torch.tensor([[4.0, 1.0], [8.0, 4.0]])
    torch.testing.assert_close(timestep_scale(peaks, 10), torch.tensor([(16 + 16) / 12, 1.0]))
    torch.testing.assert_close(timestep_scale(peaks, 2), torch.tensor([2.0, 1.0]))


# ---- patches


def convolution() -> tuple[QuantizedLayer, Tensor]:
    module = nn.Conv2d(8, 6, 3, padding=1, bias=False)
    layer = QuantizedLayer(geometry_of(module), module.weight.detach().clone(), None)
    spec = QuantSpec(4, "channel")
    layer.weight_quantizer = WeightQuantizer(spec, choose_qparams(*range_of(layer.weight, spec), spec))
    layer.input_transform = InputTransform(8, -3, scale=torch.linspace(0.5, 2, 8), block=4)
    refit_(layer, module.weight, "minmax")
    return layer, module.weight.detach()


def test_patches_and_gram_matrices_follow_the_transform() -> None:
    layer, weight = convolution()
    transform = layer.input_transform
    assert transform is not None
    x = torch.randn(2, 8, 5, 5)
    before = columns(layer.geometry, (3, 3), x)[0].mT
    after = columns(layer.geometry, (3, 3), transform(x))[0].mT
    torch.testing.assert_close(transformed_patches(transform, before), after)
    torch.testing.assert_close(transformed_products(transform, (before.mT @ before)[None])[0], after.mT @ after)
    torch.testing.assert_close(after @ layer.folded(weight).flatten(1).T, before @ weight.flatten(1).T)


@pytest.mark.parametrize("spec", [None, QuantSpec(4), QuantSpec(4, "tensor", dynamic=True)])
def test_output_error_is_that_of_the_layer(spec: QuantSpec | None) -> None:
    layer, weight = convolution()
    layer.branch = AddLowRank._branch(layer, *nearest_of_rank(layer.folded(weight).flatten(1), 2))
    refit_(layer, weight, "minmax")
    x = torch.randn(1, 8, 5, 5)
    patches = columns(layer.geometry, (3, 3), x)[0].mT
    if spec is not None:
        layer.input_quantizer = DynamicQuantizer(QuantSpec(4, "tensor", dynamic=True))
    wanted = nn.functional.conv2d(x, weight, padding=1)
    expected = float((layer(x) - wanted).square().sum() / 25)
    assert output_error(layer, patches, weight, spec) == pytest.approx(expected, rel=1e-3)


def test_tokens_have_a_range_each() -> None:
    layer = QuantizedLayer(geometry_of(nn.Linear(4, 3)), torch.randn(3, 4), None)
    x = torch.randn(5, 4) * torch.tensor([[1.0], [100.0], [1.0], [0.01], [1.0]])
    spec = QuantSpec(4, "token", dynamic=True)
    plain = QuantSpec(4)
    rounded = torch.stack([fake_quantize(row, choose_qparams(row.amin(), row.amax(), plain), plain) for row in x])
    expected = float(((rounded - x) @ layer.weight.T).square().sum() / 5)
    assert output_error(layer, x, layer.weight, spec) == pytest.approx(expected, rel=1e-4)


# ---- low rank


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (8, 8)])
def test_the_nearest_matrix_of_a_rank_is_the_truncated_svd(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape)
    down, up = nearest_of_rank(weight, 3)
    assert (tuple(down.shape), tuple(up.shape)) == ((3, shape[1]), (shape[0], 3))
    u, s, v = torch.linalg.svd(weight.double())
    expected = (u[:, :3] * s[:3]) @ v[:3]
    torch.testing.assert_close((up @ down).double(), expected, rtol=0, atol=5e-3)  # 16 bits
    assert torch.equal(down, down.half().float())
    assert torch.equal(up, up.half().float())


# ---- stages


@pytest.fixture(scope="module")
def prepared() -> Quantized:
    """Dynamic ranges, searched scales, rotation, a branch of rank 2 and rounding, on the tiny transformer."""
    torch.set_num_threads(1)
    return ran(
        DynamicInputs(),
        BalanceChannels(samples=6, patches=64, points=4, ranges="minmax"),
        RotateChannels(layers=("*ff*",), largest=8, ranges="minmax"),
        AddLowRank(rank=2, refits=3, samples=6, patches=64, ranges="minmax"),
        RoundLayers(samples=6, together=4),
        FitInputRanges(),
    )


def test_balancing_lowers_the_error_and_never_raises_it(prepared: Quantized) -> None:
    errors = figures_of(prepared, "BalanceChannels")["errors"]
    assert len(errors) > 10
    # One candidate is to leave the layer as it is.
    assert all(entry["after"] <= entry["before"] * (1 + 1e-6) for entry in errors.values())
    assert errors[FF]["after"] < 0.7 * errors[FF]["before"]
    layers = layers_of(prepared)
    for name, entry in errors.items():
        transform = layers[name].input_transform
        assert (transform is not None and transform.scale is not None) == (entry["strength"] is not None), name


def test_dynamic_ranges_are_per_token_and_per_sample(prepared: Quantized) -> None:
    layers = layers_of(prepared)
    assert layers[FF].input_quantizer.spec == QuantSpec(4, "token", dynamic=True)
    assert layers[PATCH].input_quantizer.spec == QuantSpec(4, "tensor", dynamic=True)
    assert layers[VALUES].input_quantizer.spec == QuantSpec(8, nonnegative=True)


def test_rotation_takes_the_layers_it_is_asked_for(prepared: Quantized) -> None:
    figures = figures_of(prepared, "RotateChannels")
    assert figures["blocks"][FF] == 8
    assert all(".ff." in name for name in figures["blocks"])
    layers = layers_of(prepared)
    assert layers[FF].input_transform.spec.block == 8
    odd = [name for name, layer in layers.items() if "ff" not in name and getattr(layer, "input_transform", None)]
    assert all(layers[name].input_transform.spec.block is None for name in odd)


def test_branches_lower_the_error_and_small_layers_get_none(prepared: Quantized) -> None:
    figures = figures_of(prepared, "AddLowRank")
    assert figures["errors"][FF]["after"] < figures["errors"][FF]["before"]
    assert {entry["rank"] for entry in figures["errors"].values()} <= {1, 2}
    assert set(figures["too_small"]) == {PATCH, "transformer.proj_out_2"}
    layers = layers_of(prepared)
    assert layers[FF].branch.rank == 2
    assert layers[PATCH].branch is None


def test_rounding_starts_from_the_folded_weight_and_lowers_the_error(prepared: Quantized) -> None:
    losses = figures_of(prepared, "RoundLayers")["losses"]
    assert all(entry["after"] <= entry["before"] for entry in losses.values())
    assert losses[FF]["after"] < 0.9 * losses[FF]["before"]
    pipe, layer = tiny_dit_pipe(), layers_of(prepared)[FF]
    target = layer.folded(pipe.denoiser.get_submodule(FF).weight.detach())
    assert torch.equal(layer.weight_quantizer.restore(layer.weight_quantizer.levels(layer.weight)), layer.weight)
    # Either neighbour on the grid of the folded weight: less than a step away.
    assert bool(((layer.weight - target).abs() <= layer.weight_quantizer.scale * (1 + 1e-4)).all())


@pytest.mark.parametrize("rule", ["smooth", "salience", "timesteps"])
def test_every_rule_changes_the_weight_but_not_the_operator(rule: Any) -> None:
    quantized = ran(BalanceChannels(rule=rule, samples=6, patches=8), FitInputRanges(), weights=8, activations=8)
    layer: Any = layers_of(quantized)[FF]
    full: Any = tiny_dit_pipe().denoiser.get_submodule(FF)
    scale = layer.input_transform.scale
    assert float(scale.max() / scale.min()) > 1.2
    if rule == "timesteps":
        assert float(scale.min()) >= 1
        assert float(scale.max()) <= 10
    layer.input_quantizer = None
    x = torch.randn(3, full.in_features)
    with torch.no_grad():
        assert float((layer(x) - full(x)).norm() / full(x).norm()) < 0.02


@pytest.mark.parametrize("rule", ["salience", "timesteps", "smooth"])
def test_rules_by_step_see_every_step(rule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def noted(*args: Any, **kwargs: Any) -> Any:
        found = captured(*args, **kwargs)
        seen.append(found[0])
        return found

    monkeypatch.setattr(balance, "captured", noted)
    stages = BalanceChannels(rule=rule, samples=2, patches=8, ranges="minmax"), FitInputRanges("minmax")
    quantized = ran(*stages)
    assert set(seen[0][FF].peaks) == ({0, 2} if rule == "smooth" else set(range(STEPS)))
    assert figures_of(quantized, "BalanceChannels")["evaluations"] == (2 if rule == "smooth" else 6)


def test_peaks_are_those_of_the_full_precision_model() -> None:
    """The scale of "smooth" with strength 1 is the peak of each channel, which hooks of our own find too."""
    quantized = ran(BalanceChannels(rule="smooth", strength=1.0, samples=100, patches=8), FitInputRanges())
    from stepquant.api import sample
    from stepquant.calibrate.stages import calibration_seeds

    pipe, peaks = tiny_dit_pipe(), []
    module = pipe.denoiser.get_submodule(FF)
    module.register_forward_pre_hook(lambda _m, args: peaks.append(args[0].abs().flatten(0, 1).amax(0)))
    sample(pipe, seeds=calibration_seeds(0, 2), steps=STEPS)
    torch.testing.assert_close(layers_of(quantized)[FF].input_transform.scale, torch.stack(peaks).amax(0))


def test_patterns_and_settings_are_checked() -> None:
    with pytest.raises(SpecError, match=r"'\*nope' matches none of the \d+ layers"):
        ran(BalanceChannels(layers=("*nope",)))
    for build, message in (
        (lambda: BalanceChannels(rule="smoth"), "Did you mean 'smooth'"),  # type: ignore[arg-type]
        (lambda: BalanceChannels(strength=2), "from 0 to 1"),
        (lambda: BalanceChannels(most=0.5), "at least 1, found 0.5"),
        (lambda: BalanceChannels(points=0), "points of BalanceChannels"),
        (lambda: RotateChannels(largest=12), "a power of two of at least 2, found 12"),
        (lambda: AddLowRank(rank=0), "rank of AddLowRank"),
        (lambda: AddLowRank(refits=-1), "must not be negative"),
        (lambda: ChooseSoftmaxLevels(choose="likely"), "Did you mean 'likelihood'"),  # type: ignore[arg-type]
        (lambda: ChooseSoftmaxLevels(bits=9), "2 to 8"),
        (lambda: ChooseSoftmaxLevels(groups=0), "groups of ChooseSoftmaxLevels"),
    ):
        with pytest.raises(SpecError, match=message):
            build()


# ---- softmax


def test_the_likelihoods_are_those_of_the_distributions() -> None:
    uniform = torch.rand(20_000, dtype=torch.float64)
    power = 0.01 * (1 - uniform).pow(-1 / 1.5)  # p(x) ~ x^-2.5 from 0.01 on
    exponential = 0.01 - torch.log1p(-uniform) / 4
    assert power_law_gain(power) > 0.1
    assert power_law_gain(exponential) < -0.1
    assert power_law_gain(torch.zeros(5)) == power_law_gain(torch.full((5,), 0.2)) == 0
    # Against densities of torch at their best parameters.
    x = power[power >= power.kthvalue(200).values]
    first = x.min()
    pareto = torch.distributions.Pareto(first, 1 / (x / first).log().mean())
    shifted = torch.distributions.Exponential(1 / (x - first).mean())
    expected = float((pareto.log_prob(x) - shifted.log_prob(x - first)).mean())
    assert power_law_gain(power) == pytest.approx(expected, rel=1e-9)


def test_softmax_levels_are_chosen_by_group() -> None:
    choose = ChooseSoftmaxLevels(bits=4, groups=2, choose="error", samples=6)
    quantized = ran(FitInputRanges(), choose)
    found = layers_of(quantized)[VALUES].input_quantizer
    assert isinstance(found, LogQuantizer)
    assert found.spec == QuantSpec(4, nonnegative=True, logarithmic=True)
    assert found.rows == 2
    assert found.row_of_bin.tolist() == [1, 0, 0]  # bins count from the image on: the last step is the second group
    assert figures_of(quantized, "ChooseSoftmaxLevels")["layers"][VALUES] == found.logarithmic.tolist()
    many = ran(FitInputRanges(), ChooseSoftmaxLevels(groups=7, samples=6))
    assert layers_of(many)[VALUES].input_quantizer.row_of_bin.tolist() == [2, 1, 0]


def test_even_levels_keep_the_rows_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    row = ChooseSoftmaxLevels._row
    monkeypatch.setattr(ChooseSoftmaxLevels, "_row", lambda *args: (row(*args)[0], False))
    before = layers_of(ran(FitInputRanges(windows="step")))[VALUES].input_quantizer
    quantized = ran(FitInputRanges(windows="step"), ChooseSoftmaxLevels(groups=2, samples=6))
    found = layers_of(quantized)[VALUES].input_quantizer
    assert isinstance(found, InputQuantizer)
    assert torch.equal(found.scale, before.scale)
    assert found.rows == STEPS
    assert figures_of(quantized, "ChooseSoftmaxLevels")["layers"][VALUES] == [False, False]
    # Fewer rows than groups, or other bits: new ones.
    for rows, bits in ((None, None), ("step", 4)):
        stages = FitInputRanges(windows=rows), ChooseSoftmaxLevels(bits=bits, groups=2, samples=6)
        other = layers_of(ran(*stages))[VALUES].input_quantizer
        assert isinstance(other, LogQuantizer)
        assert other.rows == 2


def test_the_choice_by_error_is_the_better_one() -> None:
    spread = torch.rand(2000)
    peaked = torch.cat((torch.rand(20_000).pow(4) * 0.03, torch.ones(20)))
    stage = ChooseSoftmaxLevels(choose="error")
    assert stage._row(spread, 1.0, 4)[1] is False
    scale, logarithmic = stage._row(peaked, 1.0, 4)
    assert logarithmic is True
    assert float(scale) == 1.0


def test_the_largest_softmax_value_counts_although_it_was_not_kept() -> None:
    kept = torch.rand(2000) * 0.01
    scale, _ = ChooseSoftmaxLevels(rule="minmax")._row(kept, 1.0, 8)
    assert float(scale) == pytest.approx(1 / 255)
