"""Sample weighting against its definitions: autograd through theta*(omega) in float64, enumeration, closed forms."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

import tiny
from stepquant.api import Quantized, quantize
from stepquant.calibrate import reconstruct
from stepquant.calibrate.reconstruct import (
    Fit,
    RoundBlocks,
    ScaleBlocks,
    fit_unit,
    reconstruction_loss,
    sample_losses,
    soft_roundings,
)
from stepquant.calibrate.rounding import SoftRounding, soften_
from stepquant.calibrate.select import CalibrationSet
from stepquant.calibrate.weighting import (
    Lookahead,
    SampleWeighting,
    UnitLosses,
    WeightLearner,
    explicit_gradient,
    matching_loss,
    relative_weights,
    softmax_chain,
    stratified,
    sweep,
)
from stepquant.errors import CalibrationError, SpecError
from stepquant.methods import STAGES
from stepquant.methods.baseline import rtn
from stepquant.methods.gac import PRESETS, gac
from stepquant.model.layer import QuantizedLayer
from stepquant.model.pipeline import DenoiserPipeline
from stepquant.model.surgery import Unit, quantized_layers
from stepquant.numerics.spec import scheme_for
from stepquant.recipe import Job, Recipe, recipe_from_dict
from stepquant.run import Run

UNITS = {"down_blocks.1.resnets.0": 1e-10, "mid_block.attentions.0": 1e-5, "conv_in": 1e-10}
"""Blocks and how exact they are: attention takes its softmax in float32."""
RESNET, ATTENTION, CONV = UNITS

SAMPLES, VALIDATION = 6, ((6, 7), (8,), (9, 10, 11))
ETA = 0.7


def problem_of(unit: str, dtype: torch.dtype = torch.float64, derivative: Any = "forward") -> Lookahead:
    """A real block with a small error and soft 3-bit weights: 6 calibration samples, 3 groups of 2, 1 and 3."""
    full_precision: Any = nn.Module.to(tiny.tiny_unet(), dtype)
    denoiser = nn.Module.to(tiny.quantize_(tiny.tiny_unet(), scheme_for(3, None), ends="same"), dtype)
    weights = {name: module.weight for name, module in full_precision.named_modules() if hasattr(module, "weight")}
    layers = {n: x for n, x in quantized_layers(denoiser).items() if isinstance(x, QuantizedLayer)}
    members = {name: layer for name, layer in layers.items() if name == unit or name.startswith(unit + ".")}
    for name, layer in members.items():
        soften_(layer, weights[name], keep=0.7).to(dtype)
        soft = layer.weight_quantizer
        assert isinstance(soft, SoftRounding)
        for holder in (soft, soft.quantizer):  # a quantizer holds float32, which sixteen digits do not fit into
            for buffer in holder._buffers:
                holder._buffers[buffer] = getattr(holder, buffer).to(dtype)
    torch.manual_seed(1)
    module = full_precision.get_submodule(unit)
    total = SAMPLES + sum(map(len, VALIDATION))
    shapes = [(module.in_channels if unit == CONV else 16, 4, 4)]
    if unit == RESNET:
        shapes = [(8, 4, 4), (32,)]  # hidden states, time embedding
    args = tuple(torch.randn(total, *shape, dtype=torch.float64).to(dtype) for shape in shapes)
    shifts = [0.1 * torch.randn(total, *shape, dtype=torch.float64).to(dtype) for shape in shapes]
    with torch.no_grad():
        wanted = module(*(value + shift for value, shift in zip(args, shifts, strict=True)))
    cache = reconstruct._Cache(args, {}, (wanted,), torch.arange(total) % 5)
    job = Job(None, full_precision, denoiser, Run(), 5)
    soft_ones = soft_roundings(members)
    theta = tuple(rounding.alpha.detach() for rounding in soft_ones.values())
    groups = [torch.tensor(group) for group in VALIDATION]
    losses = reconstruct._unit_losses(job, Unit(unit, tuple(members)), cache, soft_ones, theta, groups)
    return losses.lookahead(torch.arange(SAMPLES), losses.groups, derivative)


def omega_of(count: int = SAMPLES) -> Tensor:
    return torch.softmax(torch.linspace(-1, 1, count, dtype=torch.float64), 0)


def theta_after(problem: Lookahead, omega: Tensor) -> tuple[Tensor, ...]:
    """theta*(omega) by its definition, differentiable in omega."""
    live = tuple(part.clone().requires_grad_() for part in problem.theta)
    step = torch.autograd.grad((omega * problem.losses(live)).sum(), live, create_graph=True)
    return tuple(part - ETA * along for part, along in zip(live, step, strict=True))


def group_gradients(problem: Lookahead, omega: Tensor) -> tuple[Tensor, Tensor]:
    """L_t(theta*) `[T]` and G_t = dL_t/domega `[T, B]` by differentiating twice, with a graph."""
    theta = theta_after(problem, omega)
    losses = [group(theta) for group in problem.groups]
    gradients = [torch.autograd.grad(loss, omega, create_graph=True)[0] for loss in losses]
    return torch.stack(losses), torch.stack(gradients)


def assert_close(found: Tensor, wanted: Tensor, relative: float) -> None:
    assert float(wanted.norm()) > 0
    assert float((found - wanted).norm()) <= relative * float(wanted.norm())


@pytest.mark.parametrize("unit", UNITS)
def test_the_forward_derivative_is_the_double_backward_definition(unit: str) -> None:
    problem = problem_of(unit)
    omega = omega_of().requires_grad_()
    losses, wanted = group_gradients(problem, omega)
    theta = problem.after(omega.detach(), ETA)
    for number in range(3):
        loss, gradient = problem.group_gradient(number, theta)
        assert loss == pytest.approx(float(losses[number].detach()), rel=UNITS[unit])
        assert_close(-ETA * problem.projected(gradient), wanted[number].detach(), UNITS[unit])


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("matching", ["product", "cosine"])
def test_the_explicit_gradient_is_autograd_of_the_whole_definition(unit: str, matching: Any) -> None:
    problem = problem_of(unit)
    omega = omega_of().requires_grad_()
    losses, found = group_gradients(problem, omega)
    pairs = list(itertools.combinations(range(3), 2))
    sides = found if matching == "product" else [gradient / gradient.norm() for gradient in found]
    aligned = -sum((sides[t] @ sides[k] for t, k in pairs), torch.zeros(())) / len(pairs)
    # So that each of the two terms must be right to be seen: the alignment is made about as large as the loss.
    weight = 0.8 * float((losses.mean() / aligned.abs()).detach())
    (wanted,) = torch.autograd.grad(losses.mean() + weight * aligned, omega)
    outer = explicit_gradient(problem, omega.detach(), ETA, matching=matching, weight=weight)
    assert_close(outer.gradient, wanted, 10 * UNITS[unit])
    assert outer.losses == pytest.approx(losses.tolist(), rel=UNITS[unit])
    assert outer.matching == pytest.approx(float(aligned.detach()), rel=10 * UNITS[unit])
    plain = explicit_gradient(problem, omega.detach(), ETA, matching=matching, weight=0.0)
    assert_close(plain.gradient, found.mean(0).detach(), UNITS[unit])
    assert float((plain.gradient - wanted).norm()) > 0.01 * float(wanted.norm())


def test_finite_differences_agree_with_the_forward_derivative() -> None:
    problem = problem_of(RESNET)
    _, gradient = problem.group_gradient(0, problem.theta)
    wanted = problem.projected(gradient)
    assert_close(replace(problem, derivative="finite_difference").projected(gradient), wanted, 1e-7)
    nothing = tuple(torch.zeros_like(part) for part in problem.theta)
    assert replace(problem, derivative="finite_difference").projected(nothing).tolist() == [0.0] * SAMPLES


def test_single_precision_agrees() -> None:
    exact, single = problem_of(RESNET), problem_of(RESNET, torch.float32)
    _, gradient = exact.group_gradient(0, exact.theta)
    found = single.projected(tuple(part.float() for part in gradient))
    assert_close(found, exact.projected(gradient), 1e-3)


def test_group_norm_has_a_forward_derivative_in_any_memory_layout() -> None:
    """Convolutions in float32 may leave their result with the channels last, which torch's own derivative refuses."""
    images = torch.randn(SAMPLES, 8, 5, 5, dtype=torch.float64).contiguous(memory_format=torch.channels_last)

    def losses(theta: tuple[Tensor, ...]) -> Tensor:
        normed = nn.functional.group_norm(images + theta[0].reshape(1, 8, 1, 1), 4, theta[0])
        return normed.pow(4).flatten(1).mean(1)

    theta, direction = (torch.rand(8, dtype=torch.float64),), (torch.randn(8, dtype=torch.float64),)
    problem = Lookahead(theta, losses, ())
    wanted = torch.autograd.functional.jvp(lambda value: losses((value,)), theta[0], direction[0])[1]  # reverse twice
    assert_close(problem.projected(direction), wanted, 1e-10)


class _Opaque(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def test_an_operator_without_forward_derivative_is_named_with_the_way_out() -> None:
    def losses(theta: tuple[Tensor, ...]) -> Tensor:
        apply: Any = _Opaque.apply
        return apply(theta[0]).square()

    theta = (torch.tensor([1.0, 2.0], dtype=torch.float64),)
    problem = Lookahead(theta, losses, ())
    with pytest.raises(CalibrationError, match='derivative="finite_difference"'):
        problem.projected((torch.ones(2, dtype=torch.float64),))
    numeric = replace(problem, derivative="finite_difference")
    assert numeric.projected((torch.ones(2, dtype=torch.float64),)).tolist() == pytest.approx([2.0, 4.0], rel=1e-8)


def test_the_sweep_aligns_gradients_in_the_mean_over_orders() -> None:
    """E[s_T - s_0] + a grad sum L_t = a^2/4 grad sum_{t != k} G_t . G_k, over all six orders of three groups."""
    problem, rate, temperature = problem_of(CONV), 2000.0, 0.8
    start = torch.linspace(-0.5, 0.5, SAMPLES, dtype=torch.float64)
    # The rate is large because the losses are small: s moves by about a hundredth.
    ends = [
        sweep(problem, start, order, eta=ETA, rate=rate, temperature=temperature)
        for order in itertools.permutations(range(3))
    ]
    moved = torch.stack(ends).mean(0) - start
    logits = start.clone().requires_grad_()
    theta = theta_after(problem, torch.softmax(logits / temperature, 0))
    losses = [group(theta) for group in problem.groups]
    gradients = [torch.autograd.grad(loss, logits, create_graph=True)[0] for loss in losses]
    pairs = sum((gradients[t] @ gradients[k] for t, k in itertools.permutations(range(3), 2)), torch.zeros(()))
    (explicit,) = torch.autograd.grad(pairs, logits, retain_graph=True)
    (plain,) = torch.autograd.grad(sum(losses, torch.zeros(())), logits)
    implicit = (moved + rate * plain) / (rate**2 / 4)
    assert float(moved.abs().max()) > 1e-3
    assert float(implicit @ explicit / implicit.norm() / explicit.norm()) > 0.99
    assert float(implicit.norm() / explicit.norm()) == pytest.approx(1, abs=0.05)


def test_the_softmax_chain_is_autograd() -> None:
    logits = torch.randn(7, dtype=torch.float64, requires_grad=True)
    outer = torch.randn(7, dtype=torch.float64)
    omega = torch.softmax(logits / 0.3, 0)
    (wanted,) = torch.autograd.grad(omega @ outer, logits)
    torch.testing.assert_close(softmax_chain(omega.detach(), outer, 0.3), wanted, rtol=1e-12, atol=1e-14)


def test_alignment_by_hand() -> None:
    gradients = torch.tensor([[1.0, 0.0], [2.0, 2.0], [0.0, -3.0]], dtype=torch.float64)
    assert float(matching_loss(gradients, "product")) == pytest.approx(-(2 + 0 - 6) / 3)
    root = 2**-0.5
    assert float(matching_loss(gradients, "cosine")) == pytest.approx(-(root + 0 - root) / 3, abs=1e-12)
    assert float(matching_loss(gradients[:1], "product")) == 0
    assert float(matching_loss(torch.zeros(2, 3), "cosine")) == 0


def test_equal_logits_are_exactly_no_weights() -> None:
    for count in (1, 7, 49, 1000):
        assert relative_weights(torch.full((count,), 1 / 32, dtype=torch.float64), 0.7).tolist() == [1.0] * count
    logits = torch.randn(9, dtype=torch.float64)
    wanted = 9 * torch.softmax(logits / 0.7, 0)
    torch.testing.assert_close(relative_weights(logits, 0.7), wanted, rtol=1e-13, atol=0)


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (4, 3, 5, 2)])
def test_the_weighted_loss_is_the_weighted_mean_of_the_samples(shape: tuple[int, ...]) -> None:
    found, wanted = torch.randn(shape, requires_grad=True), torch.randn(shape)
    each = sample_losses(found, wanted, 2.4)
    assert each.shape == (4,)
    weights = torch.tensor([0.5, 2.0, 0.0, 1.5], dtype=torch.float64)
    plain = reconstruction_loss(found, wanted, 2.4)
    assert each.mean().item() == pytest.approx(plain.item(), rel=1e-6)
    by_hand = sum(w * loss for w, loss in zip(weights.tolist(), each.tolist(), strict=True)) / 4
    assert reconstruction_loss(found, wanted, 2.4, weights).item() == pytest.approx(by_hand, rel=1e-6)
    even = reconstruction_loss(found, wanted, 2.4, torch.ones(4, dtype=torch.float64))
    assert torch.equal(even, plain)
    assert torch.equal(torch.autograd.grad(even, found)[0], torch.autograd.grad(plain, found)[0])


def tiny_job() -> tuple[Job, dict[str, SoftRounding], Any]:
    """A TinyNet with soft weights, and the cache of its convolution over 12 samples."""
    torch.manual_seed(0)
    full_precision = tiny.TinyNet()
    denoiser = tiny.quantize_(copy.deepcopy(full_precision), scheme_for(3, None), ends="same")
    soften_(denoiser.conv, full_precision.conv.weight, keep=0.0)
    samples = torch.randn(12, 2, 4, 4)
    with torch.no_grad():
        wanted = (full_precision.conv(samples),)
        cache = reconstruct._Cache((samples,), {}, wanted, torch.zeros(12, dtype=torch.int64))
    return Job(None, full_precision, denoiser, Run(), 5), soft_roundings({"conv": denoiser.conv}), cache


def fitted(weights: Tensor | None, spoilt: int = 0) -> Tensor:
    """Rounding variables after a fit; the last `spoilt` samples' targets are noise."""
    job, soft, cache = tiny_job()
    (wanted,) = cache.outputs
    assert isinstance(wanted, Tensor)
    wanted[len(wanted) - spoilt :] = 5.0
    fit = Fit(30, 4, 2e-2, 2.0, 0.01, 0.2)
    fit_unit(job, Unit("conv", ("conv",)), cache, fit, soft=soft, stream=("test",), weights=weights)
    return soft["conv"].alpha.detach()


def test_uniform_weights_change_no_bit_of_a_fit() -> None:
    even = relative_weights(torch.full((12,), 1 / 32, dtype=torch.float64), 1.0)
    assert torch.equal(fitted(even), fitted(None))
    assert not torch.equal(fitted(torch.linspace(0.1, 1.9, 12)), fitted(None))


def test_samples_of_no_weight_and_samples_behind_the_weights_are_not_fitted() -> None:
    silent = torch.cat([torch.ones(8), torch.zeros(4)])
    assert torch.equal(fitted(silent), fitted(silent, spoilt=4))
    assert not torch.equal(fitted(None), fitted(None, spoilt=4))
    assert torch.equal(fitted(torch.ones(8)), fitted(torch.ones(8), spoilt=4))


def test_strata_get_their_share_and_every_sample_its_chance() -> None:
    strata = torch.tensor([3, 1, 2, 0]).repeat_interleave(5)
    generator = Run().generator("test")
    hits = torch.zeros(20)
    for _ in range(400):
        chosen = stratified(strata, 8, generator)
        assert sorted(strata[chosen].tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]
        assert len(set(chosen.tolist())) == 8
        hits[chosen] += 1
    # 400 draws at 0.4: mean 160, standard deviation below 10.
    assert float(hits.min()) > 115
    assert float(hits.max()) < 205
    assert sorted(stratified(strata, 100, generator).tolist()) == list(range(20))
    assert len(set(strata[stratified(strata, 2, generator)].tolist())) == 2


def corrupted_unit() -> tuple[UnitLosses, list[int]]:
    """A linear layer, 60 samples over 4 steps of which every third has noise for a target, clean validation.

    The layer has to grow to be right; fitting noise shrinks it.
    """
    torch.manual_seed(3)
    teacher = torch.randn(4, 6, dtype=torch.float64)
    theta = (0.7 * teacher,)
    inputs = torch.randn(120, 6, dtype=torch.float64)
    wanted = inputs @ teacher.T
    bad = list(range(0, 60, 3))
    wanted[bad] = torch.randn(len(bad), 4, dtype=torch.float64)

    def training(theta: tuple[Tensor, ...], chosen: Tensor) -> Tensor:
        return (inputs[chosen] @ theta[0].T - wanted[chosen]).square().sum(1)

    def of(group: Tensor) -> Callable[[tuple[Tensor, ...]], Tensor]:
        return lambda theta: training(theta, group).mean()

    return UnitLosses(theta, training, tuple(of(torch.arange(60 + 15 * t, 75 + 15 * t)) for t in range(4))), bad


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"matching": "cosine", "normalise_groups": True},
        {"variant": "first_order"},
        {"derivative": "finite_difference"},
        {"matching_weight": 0.0, "groups": 1},
    ],
)
def test_samples_with_wrong_targets_lose_their_weight(options: dict[str, Any]) -> None:
    unit, bad = corrupted_unit()
    groups = [(0,), (1,), (2,), (3,)]
    if options.get("groups") == 1:
        whole = unit.groups
        unit = replace(unit, groups=(lambda theta: torch.stack([loss(theta) for loss in whole]).mean(),))
        groups = [(0, 1, 2, 3)]
    setting = SampleWeighting(**{"iterations": 30, "batch": 20, "lr": 0.05, **options})
    learner = WeightLearner(setting, torch.arange(60) % 4, groups, (2.0,) * 60)
    assert learner.weights.tolist() == [1.0] * 60
    figures = learner.update_(unit, Run().generator("test"))
    weights = learner.weights
    good = [position for position in range(60) if position not in bad]
    assert float(weights[bad].mean()) < 0.6 * float(weights[good].mean())
    assert float(weights.mean()) == pytest.approx(1, abs=1e-12)
    assert figures["validation_loss"][1] < figures["validation_loss"][0]
    omega = weights / 60
    assert figures["effective_samples"] == pytest.approx(float(1 / omega.square().sum()))
    assert 30 < figures["effective_samples"] < 59
    members = [[p for p in range(60) if p % 4 in steps] for steps in groups]
    assert figures["mass"] == pytest.approx([float(omega[m].sum()) for m in members])


def test_groups_of_unlike_scale_count_alike_where_they_are_normalised() -> None:
    unit, _ = corrupted_unit()

    def scaled(factor: float) -> UnitLosses:
        """The first group asks for something else than the others, `factor` times."""
        return replace(unit, groups=(lambda theta: factor * theta[0][0].square().sum(), *unit.groups[1:]))

    def learnt(unit: UnitLosses, **options: Any) -> Tensor:
        setting = SampleWeighting(iterations=3, batch=20, lr=0.1, matching_weight=0.0, **options)
        learner = WeightLearner(setting, torch.arange(60) % 4, [(0,), (1,), (2,), (3,)], (1.0,) * 60)
        learner.update_(unit, Run().generator("test"))
        return learner.weights

    normalised = learnt(scaled(1.0), normalise_groups=True)
    torch.testing.assert_close(learnt(scaled(100.0), normalise_groups=True), normalised, rtol=1e-4, atol=0)
    assert not torch.allclose(learnt(scaled(100.0)), learnt(scaled(1.0)), rtol=1e-2)


def test_a_unit_without_error_leaves_the_weights_alone() -> None:
    unit, _ = corrupted_unit()
    still = UnitLosses(
        unit.theta,
        lambda theta, chosen: 0 * unit.training(theta, chosen),
        tuple(lambda x: 0 * x[0].sum() for _ in "12"),
    )
    for variant in ("explicit", "first_order"):
        setting = SampleWeighting(variant=variant, iterations=2, batch=20)
        learner = WeightLearner(setting, torch.arange(60) % 4, [(0, 1), (2, 3)], (1.0,) * 60)
        figures = learner.update_(still, Run().generator("test"))
        assert learner.weights.tolist() == [1.0] * 60
        assert figures["cosine"] == [0.0, 0.0]


def test_weights_start_where_the_calibration_set_has_them() -> None:
    learner = WeightLearner(SampleWeighting(temperature=0.5), torch.zeros(3), [(0,)], (1.0, 2.0, 5.0))
    torch.testing.assert_close(learner.weights, torch.tensor([1.0, 2.0, 5.0]).double() * 3 / 8, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "explict"}, "variant must be one of explicit, first_order.*Did you mean 'explicit'"),
        ({"matching": "sine"}, "matching must be one of product, cosine"),
        ({"derivative": "reverse"}, "derivative must be one of"),
        ({"groups": 0}, "at least 1"),
        ({"lr": 0.0}, "lr of the sample weighting must be above 0"),
        ({"temperature": -1.0}, "temperature .* above 0"),
        ({"hardness": 1.5}, "hardness must lie in"),
        ({"validation": 1.5}, "validation be at most 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        SampleWeighting(**options)


def test_recipes_with_nested_settings_are_plain_data() -> None:
    for preset in PRESETS.values():
        recipe = gac(**preset, variant="first_order", activations_over_time=[2, 2])  # type: ignore[arg-type]
        assert recipe_from_dict(recipe.to_dict(), STAGES) == recipe
    data = gac().to_dict()
    data["stages"][4]["weighting"]["temprature"] = 2.0
    with pytest.raises(SpecError, match=r"stages\[4\]\.weighting\.temprature"):
        recipe_from_dict(data, STAGES)
    data = gac().to_dict()
    data["stages"][4]["weighting"]["groups"] = 0
    with pytest.raises(SpecError, match="at least 1"):
        recipe_from_dict(data, STAGES)
    assert (
        recipe_from_dict({"stages": [*data["stages"][:4], {"stage": "RoundBlocks"}]}, STAGES).stages[4].weighting
        is None
    )  # type: ignore[attr-defined]


class Net(nn.Module):
    """Three layers, each a unit of its own, that know the timestep, for samples [B, 2, 4, 4]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(2, 6, 3, padding=1)
        self.middle = nn.Conv2d(6, 6, 1)
        self.last = nn.Conv2d(6, 2, 1)

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        phase = torch.sin(torch.as_tensor(timestep).to(sample.dtype) / 200).reshape(-1, 1, 1, 1)
        return self.last(torch.tanh(self.middle(torch.tanh(self.first(sample) + phase))))


def pipe_of() -> DenoiserPipeline:
    return DenoiserPipeline(Net(), DDIMScheduler(clip_sample=False), (2, 4, 4))


def recipe_of(**options: Any) -> Recipe:
    common: dict[str, Any] = {
        "weights": 3,
        "activations": 8,
        "samples": 6,
        "batch": 4,
        "iterations_weights": 4,
        "iterations_activations": 2,
        "lr_weights": 5e-2,
        "meta_iterations": 3,
        "lr_samples": 0.1,
        "ends": "same",
    }
    return gac(**{**common, **options})


def state_of(quantized: Quantized) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in quantized.pipe.denoiser.state_dict().items()}


def block_figures(quantized: Quantized) -> dict[str, Any]:
    found = next(figures for figures in quantized.figures if figures["stage"] == "RoundBlocks")
    return {key: value for key, value in found.items() if key != "seconds"}


@pytest.mark.parametrize("variant", ["explicit", "first_order"])
def test_a_killed_run_goes_on_with_its_sample_weights(variant: str, tmp_path: Path) -> None:
    undisturbed = quantize(pipe_of(), recipe_of(variant=variant), steps=5)
    with pytest.raises(KeyboardInterrupt):
        quantize(
            pipe_of(),
            recipe_of(variant=variant),
            steps=5,
            run=Run(work=tmp_path, progress=tiny.Interrupt("Rounding", 2)),
        )
    assert [path.name for path in sorted(tmp_path.glob("partial-*"))] == [
        "partial-04-units-0.safetensors",
        "partial-04-units-1.safetensors",
    ]
    resumed = quantize(pipe_of(), recipe_of(variant=variant), steps=5, run=Run(work=tmp_path), resume=True)
    assert block_figures(resumed) == block_figures(undisturbed)
    expected, found = state_of(undisturbed), state_of(resumed)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_weights_go_on_from_unit_to_unit_and_are_measured() -> None:
    figures = block_figures(quantize(pipe_of(), recipe_of(), steps=5))
    found = [figures["losses"][name]["weighting"] for name in ("first", "middle", "last")]
    effective = [entry["effective_samples"] for entry in found]
    # 5 images remain of 6: the last one is held out, with its 5 steps, one for each group.
    assert 25 > effective[0] > 1
    assert len(set(effective)) == 3
    assert figures["validation_samples"] == 5
    for entry in found:
        assert sum(entry["mass"]) == pytest.approx(1)
        assert len(entry["mass"]) == 5
        assert sum(entry["mass_of_steps"].values()) == pytest.approx(1)
        assert all(-1 <= cosine <= 1 for cosine in entry["cosine"])
    once = SampleWeighting(iterations=3, batch=4).unit_evaluations(25, 5, 5)
    assert figures["block_evaluations"] == 3 * once
    assert figures["evaluations"] == 3 * 4 * 4 + 2 * (30 + 4) + once


def test_every_pass_is_counted() -> None:
    """The cost model against counted calls: samples seen forward, and again per graph that is gone back through."""
    unit, _ = corrupted_unit()
    seen = {"training": 0, "validation": 0}

    def training(theta: tuple[Tensor, ...], chosen: Tensor) -> Tensor:
        seen["training"] += len(chosen)
        return unit.training(theta, chosen)

    def counted(loss: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
        def wrapped(theta: tuple[Tensor, ...]) -> Tensor:
            seen["validation"] += 15
            return loss(theta)

        return wrapped

    watched = UnitLosses(unit.theta, training, tuple(map(counted, unit.groups)))
    setting = SampleWeighting(iterations=2, batch=8)
    learner = WeightLearner(setting, torch.arange(60) % 4, [(0,), (1,), (2,), (3,)], (1.0,) * 60)
    learner.update_(watched, Run().generator("test"))
    # An update: one graph of the batch and 4 + 1 forward derivatives; every group once for g_t and once for H_t. A
    # measurement: one graph and 4 forward derivatives; every group once. Once more for the losses at the start.
    assert seen["training"] == 8 * (2 * (1 + 5) + 2 * (1 + 4))
    assert seen["validation"] == 60 * (2 * 2 + 2 + 1)
    # A graph costs its forward pass, and twice that for each way back: step size, inner step, one for each group.
    graph, forward, first, second = 8 * (1 + 2 * 6), 2 * 8 * 5, 3 * 60, 9 * 60
    measured = 8 * (1 + 2 * 2) + 2 * 8 * 4 + 3 * 60
    assert setting.unit_evaluations(60, 60, 4) == 2 * (graph + forward + first + second) + 2 * measured + 60


def test_spare_images_validate_so_that_all_samples_calibrate() -> None:
    figures = block_figures(quantize(pipe_of(), recipe_of(samples_per_step=4), steps=5))
    # 4 images a step calibrate, all 20 entries of them; of the spare ones there are as many as there are groups.
    assert figures["validation_samples"] == 5
    assert figures["losses"]["first"]["weighting"]["effective_samples"] > 15


@pytest.mark.parametrize("stage", [RoundBlocks(iterations=4, batch=4, lr=5e-2), ScaleBlocks(iterations=4, batch=4)])
def test_weights_of_the_calibration_set_are_heeded(stage: Any) -> None:
    def after(weights: Callable[[int], float]) -> dict[str, Tensor]:
        @dataclass(frozen=True)
        class Weigh:
            needs = frozenset({"calibration"})
            gives = frozenset({"calibration"})

            def run(self, job: Job) -> dict[str, Any]:
                entries = job.handed["calibration"].entries
                given = tuple(weights(step) for _, step, _ in entries)
                job.handed["calibration"] = CalibrationSet(entries, given)
                return {}

        beginning = rtn(weights=3, samples=4, batch=4, ends="same").stages
        return state_of(quantize(pipe_of(), Recipe("weighed", (*beginning, Weigh(), stage)), steps=3))

    even, twice, unlike = after(lambda _: 1.0), after(lambda _: 2.0), after(lambda step: 1.0 + 50 * (step == 2))
    assert all(torch.equal(even[name], twice[name]) for name in even)
    assert any(not torch.equal(even[name], unlike[name]) for name in even)


def test_a_recipe_without_weighting_is_that_of_plain_reconstruction() -> None:
    assert [type(stage).__name__ for stage in gac(iterations_activations=0).stages][-2:] == [
        "RoundBlocks",
        "FitInputRanges",
    ]
    over_time = gac(activations_over_time=(3, 2)).stages[5]
    assert over_time.windows == (3, 2)  # type: ignore[attr-defined]
    assert gac(rows="step").stages[5].windows == "step"  # type: ignore[attr-defined]
    assert gac(rows="step", activations_over_time=(3, 2)).stages[5].windows == (3, 2)  # type: ignore[attr-defined]


def test_the_base_of_the_paper_can_be_asked_for() -> None:
    base = gac(**PRESETS["quick"], activation_ranges="ema", temporal_block=True)  # type: ignore[arg-type]
    assert [type(stage).__name__ for stage in base.stages][4:] == [
        "RoundLayers",
        "RoundTemporalBlock",
        "RoundOtherBlocks",
        "FitStepRanges",
        "ScaleBlocks",
    ]
    temporal, others, ranges = base.stages[5:8]
    assert temporal.keep_rounding == others.keep_rounding == 0.6  # type: ignore[attr-defined]
    assert others.weighting == gac(**PRESETS["quick"]).stages[5].weighting  # type: ignore
    assert (ranges.layers, ranges.rule, ranges.samples) == ("all", "ema", 32)  # type: ignore[attr-defined]
    assert recipe_from_dict(base.to_dict(), STAGES) == base
    with pytest.raises(SpecError, match=r"activation_ranges='ema' .* activations_over_time=\[3, 2\]"):
        gac(activation_ranges="ema", activations_over_time=(3, 2))
    with pytest.raises(SpecError, match="rule must be one of ema, minmax, mse, found 'search'"):
        gac(activation_ranges="search")  # type: ignore[arg-type]
    assert "RoundTemporalBlock" not in str(gac(weights=None, temporal_block=True).to_dict())


def test_the_sweep_and_the_start_of_the_inner_step_can_be_set() -> None:
    weighting = gac(variant="first_order", sweep_lr=3.0, hardness=0.25).stages[4].weighting  # type: ignore[attr-defined]
    assert (weighting.sweep_lr, weighting.hardness) == (3.0, 0.25)
    assert gac().stages[4].weighting == SampleWeighting(iterations=50)  # type: ignore[attr-defined]
