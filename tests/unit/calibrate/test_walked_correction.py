"""Gains and input biases along the corrected trajectory, against their loss and a sampler written out by hand."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler, PNDMScheduler
from torch import Tensor, nn

from stepquant.calibrate.trajectory import Trajectory, record, seal
from stepquant.calibrate.walked_correction import CorrectProgressively, gains
from stepquant.errors import CalibrationError, SpecError
from stepquant.model.correction import CorrectedScheduler, StepCorrection
from stepquant.model.pipeline import DenoiserPipeline
from stepquant.recipe import Job
from stepquant.run import Run

STEPS = 4
SEEDS = (3, 1, 4)
SETTINGS = {"relative": 0.6, "nearness": 0.3, "threshold": 0.5}


class Denoiser(nn.Module):
    """Not linear, float64, for samples [B, 2, 4, 4]; `wrong` adds an error that depends on sample and timestep."""

    def __init__(self, wrong: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.inner = nn.Parameter(torch.randn(4, 2, generator=generator, dtype=torch.float64))
        self.outer = nn.Parameter(0.5 * torch.randn(2, 4, generator=generator, dtype=torch.float64))
        self.wrong = wrong

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        hidden = torch.tanh(torch.einsum("dc,bchw->bdhw", self.inner, sample.double()))
        exact = torch.einsum("cd,bdhw->bchw", self.outer, hidden) + 0.3 * sample
        growth = self.wrong * (1 + float(timestep) / 1000)
        return exact + growth * (0.5 * exact + 0.2 * torch.sin(5 * sample) + 0.3)


def ddim() -> DDIMScheduler:
    return DDIMScheduler(clip_sample=False)


def recorded(scheduler: Any, batch: int = 2) -> list[Trajectory]:
    full = Denoiser()
    pipe = DenoiserPipeline(full, scheduler, (2, 4, 4))
    return [seal(one) for one in record(pipe, full, seeds=SEEDS, steps=STEPS, batch_size=batch, run=Run())]


def fitted(
    trajectories: list[Trajectory], quantized: nn.Module, **settings: Any
) -> tuple[StepCorrection, dict[str, Any]]:
    job = Job(None, Denoiser(), quantized, Run(), STEPS)
    job.handed["trajectories"] = trajectories
    figures = CorrectProgressively(**{**SETTINGS, **settings}).run(job)
    return job.handed["correction"], figures


def loss(gain: Tensor, quantized: Tensor, exact: Tensor, relative: float, nearness: float, threshold: float) -> Tensor:
    """L(K) of one image `[C, positions]`, written out element by element."""
    count, least = exact.numel(), threshold * float(exact.abs().mean())
    total = torch.zeros((), dtype=torch.float64)
    for channel in range(len(exact)):
        for one, other in zip(quantized[channel], exact[channel], strict=True):
            if abs(float(other)) > least:
                difference = gain[channel] * one - other
                total = total + (1 - relative) * difference**2 + relative * count * (difference / other) ** 2
        total = total + nearness * count * (gain[channel] - 1) ** 2
    return total


@pytest.mark.parametrize(("relative", "nearness", "threshold"), [(0.5, 0.1, 1.0), (0.0, 0.0, 0.0), (0.8, 2.0, 0.3)])
def test_the_gain_is_the_minimum_of_the_loss(relative: float, nearness: float, threshold: float) -> None:
    exact, noise = torch.randn(2, 2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    quantized = 1.3 * exact + 0.2 * noise
    found = gains(quantized, exact, relative=relative, nearness=nearness, threshold=threshold)
    assert found.shape == (2, 3)
    for image in range(2):
        gain = found[image].clone().requires_grad_()
        value = loss(gain, quantized[image], exact[image], relative, nearness, threshold)
        (slope,) = torch.autograd.grad(value, gain)
        assert slope.abs().max() < 1e-8 * (1 + float(value.detach()))
        for step in (-1e-2, 1e-2):
            assert loss(found[image] + step, quantized[image], exact[image], relative, nearness, threshold) > value


def test_channels_below_the_threshold_keep_a_gain_of_one() -> None:
    exact = torch.tensor([[[1.0, -2.0, 3.0], [0.1, 0.1, -0.1]]])
    found = gains(2 * exact, exact, relative=0.5, nearness=0.0, threshold=1.0)
    assert found.tolist() == [[0.5, 1.0]]
    with_exact_zeros = gains(torch.ones(1, 1, 3), torch.tensor([[[0.0, 2.0, 2.0]]]), **{**SETTINGS, "threshold": 0.0})
    assert with_exact_zeros.isfinite().all()


def lowest(quantized: Tensor, exact: Tensor) -> Tensor:
    """Where the loss of one image is least: it is a parabola in every channel's gain, known from three values."""
    found = []
    for channel in range(len(exact)):
        values = []
        for at in (0.0, 1.0, 2.0):
            gain = torch.ones(len(exact), dtype=torch.float64)
            gain[channel] = at
            values.append(float(loss(gain, quantized, exact, **SETTINGS)))
        low, middle, high = values
        found.append(1 - (high - low) / (2 * (high - 2 * middle + low)))
    return torch.tensor(found, dtype=torch.float64)


def by_hand(trajectories: list[Trajectory], quantized: nn.Module, target: str) -> tuple[Tensor, Tensor, Tensor]:
    """Gains, biases and the last samples by DDIM's formula, every step's run started from the noise anew."""
    alpha_bar = DDIMScheduler().alphas_cumprod.double()
    steps = trajectories[0].steps
    timesteps = [int(step.timestep) for step in steps]
    exact = [torch.cat([one.steps[index].guided for one in trajectories]).double() for index in range(STEPS)]
    recorded_samples = [torch.cat([one.steps[index].sample for one in trajectories]).double() for index in range(STEPS)]
    gain, bias = torch.ones(STEPS, 2, dtype=torch.float64), torch.zeros(STEPS, 2, dtype=torch.float64)

    def reach(index: int) -> Tensor:
        sample = recorded_samples[0]
        for at in range(index):
            now = alpha_bar[timesteps[at]]
            then = alpha_bar[timesteps[at + 1]] if at + 1 < STEPS else torch.tensor(1.0, dtype=torch.float64)
            eps = gain[at][:, None, None] * quantized(sample - bias[at][:, None, None], timesteps[at])
            clean = (sample - bias[at][:, None, None] - (1 - now).sqrt() * eps) / now.sqrt()
            sample = then.sqrt() * clean + (1 - then).sqrt() * eps
        return sample

    for index in range(STEPS):
        sample = reach(index)
        if index:
            bias[index] = (sample - recorded_samples[index]).mean(dim=(0, 2, 3))
        predicted = quantized(sample - bias[index][:, None, None], timesteps[index])
        wanted = exact[index]
        if target == "input":
            wanted = Denoiser()(sample - bias[index][:, None, None], timesteps[index])
        rows = [lowest(one.flatten(1), other.flatten(1)) for one, other in zip(predicted, wanted, strict=True)]
        gain[index] = torch.stack(rows).mean(dim=0)
    return gain, bias, reach(STEPS)


@pytest.mark.parametrize("target", ["trajectory", "input"])
@torch.no_grad()
def test_the_sequential_fit_is_the_brute_force_one(target: str) -> None:
    trajectories, quantized = recorded(ddim()), Denoiser(0.3)
    found, figures = fitted(trajectories, quantized, target=target)
    gain, bias, last = by_hand(trajectories, quantized, target)
    assert found.gain.tolist() == [pytest.approx(row.tolist(), rel=1e-5) for row in gain]
    assert found.shift is not None
    assert found.shift[:-1].tolist() == [pytest.approx((-row).tolist(), rel=1e-4, abs=1e-6) for row in bias[1:]]
    assert found.shift[-1].tolist() == [0.0, 0.0], "no step reads the finished image"
    assert (bias.abs() > 0.01).any()
    assert (gain - 1).abs().max() > 0.05
    wanted = torch.cat([one.steps[-1].next_sample for one in trajectories]).double()
    assert figures["final_error"] == pytest.approx(float((last - wanted).square().mean().sqrt()), rel=1e-4)
    assert figures["evaluations"] == STEPS * len(SEEDS) * (2 if target == "input" else 1)
    assert figures["without_input_bias"] == []


def sampled(denoiser: nn.Module, standing: Any, batch: int) -> Tensor:
    ends = []
    for start in range(0, len(SEEDS), batch):
        seeds = SEEDS[start : start + batch]
        pipe = DenoiserPipeline(denoiser, standing, (2, 4, 4))
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        ends.append(
            pipe(batch_size=len(seeds), generator=generators, num_inference_steps=STEPS, output_type="latent").images
        )
    return torch.cat(ends)


@pytest.mark.parametrize(
    "scheduler", [DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler, HeunDiscreteScheduler]
)
def test_the_sampler_ends_where_the_fit_ended(scheduler: Any) -> None:
    trajectories, quantized = recorded(scheduler()), Denoiser(0.3)
    found, figures = fitted(trajectories, quantized)
    ends = sampled(quantized, CorrectedScheduler(scheduler(), found), 2)
    target = torch.cat([one.steps[-1].next_sample for one in trajectories])
    error = float((ends.double() - target.double()).square().mean().sqrt())
    assert figures["final_error"] == pytest.approx(error, rel=1e-6)
    timesteps = [float(step.timestep) for step in trajectories[0].steps]
    twice = sorted({timestep for timestep in timesteps if timesteps.count(timestep) > 1}, reverse=True)
    assert figures["without_input_bias"] == twice
    assert bool(twice) == (scheduler in (PNDMScheduler, HeunDiscreteScheduler))


def test_an_error_of_these_parts_alone_is_taken_back() -> None:
    class Scaled(Denoiser):
        def forward(self, sample: Tensor, timestep: Any) -> Tensor:
            scale = torch.tensor([1.25, 0.8], dtype=torch.float64)[:, None, None]
            return scale * super().forward(sample, timestep)

    trajectories = recorded(ddim())
    found, figures = fitted(trajectories, Scaled(), nearness=0.0, input_bias=False)
    assert found.gain.tolist() == [pytest.approx([0.8, 1.25], rel=1e-6)] * STEPS
    assert found.shift is None
    assert figures["final_error"] < 1e-5
    assert figures["without_input_bias"] == []


def test_the_input_bias_alone_brings_the_means_together() -> None:
    class Shifted(Denoiser):
        def forward(self, sample: Tensor, timestep: Any) -> Tensor:
            return super().forward(sample, timestep) + 0.2

    trajectories = recorded(ddim(), batch=3)
    found, figures = fitted(trajectories, Shifted(), gain=False)
    assert torch.equal(found.gain, torch.ones(STEPS, 2))
    assert found.shift is not None
    plain = CorrectedScheduler(ddim(), StepCorrection.identity(found.timesteps, 2))
    target = trajectories[0].steps[-1].next_sample.double()
    uncorrected = float((sampled(Shifted(), plain, 3).double() - target).square().mean().sqrt())
    assert figures["final_error"] < 0.5 * uncorrected


def test_a_chain_that_leaves_the_finite_numbers_is_an_error() -> None:
    class Broken(Denoiser):
        def forward(self, sample: Tensor, timestep: Any) -> Tensor:
            return super().forward(sample, timestep) / (float("inf") if float(timestep) > 600 else 0.0)

    with pytest.raises(CalibrationError, match="Step 1: the correction is not finite"):
        fitted(recorded(ddim()), Broken())


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"relative": 1.5}, "share from 0 to 1"),
        ({"nearness": -1.0}, "nearness must be 0 or more"),
        ({"threshold": float("nan")}, "threshold must be 0 or more"),
        ({"gain": False, "input_bias": False}, "Nothing to fit"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(SpecError, match=named):
        CorrectProgressively(**settings)


def test_the_trajectories_stay_as_they_were() -> None:
    trajectories = recorded(ddim())
    before = copy.deepcopy([step.sample for one in trajectories for step in one.steps])
    fitted(trajectories, Denoiser(0.3))
    after = [step.sample for one in trajectories for step in one.steps]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_positions_that_the_pipeline_writes_over_teach_nothing() -> None:
    painted = torch.zeros(len(SEEDS), 1, 4, 4, dtype=torch.bool)
    painted[..., :2] = True
    factor = torch.where(painted[:1], 1.25, 0.5)

    class Half(Denoiser):
        def forward(self, sample: Tensor, timestep: Any) -> Tensor:
            return factor * super().forward(sample, timestep)

    trajectories = [replace(one, painted=painted) for one in recorded(ddim(), batch=3)]
    found, figures = fitted(trajectories, Half(), nearness=0.0, input_bias=False)
    assert found.gain.flatten().tolist() == pytest.approx([0.8] * 2 * STEPS, rel=1e-6)
    assert figures["final_error"] < 1e-5

    class Shifted(Denoiser):
        def forward(self, sample: Tensor, timestep: Any) -> Tensor:
            return super().forward(sample, timestep) + torch.where(painted[:1], 0.2, -5.0)

    whole, _ = fitted(recorded(ddim(), batch=3), moved_by(0.2), gain=False)
    part, _ = fitted(trajectories, Shifted(), gain=False)
    assert whole.shift is not None
    assert part.shift is not None
    assert part.shift.tolist() == [pytest.approx(row, rel=0.3, abs=1e-6) for row in whole.shift.tolist()]


def moved_by(amount: float) -> Denoiser:
    class Moved(Denoiser):
        def forward(self, sample: Tensor, timestep: Any) -> Tensor:
            return super().forward(sample, timestep) + amount

    return Moved()
