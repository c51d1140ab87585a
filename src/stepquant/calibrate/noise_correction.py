"""The quantized prediction as the exact one with noise: what of it can be foretold is taken back, the rest is accounted
for in the noise that stochastic schedulers add.

In every step, over images and pixels along the full-precision trajectory, with eps the exact and eps_q the quantized
guided prediction for the same sample, and delta = eps_q - eps:

    full_precision   delta = k eps + mu_c + rest       corrected = (eps_q - mu_c) / (1 + k)     v = E rest^2 / (1 + k)^2
    quantized        delta = w eps_q + m_c + rest      corrected = eps_q - w eps_q - m_c        v = E rest^2

k, w: slopes of least squares; mu_c, m_c: a mean for each channel c. v is the variance of what is left of the error. The
step x' = a x + b corrected + sigma z carries b^2 v of it into x', so that much less noise is added:

    sigma'^2 = max(0, sigma^2 - b^2 v)

b = dx'/d eps is measured at the scheduler (`propagation.step_coefficients`). For DDPM it is -beta / sqrt(alpha (1 -
alpha_bar)), for DDIM c_t = sqrt(1 - alpha_bar' - sigma^2) - sqrt(alpha_bar' (1 - alpha_bar) / alpha_bar), both as in
the papers. The mean of the step stays that of sigma: where the rest is uncorrelated with x and eps, x' then has the
variance that it has in full precision. The rest of "quantized" is uncorrelated with eps_q instead.

Sources: He et al. 2023 (PTQD, arXiv:2305.10657) for "full_precision"; Zeng et al. 2025 (D2-DPM, arXiv:2501.08180) for
"quantized".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from stepquant.calibrate.propagation import step_coefficients
from stepquant.calibrate.step_noise import adds_noise, noise_deviation
from stepquant.calibrate.step_rows import StepRows
from stepquant.calibrate.trajectory import Trajectory, predict, state_at
from stepquant.errors import CalibrationError, SpecError
from stepquant.model.correction import StepCorrection, noise_can_be_scaled
from stepquant.recipe import Figures, Job

__all__ = ["CorrectNoise", "NoiseMoments", "Regressed", "Slopes", "noise_moments"]

Regressed = Literal["full_precision", "quantized"]
"""Whose prediction the error is regressed on."""

Slopes = Literal["step", "channel"]
"""What has a slope of its own."""


@dataclass(frozen=True)
class NoiseMoments:
    """Means over the images and pixels of one step, each `[C]` float64: of the exact prediction, of its error, and of
    their products about these means.

    count: values in each channel.
    """

    count: int
    prediction: Tensor
    error: Tensor
    prediction_squared: Tensor
    crossed: Tensor
    error_squared: Tensor

    @classmethod
    def of(cls, exact: Tensor, error: Tensor) -> NoiseMoments:
        """exact, error: `[C, values]`."""
        exact, error = exact.double().cpu(), error.double().cpu()
        means = exact.mean(dim=1), error.mean(dim=1)
        x, y = exact - means[0][:, None], error - means[1][:, None]
        return cls(exact.shape[1], *means, x.square().mean(1), (x * y).mean(1), y.square().mean(1))

    def __add__(self, other: NoiseMoments) -> NoiseMoments:
        """Of both sets of values together."""
        count = self.count + other.count
        mine, others = self.count / count, other.count / count
        x, y = other.prediction - self.prediction, other.error - self.error

        def joined(one: Tensor, two: Tensor, between: Tensor) -> Tensor:
            return mine * one + others * two + mine * others * between

        return NoiseMoments(
            count,
            self.prediction + others * x,
            self.error + others * y,
            joined(self.prediction_squared, other.prediction_squared, x * x),
            joined(self.crossed, other.crossed, x * y),
            joined(self.error_squared, other.error_squared, y * y),
        )

    def on_quantized(self) -> NoiseMoments:
        """The same with the quantized prediction, eps_q = eps + delta, in the exact one's place."""
        return NoiseMoments(
            self.count,
            self.prediction + self.error,
            self.error,
            self.prediction_squared + 2 * self.crossed + self.error_squared,
            self.crossed + self.error_squared,
            self.error_squared,
        )

    def slope(self, slopes: Slopes) -> Tensor:
        """Least squares of the error on the prediction, about the channels' means, `[C]`; 0 where nothing varies."""
        above, below = self.crossed, self.prediction_squared
        if slopes == "step":
            above, below = above.sum().expand_as(above), below.sum().expand_as(below)
        return torch.where(below > 0, above / below.clamp_min(1e-300), torch.zeros_like(above))

    def rest(self, slope: Tensor, bias: Tensor) -> Tensor:
        """Mean square `[C]` of error - slope * prediction - bias."""
        spread = self.error_squared - 2 * slope * self.crossed + slope.square() * self.prediction_squared
        return spread.clamp_min(0) + (self.error - slope * self.prediction - bias).square()


@dataclass(frozen=True)
class CorrectNoise:
    """Fit a correction of every step's prediction, and of the noise that the step adds; the module's docstring has the
    formulas.

    regress_on: whose prediction the error is regressed on; see there.
    slopes: one for the whole step, or one for each channel.
    negative: whether slopes may be below 0; otherwise they are 0 then (PTQD's code).
    bias_of: the channels' means are those of the rest of the regression, or of the error as it is (PTQD's code).
    variance: lessen the noise of DDPM's and DDIM's steps. Where a scheduler adds none, or adds it in another way, the
        figures say why nothing was changed.

    It goes last in a recipe: it corrects the model as it finds it.
    """

    regress_on: Regressed = "full_precision"
    slopes: Slopes = "step"
    negative: bool = False
    bias_of: Literal["rest", "error"] = "rest"
    variance: bool = True

    needs: ClassVar[frozenset[str]] = frozenset({"trajectories", "model"})
    gives: ClassVar[frozenset[str]] = frozenset({"correction"})

    def __post_init__(self) -> None:
        if self.regress_on == "quantized" and self.bias_of == "error":
            raise SpecError(
                'bias_of="error" belongs to regress_on="full_precision", whose exact predictions are about 0 in the '
                'mean. Use bias_of="rest".'
            )

    def run(self, job: Job) -> Figures:
        trajectories: list[Trajectory] = job.handed["trajectories"]
        rows = StepRows.of(trajectories, job.full_precision)
        total = len(rows.of_step) * len(trajectories)
        with job.run.progress.track("Measuring quantization noise", total) as advance:
            moments = noise_moments(job.denoiser, trajectories, rows, advance)
        fitted = [self._fitted(own, float(rows.timesteps[row])) for row, own in enumerate(moments)]
        shares, why = self._shares(trajectories[0], rows, [float(one.variance.mean()) for one in fitted])
        table = shares.float()[:, None].expand(-1, rows.channels).clone()
        gain, offset = (torch.stack([getattr(one, name) for one in fitted]).float() for name in ("gain", "offset"))
        job.handed["correction"] = StepCorrection(rows.timesteps.clone(), gain, torch.zeros_like(gain), offset, table)
        return {
            "slope": [float(one.slope.mean()) for one in fitted],
            "bias": [float(one.bias.square().mean().sqrt()) for one in fitted],
            "error": [_root(own.error_squared + own.error.square()) for own in moments],
            "error_left": [_root(one.variance) for one in fitted],
            "variance_share": shares.tolist(),
            "variance": why,
            "evaluations": sum(trajectory.evaluations for trajectory in trajectories),
        }

    def _fitted(self, moments: NoiseMoments, timestep: float) -> _Fitted:
        if not bool(torch.isfinite(moments.error_squared + moments.error).all()):
            raise CalibrationError(
                f"The quantized model's prediction at timestep {timestep:g} is not finite for samples of the "
                "full-precision run: its activation ranges are damaged. Calibrate it again."
            )
        of = moments if self.regress_on == "full_precision" else moments.on_quantized()
        slope = of.slope(self.slopes)
        slope = slope if self.negative else slope.clamp_min(0)
        bias = of.error if self.bias_of == "error" else of.error - slope * of.prediction
        rest = of.rest(slope, bias)
        if self.regress_on == "quantized":
            return _Fitted(slope, bias, 1 - slope, -bias, rest)
        if not bool((1 + slope > 0).all()):
            raise CalibrationError(
                f"At timestep {timestep:g} the quantized prediction falls where the exact one rises (slope "
                f'{float(slope.min()):g} of the error): use regress_on="quantized", or more bits.'
            )
        return _Fitted(slope, bias, 1 / (1 + slope), -bias / (1 + slope), rest / (1 + slope).square())

    def _shares(self, trajectory: Trajectory, rows: StepRows, variances: Sequence[float]) -> tuple[Tensor, str]:
        """b^2 v / sigma^2 of every row, at most 1, float64 `[S]`; and in words what was done about the variance."""
        shares = torch.zeros(len(rows.timesteps), dtype=torch.float64)
        if not self.variance:
            return shares, "not corrected: variance=False"
        name = type(trajectory.steps[0].scheduler).__name__
        if not any(adds_noise(step) for step in trajectory.steps):
            return shares, f"not corrected: {name} adds no noise in this run (a deterministic solver, or eta 0)"
        if not noise_can_be_scaled(trajectory.steps[0].scheduler):
            return shares, f"not corrected: only the noise of DDPM and DDIM can be lessened, this is {name}"
        noisy = 0
        for step, row, (_, b) in zip(trajectory.steps, rows.of_step, step_coefficients(trajectory), strict=True):
            sigma = noise_deviation(step)
            if sigma > 0:
                noisy += 1
                shares[row] = min(1.0, b * b * variances[row] / sigma**2)
        used_up = int((shares >= 1).sum())
        return shares, (
            f"corrected in {noisy} of {len(rows.of_step)} steps"
            + (f", in {used_up} of which quantization leaves more noise than the step adds" if used_up else "")
        )


@dataclass(frozen=True)
class _Fitted:
    """Of one step, each `[C]` float64. variance: of the corrected prediction's error."""

    slope: Tensor
    bias: Tensor
    gain: Tensor
    offset: Tensor
    variance: Tensor


def _root(squares: Tensor) -> float:
    return math.sqrt(float(squares.mean()))


@torch.no_grad()
def noise_moments(
    denoiser: nn.Module,
    trajectories: Sequence[Trajectory],
    rows: StepRows,
    advance: Callable[[int], None] = lambda _done: None,
) -> list[NoiseMoments]:
    """Moments of every row, over all its visits, at the recorded samples. advance: called with 1 after each batch."""
    found: dict[int, NoiseMoments] = {}
    for trajectory in trajectories:
        for step, row in zip(trajectory.steps, rows.of_step, strict=True):
            guided = predict(denoiser, trajectory, step.index, state_at(trajectory, step.index))
            error = guided.double() - step.guided.double()
            painted = trajectory.painted
            own = NoiseMoments.of(rows.by_channel(step.guided, painted), rows.by_channel(error, painted))
            found[row] = found[row] + own if row in found else own
            advance(1)
    return [found[row] for row in range(len(rows.timesteps))]
