"""Gains of the prediction and biases of the network's input, fitted step by step along the corrected trajectory.

For k = 0 .. S - 1, noise first, with x^_k the quantized model's state before step k, x_k the recorded sample of full
precision, eps^_k the quantized guided prediction for the corrected input, and eps_k the full-precision one, as it was
recorded for x_k ("trajectory") or for the same corrected input ("input"):

    input bias    B_k = mean over images and positions of x^_k - x_k, by channel (k > 0);      x^_k <- x^_k - B_k
    gain          K_k = the K below, by channel, mean over images
    go on         x^_{k+1} = the sampler's step from x^_k with K_k eps^_k

so that what a step is fitted on has been corrected in all steps before it. K minimises, over an image's elements of one
channel where |eps| > tau mean |eps|, with N elements in the whole image,

    L(K) = (1 - l1) sum (K eps^ - eps)^2 + l1 N sum ((K eps^ - eps) / eps)^2 + l2 N (K - 1)^2

           (1 - l1) sum eps^ eps + l1 N sum eps^ / eps     + l2 N
    K    = ------------------------------------------------------
           (1 - l1) sum eps^^2   + l1 N sum eps^^2 / eps^2 + l2 N

The first term is the absolute error, the second the relative one, the third keeps K near 1. Once the two runs have
come apart, eps_k for x_k also asks for what no K can give, which makes the best K smaller.

Source: Yao et al. 2024 (TAC-Diffusion, arXiv:2407.03917).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from stepquant.calibrate.step_rows import StepRows
from stepquant.calibrate.trajectory import State, Trajectory, follow, predict, state_at
from stepquant.errors import CalibrationError, SpecError
from stepquant.model.correction import StepCorrection
from stepquant.recipe import Figures, Job

__all__ = ["CorrectProgressively", "GainTarget", "gains"]

GainTarget = Literal["trajectory", "input"]
"""What a gain brings the quantized prediction near to: the exact one on its own trajectory, or for the same input."""


@dataclass(frozen=True)
class CorrectProgressively:
    """Fit gains of the prediction and input biases along the quantized model's corrected trajectory.

    relative: l1 of the module's docstring, from 0 to 1. nearness: l2, at least 0. threshold: tau, at least 0.
    target: which eps_k; "input" runs the full-precision network once more for each step.
    gain, input_bias: whether to fit that part.

    A timestep that comes several times (PNDM, Heun) has one gain, from its first time, and no bias behind it; the
    figures name these timesteps. It goes last in a recipe: it corrects the model as it finds it.
    """

    relative: float = 0.5
    nearness: float = 0.1
    threshold: float = 1.0
    target: GainTarget = "trajectory"
    gain: bool = True
    input_bias: bool = True

    needs: ClassVar[frozenset[str]] = frozenset({"trajectories", "model"})
    gives: ClassVar[frozenset[str]] = frozenset({"correction"})

    def __post_init__(self) -> None:
        if not 0 <= self.relative <= 1:
            raise SpecError(f"relative is a share from 0 to 1, found {self.relative}.")
        for name, value in (("nearness", self.nearness), ("threshold", self.threshold)):
            if not (math.isfinite(value) and value >= 0):
                raise SpecError(f"{name} must be 0 or more, found {value}.")
        if not (self.gain or self.input_bias):
            raise SpecError("Nothing to fit: gain and input_bias are both off. Leave the stage out instead.")

    def run(self, job: Job) -> Figures:
        trajectories: list[Trajectory] = job.handed["trajectories"]
        walk = _Walk.begin(self, StepRows.of(trajectories, job.full_precision), trajectories)
        with job.run.progress.track("Correcting step by step", len(walk.rows.of_step)) as advance, torch.no_grad():
            for index in range(len(walk.rows.of_step)):
                walk.step(job, index)
                advance(1)
        job.handed["correction"] = walk.correction()
        return {
            "gain": walk.gain.mean(dim=1).tolist(),
            "input_bias": walk.shift.square().mean(dim=1).sqrt().tolist(),
            "without_input_bias": walk.unshifted() if self.input_bias else [],
            "final_error": walk.final_error(),
            "evaluations": walk.evaluations,
        }


def gains(quantized: Tensor, exact: Tensor, *, relative: float, nearness: float, threshold: float) -> Tensor:
    """K of every image and channel, `[B, C]` float64; 1 where nothing is above the threshold and `nearness` is 0.

    quantized, exact: predictions `[B, C, positions]`.
    """
    quantized, exact = quantized.double(), exact.double()
    size = exact.abs()
    kept = size > threshold * size.mean(dim=(1, 2), keepdim=True)
    ratio = torch.where(kept, quantized / exact, torch.zeros_like(exact))
    count = exact[0].numel()
    above = (1 - relative) * (kept * quantized * exact).sum(2) + relative * count * ratio.sum(2) + nearness * count
    below = (1 - relative) * (kept * quantized.square()).sum(2) + relative * count * ratio.square().sum(2)
    below = below + nearness * count
    return torch.where(below > 0, above / below.clamp_min(1e-300), torch.ones_like(above))


@dataclass
class _Walk:
    """Where the quantized model has come to, and the coefficients so far, float32 `[S, C]`.

    shift: of a row is what is added to the sample that its step returns.
    states: of each trajectory, before the next step.
    """

    stage: CorrectProgressively
    rows: StepRows
    trajectories: Sequence[Trajectory]
    gain: Tensor
    shift: Tensor
    states: list[State]
    fitted: set[int]
    evaluations: int = 0

    @classmethod
    def begin(cls, stage: CorrectProgressively, rows: StepRows, trajectories: Sequence[Trajectory]) -> _Walk:
        shape = (len(rows.timesteps), rows.channels)
        states = [state_at(trajectory, 0) for trajectory in trajectories]
        return cls(stage, rows, trajectories, torch.ones(shape), torch.zeros(shape), states, set())

    def step(self, job: Job, index: int) -> None:
        """Fit step `index` and take it; then the bias of what it leads to, unless it is the last."""
        row = self.rows.of_step[index]
        predictions = [
            predict(job.denoiser, trajectory, index, state)
            for trajectory, state in zip(self.trajectories, self.states, strict=True)
        ]
        self._count()
        if self.stage.gain and row not in self.fitted and index not in self.rows.idle:
            self.gain[row] = self._gain(predictions, self._targets(job, index))
            self.fitted.add(row)
        self._check(row, index)
        correction = self._row(row)
        for number, (trajectory, prediction) in enumerate(zip(self.trajectories, predictions, strict=True)):
            step, state = trajectory.steps[index], self.states[number]
            given = correction.apply(prediction, step.timestep, state.sample)
            self.states[number] = follow(trajectory, index, state, given)
        if self.stage.input_bias and index + 1 < len(self.rows.of_step) and self._once(row):
            self.shift[row] = -self._bias(index + 1)
            self._check(row, index)
            self.states = [
                State(self._moved(trajectory, state.sample, row), state.history)
                for trajectory, state in zip(self.trajectories, self.states, strict=True)
            ]

    def _count(self) -> None:
        self.evaluations += sum(trajectory.evaluations // len(trajectory.steps) for trajectory in self.trajectories)

    def _targets(self, job: Job, index: int) -> list[Tensor]:
        """eps_k of every trajectory."""
        if self.stage.target == "trajectory":
            return [trajectory.steps[index].guided for trajectory in self.trajectories]
        self._count()
        return [
            predict(job.full_precision, trajectory, index, state)
            for trajectory, state in zip(self.trajectories, self.states, strict=True)
        ]

    def _gain(self, predictions: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        found = [
            gains(
                prediction,
                target,
                relative=self.stage.relative,
                nearness=self.stage.nearness,
                threshold=self.stage.threshold,
            )
            for trajectory, *both in zip(self.trajectories, predictions, targets, strict=True)
            for prediction, target in zip(*(self._positions(one, trajectory.painted) for one in both), strict=True)
        ]
        return torch.cat(found).mean(dim=0).float().cpu()

    def _bias(self, index: int) -> Tensor:
        """Mean `[C]` of what the states before step `index` differ from the recorded samples by."""
        differences = [
            self.rows.by_channel(state.sample.double() - trajectory.steps[index].sample.double(), trajectory.painted)
            for trajectory, state in zip(self.trajectories, self.states, strict=True)
        ]
        return torch.cat(differences, dim=1).mean(dim=1).float().cpu()

    def _positions(self, sample: Tensor, painted: Tensor | None) -> list[Tensor]:
        """`[B, C, ...]` or `[B, T, C]` -> `[B, C, positions]`, or `[1, C, positions]` of each image where the sampler
        has a part of them only.
        """
        values = sample.movedim(self.rows.axis, 1).flatten(2)
        if painted is None:
            return [values]
        kept = painted.to(sample.device).expand_as(sample).movedim(self.rows.axis, 1).flatten(2)[:, 0]
        return [own[None, :, where] for own, where in zip(values, kept, strict=True)]

    def _moved(self, trajectory: Trajectory, sample: Tensor, row: int) -> Tensor:
        """The sample with the row's shift, but for the known part of a picture, which the pipeline writes anew."""
        shape = [1] * sample.ndim
        shape[self.rows.axis] = self.rows.channels
        moved = (sample + self.shift[row].to(sample.device).reshape(shape)).to(sample.dtype)
        return moved if trajectory.painted is None else torch.where(trajectory.painted, moved, sample)

    def _once(self, row: int) -> bool:
        """Whether the sampling run comes to this timestep only once."""
        return self.rows.of_step.count(row) == 1

    def _check(self, row: int, index: int) -> None:
        if not bool(torch.isfinite(self.gain[row]).all() and torch.isfinite(self.shift[row]).all()):
            raise CalibrationError(
                f"Step {index}: the correction is not finite, because the quantized chain has left the finite numbers. "
                "Its activation ranges are damaged, or a larger `nearness` must hold the gains near 1."
            )

    def unshifted(self) -> list[float]:
        """Timesteps behind which no bias is corrected, because the run comes to them more than once."""
        return [float(self.rows.timesteps[row]) for row in sorted(set(self.rows.of_step)) if not self._once(row)]

    def _row(self, row: int) -> StepCorrection:
        """The gain of one row, as a correction of its own."""
        identity = StepCorrection.identity(self.rows.timesteps[row : row + 1], self.rows.channels)
        gain = self.gain[row : row + 1].clone()
        return StepCorrection(identity.timesteps, gain, identity.carry, identity.offset, identity.variance)

    def correction(self) -> StepCorrection:
        """All rows."""
        zeros = torch.zeros_like(self.gain)
        shift = self.shift if bool((self.shift != 0).any()) else None
        return StepCorrection(self.rows.timesteps, self.gain, zeros, zeros.clone(), zeros.clone(), None, shift)

    def final_error(self) -> float:
        """Root mean square of where the corrected model ends, from where full precision did, over all images."""
        ends = [
            self.rows.by_channel(
                (state.sample.double() - trajectory.steps[-1].next_sample.double()).square(), trajectory.painted
            )
            .flatten()
            .cpu()
            for trajectory, state in zip(self.trajectories, self.states, strict=True)
        ]
        return math.sqrt(float(torch.cat(ends).mean()))
