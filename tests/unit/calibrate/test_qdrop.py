"""QDrop: which elements stay in full precision, rounding with scales, and the loss of layers."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

import tiny
from stepquant.calibrate import reconstruct
from stepquant.calibrate.qdrop import DroppingQuantizer, QDrop, dropping, mixed
from stepquant.calibrate.reconstruct import Fit, RoundBlocks, fit_unit, reconstruction_loss, soft_roundings
from stepquant.calibrate.rounding import input_scales, soften_
from stepquant.calibrate.stages import FitInputRanges, FitWeightRanges, Place, Record, Select
from stepquant.calibrate.weighting import SampleWeighting
from stepquant.errors import CalibrationError, SpecError
from stepquant.model.pipeline import DenoiserPipeline
from stepquant.model.surgery import Unit, quantized_layers
from stepquant.recipe import Job, Recipe
from stepquant.run import Run


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_each_element_is_one_or_the_other() -> None:
    plain, quantized = torch.zeros(200, 50), torch.ones(200, 50)
    found = mixed(quantized, plain, 0.3, generator())
    assert set(found.flatten().tolist()) == {0.0, 1.0}
    assert float((found == 0).float().mean()) == pytest.approx(0.3, abs=0.02)
    assert float(found.mean(1).std()) > 0  # elements, not rows, are drawn
    assert torch.equal(mixed(quantized, plain, 0.0, generator()), quantized)
    assert torch.equal(mixed(quantized, plain, 1.0, generator()), plain)
    assert torch.equal(found, mixed(quantized, plain, 0.3, generator()))
    assert not torch.equal(found, mixed(quantized, plain, 0.3, generator(1)))


def test_what_cannot_be_mixed_comes_from_the_quantized_prefix() -> None:
    steps = torch.tensor([3, 4])
    assert mixed(steps, torch.tensor([9, 9]), 1.0, generator()) is steps
    assert mixed(torch.ones(2), torch.zeros(3), 1.0, generator()).tolist() == [1, 1]
    assert mixed(None, torch.zeros(3), 1.0, generator()) is None


def test_gradients_go_to_what_each_element_is() -> None:
    """d/dx is 1 everywhere inside the range; d/dscale counts the quantized elements only."""
    denoiser = tiny.quantize_(tiny.TinyNet(), rows=1)
    quantizer = denoiser.conv.input_quantizer
    quantizer.scale.requires_grad_(True)
    x = (torch.rand(40, 40) * 2 - 1).requires_grad_()
    dropping_one = DroppingQuantizer(quantizer, 0.5, generator())
    found = dropping_one(x)
    found.sum().backward()
    kept = found.detach() == x.detach()
    assert 0.45 < float(kept.float().mean()) < 0.56
    torch.testing.assert_close(x.grad, torch.ones_like(x))
    scale, zero = quantizer.scale.detach(), quantizer.zero_point
    levels = torch.round(x.detach() / scale) + zero
    expected = ((levels - zero) - x.detach() / scale)[~kept].sum()
    torch.testing.assert_close(quantizer.scale.grad[0], expected, rtol=1e-3, atol=1e-3)


def test_quantizers_are_back_in_place_after_an_error() -> None:
    layers = quantized_layers(tiny.quantize_(tiny.TinyNet()))
    before = {name: layer.input_quantizer for name, layer in layers.items()}
    inside = []

    def fails() -> None:
        with dropping(layers, 0.5, generator()):
            inside.extend(layer.input_quantizer for layer in layers.values())
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert len(inside) == 2
    assert all(isinstance(quantizer, DroppingQuantizer) for quantizer in inside)
    assert all(layer.input_quantizer is before[name] for name, layer in layers.items())


class Block(nn.Module):
    """Two layers with something between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.second = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Net(nn.Module):
    stepquant_blocks = ("Block",)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.block = Block()

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        return self.block(sample)


UNIT = Unit("block", ("block.first", "block.second"))


def one_unit(fit: Fit, samples: int = 12) -> tuple[Job, reconstruct._Cache, dict[str, Any], dict[str, Any]]:
    """A softened block with quantized activations and its cache of quantized and full-precision inputs."""
    full_precision = Net().requires_grad_(False)
    denoiser = tiny.quantize_(copy.deepcopy(full_precision), rows=1)
    layers = quantized_layers(denoiser)
    for name, layer in layers.items():
        soften_(layer, dict(full_precision.named_modules())[name].weight, 0.0)
    draw = generator(7)
    plain = torch.randn(samples, 6, generator=draw)
    quantized = plain + 0.1 * torch.randn(samples, 6, generator=draw)
    wanted = full_precision.block(plain)
    cache = reconstruct._Cache((quantized,), {}, (wanted,), torch.zeros(samples, dtype=torch.int64), ((plain,), {}))
    job = Job(None, full_precision, denoiser, Run(), 5)
    return job, cache, soft_roundings(layers), input_scales(layers) if fit.qdrop and fit.qdrop.lr_scales else {}


def test_one_iteration_follows_the_gradient_of_the_whole_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Block and layer losses of mixed inputs, from the formula by autograd; nothing is dropped at the activations.

    Plain gradient descent stands in for Adam, whose first step would show no more than signs.
    """
    monkeypatch.setattr(torch.optim, "Adam", torch.optim.SGD)
    qdrop = QDrop(activations=0.0, inputs=0.5, lr_scales=1e-2)
    fit = Fit(iterations=1, batch=12, lr=1e3, norm=2.0, qdrop=qdrop, layer_weight=0.7)
    job, cache, soft, scales = one_unit(fit)
    twin, same, twin_soft, twin_scales = one_unit(fit)
    fit_unit(job, UNIT, cache, fit, soft=soft, scales=scales, stream=("t", 1))

    chosen = torch.randint(12, (12,), generator=twin.run.generator("blocks", "t", 1))
    plain = same.float_inputs[0][0][chosen]
    x = mixed(same.args[0][chosen], plain, 0.5, twin.run.generator("drop", "t", 1))
    block, exact = twin.denoiser.block, twin.full_precision.block
    for quantizer in twin_scales.values():
        quantizer.scale.requires_grad_(True)
    first = block.first(x)
    loss = reconstruction_loss(block.second(torch.tanh(first)), exact(plain))
    loss = loss + 0.7 * reconstruction_loss(first, exact.first(plain))  # not the last layer
    loss.backward()
    for name, rounding in twin_soft.items():
        moved = soft[name].alpha.detach() - rounding.alpha.detach()
        torch.testing.assert_close(moved, -1e3 * rounding.alpha.grad, rtol=1e-4, atol=1e-6)
        assert float(moved.abs().max()) > 0.01
    for name, quantizer in twin_scales.items():
        moved = scales[name].scale / quantizer.scale.detach() - 1
        torch.testing.assert_close(moved, -1e-2 * quantizer.scale.grad, rtol=1e-3, atol=1e-6)
        assert float(moved.abs().max()) > 1e-5
        assert not scales[name].scale.requires_grad


@pytest.mark.parametrize("decay", [False, True])
def test_the_rate_of_rounding_decays_only_when_asked(decay: bool) -> None:
    """On one sample all gradients are alike, so Adam's steps have the length of the rate; cosine(1/2) is 1/2."""
    qdrop = QDrop(activations=0.0, inputs=0.0, lr_scales=0.0, decay_rounding=decay)
    ends = []
    for iterations in (1, 2):
        fit = Fit(iterations=iterations, batch=12, lr=1e-4, norm=2.0, qdrop=qdrop)
        job, cache, soft, scales = one_unit(fit, samples=1)
        start = soft["block.first"].alpha.detach().clone()
        fit_unit(job, UNIT, cache, fit, soft=soft, scales=scales, stream=("t", 1))
        ends.append(soft["block.first"].alpha.detach() - start)
    second = (ends[1] - ends[0]).abs() / 1e-4
    assert float(second.median()) == pytest.approx(0.5 if decay else 1.0, rel=0.1)


def test_dropping_everything_learns_behind_full_precision() -> None:
    """Shares of 1 leave nothing quantized but weights: the same rounding as without any activation quantizer."""
    results = []
    for activations in (1.0, None):
        fit = Fit(8, 12, 0.05, 2.0, qdrop=QDrop(activations=activations or 0.0, inputs=1.0, lr_scales=0.0))
        job, cache, soft, scales = one_unit(fit)
        if activations is None:
            for layer in quantized_layers(job.denoiser).values():
                layer.input_quantizer = None
            cache = replace(cache, args=cache.float_inputs[0])
            fit = replace(fit, qdrop=None)
        fit_unit(job, UNIT, cache, fit, soft=soft, scales=scales, stream=("t", 1))
        results.append({name: rounding.alpha.detach() for name, rounding in soft.items()})
    for name, alpha in results[0].items():
        torch.testing.assert_close(alpha, results[1][name])


def test_what_is_reported_is_measured_without_dropping() -> None:
    fit = Fit(iterations=3, batch=12, lr=1e-9, norm=2.0, qdrop=QDrop(lr_scales=0.0), layer_weight=0.5)
    job, cache, soft, scales = one_unit(fit)
    expected = float(reconstruction_loss(job.denoiser.block(cache.args[0]), cache.outputs[0]).detach())
    found = fit_unit(job, UNIT, cache, fit, soft=soft, scales=scales, stream=("t", 1))
    assert found["before"] == pytest.approx(expected, rel=1e-5)
    assert found["after"] == pytest.approx(expected, rel=1e-4)


BEGINNING = (Record(samples=2, batch=2), Select(), Place(weights=4, activations=4), FitWeightRanges())


def run(*stages: Any, seed: int = 0) -> Job:
    torch.manual_seed(1)
    net = tiny.TinyNet()
    pipe = DenoiserPipeline(net, DDIMScheduler(), (2, 4, 4))
    job = Job(pipe, net, copy.deepcopy(net).requires_grad_(False), Run(seed=seed), 4)
    for stage in Recipe("test", (*BEGINNING, *stages)).stages:
        stage.run(job)
    return job


def test_the_stage_learns_rounding_and_scales_together() -> None:
    blocks = RoundBlocks(iterations=20, batch=8, lr=0.2, qdrop=QDrop())
    before, after = run(FitInputRanges()), run(FitInputRanges(), blocks)
    for name, layer in quantized_layers(after.denoiser).items():
        old = quantized_layers(before.denoiser)[name]
        assert not torch.equal(layer.weight, old.weight)
        # The convolution reads the sample: its range is not learnt.
        assert torch.equal(layer.input_quantizer.scale, old.input_quantizer.scale) == (name == "conv")
        assert layer.on_grid
        assert torch.equal(layer.weight_quantizer.restore(layer.weight_quantizer.levels(layer.weight)), layer.weight)
    fixed = run(FitInputRanges(), replace(blocks, qdrop=QDrop(lr_scales=0.0)))
    for name, layer in quantized_layers(fixed.denoiser).items():
        old = quantized_layers(before.denoiser)[name]
        assert torch.equal(layer.input_quantizer.scale, old.input_quantizer.scale)


def test_the_prefix_of_later_units_is_quantized_in_weights_and_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, reconstruct._Cache] = {}
    fit = reconstruct.fit_unit

    def spy(job: Job, unit: Unit, cache: Any, *args: Any, **kwargs: Any) -> Any:
        seen[unit.name] = cache
        if unit.name == "out":
            conv, samples = job.denoiser.conv, seen["conv"].args[0]
            assert conv.on_grid
            assert conv.input_quantizer is not None
            expected = torch.tanh(conv(samples)).movedim(1, -1)
            torch.testing.assert_close(cache.args[0], expected)
            exact = torch.tanh(job.full_precision.conv(samples)).movedim(1, -1)
            torch.testing.assert_close(cache.float_inputs[0][0], exact)
            assert not torch.allclose(expected, exact, atol=1e-3)
        return fit(job, unit, cache, *args, **kwargs)

    monkeypatch.setattr(reconstruct, "fit_unit", spy)
    run(FitInputRanges(), RoundBlocks(iterations=1, batch=8, qdrop=QDrop()))
    assert set(seen) == {"conv", "out"}


def test_activations_need_ranges_first() -> None:
    with pytest.raises(CalibrationError, match=r"input_quantizer of conv has no range.*FitInputRanges"):
        run(RoundBlocks(iterations=1, batch=8, qdrop=QDrop()))


def test_the_layers_loss_costs_a_forward_pass() -> None:
    plain = Fit(10, 4, 0.1, 2.0)
    count = reconstruct._evaluations(plain, 8, 2)
    assert reconstruct._evaluations(replace(plain, layer_weight=0.5), 8, 2) == count + 40


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: QDrop(activations=1.5), "activations of QDrop"),
        (lambda: QDrop(inputs=-0.1), "inputs of QDrop"),
        (lambda: QDrop(lr_scales=-1.0), "lr_scales of QDrop"),
        (lambda: RoundBlocks(layer_weight=-0.1), "layer_weight must not"),
        (lambda: RoundBlocks(qdrop=QDrop(), quantized_prefix=False), "qdrop mixes inputs"),
        (lambda: RoundBlocks(qdrop=QDrop(), compute="bfloat16"), "qdrop mixes inputs"),
        (lambda: RoundBlocks(qdrop=QDrop(), weighting=SampleWeighting()), "weighting"),
    ],
)
def test_settings_that_do_not_go_together_are_named(make: Any, named: str) -> None:
    with pytest.raises(SpecError, match=named):
        make()
