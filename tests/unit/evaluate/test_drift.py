"""Drift against closed forms: a denoiser with a known bias under Euler."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, pairwise

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from torch import Tensor, nn

from stepquant.calibrate.trajectory import Trajectory, record, seal
from stepquant.errors import EvaluationError
from stepquant.evaluate.drift import measure_drift
from stepquant.model.correction import StepCorrection
from stepquant.model.pipeline import DenoiserPipeline
from stepquant.run import Run


class Constant(nn.Module):
    """The same prediction everywhere, so that errors are carried from step to step unchanged."""

    def __init__(self, bias: float) -> None:
        super().__init__()
        self.bias = bias

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return torch.full_like(sample, 0.2 + self.bias)


class Alternating(nn.Module):
    """Constant, with a bias whose sign changes between calls of different parity of the timestep's rank."""

    def __init__(self, timesteps: list[float], bias: float) -> None:
        super().__init__()
        self.signs = {timestep: bias * (-1) ** rank for rank, timestep in enumerate(timesteps)}

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return torch.full_like(sample, 0.2 + self.signs[float(timestep)])


def trajectories(steps: int = 5) -> list[Trajectory]:
    denoiser = Constant(0.0)
    pipe = DenoiserPipeline(denoiser, EulerDiscreteScheduler(), (2, 4, 4))
    found = record(pipe, denoiser, seeds=[0, 1, 2], steps=steps, batch_size=2, run=Run())
    return [seal(trajectory) for trajectory in found]


def step_sizes(trajectory: Trajectory) -> list[float]:
    return [float(abs(after - before)) for before, after in pairwise(trajectory.steps[0].scheduler.sigmas)]


def test_the_full_precision_model_does_not_drift() -> None:
    drift = measure_drift(Constant(0.0), trajectories())
    assert drift.one_step == drift.accumulated == drift.coherent == drift.incoherent == [0.0] * 5
    assert drift.cosine == pytest.approx([1.0] * 5)
    assert drift.consecutive_cosine == [0.0] * 4


def test_a_constant_bias_adds_up_coherently() -> None:
    recorded = trajectories()
    drift = measure_drift(Constant(0.5), recorded)
    expected = [0.5 * size for size in step_sizes(recorded[0])]
    assert drift.one_step == pytest.approx(expected, rel=1e-4)
    assert drift.accumulated == pytest.approx(list(accumulate(expected)), rel=1e-4)
    assert drift.coherent == pytest.approx(drift.accumulated, rel=1e-4)
    assert drift.incoherent[-1] == pytest.approx(sum(error**2 for error in expected) ** 0.5, rel=1e-4)
    assert drift.consecutive_cosine == pytest.approx([1.0] * 4, abs=1e-5)
    assert set(drift.to_dict()) == {
        "one_step",
        "accumulated",
        "coherent",
        "incoherent",
        "cosine",
        "consecutive_cosine",
    }


def test_errors_of_alternating_sign_cancel() -> None:
    recorded = trajectories()
    timesteps = [float(step.timestep) for step in recorded[0].steps]
    drift = measure_drift(Alternating(timesteps, 0.5), recorded)
    signed = [0.5 * size * (-1) ** rank for rank, size in enumerate(step_sizes(recorded[0]))]
    assert drift.accumulated == pytest.approx([abs(total) for total in accumulate(signed)], rel=1e-4)
    assert drift.consecutive_cosine == pytest.approx([-1.0] * 4, abs=1e-5)


def test_trajectories_of_different_lengths_are_refused() -> None:
    with pytest.raises(EvaluationError, match="one length"):
        measure_drift(Constant(0.0), [*trajectories(3), *trajectories(2)])
    with pytest.raises(EvaluationError, match="got 0"):
        measure_drift(Constant(0.0), [])


def test_a_correction_is_part_of_the_candidate() -> None:
    recorded = trajectories()
    timesteps = torch.tensor([float(step.timestep) for step in recorded[0].steps])
    identity = StepCorrection.identity(timesteps, 1)
    exact = replace(identity, offset=torch.full((5, 1), -0.1))
    # Takes the last prediction, which is 0.3 too, away again and puts back what is missing. At the first step there
    # is none: what stands there must not count.
    remembering = replace(identity, previous=torch.full((5, 1), -1.0), offset=torch.tensor([[-0.1], *[[0.2]] * 4]))
    for correction in (exact, remembering):
        assert measure_drift(Constant(0.1), recorded, correction).accumulated == pytest.approx([0.0] * 5, abs=1e-5)
        assert measure_drift(Constant(0.1), recorded, correction).one_step == pytest.approx([0.0] * 5, abs=1e-5)
    assert measure_drift(Constant(0.1), recorded).accumulated[-1] > 0.1
