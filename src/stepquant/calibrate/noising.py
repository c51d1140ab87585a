"""Noisy samples with a known noise, and what a trained network would predict for them.

    x_t = alpha_t x_0 + sigma_t eps

alpha and sigma are asked of the pipeline's own scheduler, through `add_noise` or, for flow matching, `scale_noise`. The
target is eps, or what the scheduler's prediction type makes of it:

    epsilon            eps
    sample             x_0
    v_prediction       (alpha eps - sigma x_0) / sqrt(alpha^2 + sigma^2)           Salimans and Ho 2022
    flow (velocity)    eps - x_0                                                   Lipman et al. 2023, x_0 the image

and the other way round, eps of a prediction for x_t, by solving for it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from stepquant.calibrate.steps import Step, copy_sharing
from stepquant.errors import SpecError

__all__ = [
    "check_drawn_noise_target",
    "check_noise_prediction",
    "noise_predicted",
    "noise_scales",
    "noise_target",
    "noisy",
]

FLOW = "flow_prediction"
"""diffusers' word for a velocity prediction."""


def noise_scales(step: Step) -> tuple[float, float]:
    """(alpha, sigma) at a recorded step. Raises SpecError for a scheduler that adds no noise."""
    scheduler = copy_sharing(step.scheduler, {})
    shape = (1,) * step.sample.ndim
    device = step.sample.device
    one, zero = torch.ones(shape, device=device), torch.zeros(shape, device=device)
    timestep = torch.as_tensor(step.timestep, device=device).reshape(-1)[:1]
    add, scale = getattr(scheduler, "add_noise", None), getattr(scheduler, "scale_noise", None)
    if add is not None:
        alpha, sigma = add(one, zero, timestep), add(zero, one, timestep)
    elif scale is not None:
        alpha, sigma = scale(one, timestep, zero), scale(zero, timestep, one)
    else:
        raise SpecError(
            f"{type(scheduler).__name__} has neither add_noise nor scale_noise, so calibration images cannot be made "
            "noisy. Use another scheduler, or a method without a search of timestep groups."
        )
    return float(alpha), float(sigma)


def noisy(x_0: Tensor, noise: Tensor, scales: tuple[float, float]) -> Tensor:
    """alpha x_0 + sigma eps, in x_0's shape."""
    alpha, sigma = scales
    return alpha * x_0 + sigma * noise


def _prediction_type(scheduler: Any) -> str | None:
    """diffusers' word for what the network predicts; None if it is not known what it makes of a drawn noise."""
    config = dict(scheduler.config)
    if "sigma_data" in config:  # EDM: the network's output is preconditioned
        return None
    if "prediction_type" not in config:
        return FLOW if getattr(scheduler, "scale_noise", None) is not None else None
    found = config["prediction_type"]
    return found if found in ("epsilon", "sample", "v_prediction", FLOW) else None


def _check_known(scheduler: Any, what: str, instead: str) -> None:
    if _prediction_type(scheduler) is None:
        raise SpecError(
            f"{what} is not known for {type(scheduler).__name__} (prediction type "
            f"{dict(scheduler.config).get('prediction_type')!r}); known are epsilon, sample, v_prediction and flow "
            f"matching. {instead}"
        )


def check_drawn_noise_target(scheduler: Any) -> None:
    """Raise SpecError if the prediction that belongs to a drawn noise is not known for this scheduler."""
    _check_known(scheduler, "What the network predicts for a drawn noise", 'Use target="full_precision".')


def noise_target(scheduler: Any, x_0: Tensor, noise: Tensor, scales: tuple[float, float]) -> Tensor:
    """What a perfect network predicts for `noisy(x_0, noise, scales)`, in x_0's shape. Raises as the check does."""
    check_drawn_noise_target(scheduler)
    kind = _prediction_type(scheduler)
    if kind == "epsilon":
        return noise
    if kind == "sample":
        return x_0
    if kind == FLOW:
        return noise - x_0
    alpha, sigma = scales
    return (alpha * noise - sigma * x_0) / math.hypot(alpha, sigma)


def check_noise_prediction(scheduler: Any) -> None:
    """Raise SpecError if it is not known which noise a prediction for this scheduler means."""
    _check_known(scheduler, "Which noise a prediction means", "Leave out the bits by step.")


def noise_predicted(step: Step, prediction: Tensor) -> Tensor:
    """eps that a prediction for a recorded step's sample means, in its shape; not finite where sigma is 0 and x_0 is
    predicted. Raises as the check does.
    """
    check_noise_prediction(step.scheduler)
    kind = _prediction_type(step.scheduler)
    if kind == "epsilon":
        return prediction
    alpha, sigma = noise_scales(step)
    sample = step.sample.to(prediction)
    if kind == "sample":
        return (sample - alpha * prediction) / sigma if sigma > 0 else torch.full_like(prediction, math.inf)
    if kind == FLOW:
        return (sample + alpha * prediction) / (alpha + sigma)
    size = math.hypot(alpha, sigma)
    return (alpha * size * prediction + sigma * sample) / size**2
