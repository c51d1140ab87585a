"""Noisy samples and their targets, against what diffusers' own schedulers make of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor, nn

from stepquant.calibrate.noising import check_drawn_noise_target, noise_predicted, noise_scales, noise_target, noisy
from stepquant.calibrate.steps import Step
from stepquant.calibrate.trajectory import record, seal
from stepquant.errors import SpecError
from stepquant.model.pipeline import DenoiserPipeline
from stepquant.run import Run

STEPS = 6

SCHEDULERS: dict[str, Callable[[], Any]] = {
    "ddim epsilon": lambda: DDIMScheduler(clip_sample=False),
    "ddim v": lambda: DDIMScheduler(clip_sample=False, prediction_type="v_prediction"),
    "ddim sample": lambda: DDIMScheduler(clip_sample=False, prediction_type="sample"),
    "ddpm": lambda: DDPMScheduler(clip_sample=False),
    "euler epsilon": lambda: EulerDiscreteScheduler(),
    "euler v": lambda: EulerDiscreteScheduler(prediction_type="v_prediction"),
    "flow": lambda: FlowMatchEulerDiscreteScheduler(shift=2.0),
    "unipc flow": lambda: UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
}


def recorded(scheduler: Any) -> tuple[Step, ...]:
    net = nn.Conv2d(2, 2, 1)
    net.forward = lambda sample, timestep: 0.1 * sample  # type: ignore[method-assign]
    pipe = DenoiserPipeline(net, scheduler, (2, 4, 4))
    (trajectory,) = record(pipe, net, seeds=[0, 1], steps=STEPS, batch_size=2, run=Run())
    return seal(trajectory).steps


def clean_estimate(step: Step, target: Tensor, sample: Tensor) -> Tensor:
    """x_0 as the scheduler understands the prediction."""
    scheduler = step.scheduler
    if hasattr(scheduler, "convert_model_output"):
        if scheduler.step_index is None:
            scheduler._init_step_index(step.timestep)
        converted: Tensor = scheduler.convert_model_output(target, sample=sample)
        return converted
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        sigma = scheduler.sigmas[step.index]
        return sample - sigma * target  # a straight step to sigma = 0
    if isinstance(scheduler, EulerDiscreteScheduler):
        scheduler.is_scale_input_called = True
    found: Tensor = scheduler.step(target, step.timestep, sample).pred_original_sample
    return found


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_scheduler_finds_the_image_in_the_target(name: str) -> None:
    image, noise = torch.rand(2, 2, 4, 4), torch.randn(2, 2, 4, 4)
    levels = []
    for step in recorded(SCHEDULERS[name]()):
        before = dict(vars(step.scheduler))
        scales = noise_scales(step)
        levels.append(scales[1] / scales[0] if scales[0] else float("inf"))
        assert all(vars(step.scheduler)[key] is value for key, value in before.items())
        target = noise_target(step.scheduler, image, noise, scales)
        found = clean_estimate(step, target, noisy(image, noise, scales))
        torch.testing.assert_close(found, image, rtol=1e-3, atol=2e-3)
    assert levels == sorted(levels, reverse=True)  # noise first


def test_scales_are_those_of_the_noise_schedule() -> None:
    for step in recorded(DDIMScheduler(clip_sample=False)):
        alpha_bar = step.scheduler.alphas_cumprod[int(step.timestep)]
        assert noise_scales(step) == pytest.approx((float(alpha_bar.sqrt()), float((1 - alpha_bar).sqrt())), abs=1e-6)


class NoNoise:
    def __init__(self, **config: Any) -> None:
        self.config = config


def test_unknown_predictions_are_refused() -> None:
    with pytest.raises(SpecError, match=r"EDMEulerScheduler .*full_precision"):
        check_drawn_noise_target(EDMEulerScheduler())
    with pytest.raises(SpecError, match="prediction type 'score'"):
        noise_target(NoNoise(prediction_type="score"), torch.zeros(1), torch.zeros(1), (1.0, 0.0))
    with pytest.raises(SpecError, match="prediction type None"):
        check_drawn_noise_target(NoNoise())
    for make in SCHEDULERS.values():
        check_drawn_noise_target(make())


def test_a_scheduler_that_adds_no_noise_is_refused() -> None:
    (step, *_) = recorded(DDIMScheduler(clip_sample=False))
    with pytest.raises(SpecError, match="NoNoise has neither add_noise nor scale_noise"):
        noise_scales(
            Step(0, step.sample, step.timestep, step.calls, step.guided, step.next_sample, NoNoise(), {}, None)
        )


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_prediction_means_the_noise_that_it_was_made_for(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for step in recorded(SCHEDULERS[name]()):
        x_0, noise = (torch.randn(step.sample.shape, generator=generator, dtype=torch.float64) for _ in range(2))
        scales = noise_scales(step)
        prediction = noise_target(step.scheduler, x_0, noise, scales)
        there = replace(step, sample=noisy(x_0, noise, scales))
        torch.testing.assert_close(noise_predicted(there, prediction), noise, rtol=1e-5, atol=1e-5)
