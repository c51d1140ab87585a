"""Corrections of the guided prediction, per step and channel, and the scheduler stand-in that applies them.

    corrected = gain * guided + carry * sample + offset

It is applied before the scheduler sees the prediction, so multistep solvers keep corrected predictions in their
history.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepquant.errors import SpecError

__all__ = ["CORRECTION_FIELDS", "CorrectedScheduler", "StepCorrection"]

CORRECTION_FIELDS = ("gain", "carry", "offset", "variance")


@dataclass(frozen=True, eq=False)
class StepCorrection:
    """Coefficients of every step and channel, float32 and finite.

    timesteps `[S]`: the distinct timesteps that the rows belong to, in the order of sampling. Solvers that call the
        denoiser twice at a timestep (Heun, PNDM) use the row twice.
    gain, carry, offset `[S, C]`: see the formula above. C is the channels of the prediction, or 1 for all of them.
    variance `[S, C]`: share of the step's own noise variance that quantization noise already supplies (PTQD), in
        [0, 1]. Kept with the others; a stochastic step that wants it reads it here.
    """

    timesteps: Tensor
    gain: Tensor
    carry: Tensor
    offset: Tensor
    variance: Tensor

    def __post_init__(self) -> None:
        steps, shape = self.timesteps.shape, self.gain.shape
        if len(steps) != 1 or steps[0] == 0 or len(shape) != 2:
            raise SpecError(
                f"A correction has timesteps [S] and coefficients [S, C], found {list(steps)}, {list(shape)}."
            )
        if len(torch.unique(self.timesteps)) != len(self.timesteps):
            raise SpecError("The timesteps of a correction must be distinct: one row serves every call at a timestep.")
        for name in ("timesteps", *CORRECTION_FIELDS):
            table: Tensor = getattr(self, name)
            if name != "timesteps" and (table.shape != shape or shape[0] != steps[0]):
                raise SpecError(
                    f"{name} of a correction has shape {list(table.shape)}, expected {[steps[0], shape[1]]}."
                )
            if table.dtype != torch.float32 or not bool(torch.isfinite(table).all()):
                raise SpecError(f"{name} of a correction must be finite float32, found {table.dtype}.")

    @classmethod
    def identity(cls, timesteps: Tensor, channels: int) -> StepCorrection:
        """The correction that changes nothing."""
        ones = torch.ones(len(timesteps), channels)
        zeros = torch.zeros_like(ones)
        return cls(timesteps.detach().float().cpu(), ones, zeros, zeros.clone(), zeros.clone())

    def row(self, timestep: Tensor | float) -> int:
        """The row whose timestep is nearest: the step's own on the schedule that the correction was fitted on."""
        return int((self.timesteps - float(timestep)).abs().argmin())

    def apply(self, guided: Tensor, timestep: Tensor | float, sample: Tensor) -> Tensor:
        """The corrected prediction, in the prediction's dtype.

        guided: `[B, C, ...]`, or `[B, T, C]` for latents that are sequences of tokens; sample: of the same shape.
        Raises SpecError if the channels differ from the correction's.
        """
        axis = 2 if guided.ndim == 3 else 1
        channels = self.gain.shape[1]
        if channels not in (1, guided.shape[axis]) or guided.shape != sample.shape:
            raise SpecError(
                f"A correction of {channels} channels was given a prediction of shape {list(guided.shape)} and a "
                f"sample of shape {list(sample.shape)}: it was fitted for another denoiser."
            )
        row, shape = self.row(timestep), [1] * guided.ndim
        shape[axis] = channels

        def coefficient(table: Tensor) -> Tensor:
            return table[row].to(guided.device).reshape(shape)

        corrected = coefficient(self.gain) * guided + coefficient(self.carry) * sample + coefficient(self.offset)
        return corrected.to(guided.dtype)


class CorrectedScheduler:
    """Stands in for a scheduler: corrects what `step` is given and forwards everything else.

    Reading and setting attributes reach the scheduler, except names that start with `_`: copying and pickling ask for
    those before the stand-in has any state, and forwarding them would recurse without end.
    """

    def __init__(self, scheduler: Any, correction: StepCorrection) -> None:
        self._scheduler = scheduler
        self._correction = correction

    @property
    def correction(self) -> StepCorrection:
        """The coefficients."""
        return self._correction

    @property
    def uncorrected(self) -> Any:
        """The scheduler behind this stand-in."""
        return self._scheduler

    @property
    def step(self) -> Any:
        """The scheduler's `step` on the corrected prediction, with the scheduler's own signature.

        Pipelines look into the signature to find out whether `eta` and `generator` may be passed.
        """
        inner = self._scheduler.step
        return functools.update_wrapper(functools.partial(_corrected_step, inner, self._correction), inner)

    def __len__(self) -> int:
        return len(self._scheduler)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}.")
        return getattr(self._scheduler, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            object.__setattr__(self, name, value)
        else:
            setattr(self._scheduler, name, value)


def _corrected_step(
    inner: Any,
    correction: StepCorrection,
    model_output: Tensor,
    timestep: Any,
    sample: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    return inner(correction.apply(model_output, timestep, sample), timestep, sample, *args, **kwargs)
