"""Quantization noise of known parts: slope, bias and rest recovered, and the variance of the corrected chain."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from torch import Tensor, nn

from stepquant.calibrate.noise_correction import CorrectNoise, NoiseMoments
from stepquant.calibrate.step_noise import adds_noise, noise_deviation
from stepquant.calibrate.trajectory import Trajectory, record, replay, seal
from stepquant.errors import CalibrationError, SpecError
from stepquant.model.correction import CorrectedScheduler, Corrector, StepCorrection
from stepquant.model.pipeline import DenoiserPipeline
from stepquant.recipe import Job, Recipe, recipe_from_dict
from stepquant.run import Run

STEPS = 5
SEEDS = (3, 1, 4, 7)
SLOPES = (0.3, 0.1, 0.25, 0.05, 0.2)
BIASES = torch.tensor([0.2, -0.1, 0.0], dtype=torch.float64)
SPREAD = 0.15
"""Root mean square of the rest."""


class Gaussian(nn.Module):
    """The perfect denoiser of white Gaussian data of variance 0.25, for samples [B, 3, ...]: eps is a line in x."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha_bar: Tensor
        self.register_buffer("alpha_bar", DDPMScheduler().alphas_cumprod.double())

    def slope(self, timestep: Any) -> float:
        alpha_bar = float(self.alpha_bar[int(timestep)])
        return float((1 - alpha_bar) ** 0.5 / (0.25 * alpha_bar + 1 - alpha_bar))

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        return self.slope(timestep) * sample


class Remembered(Gaussian):
    """What was put down for a timestep's batch."""

    def __init__(self, predictions: dict[int, Tensor]) -> None:
        super().__init__()
        self.predictions = predictions

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        return self.predictions[int(timestep)]


def recorded(scheduler: Any, size: int = 6, **arguments: Any) -> Trajectory:
    full = Gaussian()
    pipe = DenoiserPipeline(full, scheduler, (3, size, size))
    (found,) = record(
        pipe, full, seeds=SEEDS, steps=STEPS, batch_size=len(SEEDS), run=Run(), arguments=arguments or None
    )
    return seal(found)


def with_noise(trajectory: Trajectory) -> Remembered:
    """(1 + k) eps + mu + a rest that is exactly uncorrelated with eps in every channel, of exactly `SPREAD`."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for step, slope in zip(trajectory.steps, SLOPES, strict=True):
        eps = step.guided.double()
        rest = torch.randn(eps.shape, generator=generator, dtype=torch.float64)
        by_channel, values = rest.movedim(1, 0).flatten(1), eps.movedim(1, 0).flatten(1)
        for channel in range(3):
            design = torch.stack([torch.ones_like(values[channel]), values[channel]], dim=1)
            fit = torch.linalg.lstsq(design, by_channel[channel][:, None]).solution
            by_channel[channel] -= (design @ fit)[:, 0]
            by_channel[channel] *= SPREAD / by_channel[channel].square().mean().sqrt()
        rest = by_channel.reshape(3, len(SEEDS), *eps.shape[2:]).movedim(0, 1)
        found[int(step.timestep)] = (1 + slope) * eps + BIASES[:, None, None] + rest
    return Remembered(found)


def fitted(trajectory: Trajectory, quantized: nn.Module, **settings: Any) -> tuple[StepCorrection, dict[str, Any]]:
    job = Job(None, Gaussian(), quantized, Run(), STEPS)
    job.handed["trajectories"] = [trajectory]
    figures = CorrectNoise(**settings).run(job)
    return job.handed["correction"], figures


def noise_of(scheduler: Any, timestep: int, after: int, eta: float | None) -> tuple[float, float]:
    """sigma^2 and the factor of eps in the step, b, by the papers' formulas."""
    alpha_bar = scheduler.alphas_cumprod.double()
    now, then = alpha_bar[timestep], alpha_bar[after] if after >= 0 else torch.tensor(1.0, dtype=torch.float64)
    alpha = now / then
    posterior = (1 - then) / (1 - now) * (1 - alpha)
    if eta is None:
        sigma2 = 1 - alpha if scheduler.config.variance_type == "fixed_large" else posterior
        return float(sigma2) * (timestep > 0), float(-(1 - alpha) / (alpha * (1 - now)).sqrt())
    sigma2 = eta**2 * posterior
    return float(sigma2), float((1 - then - sigma2).sqrt() - (then * (1 - now) / now).sqrt())


SCHEDULERS: dict[str, tuple[Any, float | None]] = {
    "ddpm": (lambda: DDPMScheduler(clip_sample=False), None),
    "ddpm large": (lambda: DDPMScheduler(clip_sample=False, variance_type="fixed_large"), None),
    "ddim eta 1": (lambda: DDIMScheduler(clip_sample=False), 1.0),
    "ddim eta 0.4": (lambda: DDIMScheduler(clip_sample=False), 0.4),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_slope_bias_and_rest_are_recovered_and_become_the_papers_correction(name: str) -> None:
    build, eta = SCHEDULERS[name]
    trajectory = recorded(build(), **({} if eta is None else {"eta": eta}))
    correction, figures = fitted(trajectory, with_noise(trajectory))
    assert figures["slope"] == pytest.approx(SLOPES, rel=1e-9)
    assert figures["bias"] == pytest.approx([float(BIASES.square().mean().sqrt())] * STEPS, rel=1e-6)
    assert figures["error_left"] == pytest.approx([SPREAD / (1 + slope) for slope in SLOPES], rel=1e-9)
    assert figures["evaluations"] == STEPS * len(SEEDS)
    timesteps = [int(step.timestep) for step in trajectory.steps]
    assert correction.timesteps.tolist() == timesteps
    for row, (slope, timestep) in enumerate(zip(SLOPES, timesteps, strict=True)):
        assert correction.gain[row].tolist() == pytest.approx([1 / (1 + slope)] * 3, rel=1e-6)
        assert correction.offset[row].tolist() == pytest.approx((-BIASES / (1 + slope)).tolist(), abs=1e-7)
        after = timestep - 1000 // STEPS if row + 1 < STEPS else -1
        sigma2, b = noise_of(trajectory.steps[0].scheduler, timestep, after, eta)
        left = max(0.0, sigma2 - b**2 * SPREAD**2 / (1 + slope) ** 2)
        share = 1 - left / sigma2 if sigma2 else 0.0
        assert correction.variance[row].tolist() == pytest.approx([share] * 3, rel=1e-4, abs=1e-9)
        assert noise_deviation(trajectory.steps[row]) == pytest.approx(sigma2**0.5, rel=1e-5, abs=1e-12)
    assert correction.variance.max() > 0.01
    assert figures["variance"].startswith("corrected in ")


def test_the_codes_bias_is_the_mean_of_the_whole_error() -> None:
    trajectory = recorded(DDPMScheduler(clip_sample=False))
    quantized = with_noise(trajectory)
    correction, figures = fitted(trajectory, quantized, bias_of="error")
    for row, step in enumerate(trajectory.steps):
        mean = (quantized.predictions[int(step.timestep)] - step.guided.double()).mean(dim=(0, 2, 3))
        assert correction.offset[row].tolist() == pytest.approx((-mean / (1 + SLOPES[row])).tolist(), abs=1e-6)
        corrected = correction.apply(quantized.predictions[int(step.timestep)], step.timestep, step.sample.double())
        left = (corrected - step.guided.double()).square().mean().sqrt()
        assert figures["error_left"][row] == pytest.approx(float(left), rel=1e-5)


def test_slopes_below_zero_are_taken_only_if_asked_for() -> None:
    trajectory = recorded(DDPMScheduler(clip_sample=False))
    shrunk = Remembered({int(step.timestep): 0.8 * step.guided.double() for step in trajectory.steps})
    assert torch.equal(fitted(trajectory, shrunk)[0].gain, torch.ones(STEPS, 3))
    assert fitted(trajectory, shrunk, negative=True)[0].gain.flatten().tolist() == pytest.approx([1.25] * 15)
    turned = Remembered({int(step.timestep): -0.5 * step.guided.double() for step in trajectory.steps})
    with pytest.raises(CalibrationError, match="falls where the exact one rises"):
        fitted(trajectory, turned, negative=True)


def test_each_channel_may_have_a_slope() -> None:
    trajectory = recorded(DDPMScheduler(clip_sample=False))
    scales = torch.tensor([1.5, 1.0, 1.2], dtype=torch.float64)[:, None, None]
    quantized = Remembered({int(step.timestep): scales * step.guided.double() for step in trajectory.steps})
    correction, _ = fitted(trajectory, quantized, slopes="channel")
    for row in range(STEPS):
        assert correction.gain[row].tolist() == pytest.approx([1 / 1.5, 1.0, 1 / 1.2], rel=1e-5)


@pytest.mark.parametrize("slopes", ["step", "channel"])
def test_the_regression_on_the_quantized_prediction_is_least_squares(slopes: Any) -> None:
    trajectory = recorded(DDPMScheduler(clip_sample=False))
    quantized = with_noise(trajectory)
    correction, figures = fitted(trajectory, quantized, regress_on="quantized", slopes=slopes, negative=True)
    for row, step in enumerate(trajectory.steps):
        predicted = quantized.predictions[int(step.timestep)].movedim(1, 0).flatten(1)
        error = predicted - step.guided.double().movedim(1, 0).flatten(1)
        count = predicted.shape[1]
        ones = torch.eye(3, dtype=torch.float64).repeat_interleave(count, 0)
        slope_columns = predicted.flatten()[:, None] * (ones if slopes == "channel" else 1)
        design = torch.cat([ones, slope_columns], dim=1)
        solution = torch.linalg.lstsq(design, error.flatten()[:, None]).solution[:, 0]
        slope = solution[3:].expand(3)
        assert correction.gain[row].tolist() == pytest.approx((1 - slope).tolist(), rel=1e-5)
        assert correction.offset[row].tolist() == pytest.approx((-solution[:3]).tolist(), abs=1e-6)
        rest = error.flatten() - design @ solution
        assert figures["error_left"][row] == pytest.approx(float(rest.square().mean().sqrt()), rel=1e-8)
        assert figures["error_left"][row] < figures["error"][row]
        sigma2, b = noise_of(
            trajectory.steps[0].scheduler, int(step.timestep), int(step.timestep) - 200 if row < 4 else -1, None
        )
        share = min(1.0, b**2 * float(rest.square().mean()) / sigma2) if sigma2 else 0.0
        assert figures["variance_share"][row] == pytest.approx(share, rel=1e-4)


def test_moments_of_two_batches_are_those_of_both_together() -> None:
    exact, error = torch.randn(2, 3, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 3
    together, apart = NoiseMoments.of(exact, error), NoiseMoments.of(exact[:, :20], error[:, :20])
    apart = apart + NoiseMoments.of(exact[:, 20:], error[:, 20:])
    for name in ("prediction", "error", "prediction_squared", "crossed", "error_squared"):
        torch.testing.assert_close(getattr(apart, name), getattr(together, name), rtol=1e-12, atol=1e-12)
    assert apart.count == 50
    quantized = NoiseMoments.of(exact + error, error)
    for name in ("prediction", "prediction_squared", "crossed"):
        torch.testing.assert_close(getattr(together.on_quantized(), name), getattr(quantized, name))


class Noisy(Gaussian):
    """The prediction with fresh noise, a slope and a bias: quantization as the method sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(9)

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        noise = torch.randn(sample.shape, generator=self.generator)
        return 1.2 * super().forward(sample, timestep) + 0.1 + 0.25 * noise


@pytest.mark.parametrize("name", ["ddpm large", "ddim eta 1"])
def test_the_corrected_chain_has_the_variance_of_the_full_precision_one(name: str) -> None:
    size = 48
    build, eta = SCHEDULERS[name]
    trajectory = recorded(build(), size, **({} if eta is None else {"eta": eta}))
    correction, figures = fitted(trajectory, Noisy())
    # In the last step, at timestep 0, eps is small beside the noise.
    assert figures["slope"][:-1] == pytest.approx([0.2] * (STEPS - 1), abs=0.01)
    means_only = StepCorrection(
        correction.timesteps, correction.gain, correction.carry, correction.offset, torch.zeros_like(correction.gain)
    )

    def variance(denoiser: nn.Module, standing: Any) -> float:
        pipe = DenoiserPipeline(denoiser, standing, (3, size, size))
        generators = [torch.Generator().manual_seed(seed) for seed in range(20, 26)]
        images = pipe(
            batch_size=6, generator=generators, num_inference_steps=STEPS, output_type="latent", eta=eta or 0.0
        ).images
        return float(images.double().var())

    # x' = (a + b s) x + b rest + sigma z, from x of variance 1, by the papers' formulas alone.
    full = means = both = 1.0
    for row, step in enumerate(trajectory.steps):
        timestep = int(step.timestep)
        after = timestep - 200 if row < 4 else -1
        sigma2, b = noise_of(build(), timestep, after, eta)
        now = Gaussian().alpha_bar[timestep]
        then = Gaussian().alpha_bar[after] if after >= 0 else torch.ones(())
        grown = (float((then / now).sqrt()) + b * Gaussian().slope(timestep)) ** 2
        rest = b**2 * float((0.25 * correction.gain[row]).square().mean())
        full, means, both = grown * full + sigma2, grown * means + sigma2 + rest, grown * both + max(sigma2, rest)
    assert means > 1.05 * full
    if name == "ddpm large":  # eta 1 adds too little beside the image
        assert max(figures["variance_share"]) < 1
        assert both == pytest.approx(full, rel=1e-3)
    assert variance(Gaussian(), build()) == pytest.approx(full, rel=0.03)
    assert variance(Noisy(), CorrectedScheduler(build(), means_only)) == pytest.approx(means, rel=0.03)
    assert variance(Noisy(), CorrectedScheduler(build(), correction)) == pytest.approx(both, rel=0.03)


@pytest.mark.parametrize(
    ("scheduler", "why"),
    [
        (DDIMScheduler(clip_sample=False), "DDIMScheduler adds no noise"),
        (EulerDiscreteScheduler(), "EulerDiscreteScheduler adds no noise"),
        (EulerAncestralDiscreteScheduler(), "only the noise of DDPM and DDIM"),
    ],
)
def test_where_there_is_no_variance_to_correct_the_figures_say_why(scheduler: Any, why: str) -> None:
    trajectory = recorded(scheduler)
    assert any(adds_noise(step) for step in trajectory.steps) == ("Ancestral" in type(scheduler).__name__)
    quantized = Noisy()
    correction, figures = fitted(trajectory, quantized)
    assert why in figures["variance"]
    assert figures["variance_share"] == [0.0] * STEPS
    assert not correction.scales_noise
    assert correction.gain.max() < 0.9


def test_the_variance_part_can_be_left_out() -> None:
    correction, figures = fitted(recorded(DDPMScheduler()), Noisy(), variance=False)
    assert not correction.scales_noise
    assert figures["variance"] == "not corrected: variance=False"


def test_a_replay_with_the_correction_is_what_the_pipeline_samples() -> None:
    trajectory = recorded(DDPMScheduler(clip_sample=True))
    quantized = with_noise(trajectory)
    correction, _ = fitted(trajectory, quantized)
    pipe = DenoiserPipeline(quantized, CorrectedScheduler(DDPMScheduler(clip_sample=True), correction), (3, 6, 6))
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    sampled = pipe(batch_size=4, generator=generators, num_inference_steps=STEPS, output_type="latent").images
    *_, last = replay(quantized, trajectory, 0, STEPS, correct=Corrector(correction))
    assert torch.equal(last.sample, sampled)


def test_predictions_that_are_not_finite_are_refused() -> None:
    trajectory = recorded(DDPMScheduler())
    broken = Remembered({int(step.timestep): step.guided * float("nan") for step in trajectory.steps})
    with pytest.raises(CalibrationError, match="at timestep 800 is not finite"):
        fitted(trajectory, broken)


def test_settings_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(SpecError, match="belongs to regress_on"):
        CorrectNoise(regress_on="quantized", bias_of="error")
    recipe = {"name": "x", "stages": [{"stage": "CorrectNoise", "slopes": "layer"}]}
    with pytest.raises(SpecError, match=r"stages\[0\]\.slopes"):
        recipe_from_dict(recipe, {"CorrectNoise": CorrectNoise})


def test_a_recipe_has_one_correction() -> None:
    from stepquant.methods.baseline import rtn

    with pytest.raises(SpecError, match="a stage before it has fitted one already"):
        Recipe("twice", (*rtn().stages, CorrectNoise(), CorrectNoise(regress_on="quantized")))


def test_positions_that_the_pipeline_writes_over_teach_nothing() -> None:
    trajectory = recorded(DDPMScheduler(clip_sample=False))
    painted = torch.zeros(len(SEEDS), 1, *trajectory.steps[0].sample.shape[2:], dtype=torch.bool)
    painted[..., :3] = True
    factor = torch.where(painted, 1.25, 0.3)
    quantized = Remembered({int(step.timestep): factor * step.guided.double() for step in trajectory.steps})
    found, _ = fitted(replace(trajectory, painted=painted), quantized)
    assert found.gain.flatten().tolist() == pytest.approx([0.8] * 3 * STEPS, rel=1e-6)
