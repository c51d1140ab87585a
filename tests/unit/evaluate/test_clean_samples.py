"""Clean samples against those that diffusers' own schedulers compute."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from stepquant.calibrate.trajectory import Trajectory, record, replay, seal
from stepquant.errors import SpecError
from stepquant.evaluate.clean_samples import clean_sample, clean_samples
from stepquant.model.correction import Corrector, StepCorrection
from stepquant.model.pipeline import DenoiserPipeline
from stepquant.run import Run
from tiny import TinyNet


def recorded(scheduler: Any, denoiser: TinyNet) -> Trajectory:
    pipe = DenoiserPipeline(denoiser, scheduler, (2, 4, 4))
    (found,) = record(pipe, denoiser, seeds=[0, 1], steps=4, batch_size=2, run=Run())
    return seal(found)


@pytest.mark.parametrize(
    "scheduler",
    [
        *(DDIMScheduler(clip_sample=False, prediction_type=kind) for kind in ("epsilon", "sample", "v_prediction")),
        *(EulerDiscreteScheduler(prediction_type=kind) for kind in ("epsilon", "v_prediction")),
    ],
    ids=lambda scheduler: f"{type(scheduler).__name__}-{scheduler.config.prediction_type}",
)
def test_it_is_what_the_scheduler_takes_the_image_to_be(scheduler: Any) -> None:
    trajectory = recorded(scheduler, TinyNet())
    for step in trajectory.steps:
        own = copy.deepcopy(step.scheduler).step(step.guided, step.timestep, step.sample).pred_original_sample
        found = clean_sample(step, step.sample, step.guided)
        torch.testing.assert_close(found.float(), own, rtol=2e-3, atol=2e-3 * float(own.abs().max()))


def test_flow_matching_goes_back_along_the_velocity() -> None:
    trajectory = recorded(FlowMatchEulerDiscreteScheduler(), TinyNet())
    for step in trajectory.steps:
        sigma = step.scheduler.sigmas[step.index]
        torch.testing.assert_close(
            clean_sample(step, step.sample, step.guided).float(), step.sample - sigma * step.guided
        )


def test_the_candidate_runs_freely_and_its_correction_counts() -> None:
    denoiser = TinyNet()
    # With set_alpha_to_one, the last step of DDIM returns the clean sample itself.
    trajectory = recorded(DDIMScheduler(clip_sample=False, set_alpha_to_one=True), denoiser)
    candidate = copy.deepcopy(denoiser)
    with torch.no_grad():
        candidate.out.weight *= 1.2
    timesteps = torch.tensor([float(step.timestep) for step in trajectory.steps])
    table = StepCorrection.identity(timesteps, 1)
    halved = StepCorrection(timesteps, table.gain / 2, table.carry, table.offset, table.variance)
    for net, correction in ((denoiser, None), (candidate, None), (candidate, halved)):
        found = clean_samples(net, trajectory, correction)
        assert found.shape == (4, 2, 2, 4, 4)
        correct = None if correction is None else Corrector(correction)
        with torch.no_grad():
            *_, last = replay(net, trajectory, 0, 4, correct=correct)
        torch.testing.assert_close(found[-1], last.sample, rtol=1e-4, atol=1e-4)
    first = trajectory.steps[0]
    torch.testing.assert_close(
        clean_samples(denoiser, trajectory)[0], clean_sample(first, first.sample, first.guided).float()
    )


def test_a_learnt_variance_is_passed_over_and_an_unknown_prediction_is_refused() -> None:
    trajectory = recorded(DDIMScheduler(clip_sample=False), TinyNet())
    step = trajectory.steps[1]
    both = torch.cat([step.guided, torch.full_like(step.guided, 7.0)], dim=1)
    assert torch.equal(clean_sample(step, step.sample, both), clean_sample(step, step.sample, step.guided))
    step.scheduler.register_to_config(prediction_type="something")
    with pytest.raises(SpecError, match="something"):
        clean_sample(step, step.sample, step.guided)
