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

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.calibrate.trajectory import Trajectory, advance, state_at
from stepquant.errors import EvaluationError
from stepquant.evaluate.flat_field import has_flat_field, noise_level, white_point
from stepquant.model.correction import Corrector, StepCorrection

__all__ = ["Drift", "drift_curves", "flat_field", "measure_drift", "summary"]

Curves = dict[str, Tensor]
"""Of one batch, as `drift_curves` gives them."""


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
    return summary([drift_curves(candidate_denoiser, trajectory, correction) for trajectory in trajectories])


def summary(curves: Sequence[Mapping[str, Tensor]]) -> Drift:
    """Means over the images of all batches. curves: what `drift_curves` gave for each, of one number of steps."""
    names = ("one_step", "accumulated", "cosine", "consecutive_cosine")
    one_step, accumulated, cosine, consecutive = (torch.cat([rows[name] for rows in curves], dim=1) for name in names)
    return Drift(
        one_step=_means(one_step),
        accumulated=_means(accumulated),
        coherent=_means(one_step.cumsum(dim=0)),
        incoherent=_means(one_step.square().cumsum(dim=0).sqrt()),
        cosine=_means(cosine),
        consecutive_cosine=_means(consecutive),
    )


def flat_field(curves: Sequence[Mapping[str, Tensor]]) -> dict[str, dict[str, Any]]:
    """Noise level `[steps]` and white point `[steps][C]` of the candidate, running freely, and of the reference.

    Means over the images of all batches, as JSON values; see `evaluate.flat_field`. Empty if the samples are no
    pictures.
    """
    found: dict[str, dict[str, Any]] = {}
    for figure in ("noise_level", "white_point"):
        for side in ("candidate", "reference"):
            if all(f"{figure}.{side}" in rows for rows in curves):
                rows = torch.cat([batch[f"{figure}.{side}"] for batch in curves], dim=1)
                found.setdefault(figure, {})[side] = rows.mean(dim=1).tolist()
    return found


@torch.no_grad()
def drift_curves(denoiser: nn.Module, trajectory: Trajectory, correction: StepCorrection | None = None) -> Curves:
    """What every image of one sealed trajectory contributes, float64 on the CPU, each `[steps, B]`.

    one_step, accumulated, cosine; consecutive_cosine is `[steps - 1, B]`. Where the sample is a picture, also
    noise_level.candidate, noise_level.reference, and white_point.candidate, white_point.reference `[steps, B, C]`.
    Takes two denoiser calls for each call that was recorded.
    """
    free = state_at(trajectory, 0)
    before: Tensor | None = None
    # One for each run: they remember predictions.
    forced, running = (None if correction is None else Corrector(correction) for _ in range(2))
    rows: dict[str, list[Tensor]] = {}

    def add(name: str, row: Tensor) -> None:
        rows.setdefault(name, []).append(row)

    for index in range(len(trajectory.steps)):
        recorded = state_at(trajectory, index + 1).sample
        exact = _flat(recorded)
        error = _flat(advance(denoiser, trajectory, index, state_at(trajectory, index), forced).sample) - exact
        free = advance(denoiser, trajectory, index, free, running)
        add("one_step", _rms(error))
        add("accumulated", _rms(_flat(free.sample) - exact))
        add("cosine", _cosine(_flat(free.sample), exact))
        if before is not None:
            add("consecutive_cosine", _cosine(before, error))
        before = error
        if has_flat_field(recorded):
            for side, sample in (("candidate", free.sample), ("reference", recorded)):
                add(f"noise_level.{side}", noise_level(sample))
                add(f"white_point.{side}", white_point(sample))
    curves = {name: torch.stack(found) for name, found in rows.items()}
    return {"consecutive_cosine": torch.empty(0, curves["one_step"].shape[1], dtype=torch.float64)} | curves


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
