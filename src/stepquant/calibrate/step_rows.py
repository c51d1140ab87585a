"""Which row of a correction every recorded step belongs to, and what the trajectories say about its shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stepquant.calibrate.steps import DenoiserCall
from stepquant.calibrate.trajectory import Trajectory, steps_where_nothing_happens
from stepquant.errors import CalibrationError, UnsupportedPipeline
from stepquant.model.layer import QuantizedLayer
from stepquant.model.surgery import execution_order, quantizable, quantized_layers

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
    def of(cls, trajectories: Sequence[Trajectory], denoiser: nn.Module, *, shared: bool = False) -> StepRows:
        """denoiser: that the trajectories are of, quantized or not.

        Raises CalibrationError for schedules that differ, UnsupportedPipeline if predictions and samples differ in
        shape, or if a row for each channel is to be fitted to predictions `[B, C, L]` of a one-dimensional convolution:
        what applies corrections takes three axes for tokens, `[B, T, C]`.
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
        if step.guided.ndim == 3 and not shared and _ends_in_convolution(denoiser, step.calls[0]):
            raise UnsupportedPipeline(
                f"The predictions of {type(denoiser).__name__}, of shape {list(step.guided.shape)}, come out of a "
                "one-dimensional convolution. Coefficients for each channel are for images, videos and tokens "
                "[B, T, C]; one for all channels fits here: `shared=True` of Compensate, "
                "`compensate --set shared=true`."
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


def _ends_in_convolution(denoiser: nn.Module, call: DenoiserCall) -> bool:
    """Whether the last layer of the call is a one-dimensional convolution, quantized or not."""
    layers = {**quantizable(denoiser), **quantized_layers(denoiser)}
    order = execution_order(denoiser, layers, call.args, call.kwargs)
    last = layers[order[-1]] if order else None
    if isinstance(last, QuantizedLayer):
        return last.geometry.kind == "conv1d"
    return isinstance(last, nn.Conv1d)
