"""How the error of every step travels through the steps after it, and how well formulas foretell that.

A one-step solver is affine in sample and prediction, x_{k+1} = a_k x_k + b_k eps(x_k) + noise_k. With x^ the quantized
trajectory from the same noise, delta = x^ - x, and e_k = eps_q(x_k) - eps(x_k) the teacher-forced error, that is the
one at the full-precision input (Liu et al. 2025, arXiv:2508.12094, propagation of the error; the derivation is ours):

    delta_{k+1} = a_k delta_k + b_k [ J_k delta_k + e_k ] + O(|delta|^2)

J_k is the denoiser's Jacobian. What is done with it makes the prediction:

    no_jacobian   J_k = 0: the paper's approximation, delta_{k+1} = a_k delta_k + b_k e_k
    cosine        J_k = j_k I, j_k = <x_k, eps_k> / <x_k, x_k>: the gain with which the full-precision trajectory
                  itself goes on. For white data of unit variance under DDIM, a_k + b_k j_k is
                  sqrt(alpha_bar alpha_bar') + sqrt((1 - alpha_bar)(1 - alpha_bar')), the cosine of the angle of a step
    measured      J_k = g_k I, g_k = <d_k, J_k d_k> / <d_k, d_k> along the actual accumulated error d_k
    jacobian      J_k delta_k itself, of the delta that is foretold: first order, nothing else neglected
    (actual)      x^_k - x_k of the free run

J d is the finite difference [eps(x + h d) - eps(x)] / h. Norms are root mean squares over an image's values and curves
are means over images, after each step, as in `evaluate.drift`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stepquant.calibrate.forms import scaled_sample
from stepquant.calibrate.steps import Step, copy_sharing, run_scheduler
from stepquant.calibrate.trajectory import State, Trajectory, advance, predict, state_at
from stepquant.errors import CalibrationError

__all__ = ["MODES", "JacobianOf", "Propagation", "propagate", "step_coefficients"]

MODES = ("no_jacobian", "cosine", "measured", "jacobian")

JacobianOf = Literal["full_precision", "quantized"]

PROBE = 1e-2
"""Root mean square of the finite difference's step, relative to that of the sample. Ours: far above float32's rounding
in the prediction, far below where a denoiser bends."""


@dataclass(frozen=True)
class Propagation:
    """Curves over the steps, noise end first; definitions in the module's docstring.

    timesteps: of the steps.
    sample_weight, prediction_weight: a_k and b_k, those where nothing is clipped.
    cosine_jacobian, measured_jacobian: j_k and g_k.
    not_affine: what clipping or thresholding adds to the full-precision step, RMS relative to the sample's; where it is
        not 0 the recursion is no more than a guide.
    one_step: RMS of b_k e_k. prediction_error: RMS of e_k.
    actual: RMS of the accumulated error.
    foretold: RMS of the accumulated error by mode (`MODES`).
    cosine_with_actual: by mode; 0 where either error is 0.
    evaluations: of the network, in rows of its calls.
    """

    timesteps: list[float]
    sample_weight: list[float]
    prediction_weight: list[float]
    cosine_jacobian: list[float]
    measured_jacobian: list[float]
    not_affine: list[float]
    one_step: list[float]
    prediction_error: list[float]
    actual: list[float]
    foretold: Mapping[str, list[float]]
    cosine_with_actual: Mapping[str, list[float]]
    evaluations: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def step_coefficients(trajectory: Trajectory) -> list[tuple[float, float]]:
    """(a_k, b_k) of every step, measured: the derivatives of the recorded scheduler's step at the origin, in float64.

    At the origin no scheduler clips. Raises CalibrationError for a solver that remembers earlier predictions, whose
    errors have more than one way onward, and for a step that is not affine with one number for all values.
    """
    for step in trajectory.steps:
        history = sorted(state_at(trajectory, step.index).history)
        if history:
            raise CalibrationError(
                f"Step {step.index}: {type(step.scheduler).__name__} remembers {', '.join(history)}, so errors of "
                "earlier predictions enter later steps too and no pair of coefficients describes a step. Ask with a "
                "one-step solver (DDIM, DDPM, Euler, flow matching), or use an estimator that needs no coefficients."
            )
    return [_step_coefficients(step, scaled=_scaled(trajectory)) for step in trajectory.steps]


def _scaled(trajectory: Trajectory) -> bool:
    return trajectory.form is not None and trajectory.form.scaled


def _step_coefficients(step: Step, *, scaled: bool) -> tuple[float, float]:
    sample = torch.zeros_like(step.sample, dtype=torch.float64, requires_grad=True)
    guided = torch.zeros_like(step.guided, dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        found = _stepped(step, sample, guided, scaled=scaled)
        slopes = torch.autograd.grad(found.sum(), [sample, guided], allow_unused=True)
    numbers = []
    for slope, what in zip(slopes, ("sample", "prediction"), strict=True):
        low, high = (0.0, 0.0) if slope is None else (float(slope.min()), float(slope.max()))
        if high - low > 1e-6 * max(abs(low), abs(high)):
            raise CalibrationError(
                f"Step {step.index}: {type(step.scheduler).__name__} weights the {what}'s values between {low:.4g} and "
                f"{high:.4g}, expected one number for all. Use a scheduler whose step is a x + b eps."
            )
        numbers.append((low + high) / 2)
    return numbers[0], numbers[1]


def _stepped(step: Step, sample: Tensor, guided: Tensor, *, scaled: bool) -> Tensor:
    scheduler = copy_sharing(step.scheduler, {})
    scaled_sample(scheduler, sample, step.timestep, scaled=scaled)  # some look up their step index when they scale
    return run_scheduler(scheduler, step, guided=guided, sample=sample)


@torch.no_grad()
def propagate(
    denoiser: nn.Module,
    trajectories: Sequence[Trajectory],
    *,
    full_precision: nn.Module,
    jacobian_of: JacobianOf = "full_precision",
) -> Propagation:
    """Predicted and actual accumulated error of a quantized denoiser along sealed full-precision trajectories.

    jacobian_of: whose Jacobian. Teacher-forced errors go with the quantized one, but quantizers make it a staircase,
        which finite differences see badly; the full-precision one differs by a term of second order.

    Four forward passes a step. Raises CalibrationError without trajectories or if their schedules differ, and for
    solvers that `step_coefficients` refuses.
    """
    if len({tuple(float(step.timestep) for step in trajectory.steps) for trajectory in trajectories}) != 1:
        raise CalibrationError(
            f"Propagation is asked along trajectories of one schedule; got {len(trajectories)} trajectories with "
            f"{sorted({len(trajectory.steps) for trajectory in trajectories})} steps."
        )
    coefficients = step_coefficients(trajectories[0])
    chains = [_Chain(denoiser, full_precision, trajectory, jacobian_of) for trajectory in trajectories]
    rows = [_step_of_all(chains, index, a, b) for index, (a, b) in enumerate(coefficients)]
    steps = trajectories[0].steps
    return Propagation(
        timesteps=[float(step.timestep) for step in steps],
        sample_weight=[a for a, _ in coefficients],
        prediction_weight=[b for _, b in coefficients],
        **{key: [row[key] for row in rows] for key in _SIMPLE},
        foretold={mode: [row[f"foretold.{mode}"] for row in rows] for mode in MODES},
        cosine_with_actual={mode: [row[f"cosine.{mode}"] for row in rows] for mode in MODES},
        evaluations=4 * sum(trajectory.evaluations for trajectory in trajectories),
    )


_SIMPLE = ("cosine_jacobian", "measured_jacobian", "not_affine", "one_step", "prediction_error", "actual")


class _Chain:
    """One trajectory: its free run, and the error that each mode foretells, float64."""

    def __init__(
        self, denoiser: nn.Module, full_precision: nn.Module, trajectory: Trajectory, jacobian_of: JacobianOf
    ) -> None:
        self.denoiser = denoiser
        self.trajectory = trajectory
        self.probed = denoiser if jacobian_of == "quantized" else full_precision
        self.jacobian_of = jacobian_of
        self.free = state_at(trajectory, 0)
        self.actual = torch.zeros_like(trajectory.steps[0].sample, dtype=torch.float64)
        self.foretold = {mode: self.actual.clone() for mode in MODES}

    def look(self, index: int) -> None:
        """Everything about a step that needs the network, before any error moves on."""
        step = self.trajectory.steps[index]
        self.quantized = predict(self.denoiser, self.trajectory, index, state_at(self.trajectory, index))
        self.error = self.quantized.double() - step.guided.double()
        self.along_actual = self._jacobian_times(index, self.actual)
        self.along_foretold = self._jacobian_times(index, self.foretold["jacobian"])
        self.free = advance(self.denoiser, self.trajectory, index, self.free)

    def _jacobian_times(self, index: int, direction: Tensor) -> Tensor:
        """J d, by a finite difference at the recorded sample."""
        step = self.trajectory.steps[index]
        size = float(direction.square().mean().sqrt())
        if size == 0.0:
            return torch.zeros_like(direction)
        h = PROBE * float(step.sample.double().square().mean().sqrt()) / size
        moved = State((step.sample.double() + h * direction).to(step.sample.dtype))
        base = self.quantized if self.jacobian_of == "quantized" else step.guided
        return (predict(self.probed, self.trajectory, index, moved).double() - base.double()) / h

    def not_affine(self, index: int, a: float, b: float) -> float:
        step = self.trajectory.steps[index]
        nothing = torch.zeros_like(step.sample), torch.zeros_like(step.guided)
        noise = _stepped(step, *nothing, scaled=_scaled(self.trajectory)).double()
        rest = step.next_sample.double() - noise - a * step.sample.double() - b * step.guided.double()
        return float(rest.square().mean().sqrt() / step.sample.double().square().mean().sqrt())

    def move(self, index: int, weights: Mapping[str, float], a: float, b: float) -> None:
        """delta_{k+1} of every mode, and of the free run. weights: j of the modes with J = j I."""
        for mode, j in weights.items():
            self.foretold[mode] = (a + b * j) * self.foretold[mode] + b * self.error
        self.foretold["jacobian"] = a * self.foretold["jacobian"] + b * (self.along_foretold + self.error)
        self.actual = self.free.sample.double() - state_at(self.trajectory, index + 1).sample.double()


def _step_of_all(chains: Sequence[_Chain], index: int, a: float, b: float) -> dict[str, float]:
    for chain in chains:
        chain.look(index)
    steps = [chain.trajectory.steps[index] for chain in chains]
    weights = {
        "no_jacobian": 0.0,
        "cosine": _slope([(step.sample.double(), step.guided.double()) for step in steps]),
        "measured": _slope([(chain.actual, chain.along_actual) for chain in chains]),
    }
    for chain in chains:
        chain.move(index, weights, a, b)
    row = {
        "cosine_jacobian": weights["cosine"],
        "measured_jacobian": weights["measured"],
        "not_affine": max(chain.not_affine(index, a, b) for chain in chains),
        "one_step": abs(b) * _mean(chains, lambda chain: _rms(chain.error)),
        "prediction_error": _mean(chains, lambda chain: _rms(chain.error)),
        "actual": _mean(chains, lambda chain: _rms(chain.actual)),
    }
    for mode in MODES:
        row[f"foretold.{mode}"] = _mean(chains, lambda chain, mode=mode: _rms(chain.foretold[mode]))
        row[f"cosine.{mode}"] = _mean(chains, lambda chain, mode=mode: _cosine(chain.foretold[mode], chain.actual))
    return row


def _slope(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """<d, y> / <d, d> over all pairs (d, y); 0 where d is 0."""
    below = sum(float(d.square().sum()) for d, _ in pairs)
    return sum(float((d * y).sum()) for d, y in pairs) / below if below > 0 else 0.0


def _mean(chains: Sequence[_Chain], of: Callable[..., Tensor]) -> float:
    """Mean over the images of all chains of a value per image."""
    return float(torch.cat([of(chain) for chain in chains]).mean())


def _rms(errors: Tensor) -> Tensor:
    return errors.flatten(1).square().mean(dim=1).sqrt()


def _cosine(one: Tensor, other: Tensor) -> Tensor:
    """Per image; 0 where either is 0."""
    one, other = one.flatten(1), other.flatten(1)
    norms = one.norm(dim=1) * other.norm(dim=1)
    return torch.where(norms > 0, (one * other).sum(dim=1) / norms.clamp_min(1e-300), torch.zeros_like(norms))
