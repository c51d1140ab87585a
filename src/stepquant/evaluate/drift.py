"""Drift: how far the quantized trajectory leaves the full-precision one, step by step.

With x_k the recorded full-precision state before step k, F_k the full-precision step and G_k the same step with the
candidate (same solver, same noise), each norm the root mean square over an image's values, and each figure a mean
over images:

    e_k              = G_k(x_k) - x_{k+1}                    error made in step k alone
    y_0 = x_0,  y_{k+1} = G_k(y_k)                           the candidate, running freely
    one_step[k]      = |e_k|
    accumulated[k]   = |y_{k+1} - x_{k+1}|
    coherent[k]      = |e_0| + ... + |e_k|                   if all errors pointed the same way and were carried
    unchanged
    incoherent[k]    = sqrt(|e_0|^2 + ... + |e_k|^2)         if they were independent and carried unchanged
    cosine[k]        = cos(y_{k+1}, x_{k+1})
    consecutive_cosine[k] = cos(e_k, e_{k+1})                near 1: errors add up coherently; one entry less than steps

A correction of the candidate's predictions belongs to G_k. One that remembers the prediction before remembers, for
e_k, the one made at x_{k-1}.

Where `accumulated` lies between the two running sums says whether to correct a bias (coherent) or to fight noise
(incoherent). The cosine with an error that is exactly 0 is given as 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from stepquant.calibrate.trajectory import Trajectory, advance, state_at
from stepquant.errors import EvaluationError
from stepquant.model.correction import Corrector, StepCorrection

__all__ = ["Drift", "measure_drift"]


@dataclass(frozen=True)
class Drift:
    """Curves over the steps, noise end first; definitions in the module's docstring. In units of the sample."""

    one_step: list[float]
    accumulated: list[float]
    coherent: list[float]
    incoherent: list[float]
    cosine: list[float]
    consecutive_cosine: list[float]

    def to_dict(self) -> dict[str, list[float]]:
        """As JSON values."""
        return asdict(self)


@torch.no_grad()
def measure_drift(
    candidate_denoiser: nn.Module, trajectories: Sequence[Trajectory], correction: StepCorrection | None = None
) -> Drift:
    """Drift of the candidate from sealed full-precision trajectories of one schedule, computed in float64.

    correction: what the candidate's scheduler applies to predictions (`CorrectedScheduler.correction`), if anything.
    Takes two denoiser calls for each call that was recorded. Raises EvaluationError without trajectories or if they
    have different numbers of steps.
    """
    counts = {len(trajectory.steps) for trajectory in trajectories}
    if len(counts) != 1:
        raise EvaluationError(
            f"Drift is measured over trajectories of one length; got {len(trajectories)} with {sorted(counts)} steps."
        )
    curves = [_curves(candidate_denoiser, trajectory, correction) for trajectory in trajectories]
    one_step, accumulated, cosine, consecutive = (torch.cat(rows, dim=1) for rows in zip(*curves, strict=True))
    return Drift(
        one_step=_means(one_step),
        accumulated=_means(accumulated),
        coherent=_means(one_step.cumsum(dim=0)),
        incoherent=_means(one_step.square().cumsum(dim=0).sqrt()),
        cosine=_means(cosine),
        consecutive_cosine=_means(consecutive),
    )


def _curves(
    denoiser: nn.Module, trajectory: Trajectory, correction: StepCorrection | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """|e|, |y - x|, cos(y, x) as [steps, B] and cos(e_k, e_{k+1}) as [steps - 1, B], float64 on the CPU."""
    free = state_at(trajectory, 0)
    before: Tensor | None = None
    # One for each run: they remember predictions.
    forced, running = (None if correction is None else Corrector(correction) for _ in range(2))
    one_step, accumulated, cosine, consecutive = [], [], [], []
    for index in range(len(trajectory.steps)):
        exact = _flat(state_at(trajectory, index + 1).sample)
        error = _flat(advance(denoiser, trajectory, index, state_at(trajectory, index), forced).sample) - exact
        free = advance(denoiser, trajectory, index, free, running)
        one_step.append(_rms(error))
        accumulated.append(_rms(_flat(free.sample) - exact))
        cosine.append(_cosine(_flat(free.sample), exact))
        if before is not None:
            consecutive.append(_cosine(before, error))
        before = error
    empty = torch.empty(0, one_step[0].shape[0], dtype=torch.float64)
    return (
        torch.stack(one_step),
        torch.stack(accumulated),
        torch.stack(cosine),
        torch.stack(consecutive) if consecutive else empty,
    )


def _flat(sample: Tensor) -> Tensor:
    """[B, C, ...] -> [B, values], float64 on the CPU."""
    return sample.detach().double().cpu().flatten(1)


def _rms(rows: Tensor) -> Tensor:
    return rows.square().mean(dim=1).sqrt()


def _cosine(one: Tensor, other: Tensor) -> Tensor:
    """Per row; 0 where either row is 0."""
    norms = one.norm(dim=1) * other.norm(dim=1)
    return torch.where(norms > 0, (one * other).sum(dim=1) / norms.clamp_min(1e-300), torch.zeros_like(norms))


def _means(rows: Tensor) -> list[float]:
    values: list[float] = rows.mean(dim=1).tolist()
    return values
