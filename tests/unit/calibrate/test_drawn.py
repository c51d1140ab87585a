"""Calibration steps that are drawn: normal and Beta positions, and density with variety of features."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

import tiny
from stepquant.calibrate.density_variety import (
    SelectDensityVariety,
    bottleneck_inputs,
    density,
    pairwise,
    sample_counts,
    variety,
)
from stepquant.calibrate.drawn import SelectDrawn, drawn_steps
from stepquant.calibrate.stages import Select
from stepquant.calibrate.trajectory import Trajectory, record, seal
from stepquant.errors import CalibrationError, SpecError
from stepquant.model.pipeline import DenoiserPipeline
from stepquant.recipe import Job
from stepquant.run import Run

STEPS = 5


class Guided(DenoiserPipeline):
    """Classifier-free guidance with both halves in one call: a batch of 2 B rows for B images."""

    def __call__(self, *, batch_size: int = 1, generator: Any = None, num_inference_steps: int = 5, **_: Any) -> Any:
        self.scheduler.set_timesteps(num_inference_steps)
        sample = torch.cat([torch.randn(1, *self.sample_shape, generator=one) for one in generator])
        with torch.no_grad():
            for timestep in self.scheduler.timesteps:
                label = torch.arange(2.0).repeat_interleave(batch_size)
                both = self.denoiser(torch.cat([sample, sample]), timestep, label)
                plain, toward = both.chunk(2)
                sample = self.scheduler.step(plain + 2.0 * (toward - plain), timestep, sample).prev_sample
        return sample


class Labelled(tiny.TinyNet):
    """Takes a number for every sample."""

    def forward(self, sample: Tensor, timestep: Any, label: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(sample + label.reshape(-1, 1, 1, 1), timestep)


class TimedNet(nn.Module):
    """Samples [B, 2, 4, 4]; the bottleneck knows the timestep."""

    def __init__(self, attention: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv_in = nn.Conv2d(2, 4, 3, padding=1)
        self.mid_block = nn.Module()
        self.mid_block.resnet = nn.Conv2d(4, 4, 1)
        if attention:
            self.mid_block.attentions = nn.ModuleList([nn.Conv2d(4, 4, 1)])
        self.mid_block.forward = self.middle  # type: ignore[method-assign]
        self.conv_out = nn.Conv2d(4, 2, 1)

    def middle(self, x: Tensor) -> Tensor:
        x = self.mid_block.resnet(x)
        return self.mid_block.attentions[0](x) if hasattr(self.mid_block, "attentions") else x

    def hidden(self, sample: Tensor, timestep: Any) -> Tensor:
        return torch.tanh(self.conv_in(sample)) * (1 + torch.as_tensor(timestep) / 500)

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        return self.conv_out(self.mid_block(self.hidden(sample, timestep)))


def recorded(denoiser: nn.Module, kind: Any = DenoiserPipeline, images: int = 4) -> tuple[Any, list[Trajectory]]:
    pipe = kind(denoiser, DDIMScheduler(clip_sample=False), (2, 4, 4))
    trajectories = record(pipe, denoiser, seeds=range(images), steps=STEPS, batch_size=2, run=Run())
    return pipe, [seal(trajectory) for trajectory in trajectories]


def job_of(denoiser: nn.Module, kind: Any = DenoiserPipeline, seed: int = 0, images: int = 4) -> Job:
    pipe, trajectories = recorded(denoiser, kind, images)
    return Job(pipe, denoiser, denoiser, Run(seed=seed), STEPS, handed={"trajectories": trajectories})


def test_positions_to_steps_by_hand() -> None:
    # Position 0 is the image: the last of ten steps.
    assert drawn_steps(torch.tensor([0.0, 0.05, 0.1, 0.99, 1.0, -3.0, 7.0]), 10) == [9, 9, 8, 0, 0, 9, 0]


def test_normal_positions_have_their_mean_and_spread() -> None:
    u = torch.linspace(0.0005, 0.9995, 1000, dtype=torch.float64)
    positions = SelectDrawn(mean=0.3, std=0.2).positions(u)
    assert float(positions.mean()) == pytest.approx(0.3, abs=1e-9)
    assert float(positions.std()) == pytest.approx(0.2, rel=5e-3)
    assert float(positions[u.sub(0.8413447).abs().argmin()]) == pytest.approx(0.5, abs=1e-3)  # one deviation above


def test_counts_follow_the_distribution() -> None:
    chosen = {
        name: SelectDrawn(distribution=name, draws=4000).run(job_of(tiny.TinyNet()))["counts"]
        for name in ("normal", "beta")
    }
    # P(0.8 <= x) of N(0.4, 0.4^2) is 0.159, the middle fifth 0.191, and everything below 0.2 is 0.309.
    assert [count / 4000 for count in chosen["normal"]] == pytest.approx([0.159, 0.150, 0.191, 0.191, 0.309], abs=0.03)
    # Beta(0.6, 0.6): symmetric, the ends have the most.
    first, second, middle, fourth, last = (count / 4000 for count in chosen["beta"])
    assert first == pytest.approx(last, abs=0.03)
    assert second == pytest.approx(fourth, abs=0.03)
    assert first > 1.5 * middle


def test_each_image_calibrates_once_and_by_the_runs_seed() -> None:
    one, again, other = (job_of(tiny.TinyNet(), seed=seed) for seed in (0, 0, 1))
    for job in (one, again, other):
        SelectDrawn().run(job)
    images = [(number, row) for number, _, row in one.handed["calibration"].entries]
    assert sorted(images) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert one.handed["calibration"] == again.handed["calibration"]
    assert one.handed["calibration"] != other.handed["calibration"]


def test_guidance_doubles_every_draw() -> None:
    job = job_of(Labelled(), Guided)
    figures = SelectDrawn(draws=3).run(job)
    entries = job.handed["calibration"].entries
    assert figures["samples"] == len(entries) == 6
    for number, step, row in entries:
        assert (number, step, (row + 2) % 4) in entries  # the other half of the same image


def test_strided_selection_by_the_number_of_steps() -> None:
    job = job_of(Labelled(), Guided)
    Select(steps=2, samples_per_step=1).run(job)  # stride 5 // 2: steps 0, 2, 4
    assert job.handed["calibration"].entries == tuple((0, step, row) for step in (0, 2, 4) for row in (0, 2))
    Select(steps=50).run(job)
    assert {step for _, step, _ in job.handed["calibration"].entries} == set(range(STEPS))
    for settings in ({"steps": 0}, {"steps": 2, "every": 2}):
        with pytest.raises(SpecError, match="`every` or"):
            Select(**settings)


def brute_force(features: Tensor, radius: float) -> tuple[list[float], list[float]]:
    """D and V by loops over steps, images and positions."""
    steps, batch, channels = features.shape[:3]
    flat = features.double().reshape(steps, batch, channels, -1)
    dense, various = [0.0] * steps, [0.0] * steps
    for t in range(steps):
        for s in range(steps):
            if s == t:
                continue
            dense[t] += float((flat[t] - flat[s]).square().mean() <= radius)
            for image in range(batch):
                for place in range(flat.shape[3]):
                    one, other = flat[t, image, :, place], flat[s, image, :, place]
                    various[t] += 1 - float(one @ other / (one.norm() * other.norm()))
    return dense, various


def test_density_and_variety_are_their_formulas() -> None:
    features = torch.randn(4, 2, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    features[2] = features[1] + 0.01  # two steps that are near each other
    squares, cosines = pairwise(features)
    dense, various = brute_force(features, 0.5)
    assert density(squares, 0.5).tolist() == dense == [0, 1, 1, 0]
    torch.testing.assert_close(variety(cosines), torch.tensor(various, dtype=torch.float64))


def test_counts_by_hand_with_both_residues() -> None:
    # D scaled 0, 1/2, 1 and V scaled 1, 0, 1/2: w = 2, 1/2, 2 with lambda = 2; 10 w / 4.5 = 4.44, 1.11, 4.44
    dense, various = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([9.0, 5.0, 7.0])
    assert sample_counts(dense, various, 10, 2.0) == [5, 1, 4]  # rounds to 9: one more for the first largest
    # 7 w / 4.5 = 3.11, 0.78, 3.11 rounds to 7; 8 w / 4.5 = 3.56, 0.89, 3.56 to 9: one less for the last
    assert sample_counts(dense, various, 7, 2.0) == [3, 1, 3]
    assert sample_counts(dense, various, 8, 2.0) == [4, 1, 3]
    assert sample_counts(torch.zeros(3), torch.ones(3), 7, 1.0) == [3, 2, 2]  # all alike: equal shares
    for total in range(1, 40):
        counts = sample_counts(torch.rand(7), torch.rand(7), total, 1.2)
        assert sum(counts) == total
        assert min(counts) >= 0


@pytest.mark.parametrize("attention", [True, False])
def test_features_are_what_goes_into_the_bottleneck(attention: bool) -> None:
    net = TimedNet(attention)
    _, trajectories = recorded(net)
    found = bottleneck_inputs(net, trajectories[0])
    for step, features in zip(trajectories[0].steps, found, strict=True):
        inner = net.hidden(step.sample, step.timestep)
        torch.testing.assert_close(features, net.mid_block.resnet(inner) if attention else inner)


def test_the_stage_draws_what_the_features_say() -> None:
    net = TimedNet(attention=True)
    job = job_of(net)
    figures = SelectDensityVariety(radius=0.05, draws=9).run(job)
    features = bottleneck_inputs(net, job.handed["trajectories"][0])
    dense, various = brute_force(features, 0.05)
    assert figures["counts"] == sample_counts(torch.tensor(dense), torch.tensor(various), 9, 1.2)
    weights: dict[int, float] = {}
    for (_, step, _), weight in zip(job.handed["calibration"].entries, job.handed["calibration"].weights, strict=True):
        weights[step] = weights.get(step, 0.0) + weight
    assert [weights.get(step, 0) for step in range(STEPS)] == figures["counts"]
    assert figures["evaluations"] == 2 * STEPS
    again = job_of(net)
    SelectDensityVariety(radius=0.05, draws=9).run(again)
    assert again.handed["calibration"] == job.handed["calibration"]
    SelectDensityVariety().run(job)
    images = [(number, row) for number, _, row in job.handed["calibration"].entries]
    assert sorted(images) == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_features_are_of_all_calls_of_a_step() -> None:
    net = TimedNet(attention=True)
    job = job_of(net)
    (trajectory, *_) = job.handed["trajectories"]
    (call,) = trajectory.steps[0].calls
    other = replace(call, args=(2 * call.args[0], *call.args[1:]))
    steps = tuple(replace(step, calls=(*step.calls, other)) for step in trajectory.steps)
    guided = replace(trajectory, steps=steps)
    found = bottleneck_inputs(net, guided)
    assert torch.equal(found[:, :2], bottleneck_inputs(net, trajectory))
    assert torch.equal(found[:, 2:], net.mid_block.resnet(net.hidden(*other.args)).expand(STEPS, -1, -1, -1, -1))
    job.handed["trajectories"] = [guided]
    assert SelectDensityVariety().run(job)["evaluations"] == 4 * STEPS


def test_the_default_radius_is_a_median() -> None:
    job = job_of(TimedNet(attention=True))
    figures = SelectDensityVariety().run(job)
    squares, _ = pairwise(bottleneck_inputs(job.full_precision, job.handed["trajectories"][0]))
    near = int((squares <= figures["radius"]).sum()) - STEPS
    assert near == STEPS * (STEPS - 1) / 2


def test_a_bottleneck_that_does_not_run_is_an_error() -> None:
    net = TimedNet(attention=True)
    _, trajectories = recorded(net)
    net.mid_block.attentions.append(nn.Conv2d(4, 4, 1))
    net.middle = None  # type: ignore[assignment, method-assign]
    net.mid_block.forward = lambda x: net.mid_block.attentions[1](x)  # type: ignore[method-assign]
    with pytest.raises(CalibrationError, match="did not run in a forward call"):
        bottleneck_inputs(net, trajectories[0])


@pytest.mark.parametrize(
    ("stage", "settings", "named"),
    [
        (SelectDrawn, {"distribution": "uniform"}, "distribution must be one of"),
        (SelectDrawn, {"std": 0.0}, "std above 0"),
        (SelectDrawn, {"mean": 1.4}, "mean must lie"),
        (SelectDrawn, {"distribution": "beta", "alpha": -1.0}, "above 0"),
        (SelectDrawn, {"draws": 0}, "draws must be at least 1"),
        (SelectDensityVariety, {"radius": 0.0}, "radius must be above 0"),
        (SelectDensityVariety, {"variety_weight": -1.0}, "not negative"),
        (SelectDensityVariety, {"draws": 0}, "draws must be at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_named(stage: Any, settings: dict[str, Any], named: str) -> None:
    with pytest.raises(SpecError, match=named):
        stage(**settings)
