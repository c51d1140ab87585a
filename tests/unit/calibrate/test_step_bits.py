"""Activation bits by step, from signal-to-noise ratios that are computed apart."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, HeunDiscreteScheduler
from torch import Tensor, nn

from stepquant.calibrate import step_bits
from stepquant.calibrate.ranges import fit_range
from stepquant.calibrate.stages import FitInputRanges, FitWeightRanges, LayerRule, Place, Record, Select
from stepquant.calibrate.step_bits import ChooseStepBits, fewest_bits
from stepquant.calibrate.trajectory import predict, state_at
from stepquant.errors import SpecError
from stepquant.methods.ptqd import ptqd
from stepquant.model.assembly import describe
from stepquant.model.layer import Matmul
from stepquant.model.pipeline import DenoiserPipeline
from stepquant.model.quantizer import InputQuantizer
from stepquant.model.surgery import operand_specs, quantized_layers
from stepquant.numerics.spec import QuantSpec
from stepquant.recipe import Job
from stepquant.run import Run

STEPS = 5


class Net(nn.Module):
    """Two layers, for samples [B, 2, 4, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3, padding=1)
        self.last = nn.Conv2d(6, 2, 1)

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        return self.last(torch.tanh(self.first(sample)))


def placed(scheduler: Any = DDIMScheduler, activations: int = 3, kind: type[nn.Module] = Net, **settings: Any) -> Job:
    torch.manual_seed(2)
    net = kind()
    pipe = DenoiserPipeline(net, scheduler(), (2, 4, 4))
    job = Job(pipe, net, copy.deepcopy(net).requires_grad_(False), Run(), STEPS)
    place = Place(weights=8, activations=activations, **{"ends": "same", **settings})
    for stage in (Record(samples=4, batch=2), Select(), place, FitWeightRanges(), FitInputRanges("minmax")):
        stage.run(job)
    return job


def test_the_rule_by_hand() -> None:
    ratios = {2: [5.0, 1.0, 0.1, math.inf], 8: [50.0, 10.0, 0.2, math.inf], 4: [9.0, 5.0, 0.1, math.inf]}
    assert fewest_bits(ratios, [1.0, 1.0, 1.0, math.inf]) == [2, 4, 8, 8]
    assert fewest_bits(ratios, [5.0, 0.5, 0.15, 1.0]) == [4, 2, 8, 2]


def ratios_by_hand(job: Job, bits: int) -> list[float]:
    """With quantizers over the whole range of what a layer's input was in all recorded steps, in full precision behind
    the quantized weights.
    """
    denoiser = copy.deepcopy(job.denoiser)
    layers, seen = quantized_layers(denoiser), {}
    for name, layer in layers.items():
        layer.input_quantizer = None
        seen[name] = []
        layer.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0].flatten()))
    for trajectory in job.handed["trajectories"]:
        for index in range(len(trajectory.steps)):
            predict(denoiser, trajectory, index, state_at(trajectory, index))
    clock = denoiser.stepquant_clock
    for name, layer in layers.items():
        spec = QuantSpec(bits)
        layer.input_quantizer = InputQuantizer(spec, clock, fit_range(torch.cat(seen[name]), spec, "minmax"))
    found = []
    for index in range(len(job.handed["trajectories"][0].steps)):
        signal = noise = 0.0
        for trajectory in job.handed["trajectories"]:
            exact = trajectory.steps[index].guided
            signal += float(exact.double().square().sum())
            guided = predict(denoiser, trajectory, index, state_at(trajectory, index))
            noise += float((guided.double() - exact.double()).square().sum())
        found.append(signal / noise)
    return found


@torch.no_grad()
def test_steps_next_to_the_image_have_more_bits_and_ranges_of_their_own() -> None:
    job = placed()
    stage = ChooseStepBits((3, 6), rule="minmax", images=4)
    by_hand = {bits: ratios_by_hand(job, bits) for bits in (3, 6)}
    figures = stage.run(job)
    for bits in (3, 6):
        assert figures["signal_to_noise"][str(bits)] == pytest.approx(by_hand[bits], rel=1e-6)
    alpha_bar = DDIMScheduler().alphas_cumprod.double()
    forward = [float(alpha_bar[t] / (1 - alpha_bar[t])) for t in (800, 600, 400, 200, 0)]
    assert figures["forward_signal_to_noise"] == pytest.approx(forward, rel=1e-4)
    chosen = figures["bits"]
    assert chosen == fewest_bits(by_hand, forward)
    assert chosen == sorted(chosen)
    assert {*chosen} == {3, 6}
    assert figures["average"] == pytest.approx(sum(chosen) / STEPS)
    assert figures["evaluations"] == 4 * STEPS + 2 * STEPS * 4
    layers = quantized_layers(job.denoiser)
    structure = describe(job.denoiser)
    clock = job.denoiser.stepquant_clock
    for name, layer in layers.items():
        quantizer: Any = layer.input_quantizer
        assert structure.layers[name].row_bits == {"input_quantizer": (3, 6)}
        for step, bits in zip(job.handed["trajectories"][0].steps, chosen, strict=True):
            clock.set(torch.as_tensor(step.timestep))
            row = int(quantizer.row_of_bin[clock.bin])
            assert quantizer.bits[row] == bits
            assert len(quantizer(torch.linspace(-50, 50, 10_000)).unique()) == 2**bits
    # Each row spans what the first layer, which reads the sample, has seen in its own steps.
    for row, bits in enumerate((3, 6)):
        own = [index for index, found in enumerate(chosen) if found == bits]
        samples = [one.steps[index].sample for one in job.handed["trajectories"] for index in own]
        wanted = fit_range(torch.cat([one.flatten() for one in samples]), QuantSpec(bits), "minmax")
        assert float(layers["first"].input_quantizer.scale[row]) == pytest.approx(float(wanted.scale))


def test_where_all_steps_choose_the_same_the_quantizer_has_these_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    job = placed()
    monkeypatch.setattr(step_bits, "fewest_bits", lambda _ratios, forward: [6] * len(forward))
    assert ChooseStepBits((3, 6), images=2).run(job)["average"] == 6
    for structure in describe(job.denoiser).layers.values():
        assert structure.row_bits == {}
        assert structure.rows == {"input_quantizer": 1}
        assert structure.scheme.input is not None
        assert structure.scheme.input.bits == 6


def test_only_activations_of_the_first_bits_change() -> None:
    job = placed(rules=(LayerRule("last", 8, 8),))
    last: Any = quantized_layers(job.denoiser)["last"]
    before = last.input_quantizer
    assert ChooseStepBits((3, 6), images=2).run(job)["operands"] == 1
    assert last.input_quantizer is before
    assert describe(job.denoiser).layers["first"].row_bits == {"input_quantizer": (3, 6)}
    with pytest.raises(SpecError, match="No static activation was placed at 4 bits"):
        ChooseStepBits((4, 6)).run(job)


def test_a_timestep_that_comes_twice_has_the_bits_of_its_first_time() -> None:
    job = placed(HeunDiscreteScheduler)
    figures = ChooseStepBits((3, 6), images=4).run(job)
    steps = job.handed["trajectories"][0].steps
    first: dict[float, int] = {}
    for step, bits in zip(steps, figures["bits"], strict=True):
        first.setdefault(float(step.timestep), bits)
    clock, quantizer = job.denoiser.stepquant_clock, quantized_layers(job.denoiser)["first"].input_quantizer
    for timestep, bits in first.items():
        clock.set(torch.as_tensor(timestep))
        assert quantizer.bits[int(quantizer.row_of_bin[clock.bin])] == bits


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"bits": (4,)}, "two or more"),
        ({"bits": (8, 4)}, "ascending"),
        ({"bits": (4, 4)}, "ascending"),
        ({"bits": (1, 4)}, "from 2 to 16"),
        ({"images": 0}, "at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(SpecError, match=named):
        ChooseStepBits(**settings)


class Attending(nn.Module):
    """An end on each side of an attention, for samples [B, 2, 4, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Conv2d(2, 4, 1), nn.Linear(4, 4), nn.Linear(4, 2)
        self.values = Matmul("values")

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        tokens = self.first(sample).flatten(2).mT
        mixed = self.values(torch.softmax(tokens @ tokens.mT, -1), self.middle(tokens))
        return self.last(mixed).mT.reshape(sample.shape)


def test_at_8_bits_ends_and_softmax_are_told_by_their_place() -> None:
    def changed(place: dict[str, Any], **settings: Any) -> set[tuple[str, str]]:
        job = placed(activations=8, kind=Attending, **place)
        assert all(spec.bits == 8 for scheme in job.handed["plan"].values() for _, spec in operand_specs(scheme))
        return set(ChooseStepBits((8, 10), images=2, **settings)._operands(job))

    inner = {("middle", "input_quantizer"), ("values", "second_quantizer")}
    ends = {("first", "input_quantizer"), ("last", "input_quantizer")}
    softmax = {("values", "input_quantizer")}
    assert changed({"ends": "8bit"}) == inner
    assert changed({"ends": "same"}, ends="same") == inner | ends
    assert changed({"ends": "8bit", "softmax_bits": None}, softmax_bits=None) == inner | softmax
    stages = {type(stage): stage for stage in ptqd(activations=8, step_bits=(8, 10), ends="same").stages}
    assert stages[ChooseStepBits].ends == "same"  # type: ignore[attr-defined]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_other_predictions_are_compared_in_the_noise_that_they_mean(kind: str) -> None:
    job = placed(lambda: DDIMScheduler(prediction_type=kind, clip_sample=False))
    found = step_bits._signal_to_noise(job, job.handed["trajectories"], lambda _done: None)
    for index, ratio in enumerate(found):
        signal = noise = 0.0
        for trajectory in job.handed["trajectories"]:
            step = trajectory.steps[index]
            alpha_bar = float(DDIMScheduler().alphas_cumprod[int(step.timestep)])
            alpha, sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
            guided = predict(job.denoiser, trajectory, index, state_at(trajectory, index))
            exact, other = (
                alpha * one + sigma * step.sample if kind == "v_prediction" else (step.sample - alpha * one) / sigma
                for one in (step.guided.double(), guided.double())
            )
            signal += float(exact.square().sum())
            noise += float((other - exact).square().sum())
        assert ratio == pytest.approx(signal / noise, rel=1e-3)


def test_a_prediction_of_unknown_noise_is_refused_before_recording() -> None:
    net = Net()
    job = Job(DenoiserPipeline(net, EDMEulerScheduler(), (2, 4, 4)), net, net, Run(), STEPS)
    with pytest.raises(SpecError, match="Which noise a prediction means is not known for EDMEulerScheduler"):
        ChooseStepBits().check(job)
