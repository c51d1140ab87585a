"""The noise that a recorded step of a scheduler adds: whether there is any, and its standard deviation."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from stepquant.calibrate.steps import Step, copy_sharing, run_scheduler
from stepquant.errors import UnsupportedPipeline

__all__ = ["adds_noise", "noise_deviation"]


@torch.no_grad()
def adds_noise(step: Step) -> bool:
    """Whether the step comes out differently with other generators."""
    if step.generator_states is None:
        return False
    device = step.sample.device if step.draws_globally else torch.device("cpu")
    others = [torch.Generator(device).manual_seed(number) for number in range(len(step.generator_states))]
    other = replace(step, generator_states=tuple(generator.get_state() for generator in others))
    found = run_scheduler(copy_sharing(step.scheduler, {}), other, guided=step.guided, sample=step.sample)
    return not torch.equal(found, step.next_sample)


@torch.no_grad()
def noise_deviation(step: Step) -> float:
    """sigma of a step x' = mean(x, eps) + sigma z, 0 where nothing is added.

    The step of a sample and a prediction that are 0 is sigma z, for schedulers whose mean is 0 there; z is drawn once
    more from the recorded generators. Raises UnsupportedPipeline if that is not how the step draws its noise.
    """
    if step.generator_states is None:
        return 0.0
    scheduler, nothing = copy_sharing(step.scheduler, {}), torch.zeros_like(step.sample)
    noise = run_scheduler(scheduler, step, guided=torch.zeros_like(step.guided), sample=nothing).double()
    if not bool((noise != 0).any()):
        return 0.0
    drawn = _drawn(step).double()
    sigma = float((noise * drawn).sum() / drawn.square().sum())
    rounding = 16 * torch.finfo(step.guided.dtype).eps * abs(sigma) * float(drawn.abs().max())
    if not float((noise - sigma * drawn).abs().max()) <= rounding:
        raise UnsupportedPipeline(
            f"Step {step.index}: what {type(step.scheduler).__name__} adds to a sample of zeros is not its generators' "
            "normal noise with one standard deviation, so its variance is not known. Fit without the variance part "
            "(variance=False)."
        )
    return sigma


def _drawn(step: Step) -> Tensor:
    """Standard normal noise of the step's shape, as diffusers' schedulers draw it from these generators."""
    assert step.generator_states is not None
    shape, device = step.guided.shape, step.guided.device
    where = device if step.draws_globally else torch.device("cpu")
    generators = []
    for state in step.generator_states:
        generator = torch.Generator(where)
        generator.set_state(state.cpu())
        generators.append(generator)
    if len(generators) == 1:
        return torch.randn(shape, generator=generators[0], device=where, dtype=step.guided.dtype).to(device)
    rows = [
        torch.randn((1, *shape[1:]), generator=generator, device=where, dtype=step.guided.dtype)
        for generator in generators
    ]
    return torch.cat(rows).to(device)
