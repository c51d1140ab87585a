"""Judging a calibrated network by where sampling ends.

What lowers an error at recorded states need not lower the error of the final samples, so stages that can go only part
of the way, or not at all, ask here. Some recorded images are sampled with the quantized network as it is, and with n
the values of an image

    e_i = |y_K - x_K| / sqrt(n)         y_K the final sample of image i, x_K the recorded full-precision one

A candidate is better than another where the mean of its e_i is less by more than the standard error of the paired
difference: so noise alone rarely decides, and where nothing is gained nothing is changed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stepquant.calibrate.final_state import final_drifts, final_states
from stepquant.calibrate.trajectory import Trajectory
from stepquant.recipe import Job

__all__ = ["Judge", "clearly_less", "judged_images"]


def judged_images(asked: int, *, images: int, batch: int) -> int:
    """How many images of so many that were recorded in mini-batches of `batch` are sampled: whole mini-batches."""
    return min(images, -(-asked // batch) * batch)


def clearly_less(errors: Tensor, others: Tensor) -> bool:
    """Whether the mean of `errors` is less, by more than the standard error of the paired difference; each `[images]`.

    Finite errors are less than any that are not.
    """
    if not others.isfinite().all():
        return bool(errors.isfinite().all())
    difference = errors - others
    noise = float(difference.std()) / math.sqrt(len(difference)) if len(difference) > 1 else 0.0
    return float(difference.mean()) < -noise


@dataclass
class Judge:
    """Final errors of sampling, by candidate. A candidate is a number: how far a stage has gone.

    trajectories: recorded; what is sampled again. errors: candidate -> e_i, `[images]` float64.
    """

    job: Job
    trajectories: Sequence[Trajectory]
    errors: dict[float, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, job: Job, asked: int) -> Judge:
        """asked: images, at least. Whole mini-batches of the recording are sampled, its last: `Select` begins with the
        first."""
        recorded: Sequence[Trajectory] = job.handed["trajectories"][::-1]
        images = list(itertools.accumulate(len(trajectory.seeds) for trajectory in recorded))
        enough = sum(count < asked for count in images) + 1
        return cls(job, recorded[:enough])

    @property
    def images(self) -> int:
        """That every candidate samples."""
        return sum(len(trajectory.seeds) for trajectory in self.trajectories)

    @property
    def evaluations(self) -> int:
        """Of the network up to now, in rows of its calls."""
        return len(self.errors) * sum(trajectory.evaluations for trajectory in self.trajectories)

    def sample(self, candidate: float, advance: Callable[[int], None]) -> None:
        """Sample with the job's denoiser as it is now. advance: called with a mini-batch's number of images.

        Several processes share the mini-batches, and all of them have all errors, so that they choose alike.
        """
        found = []
        for errors in self.job.run.processes.in_turn(self._final_errors, self.trajectories):
            found.append(errors)
            advance(len(errors))
        self.errors[candidate] = torch.cat(found)

    def _final_errors(self, trajectory: Trajectory) -> Tensor:
        drifts = final_drifts(final_states(self.job.denoiser, [trajectory]), [trajectory])
        # A pipeline that carries doubled latents (DiT with guidance) has every image twice.
        return drifts.reshape(-1, len(trajectory.seeds)).mean(0)

    def better(self, candidate: float, other: float) -> bool:
        """Whether its errors are less in the mean, by more than the standard error of the difference."""
        return clearly_less(self.errors[candidate], self.errors[other])

    def finite(self, candidate: float) -> bool:
        """Whether sampling ended in finite numbers."""
        return bool(self.errors[candidate].isfinite().all())

    def report(self, name: str) -> list[dict[str, float | None]]:
        """What was tried, in order, under this name; an error is null where the samples left the finite numbers."""
        means = {candidate: float(errors.mean()) for candidate, errors in self.errors.items()}
        return [
            {name: candidate, "final_error": mean if math.isfinite(mean) else None} for candidate, mean in means.items()
        ]
