"""Corrections in closed form: errors that can be removed exactly, regressions by hand, selection on held-out images."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor, nn

import tiny
import tiny_pipelines
from stepquant.calibrate.compensation import Compensate, candidates
from stepquant.calibrate.correction_fit import RIDGE, Estimator, Fitted, Moments, fit, held_out_images
from stepquant.calibrate.forms import DoubledLatentsGuidance
from stepquant.calibrate.step_rows import StepRows
from stepquant.calibrate.trajectory import (
    Trajectory,
    record,
    replay,
    seal,
    state_at,
    steps_where_nothing_happens,
)
from stepquant.errors import CalibrationError, SpecError, UnsupportedPipeline
from stepquant.model.correction import CorrectedScheduler, Corrector, StepCorrection
from stepquant.model.pipeline import DenoiserPipeline
from stepquant.numerics.spec import scheme_for
from stepquant.recipe import Job, recipe_from_dict
from stepquant.run import Run

STEPS = 5
SEEDS = (3, 1, 4, 7, 5)
"""The fourth image is held out of the fit."""

SCHEDULERS: dict[str, Callable[[], Any]] = {
    "ddim": lambda: DDIMScheduler(clip_sample=False),
    "ddim clipped": lambda: DDIMScheduler(clip_sample=True),
    "ddpm": lambda: DDPMScheduler(clip_sample=False),
    "v-prediction": lambda: DDIMScheduler(clip_sample=False, prediction_type="v_prediction"),
    "euler": EulerDiscreteScheduler,
    "flow euler": FlowMatchEulerDiscreteScheduler,
    "dpm++ 2m": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
    "pndm": PNDMScheduler,
    "pndm plms": lambda: PNDMScheduler(skip_prk_steps=True),
    "heun": HeunDiscreteScheduler,
}


class Denoiser(nn.Module):
    """A small network that is not linear, for samples [B, 2, 4, 4]."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.inner = nn.Parameter(torch.randn(4, 2, generator=generator, dtype=torch.float64))
        self.outer = nn.Parameter(0.5 * torch.randn(2, 4, generator=generator, dtype=torch.float64))

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        hidden = torch.tanh(torch.einsum("dc,bchw->bdhw", self.inner, sample.double()))
        return torch.einsum("cd,bdhw->bchw", self.outer, hidden) + 0.3 * sample


SCALE = torch.tensor([1.1, 0.9], dtype=torch.float64)[:, None, None]
SHIFT = torch.tensor([0.05, -0.1], dtype=torch.float64)[:, None, None]


class Erring(Denoiser):
    """The same network with an error that is known: `error(eps, sample, before)` is added.

    before: what it returned at the timestep before, zeros at the first.
    """

    def __init__(self, error: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.error = error
        self.timestep = -1.0
        self.latest = self.before = torch.zeros(())

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        exact = super().forward(sample, timestep)
        if float(timestep) > self.timestep:
            self.latest = self.before = torch.zeros_like(exact)
        elif float(timestep) < self.timestep:
            self.before = self.latest
        self.timestep = float(timestep)
        self.latest = exact + self.error(exact, sample, self.before)
        return self.latest


def affine() -> Erring:
    return Erring(lambda eps, _sample, _before: (SCALE - 1) * eps + SHIFT)


def rough() -> Erring:
    """An error that no regressor foretells exactly."""
    return Erring(lambda eps, sample, _before: 0.2 * torch.sin(3 * eps) + 0.1 * sample.square() * SCALE)


def pipe_of(denoiser: nn.Module, scheduler: Any) -> DenoiserPipeline:
    return DenoiserPipeline(denoiser, scheduler, (2, 4, 4))


def recorded(scheduler: Any, *, batch: int = len(SEEDS), seeds: tuple[int, ...] = SEEDS) -> list[Trajectory]:
    full = Denoiser()
    found = record(pipe_of(full, scheduler), full, seeds=seeds, steps=STEPS, batch_size=batch, run=Run())
    return [seal(trajectory) for trajectory in found]


def fitted(quantized: nn.Module, trajectories: list[Trajectory], estimator: Estimator, **options: Any) -> Fitted:
    return fit(quantized, trajectories, estimator, full_precision=Denoiser(), **options)


def regression(*regressors: Any, ridge: float = 0.0) -> Estimator:
    return Estimator("regression", regressors, ridge)


def sampled(pipe: DenoiserPipeline) -> Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    output = pipe(batch_size=len(SEEDS), generator=generators, num_inference_steps=STEPS, output_type="latent")
    images: Tensor = output.images
    return images


def rows_that_move(trajectory: Trajectory) -> list[int]:
    """Rows of the correction but for steps that do nothing (PNDM's last one by default)."""
    idle = steps_where_nothing_happens(trajectory)
    distinct = list(dict.fromkeys(float(step.timestep) for step in trajectory.steps))
    return sorted({distinct.index(float(step.timestep)) for step in trajectory.steps if step.index not in idle})


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "ddim clipped"])
def test_an_error_that_is_affine_in_the_prediction_is_removed_exactly(name: str) -> None:
    # eps_q = s eps + t, so eps = eps_q / s - t / s, whatever the solver and however often it asks at a timestep.
    scheduler = SCHEDULERS[name]()
    trajectories = recorded(scheduler)
    found = fitted(affine(), trajectories, regression("prediction", "one"))
    visited = {float(step.timestep) for step in trajectories[0].steps}
    assert sorted(found.correction.timesteps.tolist(), reverse=True) == sorted(visited, reverse=True)
    rows = rows_that_move(trajectories[0])
    assert len(rows) >= STEPS - 1
    for row in rows:
        assert found.correction.gain[row].tolist() == pytest.approx((1 / SCALE).flatten().tolist(), rel=1e-4)
        assert found.correction.offset[row].tolist() == pytest.approx((-SHIFT / SCALE).flatten().tolist(), rel=1e-3)
    assert found.correction.previous is None
    uncorrected = fitted(affine(), trajectories, Estimator("bias", ridge=1e12)).held_out_rms
    assert uncorrected > 0.01
    assert found.held_out_rms < 1e-4 * uncorrected
    # The pipeline with the stand-in samples what the full-precision one samples, run after run.
    corrected = pipe_of(affine(), CorrectedScheduler(copy.deepcopy(scheduler), found.correction))
    wanted = sampled(pipe_of(Denoiser(), copy.deepcopy(scheduler)))
    torch.testing.assert_close(sampled(corrected), wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(sampled(corrected), sampled(corrected))


@pytest.mark.parametrize("name", ["ddim", "dpm++ 2m", "pndm", "heun"])
def test_an_error_that_follows_the_prediction_before_is_removed_exactly(name: str) -> None:
    scheduler = SCHEDULERS[name]()
    quantized, trajectories = Erring(lambda _eps, _sample, before: 0.2 * before), recorded(scheduler)
    found = fitted(quantized, trajectories, regression("previous"))
    assert found.correction.previous is not None
    assert found.correction.previous[0].tolist() == [0.0, 0.0]
    for row in rows_that_move(trajectories[0])[1:]:
        assert found.correction.previous[row].tolist() == pytest.approx([-0.2, -0.2], rel=1e-3)
    corrected = pipe_of(quantized, CorrectedScheduler(copy.deepcopy(scheduler), found.correction))
    wanted = sampled(pipe_of(Denoiser(), copy.deepcopy(scheduler)))
    torch.testing.assert_close(sampled(corrected), wanted, rtol=1e-4, atol=1e-4)


def test_an_error_that_follows_the_sample_is_removed_exactly() -> None:
    quantized = Erring(lambda _eps, sample, _before: 0.1 * sample)
    found = fitted(quantized, recorded(DDIMScheduler(clip_sample=False)), regression("prediction", "sample"))
    assert found.correction.carry.flatten().tolist() == pytest.approx([-0.1] * 2 * STEPS, rel=1e-3)
    assert found.correction.gain.flatten().tolist() == pytest.approx([1.0] * 2 * STEPS, rel=1e-4)


def test_a_linear_denoiser_of_gaussian_data_with_a_known_error() -> None:
    # eps = A x + c, eps_q = A' x + c' with diagonal A, A': the error is (1 - A/A') eps_q + ..., affine in eps_q.
    class Linear(nn.Module):
        def __init__(self, slope: list[float], constant: list[float]) -> None:
            super().__init__()
            self.slope = nn.Parameter(torch.tensor(slope, dtype=torch.float64)[:, None, None])
            self.constant = nn.Parameter(torch.tensor(constant, dtype=torch.float64)[:, None, None])

        def forward(self, sample: Tensor, timestep: Any) -> Tensor:
            return self.slope * sample + self.constant

    exact, other = Linear([0.7, 0.5], [0.1, 0.0]), Linear([0.6, 0.55], [0.15, -0.1])
    (run,) = record(
        pipe_of(exact, DDIMScheduler(clip_sample=False)), exact, seeds=SEEDS, steps=STEPS, batch_size=5, run=Run()
    )
    trajectories = [seal(run)]
    found = fit(other, trajectories, regression("prediction", "one"), full_precision=exact)
    ratio = [0.7 / 0.6, 0.5 / 0.55]
    for row in range(STEPS):
        assert found.correction.gain[row].tolist() == pytest.approx(ratio, rel=1e-4)
        assert found.correction.offset[row].tolist() == pytest.approx([0.1 - 0.15 * ratio[0], 0.1 * ratio[1]], rel=1e-3)
    # The bias alone: mean of the difference at the full-precision samples that are not held out.
    bias = fit(other, trajectories, Estimator("bias", ridge=0.0), full_precision=exact)
    with torch.no_grad():
        for row, step in enumerate(trajectories[0].steps):
            rows = step.sample[[0, 1, 2, 4]].double()
            mean = (other(rows, 0) - exact(rows, 0)).mean(dim=(0, 2, 3))
            assert bias.correction.offset[row].tolist() == pytest.approx((-mean).tolist(), rel=1e-5)


# Estimators by hand. All but the fourth image are fitted.

FIT = [0, 1, 2, 4]


def by_hand(error: Tensor, regressors: list[Tensor], weight: float = 1.0, ridge: float = 0.0) -> Tensor:
    """argmin |b (y - sum w phi)|^2 + ridge sum w^2 |b phi|^2 per channel `[C, p]`, with rows for the ridge."""
    found = []
    for channel in range(error.shape[1]):
        columns = [weight * regressor[FIT, channel].flatten().double() for regressor in regressors]
        target = weight * error[FIT, channel].flatten().double()
        penalty = torch.diag(torch.stack([ridge**0.5 * column.norm() for column in columns]))
        design = torch.cat([torch.stack(columns, dim=1), penalty])
        padded = torch.cat([target, torch.zeros(len(columns), dtype=torch.float64)])
        found.append(torch.linalg.lstsq(design, padded[:, None]).solution[:, 0])
    return torch.stack(found)


def ddim_weights(trajectory: Trajectory) -> list[tuple[float, float]]:
    alpha_bar = DDIMScheduler().alphas_cumprod.double()
    found = []
    for step in trajectory.steps:
        timestep = int(step.timestep)
        now, after = alpha_bar[timestep], timestep - 1000 // STEPS
        then = alpha_bar[after] if after >= 0 else torch.tensor(1.0, dtype=torch.float64)
        a = (then / now).sqrt()
        found.append((float(a), float((1 - then).sqrt() - a * (1 - now).sqrt())))
    return found


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_teacher_forced_gains_by_hand(ridge: float) -> None:
    trajectories = recorded(DDIMScheduler(clip_sample=False))
    (trajectory,) = trajectories
    gains = []
    with torch.no_grad():
        for step in trajectory.steps:
            quantized, exact = rough()(step.sample, step.timestep), Denoiser()(step.sample, step.timestep)
            products = (
                quantized.square()[FIT].sum(dim=(0, 2, 3)),
                ((quantized - exact) * quantized)[FIT].sum(dim=(0, 2, 3)),
            )
            gains.append(products[1] / (products[0] * (1 + ridge)))
    plain = fitted(rough(), trajectories, Estimator("scale", ridge=ridge))
    torch.testing.assert_close(1 - plain.correction.gain.double(), torch.stack(gains), rtol=1e-4, atol=1e-6)
    assert plain.correction.previous is None
    # gamma = 1: x_{k+1} = a x^ + b eps_q - [ b K eps_q + a b' K' eps_q' ]
    both = fitted(rough(), trajectories, Estimator("scale", ridge=ridge, gamma=1))
    assert torch.equal(both.correction.gain, plain.correction.gain)
    assert both.correction.previous is not None
    weights = ddim_weights(trajectory)
    for row in range(1, STEPS):
        expected = -weights[row][0] * weights[row - 1][1] / weights[row][1] * gains[row - 1]
        assert both.correction.previous[row].tolist() == pytest.approx(expected.tolist(), rel=1e-3)
    assert both.correction.previous[0].tolist() == [0.0, 0.0]


def test_gamma_removes_the_term_of_the_step_before() -> None:
    trajectories = recorded(DDIMScheduler(clip_sample=False))
    (trajectory,) = trajectories
    correction = fitted(rough(), trajectories, Estimator("scale", ridge=0.0, gamma=1)).correction
    quantized, weights = rough(), ddim_weights(trajectory)
    with torch.no_grad():
        states = [state_at(trajectory, 0), *replay(rough(), trajectory, 0, 2, correct=Corrector(correction))]
        raw = [quantized(states[k].sample, trajectory.steps[k].timestep) for k in (0, 1)]
    gains = [(1 - correction.gain[k].double())[:, None, None] for k in (0, 1)]
    (_, before), (a, b) = weights[0], weights[1]
    expected = a * states[1].sample + b * raw[1] - (b * gains[1] * raw[1] + a * before * gains[0] * raw[0])
    torch.testing.assert_close(states[2].sample.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_closed_loop_fits_by_hand(ridge: float) -> None:
    trajectories = recorded(DDIMScheduler(clip_sample=False))
    (trajectory,) = trajectories
    weights = ddim_weights(trajectory)

    def at_step_two(correction: StepCorrection) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Sample, prediction, exact prediction, prediction before and r = a x^ + b eps_q - x', corrected so far."""
        quantized = rough()
        with torch.no_grad():
            start = state_at(trajectory, 0)
            states = [start, *replay(quantized, trajectory, 0, 2, correct=Corrector(correction))]
            before = quantized(states[1].sample, trajectory.steps[1].timestep)
            sample = states[2].sample
            found, exact = quantized(sample, trajectory.steps[2].timestep), Denoiser()(sample, 0)
        a, b = weights[2]
        return sample, found, exact, before, a * sample + b * found - trajectory.steps[3].sample

    local = fitted(rough(), trajectories, Estimator("closed_loop", ridge=ridge)).correction
    _, found, exact, _, _ = at_step_two(local)
    expected = by_hand(found - exact, [found], ridge=ridge)[:, 0]
    assert (1 - local.gain[2]).tolist() == pytest.approx(expected.tolist(), rel=1e-3)

    free = fitted(rough(), trajectories, Estimator("free_run", ridge=ridge)).correction
    _, found, exact, _, _ = at_step_two(StepCorrection.identity(free.timesteps, 2))
    expected = by_hand(found - exact, [found], ridge=ridge)[:, 0]
    assert (1 - free.gain[2]).tolist() == pytest.approx(expected.tolist(), rel=1e-3)

    target = fitted(rough(), trajectories, Estimator("trajectory", ridge=ridge)).correction
    _, found, _, _, rest = at_step_two(target)
    b = weights[2][1]
    expected = (rest * b * found)[FIT].sum(dim=(0, 2, 3)) / ((b * found)[FIT].square().sum(dim=(0, 2, 3)) * (1 + ridge))
    assert (1 - target.gain[2]).tolist() == pytest.approx(expected.tolist(), rel=1e-3)

    every = regression("prediction", "sample", "one", "previous", ridge=ridge)
    several = fitted(rough(), trajectories, every).correction
    sample, found, _, before, rest = at_step_two(several)
    solved = by_hand(rest / b, [found, sample, torch.ones_like(found), before], weight=b, ridge=ridge)
    assert several.previous is not None
    tables = (1 - several.gain[2], -several.carry[2], -several.offset[2], -several.previous[2])
    for number, table in enumerate(tables):
        assert table.tolist() == pytest.approx(solved[:, number].tolist(), rel=1e-2, abs=1e-4)


def test_clipped_steps_are_fitted_where_they_still_move() -> None:
    # b is the step's own derivative, which differs from value to value where the scheduler clips.
    trajectories = recorded(DDIMScheduler(clip_sample=True, clip_sample_range=0.7))
    (trajectory,) = trajectories
    step = trajectory.steps[0]
    with torch.no_grad():
        found = rough()(step.sample, step.timestep)
    given = found.clone().requires_grad_()
    scheduler = copy.deepcopy(step.scheduler)
    after = scheduler.step(given, step.timestep, step.sample).prev_sample
    (slope,) = torch.autograd.grad(after.sum(), given)
    assert float(slope.max() - slope.min()) > 1e-2, "some values are clipped and some are not"
    design, rest = slope * found, after.detach() - step.next_sample
    expected = (design * rest)[FIT].sum(dim=(0, 2, 3)) / design[FIT].square().sum(dim=(0, 2, 3))
    correction = fitted(rough(), trajectories, Estimator("trajectory", ridge=0.0)).correction
    assert (1 - correction.gain[0]).tolist() == pytest.approx(expected.tolist(), rel=1e-3)


def test_shared_coefficients_are_a_fit_over_all_channels() -> None:
    trajectories = recorded(DDIMScheduler(clip_sample=False))
    step = trajectories[0].steps[0]
    with torch.no_grad():
        found, exact = rough()(step.sample, step.timestep), Denoiser()(step.sample, step.timestep)
    expected = float(((found - exact) * found)[FIT].sum() / found[FIT].square().sum())
    correction = fitted(rough(), trajectories, Estimator("scale", ridge=0.0), shared=True).correction
    assert correction.gain.shape == (STEPS, 1)
    assert float(1 - correction.gain[0]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["ddim", "pndm", "heun", "dpm++ 2m"])
@pytest.mark.parametrize("estimator", [regression("prediction", "sample", "one", "previous"), Estimator("closed_loop")])
def test_the_fit_sees_what_sampling_does(name: str, estimator: Estimator) -> None:
    """The held-out error comes from the run of the fit; a pipeline with the correction makes the same images."""
    scheduler = SCHEDULERS[name]()
    trajectories = recorded(scheduler)
    found = fitted(rough(), trajectories, replace(estimator, ridge=1e-2))
    images = sampled(pipe_of(rough(), CorrectedScheduler(copy.deepcopy(scheduler), found.correction)))
    error = (images - trajectories[0].steps[-1].next_sample)[3].double()
    assert found.held_out_rms == pytest.approx(float(error.square().mean().sqrt()), rel=1e-5)
    *_, last = replay(rough(), trajectories[0], 0, len(trajectories[0].steps), correct=Corrector(found.correction))
    assert torch.equal(last.sample, images)


def test_coefficients_do_not_depend_on_the_batch_size() -> None:
    scheduler = DDIMScheduler(clip_sample=False)
    estimator = regression("prediction", "sample", "one", ridge=1e-2)
    one = fitted(rough(), recorded(scheduler), estimator)
    two = fitted(rough(), recorded(scheduler, batch=2), estimator)
    torch.testing.assert_close(one.correction.gain, two.correction.gain, rtol=1e-3, atol=1e-4)
    assert one.held_out_rms == pytest.approx(two.held_out_rms, rel=1e-3)


def test_held_out_images_are_in_no_fit() -> None:
    trajectories = recorded(DDIMScheduler(clip_sample=False))
    (trajectory,) = trajectories

    def spoilt(row: int) -> list[Trajectory]:
        """Another full-precision answer for one image."""
        steps = []
        for step in trajectory.steps:
            guided, after = step.guided.clone(), step.next_sample.clone()
            guided[row] += 1.0
            after[row] += 1.0
            steps.append(replace(step, guided=guided, next_sample=after))
        return [replace(trajectory, steps=tuple(steps))]

    for estimator in (Estimator("scale"), Estimator("bias"), regression("prediction", "one", ridge=1e-2)):
        before = fitted(rough(), trajectories, estimator)
        held = fitted(rough(), spoilt(3), estimator)
        for name, table in before.correction.tables().items():
            assert torch.equal(held.correction.tables()[name], table)
        assert abs(held.held_out_rms - before.held_out_rms) > 0.05
        other = fitted(rough(), spoilt(2), estimator)
        assert not torch.equal(
            other.correction.gain + other.correction.offset, before.correction.gain + before.correction.offset
        )


def test_which_images_are_held_out() -> None:
    def masks(every: int, *batches: int, doubled: bool = False) -> list[list[bool]]:
        (trajectory,) = recorded(DDIMScheduler(), seeds=(1,), batch=1)
        assert trajectory.form is not None
        form = replace(trajectory.form, doubled=doubled, guidance=DoubledLatentsGuidance(0, 1, 2.0, 2, keep_rest=False))
        step = trajectory.steps[0]
        parts = [
            replace(trajectory, form=form, steps=(replace(step, sample=step.sample.expand(batch, -1, -1, -1)),))
            for batch in batches
        ]
        return [mask.tolist() for mask in held_out_images(parts, every)]

    assert masks(4, 3, 3, 2) == [[False] * 3, [True, False, False], [False, True]]
    assert masks(4, 2) == [[False, True]], "the last of a few"
    assert masks(2, 4, doubled=True) == [[False, True, False, True]], "both halves of an image"
    with pytest.raises(CalibrationError, match="1 was recorded"):
        masks(4, 1)


# Shrinking and choosing


def test_the_share_to_keep_is_the_best_one() -> None:
    torch.manual_seed(5)
    for _ in range(20):
        design, target = torch.randn(2, 4, 30).double(), torch.randn(2, 30).double()
        moments = Moments(design @ design.mT, (design @ target[:, :, None])[:, :, 0])
        weights = 0.3 * torch.randn(2, 4).double()

        def error(share: float) -> float:
            return float((target - share * torch.einsum("cp,cpn->cn", weights, design)).square().sum())  # noqa: B023

        share = moments.share_to_keep(weights)
        if error(1.0) <= error(0.0):
            assert share == 1.0
        else:
            grid = [number / 200 for number in range(201)]
            assert share == pytest.approx(min(grid, key=error), abs=5e-3)
            assert share <= 0.5


class Noisy(Denoiser):
    """A denoiser whose error differs from image to image and follows nothing: its sign is that of the image's mean."""

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        signs = torch.tensor([1.0, 1.0, 1.0, -1.0, 1.0], dtype=torch.float64)[: len(sample)]
        return super().forward(sample, timestep) + 0.1 * signs[:, None, None, None]


def job_for(quantized: nn.Module, scheduler: Any, keeper: Any = None) -> Job:
    full = Denoiser()
    job = Job(pipe_of(full, scheduler), full, quantized, Run(), STEPS, keeper=keeper)
    job.handed["trajectories"] = recorded(scheduler)
    return job


def test_what_does_not_carry_over_is_shrunk_away() -> None:
    trajectories = recorded(DDIMScheduler(clip_sample=False))
    plain = fitted(Noisy(), trajectories, Estimator("bias"))
    assert plain.correction.offset.max() < -0.05
    shrunk = fitted(Noisy(), trajectories, Estimator("bias"), shrink=True)
    assert shrunk.kept == (0.0,) * STEPS
    identity = StepCorrection.identity(shrunk.correction.timesteps, 2)
    assert torch.equal(shrunk.correction.offset, identity.offset)
    assert shrunk.held_out_rms < plain.held_out_rms


def test_auto_takes_the_best_on_held_out_images() -> None:
    job = job_for(affine(), DDIMScheduler(clip_sample=False))
    figures = Compensate().run(job)
    tried = candidates(one_step_solver=True)
    assert [row["candidate"] for row in figures["candidates"]] == ["none", *(one.label for one in tried)]
    relative = {row["candidate"]: row["relative"] for row in figures["candidates"]}
    assert relative["none"] == 1.0
    assert figures["chosen"] == min(relative, key=relative.__getitem__)
    assert "prediction" in figures["chosen"]
    assert relative[figures["chosen"]] < 0.02
    assert isinstance(job.handed["correction"], StepCorrection)
    # One run without, one at the recorded samples for both scales and the bias, one for each candidate.
    assert figures["evaluations"] == (2 + len(tried)) * STEPS * len(SEEDS)


def test_auto_leaves_a_perfect_model_alone() -> None:
    job = job_for(Denoiser(), DDIMScheduler(clip_sample=False))
    figures = Compensate().run(job)
    assert figures["chosen"] == "none"
    assert job.handed["correction"] is None
    assert all(row["relative"] is None for row in figures["candidates"])


def test_auto_does_without_gamma_where_the_solver_remembers() -> None:
    figures = Compensate().run(job_for(rough(), DPMSolverMultistepScheduler()))
    assert not any("gamma" in row["candidate"] for row in figures["candidates"])
    with pytest.raises(CalibrationError, match="one-step solver"):
        Compensate("scale", gamma=1).run(job_for(rough(), DPMSolverMultistepScheduler()))


def test_a_named_estimator_is_taken_as_it_is() -> None:
    # The bias makes the held-out image worse, and is taken all the same.
    job = job_for(Noisy(), DDIMScheduler(clip_sample=False))
    figures = Compensate("bias", ridge=0.0).run(job)
    assert figures["candidates"][1]["relative"] > 1
    assert figures["kept"] == [1.0] * STEPS
    expected = fitted(Noisy(), job.handed["trajectories"], Estimator("bias", ridge=0.0)).correction
    assert torch.equal(job.handed["correction"].offset, expected.offset)
    assert figures["evaluations"] == 3 * STEPS * len(SEEDS)


@pytest.mark.parametrize(
    ("estimator", "passes"), [("closed_loop", 3), ("free_run", 4), ("trajectory", 2), ("regression", 2), ("scale", 3)]
)
def test_evaluations_are_those_that_were_made(estimator: Any, passes: int) -> None:
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    quantized, job = rough(), job_for(rough(), DDIMScheduler(clip_sample=False))
    for module in (quantized, job.full_precision):
        module.register_forward_hook(count)
    job.denoiser = quantized
    figures = Compensate(estimator).run(job)
    assert figures["evaluations"] == calls * len(SEEDS) == passes * STEPS * len(SEEDS)


class Shelf:
    """A keeper in memory that stops the run after so many savings."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.kept: dict[str, Any] = {}
        self.left = stop_after

    def save(self, name: str, tensors: Any, meta: Any) -> None:
        self.kept[name] = ({key: value.clone() for key, value in tensors.items()}, copy.deepcopy(dict(meta)))
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

    def load(self, name: str) -> Any:
        return self.kept.get(name)


@pytest.mark.parametrize("stop_after", [1, 2, 4])
def test_a_killed_search_goes_on_where_it_was(stop_after: int) -> None:
    scheduler = DDIMScheduler(clip_sample=False)
    whole = job_for(rough(), scheduler)
    expected = Compensate().run(whole)
    shelf = Shelf(stop_after)
    with pytest.raises(KeyboardInterrupt):
        Compensate().run(job_for(rough(), scheduler, shelf))
    shelf.left = None
    again = job_for(rough(), scheduler, shelf)
    calls: list[int] = []
    again.denoiser.register_forward_hook(lambda *_: calls.append(1))
    assert Compensate().run(again) == expected
    assert len(calls) * len(SEEDS) < expected["evaluations"]
    for name, table in whole.handed["correction"].tables().items():
        assert torch.equal(again.handed["correction"].tables()[name], table)


def test_a_candidate_that_diverges_loses() -> None:
    class Exploding(Denoiser):
        def forward(self, sample: Tensor, timestep: Any) -> Tensor:
            return super().forward(sample, timestep) / 0.0

    job = job_for(Exploding(), DDIMScheduler(clip_sample=False))
    figures = Compensate().run(job)
    assert figures["chosen"] == "none"
    assert [row["held_out_rms"] for row in figures["candidates"]] == [None] * len(figures["candidates"])
    with pytest.raises(CalibrationError, match="not finite"):
        Compensate("scale").run(job)


def test_steps_that_do_nothing_teach_nothing() -> None:
    # A schedule with a timestep twice: the first of the two leaves the sample as it is.
    class Twice(DDIMScheduler):
        def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
            super().set_timesteps(*args, **kwargs)
            self.timesteps = torch.cat([self.timesteps[:2], self.timesteps[1:]])
            self.seen = 0

        def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **kwargs: Any) -> Any:
            self.seen += 1
            if self.seen == 2:
                return type("Output", (), {"prev_sample": sample + 0 * model_output})()
            return super().step(model_output, timestep, sample, **kwargs)

    trajectories = recorded(Twice(clip_sample=False))
    assert len(trajectories[0].steps) == STEPS + 1
    found = fitted(affine(), trajectories, regression("prediction", "one"))
    assert found.correction.gain.shape == (STEPS, 2)
    for row in range(STEPS):
        assert found.correction.gain[row].tolist() == pytest.approx((1 / SCALE).flatten().tolist(), rel=1e-4)
    assert bool(torch.isfinite(fitted(affine(), trajectories, Estimator("scale", gamma=1)).correction.gain).all())


# Settings and what is refused


def test_settings_that_make_no_sense_are_refused() -> None:
    for wrong, message in (
        ({"estimator": "regression", "regressors": ()}, "needs regressors"),
        ({"estimator": "regression", "regressors": ("one", "one")}, "different ones"),
        ({"estimator": "scale", "regressors": ("one",)}, "belong to the estimator regression"),
        ({"estimator": "bias", "gamma": 1}, "with the estimator scale"),
        ({"estimator": "scale", "ridge": -1.0}, "0 or more"),
        ({"estimator": "scale", "ridge": float("nan")}, "0 or more"),
        ({"estimator": "guess"}, "must be one of bias, scale"),
        ({"gamma": 1}, "belong to a named estimator"),
        ({"ridge": 0.1}, "belong to a named estimator"),
        ({"held_out": 1}, "2 or more"),
    ):
        with pytest.raises(SpecError, match=message):
            Compensate(**wrong)  # type: ignore[arg-type]


def test_settings_are_plain_data() -> None:
    from stepquant.recipe import Recipe

    @dataclasses.dataclass(frozen=True)
    class Given:
        needs = frozenset[str]()
        gives = frozenset({"trajectories", "model"})

        def run(self, job: Job) -> dict[str, Any]:
            return {}

    for stage in (Compensate(), Compensate("regression", ("one", "previous"), ridge=0.5, shared=True)):
        recipe = Recipe("cec", (Given(), stage))
        assert recipe_from_dict(recipe.to_dict(), {"Given": Given, "Compensate": Compensate}) == recipe
    assert Compensate("regression")._named() == Estimator("regression", ("prediction", "sample", "one"), RIDGE)


def test_trajectories_that_do_not_go_together_are_refused() -> None:
    one, other = recorded(DDIMScheduler())[0], recorded(DDIMScheduler(timestep_spacing="trailing"))[0]
    with pytest.raises(CalibrationError, match="2 schedules"):
        fitted(rough(), [one, other], Estimator("bias"))
    with pytest.raises(CalibrationError, match="0 trajectories"):
        fitted(rough(), [], Estimator("bias"))
    learnt = replace(one.steps[0], guided=torch.cat([one.steps[0].guided] * 2, dim=1))
    with pytest.raises(UnsupportedPipeline, match="learned variance"):
        fitted(rough(), [replace(one, steps=(learnt, *one.steps[1:]))], Estimator("bias"))


@pytest.mark.parametrize(
    "estimator",
    [Estimator("trajectory", ridge=0.0), Estimator("closed_loop", ridge=0.0), Estimator("scale", ridge=0.0)],
    ids=lambda estimator: estimator.name,
)
def test_positions_that_the_pipeline_writes_over_teach_nothing(estimator: Estimator) -> None:
    painted = torch.zeros(len(SEEDS), 1, 4, 4, dtype=torch.bool)
    painted[..., :2] = True

    class Half(Denoiser):
        """1.1 times as much where something is painted, 0.6 times where the pipeline writes what is known."""

        def forward(self, sample: Tensor, timestep: Any) -> Tensor:
            return torch.where(painted, 1.1, 0.6) * super().forward(sample, timestep)

    trajectories = [replace(one, painted=painted) for one in recorded(DDIMScheduler(clip_sample=False))]
    found = fitted(Half(), trajectories, estimator)
    moving = rows_that_move(trajectories[0])
    assert found.correction.gain[moving].flatten().tolist() == pytest.approx([1 / 1.1] * 2 * len(moving), rel=1e-3)
    # Compared where something was painted, of which a half of all positions is no part.
    uncorrected = fitted(Half(), trajectories, Estimator("bias", ridge=1e12)).held_out_rms
    assert found.held_out_rms < 0.01 * uncorrected


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_guided_prediction_is_what_is_corrected(eta: float) -> None:
    """An error in one half of a doubled batch, which is a factor of the guided prediction and of nothing else."""
    scale = 3.0
    pipe = tiny_pipelines.sd15()
    pipe.scheduler = DDIMScheduler(clip_sample=False)
    arguments = {**tiny_pipelines.FAMILIES["sd15"].arguments(), "guidance_scale": scale, "eta": eta}
    quantized = copy.deepcopy(pipe.unet)
    plain = quantized.forward

    def wrong(*args: Any, **kwargs: Any) -> Any:
        (found,) = plain(*args, **{**kwargs, "return_dict": False})
        without, told = found.chunk(2)
        guided = without + scale * (told - without)
        return (torch.cat([without, told + 0.1 * guided]),)

    quantized.forward = wrong
    found = record(pipe, pipe.unet, seeds=range(2), steps=3, batch_size=2, run=Run(), arguments=arguments)
    trajectories = [seal(one) for one in found]
    assert trajectories[0].fingerprint.guidance == "cfg(3)"
    correction = fit(
        quantized, trajectories, Estimator("regression", ("prediction", "one"), 0.0), full_precision=pipe.unet
    ).correction
    gain = 1 / (1 + 0.1 * scale)
    assert correction.gain.flatten().tolist() == pytest.approx([gain] * correction.gain.numel(), rel=1e-3)


class Line(nn.Module):
    """Samples [B, 2, 6] of one spatial axis, out of a one-dimensional convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv1d(2, 4, 3, padding=1), nn.Conv1d(4, 2, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        found: Tensor = self.last(torch.tanh(self.first(sample)))
        return found


@pytest.mark.parametrize("quantized", [False, True])
def test_channels_of_a_one_dimensional_convolution_are_no_tokens(quantized: bool) -> None:
    net = Line()
    pipe = DenoiserPipeline(net, DDIMScheduler(clip_sample=False), (2, 6))
    trajectories = [seal(one) for one in record(pipe, net, seeds=range(2), steps=3, batch_size=2, run=Run())]
    denoiser = tiny.quantize_(copy.deepcopy(net), scheme_for(4, None)) if quantized else net
    with pytest.raises(UnsupportedPipeline, match=r"of shape \[2, 2, 6\], come out of a one-dimensional convolution"):
        StepRows.of(trajectories, denoiser)
    assert StepRows.of(trajectories, denoiser, shared=True).channels == 1
