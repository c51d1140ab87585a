"""Which row of a correction every recorded step belongs to, and what the trajectories say about its shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stepquant.calibrate.trajectory import Trajectory, steps_where_nothing_happens
from stepquant.errors import CalibrationError, UnsupportedPipeline

__all__ = ["StepRows"]


@dataclass(frozen=True, eq=False)
class StepRows:
    """The rows of a correction for trajectories of one schedule.

    timesteps `[S]`: distinct ones, in the order of sampling. of_step: the row of every recorded step.
    idle: steps that change nothing and teach nothing.
    channels, axis: of the prediction; channels is 1 if coefficients are shared by all.
    """

    timesteps: Tensor
    of_step: tuple[int, ...]
    idle: frozenset[int]
    channels: int
    axis: int
    shared: bool

    @classmethod
    def of(cls, trajectories: Sequence[Trajectory], *, shared: bool = False) -> StepRows:
        """Raises CalibrationError for schedules that differ, UnsupportedPipeline if predictions and samples differ in
        shape.
        """
        schedules = {tuple(float(step.timestep) for step in trajectory.steps) for trajectory in trajectories}
        if len(schedules) != 1:
            raise CalibrationError(
                f"A correction is fitted to trajectories of one schedule; got {len(trajectories)} trajectories of "
                f"{len(schedules)} schedules."
            )
        step = trajectories[0].steps[0]
        if step.guided.shape != step.sample.shape:
            raise UnsupportedPipeline(
                f"The scheduler is given predictions of shape {list(step.guided.shape)} for samples of shape "
                f"{list(step.sample.shape)}, and a correction needs equal ones. A learned variance must be dropped "
                "before the scheduler."
            )
        (values,) = schedules
        distinct = list(dict.fromkeys(values))
        axis = 2 if step.guided.ndim == 3 else 1
        return cls(
            timesteps=torch.tensor(distinct, dtype=torch.float32),
            of_step=tuple(distinct.index(value) for value in values),
            idle=frozenset(steps_where_nothing_happens(trajectories[0])),
            channels=1 if shared else step.guided.shape[axis],
            axis=axis,
            shared=shared,
        )

    def by_channel(self, tensor: Tensor, painted: Tensor | None = None) -> Tensor:
        """`[B, C, ...]` or `[B, T, C]` -> `[C, values]`; one row if coefficients are shared.

        painted: as `Trajectory.painted`; values of other positions, which the pipeline writes over, are left out.
        """
        rows = tensor.reshape(1, -1) if self.shared else tensor.movedim(self.axis, 0).flatten(1)
        if painted is None:
            return rows
        kept: Tensor = self.by_channel(painted.to(tensor.device).expand_as(tensor))
        return rows[:, kept[0]]
