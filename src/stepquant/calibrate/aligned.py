"""Progressively aligned rounding: round again on what the quantized model itself samples.

    repeat `rounds` times:   sample with the quantized model, from noise of its own
                             round layers and fit activation ranges again on these inputs, full precision is the target

A model that is calibrated on full-precision samples meets others at run time, which its own errors have moved.

Source: TCAQ-DM (arXiv:2412.16700), progressively aligned reconstruction; which rounding is repeated, and how often, is
ours.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from stepquant.calibrate.gram import RoundLayers
from stepquant.calibrate.ranges import RangeRule
from stepquant.calibrate.stages import FitInputRanges, calibration_seeds
from stepquant.calibrate.trajectory import Trajectory, record, seal
from stepquant.errors import SpecError
from stepquant.model.families import name_of_denoiser
from stepquant.recipe import Figures, Job

__all__ = ["AlignLayers"]


@dataclass(frozen=True)
class AlignLayers:
    """Sample with the quantized model, then round layers and fit activation ranges again; `rounds` times.

    Each round has as many samples as were recorded, from noise that no other round had.
    samples, batch, together: of `RoundLayers`. ranges, windows: of `FitInputRanges`.
    Later stages see the full-precision trajectories as before.
    """

    rounds: int = 2
    samples: int = 64
    batch: int = 32
    together: int = 1
    ranges: RangeRule = "mse"
    windows: tuple[int, ...] | Literal["step"] | None = None

    needs: ClassVar[frozenset[str]] = frozenset({"trajectories", "calibration", "plan", "model"})
    gives: ClassVar[frozenset[str]] = frozenset({"model"})
    replaces_input_quantizers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise SpecError(f"rounds must be at least 1, found {self.rounds}.")
        RoundLayers(samples=self.samples, batch=self.batch, together=self.together)  # checks its settings
        FitInputRanges(self.ranges, windows=self.windows)

    def run(self, job: Job) -> Figures:
        rounding = RoundLayers(samples=self.samples, batch=self.batch, together=self.together)
        fitting = FitInputRanges(self.ranges, windows=self.windows)
        entries: list[Any] = []
        evaluations = 0
        for number in range(1, self.rounds + 1):
            trajectories = self._sampled(job, number)
            evaluations += sum(one.evaluations for one in trajectories)
            # Without a keeper: what it keeps has no place for the round.
            inner = replace(job, handed={**job.handed, "trajectories": trajectories}, keeper=None)
            rounded, ranged = rounding.run(inner), fitting.run(inner)
            evaluations += rounded["evaluations"] + ranged["evaluations"]
            losses = rounded["losses"].values()
            entries.append({key: sum(entry[key] for entry in losses) for key in ("before", "after")})
        return {"rounds": entries, "evaluations": evaluations}

    def _sampled(self, job: Job, number: int) -> list[Trajectory]:
        """Trajectories of the quantized model, of the size and grouping of the recorded ones."""
        known: list[Trajectory] = job.handed["trajectories"]
        count = sum(len(one.seeds) for one in known)
        seeds = calibration_seeds(job.run.seed, count * (number + 1))[count * number :]
        name = name_of_denoiser(job.pipe, job.full_precision)
        pipe = copy.copy(job.pipe)
        setattr(pipe, name, job.denoiser)
        pipe.scheduler = copy.deepcopy(job.pipe.scheduler)
        found = record(
            pipe,
            job.denoiser,
            seeds=seeds,
            steps=job.steps,
            batch_size=len(known[0].seeds),
            arguments=job.arguments,
            run=job.run,
        )
        return [seal(trajectory) for trajectory in found]
