"""What the network takes the image to be, step by step: the clean sample that each prediction stands for.

A step's noisy sample is x = alpha x_0 + sigma eps, and the prediction for it is a fixed combination
p = a x_0 + b eps (eps itself, x_0, v, or a flow's velocity; see `calibrate.noising`). The two equations give

    x_0 = (b x - sigma p) / (alpha b - sigma a)

for every scheduler whose prediction type is known, whether or not it computes x_0 on its way.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stepquant.calibrate.noising import noise_scales, noise_target
from stepquant.calibrate.steps import Step
from stepquant.calibrate.trajectory import Trajectory, follow, predict, state_at
from stepquant.model.correction import Corrector, StepCorrection

__all__ = ["clean_sample", "clean_samples"]


def clean_sample(step: Step, sample: Tensor, guided: Tensor) -> Tensor:
    """x_0 of a guided prediction at a recorded step's timestep, in float64, `[B, C, ...]` like the sample.

    Not finite where the schedule says that the sample is pure noise (alpha = 0) and the network predicts that noise.
    Raises SpecError if the prediction type is not known.
    """
    scales = noise_scales(step)
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    a = float(noise_target(step.scheduler, one, zero, scales))
    b = float(noise_target(step.scheduler, zero, one, scales))
    alpha, sigma = scales
    # A learnt variance, in the channels behind, says nothing about x_0.
    prediction = guided[:, : sample.shape[1]].double()
    clean: Tensor = (b * sample.double() - sigma * prediction) / (alpha * b - sigma * a or float("nan"))
    return clean


@torch.no_grad()
def clean_samples(denoiser: nn.Module, trajectory: Trajectory, correction: StepCorrection | None = None) -> Tensor:
    """x_0 after every step of a run of its own from the recorded noise: `[steps, images, C, ...]`, float32 on the CPU.

    correction: what the denoiser's scheduler applies to predictions, if anything; it is part of the run and of x_0.
    Raises SpecError if the prediction type is not known, CalibrationError for a trajectory that is not sealed.
    """
    state = state_at(trajectory, 0)
    correct = None if correction is None else Corrector(correction)
    found = []
    for step in trajectory.steps:
        guided = predict(denoiser, trajectory, step.index, state)
        if correct is not None:
            guided = correct(guided, step.timestep, state.sample)
        # Pipelines that double their latents for guidance carry every image twice.
        images = len(trajectory.seeds)
        found.append(clean_sample(step, state.sample[:images], guided[:images]).float().cpu())
        state = follow(trajectory, step.index, state, guided, correction)
    return torch.stack(found)
