"""Beta sampling: timesteps that are dense at both ends of the schedule and sparse in its middle.

    u_i = 1 - i / n,   t_i = round((T - 1) * F^-1(u_i)),   i = 0 .. n - 1

F^-1 is the inverse of the cumulative distribution function of Beta(alpha, beta) (probability integral transform), n the
number of steps, T that of the training timesteps. A timestep that comes twice is run once.

Source: Lee et al. 2024, "Beta Sampling is All You Need" (arXiv:2407.12173); alpha = beta = 0.6 as in diffusers and
other samplers that cite it. It must be the inverse: F itself would gather the steps in the middle.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.special import betaincinv
from torch import Tensor

from stepquant.errors import SpecError

__all__ = ["BETA_SHAPE", "beta_quantile", "beta_timesteps", "use_beta_timesteps_"]

BETA_SHAPE = 0.6
"""alpha and beta of the usual, symmetric form."""


def beta_quantile(u: Tensor, alpha: float = BETA_SHAPE, beta: float = BETA_SHAPE) -> Tensor:
    """F^-1(u) of Beta(alpha, beta) in float64, in the shape of u; u and the result lie in [0, 1].

    Raises SpecError for shapes alpha and beta that are not positive.
    """
    if not (alpha > 0 and beta > 0):
        raise SpecError(f"The shapes alpha and beta of a Beta distribution must be above 0, found {alpha} and {beta}.")
    return torch.from_numpy(np.asarray(betaincinv(alpha, beta, u.detach().cpu().double().numpy())))


def beta_timesteps(
    steps: int, *, total: int = 1000, alpha: float = BETA_SHAPE, beta: float = BETA_SHAPE
) -> tuple[int, ...]:
    """The timesteps of `steps` steps of Beta sampling, descending, each once: possibly fewer than asked for.

    total: training timesteps, T; results lie in 0 .. T - 1.
    """
    if steps < 1 or total < 1:
        raise SpecError(f"Beta sampling needs at least one step and one timestep, found {steps} and {total}.")
    u = 1 - torch.arange(steps, dtype=torch.float64) / steps
    chosen = ((total - 1) * beta_quantile(u, alpha, beta)).round().long().tolist()
    return tuple(sorted(set(chosen), reverse=True))


def use_beta_timesteps_(pipe: Any, *, alpha: float = BETA_SHAPE, beta: float = BETA_SHAPE) -> None:
    """Make a pipeline sample on `beta_timesteps`, however many steps it is asked for.

    Only the pipeline's scheduler instance is changed; copies of it (also unpickled ones) are changed likewise. Calling
    it again replaces the shapes. The fingerprint of a quantized model records the timesteps, and a loaded checkpoint
    walks them again; for another number of steps with `schedule="nearest"`, call this on the loaded pipeline too.

    Raises SpecError for a scheduler whose `set_timesteps` takes no `timesteps`, and for one of flow matching, which
    takes them but shifts its sigmas away from them.
    """
    beta_quantile(torch.zeros(1), alpha, beta)  # refuses bad shapes here instead of in the middle of sampling
    scheduler = pipe.scheduler
    current = scheduler.set_timesteps
    if isinstance(current, functools.partial) and current.func is _set_beta_timesteps:
        current = current.args[1]
    name = type(getattr(scheduler, "uncorrected", scheduler)).__name__
    if not {"num_inference_steps", "timesteps"} <= set(inspect.signature(current).parameters):
        raise SpecError(
            f"{name} takes no custom timesteps, so it cannot walk those of Beta sampling. Use a scheduler whose "
            "`set_timesteps` has an argument `timesteps` (DDPMScheduler, DPMSolverMultistepScheduler, "
            "EulerDiscreteScheduler), or set use_beta_sigmas=True where the scheduler has that setting."
        )
    if "shift" in scheduler.config:
        raise SpecError(
            f"{name} shifts its sigmas away from timesteps that it is given. Set use_beta_sigmas=True in its "
            "configuration instead, which places the sigmas by the same distribution."
        )
    # A partial over a module-level function, not a closure: copies of the scheduler get one of their own.
    replaced = functools.partial(_set_beta_timesteps, scheduler, current, alpha, beta)
    functools.update_wrapper(replaced, current)  # pipelines look for `timesteps` and `sigmas` in the signature
    scheduler.set_timesteps = replaced


def _set_beta_timesteps(
    scheduler: Any, original: Callable[..., Any], alpha: float, beta: float, *args: Any, **kwargs: Any
) -> Any:
    given = inspect.signature(original).bind(*args, **kwargs).arguments
    steps = given.get("num_inference_steps")
    if steps is None:
        return original(*args, **kwargs)  # the caller brings timesteps of its own
    others = {key: value for key, value in given.items() if key != "num_inference_steps"}
    wanted = beta_timesteps(steps, total=scheduler.config.num_train_timesteps, alpha=alpha, beta=beta)
    try:
        result = original(timesteps=list(wanted), **others)
    except ValueError as error:
        raise SpecError(
            f"{type(scheduler).__name__} refused the {len(wanted)} timesteps of Beta sampling: {error}"
        ) from error
    found = {float(timestep) for timestep in scheduler.timesteps}
    if found != {float(timestep) for timestep in wanted}:
        raise SpecError(
            f"{type(scheduler).__name__} was given the {len(wanted)} timesteps {wanted[0]} .. {wanted[-1]} of Beta "
            f"sampling and walks {len(found)} others. Use a scheduler that walks the timesteps it is given."
        )
    return result
