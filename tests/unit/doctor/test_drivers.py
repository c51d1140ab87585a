"""Contributions to the drift against finite differences and the unrolled graph in float64; restoring by brute force."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler, UniPCMultistepScheduler
from torch import Tensor, nn

import tiny
from stepquant.api import quantize
from stepquant.calibrate.trajectory import Trajectory, record, replay, seal
from stepquant.doctor.drivers import contributions, drift, final_states, restored_drift
from stepquant.doctor.layers import paired_layers, reference_of, swapped
from stepquant.errors import EvaluationError
from stepquant.evaluate.drift import measure_drift
from stepquant.methods.baseline import rtn
from stepquant.model.correction import Corrector, StepCorrection
from stepquant.model.pipeline import DenoiserPipeline
from stepquant.run import Run

STEPS = 5


class Net(nn.Module):
    """Two layers on the sample and one on the timestep, smooth, for samples [B, 2, 4, 4]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.enter = nn.Conv2d(2, 6, 3, padding=1)
        self.time = nn.Linear(2, 6)
        self.leave = nn.Conv2d(6, 2, 1)

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        phase = torch.as_tensor(timestep).reshape(-1, 1).to(sample) / 300
        when = self.time(torch.cat([torch.sin(phase), torch.cos(phase)], dim=1))
        return self.leave(torch.tanh(self.enter(sample) + when[:, :, None, None]))


@dataclass
class Case:
    trajectories: list[Trajectory]
    reference: nn.Module
    candidate: Any
    pairs: dict[str, tuple[nn.Module, nn.Module]]

    def drift(self, correction: StepCorrection | None = None) -> float:
        return drift(final_states(self.candidate, self.trajectories, correction), self.trajectories)


def case(scheduler: Any, *, weights: int = 3, activations: int | None = None) -> Case:
    pipe = DenoiserPipeline(Net().double().eval(), scheduler, (2, 4, 4))
    recipe = rtn(weights=weights, activations=activations, samples=4, batch=4, ends="same")
    candidate = quantize(pipe, recipe, steps=STEPS).pipe.denoiser
    recorded = record(pipe, pipe.denoiser, seeds=[0, 1, 2], steps=STEPS, batch_size=2, run=Run())
    reference = reference_of(pipe.denoiser)
    return Case([seal(one) for one in recorded], reference, candidate, paired_layers(reference, candidate))


class Blend(nn.Module):
    """A layer with a part of its error taken away; differentiable in that part."""

    def __init__(self, exact: nn.Module, quantized: nn.Module, part: Any) -> None:
        super().__init__()
        self.exact, self.quantized, self.part = exact, quantized, part

    def forward(self, x: Tensor) -> Tensor:
        exact = self.exact(x)
        return self.quantized(x) - self.part * (self.quantized(x) - exact)


def correction_that_remembers(trajectory: Trajectory) -> StepCorrection:
    """Different numbers for every step, and a part of the prediction before."""
    timesteps = torch.tensor(trajectory.fingerprint.timesteps).unique().flip(0)
    table = torch.linspace(-0.1, 0.1, 2 * len(timesteps)).reshape(-1, 2)
    return StepCorrection(timesteps.float(), 1 + table, table, 0.3 * table, torch.zeros_like(table), -table)


SCHEDULERS: dict[str, Callable[[], Any]] = {
    "ddim": lambda: DDIMScheduler(clip_sample=False),
    "unipc": lambda: UniPCMultistepScheduler(),
    "pndm": lambda: PNDMScheduler(skip_prk_steps=True),
}


@pytest.mark.parametrize("corrected", [False, True], ids=["plain", "corrected"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_contribution_is_the_derivative_of_the_drift(scheduler: str, corrected: bool) -> None:
    """Central differences in the part of a layer's error that is taken away; weights only, so all is smooth."""
    given = case(SCHEDULERS[scheduler]())
    correction = correction_that_remembers(given.trajectories[0]) if corrected else None
    found = contributions(given.candidate, given.reference, given.pairs, given.trajectories, correction=correction)
    assert set(found) == {"enter", "time", "leave"}
    for name, row in found.items():
        slopes = []
        for part in (1e-4, -1e-4):
            with swapped(given.candidate, name, Blend(*given.pairs[name], part)):
                slopes.append(given.drift(correction))
        slope = (slopes[0] - slopes[1]) / 2e-4
        assert -sum(row) == pytest.approx(slope, rel=2e-5, abs=1e-9)
        assert all(value != 0 for value in row[1:-1])


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_contribution_goes_straight_through_quantizers(scheduler: str) -> None:
    """Autograd over the whole unrolled run, in the same part, with 4-bit activations."""
    given = case(SCHEDULERS[scheduler](), weights=4, activations=4)
    found = contributions(given.candidate, given.reference, given.pairs, given.trajectories)
    parts = {name: torch.zeros((), dtype=torch.float64, requires_grad=True) for name in given.pairs}
    unrolled = copy.deepcopy(given.candidate)
    for name, (exact, _) in given.pairs.items():
        setattr(unrolled, name, Blend(exact, getattr(unrolled, name), parts[name]))
    total = torch.zeros((), dtype=torch.float64)
    for trajectory in given.trajectories:
        *_, last = replay(unrolled, trajectory, 0, len(trajectory.steps))
        rows = (last.sample - trajectory.steps[-1].next_sample).flatten(1)
        total = total + rows.square().mean(1).sqrt().sum() / 3
    total.backward()
    for name, part in parts.items():
        assert part.grad is not None
        assert -sum(found[name]) == pytest.approx(float(part.grad), rel=1e-9)


def noisy(given: Case, size: float) -> Case:
    """A candidate whose weights differ from full precision by noise of this size, and no quantizer."""
    candidate = copy.deepcopy(given.reference)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in candidate.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return Case(given.trajectories, given.reference, candidate, paired_layers(given.reference, candidate))


def test_contributions_add_up_to_the_drift_to_first_order() -> None:
    """Both expansions, at their own trajectories: what is missing shrinks as fast as the errors do."""
    exact = case(DDIMScheduler(clip_sample=False))
    for at in ("quantized", "full_precision"):
        missing = []
        for size in (1e-3, 1e-4):
            given = noisy(exact, size)
            found = contributions(given.candidate, given.reference, given.pairs, given.trajectories, at=at)  # type: ignore[arg-type]
            missing.append(abs(sum(map(sum, found.values())) / given.drift() - 1))
        assert missing[0] < 0.05
        assert missing[1] < missing[0] / 5


def test_restoring_for_certain_is_brute_force() -> None:
    given = case(DDIMScheduler(), weights=4, activations=4)
    for name, (exact, quantized) in given.pairs.items():
        copied = copy.deepcopy(given.candidate)
        setattr(copied, name, copy.deepcopy(exact))
        wanted = measure_drift(copied, given.trajectories).accumulated[-1]
        assert restored_drift(given.candidate, {name: exact}, given.trajectories) == pytest.approx(wanted, rel=1e-12)
        assert getattr(given.candidate, name) is quantized
    assert given.drift() == pytest.approx(measure_drift(given.candidate, given.trajectories).accumulated[-1])


def test_drift_of_a_corrected_model_is_that_of_the_evaluation() -> None:
    given = case(DDIMScheduler(), weights=4, activations=8)
    correction = correction_that_remembers(given.trajectories[0])
    wanted = measure_drift(given.candidate, given.trajectories, correction).accumulated[-1]
    assert given.drift(correction) == pytest.approx(wanted)
    corrector = Corrector(correction)
    *_, last = replay(given.candidate, given.trajectories[0], 0, STEPS, correct=corrector)
    assert torch.equal(final_states(given.candidate, given.trajectories, correction)[0], last.sample)


def test_a_layer_in_two_places_is_restored_in_both() -> None:
    shared = nn.Linear(2, 2)
    net = nn.Sequential(shared, nn.Sequential(shared))
    other = nn.Linear(2, 2)
    with swapped(net, "0", other):
        assert net[0] is other
        assert net[1][0] is other
    assert net[0] is shared
    assert net[1][0] is shared


def test_only_layers_that_compute_something_else_are_compared() -> None:
    reference = reference_of(tiny.TinyNet())
    assert paired_layers(reference, copy.deepcopy(reference)) == {}
    other = copy.deepcopy(reference)
    with torch.no_grad():
        other.out.weight += 1
    assert set(paired_layers(reference, other)) == {"out"}


def test_without_a_finite_end_there_is_no_gradient() -> None:
    given = case(DDIMScheduler())
    given.candidate.leave.weight.data[0] = torch.inf
    with pytest.raises(EvaluationError, match="not finite"):
        contributions(given.candidate, given.reference, given.pairs, given.trajectories)


def test_the_users_parameters_keep_asking_for_gradients_and_get_none() -> None:
    given = case(DDIMScheduler())
    given.reference.requires_grad_(True)
    contributions(given.candidate, given.reference, given.pairs, given.trajectories, at="full_precision")
    assert all(parameter.requires_grad and parameter.grad is None for parameter in given.reference.parameters())
