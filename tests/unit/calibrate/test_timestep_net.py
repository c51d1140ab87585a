"""Step sizes from a network of the timestep: where it starts, its gradient, its table, a scale that it must find."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

import tiny
from stepquant.api import quantize
from stepquant.calibrate import timestep_net
from stepquant.calibrate.stages import FitInputRanges, FitWeightRanges, Place, Select
from stepquant.calibrate.timestep_net import LearnStepSizes, TimestepScale, embedded
from stepquant.calibrate.trajectory import record, seal
from stepquant.errors import CalibrationError, SpecError
from stepquant.methods.layerwise import layerwise
from stepquant.methods.tdq import tdq
from stepquant.model.clock import StepClock
from stepquant.model.pipeline import DenoiserPipeline
from stepquant.model.quantizer import InputQuantizer
from stepquant.model.surgery import quantized_layers
from stepquant.numerics.affine import QParams
from stepquant.numerics.spec import QuantSpec
from stepquant.recipe import Job
from stepquant.run import Run

STEPS = 5


def quantizer_of(bins: int = 4, rows: int = 2) -> InputQuantizer:
    clock = StepClock(torch.arange(1.0, bins))
    params = QParams(torch.tensor([0.1, 0.3])[:rows], torch.tensor([3.0, 7.0])[:rows])
    return InputQuantizer(QuantSpec(4), clock, params, torch.arange(bins) % rows)


def scale_of(quantizer: InputQuantizer, seed: int = 0) -> TimestepScale:
    features = embedded(torch.tensor([1.0, 200.0, 600.0, 999.0]), 3)
    generator = torch.Generator().manual_seed(seed)
    return TimestepScale(quantizer, features, layers=3, width=5, generator=generator)


def test_the_embedding_by_hand() -> None:
    found = embedded(torch.tensor([0.25, 1.0]), 2)  # scaled to 250 and 1000; rates 1 and 1 / 100
    expected = [[math.sin(t), math.sin(t / 100), math.cos(t), math.cos(t / 100)] for t in (250.0, 1000.0)]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-6)
    assert torch.equal(found, embedded(torch.tensor([250.0, 1000.0]), 2))


def test_it_starts_as_the_calibrated_quantizer() -> None:
    quantizer = quantizer_of()
    module, x = scale_of(quantizer), torch.linspace(-3, 3, 24).reshape(4, 6)
    for timestep in (torch.tensor(0.5), torch.tensor([0.5, 1.5, 2.5, 3.5])):
        quantizer.clock.set(timestep)
        torch.testing.assert_close(module(x), quantizer(x), rtol=1e-5, atol=1e-6)
    hidden = module.net[0].weight
    assert float(hidden.detach().square().mean()) == pytest.approx(2 / 6, rel=0.6)  # He et al.
    assert torch.equal(hidden, scale_of(quantizer).net[0].weight)
    assert not torch.equal(hidden, scale_of(quantizer, seed=1).net[0].weight)


def moved(module: TimestepScale) -> TimestepScale:
    """The same with a last layer that makes every timestep differ."""
    with torch.no_grad():
        last: Any = module.net[-1]
        last.weight.copy_(torch.linspace(-0.5, 0.7, last.weight.numel()).reshape(last.weight.shape))
    return module


def test_the_table_is_the_network_at_every_timestep() -> None:
    quantizer = quantizer_of()
    module = moved(scale_of(quantizer))
    table = module.tabulated()
    assert table.rows == 4
    assert len(set(table.scale.tolist())) == 4
    x = torch.linspace(-3, 3, 30).reshape(1, 30)
    for timestep in (0.5, 1.5, 2.5, 3.5):
        quantizer.clock.set(timestep)
        assert torch.equal(table(x), module(x))
    quantizer.clock.set(torch.tensor([3.5, 0.5]))
    folded = torch.linspace(-3, 3, 24).reshape(4, 6)  # two heads of each sample
    # How a processor multiplies matrices of two rows and of four may differ in the last bit.
    torch.testing.assert_close(table(folded), module(folded), rtol=1e-6, atol=0)
    factor = torch.tensor([math.log1p(math.exp(float(v))) for v in _raw(module)])
    torch.testing.assert_close(table.scale, factor * quantizer.scale[quantizer.row_of_bin])
    assert torch.equal(table.zero_point, quantizer.zero_point[quantizer.row_of_bin])


def _raw(module: TimestepScale) -> Tensor:
    """f of every bin, layer by layer."""
    first, second, third = (one for one in module.net)
    hidden = torch.relu(module.features @ first.weight.T + first.bias)  # type: ignore[operator]
    hidden = torch.relu(hidden @ second.weight.T + second.bias)  # type: ignore[operator]
    result: Tensor = (hidden @ third.weight.T + third.bias)[:, 0]  # type: ignore[operator]
    return result.detach()


def test_the_gradient_is_that_of_a_table_of_scales_through_the_network() -> None:
    quantizer = quantizer_of(rows=1)
    module = moved(scale_of(quantizer))
    x, push = torch.randn(4, 6) * 2, torch.randn(4, 6)
    quantizer.clock.set(torch.tensor([0.5, 1.5, 3.5, 1.5]))
    parameters = list(module.parameters())
    found = torch.autograd.grad((module(x) * push).sum(), parameters)
    table = module.tabulated()
    table.scale.requires_grad_(True)
    (of_scale,) = torch.autograd.grad((table(x) * push).sum(), [table.scale])
    expected = torch.autograd.grad(module.scales(torch.arange(4)), parameters, of_scale)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert float(of_scale[2]) == 0  # no sample was at the third timestep


class Growing(nn.Module):
    """Activations between the two layers grow with the timestep, from 1 to 9 times."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(2, 6, 3, padding=1)
        self.inner = nn.Conv2d(6, 6, 1)
        self.last = nn.Conv2d(6, 2, 1)

    @staticmethod
    def size(timestep: Any) -> Tensor:
        return (1 + torch.as_tensor(timestep).float() / 125).reshape(-1, 1, 1, 1)

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        size = self.size(timestep)
        inner: Tensor = self.inner(torch.tanh(self.first(sample)) * size)
        result: Tensor = self.last(inner / size)
        return result


def growing_job(**place: Any) -> Job:
    net = Growing()
    pipe = DenoiserPipeline(net, DDIMScheduler(), (2, 4, 4))
    recorded = record(pipe, net, seeds=range(4), steps=STEPS, batch_size=2, run=Run())
    job = Job(pipe, net, copy.deepcopy(net), Run(), STEPS)
    job.handed["trajectories"] = [seal(trajectory) for trajectory in recorded]
    rules = {"weights": None, "activations": 4, **place}
    for stage in (Select(), Place(**rules), FitWeightRanges("minmax"), FitInputRanges("minmax")):
        stage.run(job)
    return job


def error(job: Job) -> float:
    calls = [call for one in job.handed["trajectories"] for step in one.steps for call in step.calls]
    with torch.no_grad():
        return sum(float((job.denoiser(*call.args, **call.kwargs) - call.prediction).square().mean()) for call in calls)


def test_step_sizes_follow_the_activations() -> None:
    job = growing_job()
    before = error(job)
    figures = LearnStepSizes(iterations=120, batch=8, lr=1e-2, width=16, frequencies=8).run(job)
    layer: Any = quantized_layers(job.denoiser)["inner"]
    scale = layer.input_quantizer.scale
    assert layer.input_quantizer.rows == STEPS
    assert bool((scale[1:] > scale[:-1]).all()), scale
    assert error(job) < 0.5 * before
    assert figures["losses"][-1] < figures["losses"][0]
    assert figures["spread"]["inner.input_quantizer"] == pytest.approx(float(scale.max() / scale.min()))
    assert figures["evaluations"] == 3 * 8 * 120
    assert not any(parameter.requires_grad for parameter in job.denoiser.parameters())


def test_what_reads_the_sample_and_what_is_not_named_keep_their_ranges() -> None:
    job = growing_job(activations=8, ends="same")
    layers: dict[str, Any] = quantized_layers(job.denoiser)
    before = {name: layer.input_quantizer for name, layer in layers.items()}
    LearnStepSizes(layers=("*first", "inner"), iterations=1, width=4).run(job)
    changed = [name for name, layer in layers.items() if layer.input_quantizer is not before[name]]
    assert changed == ["inner"]


class Kept:
    """A keeper in memory."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}

    def save(self, name: str, tensors: Any, meta: Any) -> None:
        self.state[name] = copy.deepcopy((dict(tensors), dict(meta)))

    def load(self, name: str) -> Any:
        return copy.deepcopy(self.state.get(name))


def test_it_goes_on_where_it_was_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timestep_net, "KEEP_EVERY", 2)
    stage = LearnStepSizes(iterations=6, batch=4, lr=1e-2, width=8, frequencies=4)
    whole = growing_job()
    expected = stage.run(whole)
    keeper = Kept()
    loss: Any = vars(timestep_net)["_prediction_loss"]
    calls = []

    def interrupting(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:  # after five iterations, of which four are kept
            raise KeyboardInterrupt
        return loss(*args)

    monkeypatch.setattr(timestep_net, "_prediction_loss", interrupting)
    job = growing_job()
    job.keeper = keeper
    with pytest.raises(KeyboardInterrupt):
        stage.run(job)
    job = growing_job()
    job.keeper = keeper
    assert stage.run(job) == expected
    assert len(calls) == 6 + 2
    one, other = (state.denoiser.state_dict() for state in (whole, job))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("rows", ["shared", "step"])
def test_the_method_starts_from_the_ranges_asked_for(rows: Any) -> None:
    """At a rate of nothing it is `layerwise`, with one zero point or one for every step."""
    common: dict[str, Any] = {"samples": 2, "batch": 2, "rows": rows, "together": 8}
    recipes = tdq(**common, iterations=1, lr=1e-12), layerwise(**common, correct_biases=False)
    found, expected = (quantize(tiny.tiny_pipe()[0], recipe, steps=STEPS).pipe.unet for recipe in recipes)
    zero_points = set()
    others: dict[str, Any] = quantized_layers(expected)
    for name, layer in quantized_layers(found).items():
        bins = torch.arange(layer.input_quantizer.clock.bins)
        own, other = (
            (q.scale[q.row_of_bin[bins]], q.zero_point[q.row_of_bin[bins]])
            for q in (layer.input_quantizer, others[name].input_quantizer)
        )
        torch.testing.assert_close(own, other)
        if name != "conv_in":  # what reads the sample has a row for every step with either
            zero_points.add(len(own[1].unique()))
    assert (max(zero_points) > 1) == (rows == "step")


def test_errors() -> None:
    with pytest.raises(SpecError, match="depth of LearnStepSizes must be at least 2, found 1"):
        LearnStepSizes(depth=1)
    with pytest.raises(SpecError, match="lr of LearnStepSizes must be positive"):
        LearnStepSizes(lr=0)
    with pytest.raises(SpecError, match=r"pattern 'outer' matches none of the 3 layers"):
        LearnStepSizes(layers=("outer",)).check(growing_job())
    with pytest.raises(SpecError, match="nothing to learn"):
        LearnStepSizes().run(growing_job(weights=4, activations=None))
    module = scale_of(quantizer_of())
    with torch.no_grad():
        last: Any = module.net[-1]
        last.bias.fill_(float("nan"))
    with pytest.raises(CalibrationError, match="lower lr"):
        module.tabulated()
