"""Error propagation: the solver's coefficients against their closed form, and predictions where they must be exact."""

from __future__ import annotations

import json
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
)
from torch import Tensor, nn

from stepquant.calibrate.propagation import MODES, propagate, step_coefficients
from stepquant.calibrate.trajectory import Trajectory, record, seal
from stepquant.errors import CalibrationError
from stepquant.model.pipeline import DenoiserPipeline
from stepquant.run import Run

STEPS = 6


class LinearDenoiser(nn.Module):
    """eps = A x + c, with A over the channels: what the best denoiser of Gaussian data is."""

    def __init__(self, matrix: Tensor, constant: Tensor, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix.to(dtype))
        self.constant = nn.Parameter(constant.to(dtype))

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        return torch.einsum("dc,bchw->bdhw", self.matrix, sample) + self.constant[:, None, None]


FULL = LinearDenoiser(torch.tensor([[0.6, 0.1], [-0.2, 0.8]]), torch.tensor([0.1, -0.2]))
OTHER = LinearDenoiser(torch.tensor([[0.7, -0.1], [-0.1, 0.75]]), torch.tensor([0.2, -0.25]))


def recorded(denoiser: nn.Module, scheduler: Any, seeds: tuple[int, ...] = (3, 1), **arguments: Any) -> Trajectory:
    pipe = DenoiserPipeline(denoiser, scheduler, (2, 4, 4))
    (found,) = record(pipe, denoiser, seeds=seeds, steps=STEPS, batch_size=len(seeds), run=Run(), arguments=arguments)
    return seal(found)


def ddim(trajectory: Trajectory, eta: float = 0.0) -> list[tuple[float, float]]:
    """a_k, b_k of Song et al. 2021, eq. 12, from the schedule's alpha_bar."""
    alpha_bar = DDIMScheduler().alphas_cumprod.double()
    timesteps = [int(value) for value in trajectory.fingerprint.timesteps]
    found = []
    for timestep in timesteps:
        now, after = alpha_bar[timestep], timestep - 1000 // STEPS
        then = alpha_bar[after] if after >= 0 else torch.tensor(1.0, dtype=torch.float64)
        sigma = eta * ((1 - then) / (1 - now) * (1 - now / then)).sqrt()
        a = (then / now).sqrt()
        found.append((float(a), float((1 - then - sigma**2).sqrt() - a * (1 - now).sqrt())))
    return found


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_coefficients_equal_the_closed_form(eta: float, clip: bool) -> None:
    trajectory = recorded(FULL, DDIMScheduler(clip_sample=clip), eta=eta)
    for found, expected in zip(step_coefficients(trajectory), ddim(trajectory, eta), strict=True):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_v_prediction_is_epsilon_rewritten() -> None:
    # eps = sqrt(alpha_bar) v + sqrt(1 - alpha_bar) x
    trajectory = recorded(FULL, DDIMScheduler(clip_sample=False, prediction_type="v_prediction"))
    alpha_bar = DDIMScheduler().alphas_cumprod.double()
    for step, found, (a, b) in zip(trajectory.steps, step_coefficients(trajectory), ddim(trajectory), strict=True):
        now = float(alpha_bar[int(step.timestep)])
        assert found == pytest.approx((a + b * (1 - now) ** 0.5, b * now**0.5), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler])
def test_euler_steps_by_the_difference_of_sigmas(scheduler: Any) -> None:
    trajectory = recorded(FULL, scheduler())
    for step, (a, b) in zip(trajectory.steps, step_coefficients(trajectory), strict=True):
        sigmas = step.scheduler.sigmas
        assert a == pytest.approx(1.0, rel=1e-5)
        assert b == pytest.approx(float(sigmas[step.index + 1] - sigmas[step.index]), rel=1e-4)


@pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, PNDMScheduler, HeunDiscreteScheduler])
def test_solvers_with_a_memory_are_refused(scheduler: Any) -> None:
    with pytest.raises(CalibrationError, match=rf"{scheduler.__name__} remembers .*one-step solver"):
        step_coefficients(recorded(FULL, scheduler()))


@pytest.mark.parametrize(
    ("scheduler", "arguments"), [(DDIMScheduler, {"eta": 1.0}), (DDIMScheduler, {}), (DDPMScheduler, {})]
)
def test_first_order_is_exact_for_linear_denoisers(scheduler: Any, arguments: dict[str, float]) -> None:
    trajectory = recorded(FULL, scheduler(clip_sample=False), **arguments)
    found = propagate(OTHER, [trajectory], full_precision=FULL, jacobian_of="quantized")
    # The schedule's tables are float32, so coefficients measured at the origin differ from those met by their rounding.
    assert found.foretold["jacobian"] == pytest.approx(found.actual, rel=1e-4)
    assert found.cosine_with_actual["jacobian"] == pytest.approx([1.0] * STEPS, abs=1e-6)
    assert max(found.not_affine) < 1e-4
    # With another Jacobian, or none, it is not: the modes differ where they should.
    assert found.foretold["no_jacobian"][-1] > 1.5 * found.actual[-1]
    wrong = propagate(OTHER, [trajectory], full_precision=FULL, jacobian_of="full_precision")
    assert wrong.foretold["jacobian"][-1] != pytest.approx(found.actual[-1], rel=1e-2)


def test_measured_gains_are_exact_where_the_jacobian_is_a_number() -> None:
    half = LinearDenoiser(0.5 * torch.eye(2), torch.tensor([0.3, -0.1]))
    trajectory = recorded(FULL, DDIMScheduler(clip_sample=False))
    found = propagate(half, [trajectory, trajectory], full_precision=FULL, jacobian_of="quantized")
    assert found.measured_jacobian[1:] == pytest.approx([0.5] * (STEPS - 1), rel=1e-5)
    assert found.foretold["measured"] == pytest.approx(found.actual, rel=1e-4)


def test_the_cosine_gain_is_that_of_white_data() -> None:
    class White(nn.Module):
        """The best denoiser of white Gaussian data of unit variance: eps = sqrt(1 - alpha_bar) x."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("alpha_bar", DDIMScheduler().alphas_cumprod.double())

        def forward(self, sample: Tensor, timestep: Any) -> Tensor:
            return (1 - self.alpha_bar[int(timestep)]).sqrt() * sample

    trajectory = recorded(White(), DDIMScheduler(clip_sample=False))
    found = propagate(White(), [trajectory], full_precision=White())
    alpha_bar = [float(White().alpha_bar[int(step.timestep)]) for step in trajectory.steps] + [1.0]
    for k, (a, b) in enumerate(zip(found.sample_weight, found.prediction_weight, strict=True)):
        now, then = alpha_bar[k], alpha_bar[k + 1]
        cosine = (now * then) ** 0.5 + ((1 - now) * (1 - then)) ** 0.5
        assert a + b * found.cosine_jacobian[k] == pytest.approx(cosine, rel=1e-5)
    assert found.actual == [0.0] * STEPS
    assert all(found.foretold[mode] == [0.0] * STEPS for mode in MODES)


def test_one_step_errors_by_hand() -> None:
    trajectory = recorded(FULL, DDIMScheduler(clip_sample=False))
    found = propagate(OTHER, [trajectory], full_precision=FULL)
    step = trajectory.steps[2]
    with torch.no_grad():
        error = OTHER(step.sample, 0) - FULL(step.sample, 0)
    rms = float(error.flatten(1).square().mean(dim=1).sqrt().mean())
    assert found.prediction_error[2] == pytest.approx(rms, rel=1e-9)
    assert found.one_step[2] == pytest.approx(abs(ddim(trajectory)[2][1]) * rms, rel=1e-5)
    assert found.actual[0] == pytest.approx(found.one_step[0], rel=1e-5)
    assert found.evaluations == 4 * STEPS * 2
    assert json.loads(json.dumps(found.to_dict()))["foretold"]["cosine"] == found.foretold["cosine"]


def test_clipping_is_told() -> None:
    trajectory = recorded(FULL, DDIMScheduler(clip_sample=True))
    found = propagate(OTHER, [trajectory], full_precision=FULL)
    assert max(found.not_affine) > 1e-2


def test_trajectories_must_share_a_schedule() -> None:
    one = recorded(FULL, DDIMScheduler())
    other = recorded(FULL, DDIMScheduler(timestep_spacing="trailing"))
    for wrong in ([], [one, other]):
        with pytest.raises(CalibrationError, match="trajectories of one schedule"):
            propagate(OTHER, wrong, full_precision=FULL)
