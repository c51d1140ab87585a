"""Calibration samples at timesteps that are drawn from a distribution.

    u ~ U(0, 1),   x = F^-1(u),   step = floor(T x), held to 0 .. T - 1, counted from the image

    normal   x ~ N(mean, std^2)        Shang et al. 2023 (PTQ4DM); Ye et al. 2025 (PQD): mean = std = 0.4
    beta     x ~ Beta(alpha, beta)     Lee et al. 2024 (Beta sampling): alpha = beta = 0.6, dense at both ends

T is the number of recorded steps. Steps of the sampling run are what is drawn, as in PTQ4DM's public code, which counts
them in the respaced schedule: with unevenly spaced timesteps these are not shares of the training time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from stepquant.calibrate.select import at_steps
from stepquant.calibrate.trajectory import Trajectory
from stepquant.errors import SpecError, nearest
from stepquant.model.beta_schedule import BETA_SHAPE, beta_quantile
from stepquant.recipe import Figures, Job

__all__ = ["Distribution", "SelectDrawn", "drawn_steps"]

Distribution = Literal["normal", "beta"]


def drawn_steps(positions: Tensor, steps: int) -> list[int]:
    """Step indices, noise first, of positions `[N]` in [0, 1] from the image; what lies outside is held to the ends."""
    from_image = (positions * steps).floor().clamp(0, steps - 1)
    return [steps - 1 - int(index) for index in from_image.tolist()]


@dataclass(frozen=True)
class SelectDrawn:
    """Calibrate each recorded image at a step that is drawn for it, with both halves of its guidance.

    distribution: of the step's place between the image (0) and the noise (1).
    mean, std: of "normal". alpha, beta: of "beta".
    draws: samples to draw, the images in turn; None draws one for each image, as the papers do. One that is drawn twice
        for the same image counts twice.
    """

    distribution: Distribution = "normal"
    mean: float = 0.4
    std: float = 0.4
    alpha: float = BETA_SHAPE
    beta: float = BETA_SHAPE
    draws: int | None = None

    needs: ClassVar[frozenset[str]] = frozenset({"trajectories"})
    gives: ClassVar[frozenset[str]] = frozenset({"calibration"})

    def __post_init__(self) -> None:
        allowed = get_args(Distribution)
        if self.distribution not in allowed:
            raise SpecError(
                f"distribution must be one of {', '.join(allowed)}, found {self.distribution!r}."
                f"{nearest(str(self.distribution), allowed)}"
            )
        if not 0 <= self.mean <= 1 or self.std <= 0:
            raise SpecError(
                f"mean must lie in [0, 1] and std above 0, in shares of the schedule; found {self.mean} and {self.std}."
            )
        if self.draws is not None and self.draws < 1:
            raise SpecError(f"draws must be at least 1, found {self.draws}.")
        beta_quantile(torch.zeros(1), self.alpha, self.beta)

    def run(self, job: Job) -> Figures:
        trajectories: list[Trajectory] = job.handed["trajectories"]
        steps = len(trajectories[0].steps)
        images = sum(trajectory.images for trajectory in trajectories)
        u = torch.rand(self.draws or images, generator=job.run.generator("drawn"), dtype=torch.float64)
        places = drawn_steps(self.positions(u), steps)
        chosen = at_steps(trajectories, [(step, number % images) for number, step in enumerate(places)])
        job.handed["calibration"] = chosen
        return {"samples": len(chosen), "counts": [places.count(step) for step in range(steps)], "evaluations": 0}

    def positions(self, u: Tensor) -> Tensor:
        """F^-1 of numbers u in (0, 1), float64; a normal position may lie outside of [0, 1]."""
        if self.distribution == "beta":
            return beta_quantile(u, self.alpha, self.beta)
        standard: Tensor = torch.special.ndtri(u.double())
        return self.mean + self.std * standard
