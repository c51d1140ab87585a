"""Corrections of the guided prediction, per step and channel, and the scheduler stand-in that applies them.

    corrected = gain * guided + carry * sample + offset + previous * before

`before` is what the denoiser predicted at the timestep before, as it came out of the network (guided, not corrected),
and 0 at the first timestep. The correction is applied before the scheduler sees the prediction, so multistep solvers
keep corrected predictions in their history.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepquant.errors import SpecError

__all__ = ["CORRECTION_FIELDS", "OPTIONAL_FIELDS", "CorrectedScheduler", "Corrector", "StepCorrection", "correction_of"]

CORRECTION_FIELDS = ("gain", "carry", "offset", "variance")

OPTIONAL_FIELDS = ("previous",)
"""Tables that a correction may do without."""


@dataclass(frozen=True, eq=False)
class StepCorrection:
    """Coefficients of every step and channel, float32 and finite.

    timesteps `[S]`: the distinct timesteps that the rows belong to, in the order of sampling. Solvers that call the
        denoiser twice at a timestep (Heun, PNDM) use the row twice.
    gain, carry, offset `[S, C]`: see the formula above. C is the channels of the prediction, or 1 for all of them.
    variance `[S, C]`: share of the step's own noise variance that quantization noise already supplies (PTQD), in
        [0, 1]. Kept with the others; a stochastic step that wants it reads it here.
    previous `[S, C]`: of the prediction at the timestep before. None where it is not used: then nothing is kept
        between steps.
    """

    timesteps: Tensor
    gain: Tensor
    carry: Tensor
    offset: Tensor
    variance: Tensor
    previous: Tensor | None = None

    def __post_init__(self) -> None:
        steps, shape = self.timesteps.shape, self.gain.shape
        if len(steps) != 1 or steps[0] == 0 or len(shape) != 2:
            raise SpecError(
                f"A correction has timesteps [S] and coefficients [S, C], found {list(steps)}, {list(shape)}."
            )
        if len(torch.unique(self.timesteps)) != len(self.timesteps):
            raise SpecError("The timesteps of a correction must be distinct: one row serves every call at a timestep.")
        for name, table in self.tables().items():
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

    def tables(self) -> dict[str, Tensor]:
        """The tensors by name, without those that are not there."""
        every = {name: getattr(self, name) for name in ("timesteps", *CORRECTION_FIELDS, *OPTIONAL_FIELDS)}
        return {name: table for name, table in every.items() if table is not None}

    def row(self, timestep: Tensor | float) -> int:
        """The row whose timestep is nearest: the step's own on the schedule that the correction was fitted on."""
        return int((self.timesteps - float(timestep)).abs().argmin())

    def apply(self, guided: Tensor, timestep: Tensor | float, sample: Tensor, before: Tensor | None = None) -> Tensor:
        """The corrected prediction, computed in float32 or wider, in the prediction's dtype.

        guided: `[B, C, ...]`, or `[B, T, C]` for latents that are sequences of tokens; sample: of the same shape.
        before: the prediction at the timestep before, of the same shape; None at the first.
        Raises SpecError if the channels differ from the correction's.
        """
        return self._applied(self.row(timestep), guided, sample, before)

    def _applied(self, row: int, guided: Tensor, sample: Tensor, before: Tensor | None) -> Tensor:
        axis = 2 if guided.ndim == 3 else 1
        channels = self.gain.shape[1]
        if channels not in (1, guided.shape[axis]) or guided.shape != sample.shape:
            raise SpecError(
                f"A correction of {channels} channels was given a prediction of shape {list(guided.shape)} and a "
                f"sample of shape {list(sample.shape)}: it was fitted for another denoiser."
            )
        shape = [1] * guided.ndim
        shape[axis] = channels

        def coefficient(table: Tensor) -> Tensor:
            return table[row].to(guided.device).reshape(shape)

        corrected = coefficient(self.gain) * guided + coefficient(self.carry) * sample + coefficient(self.offset)
        if self.previous is not None and before is not None:
            corrected = corrected + coefficient(self.previous) * before
        return corrected.to(guided.dtype)


class _Remembering:
    """Applies a correction step after step and remembers the predictions that its `previous` asks for.

    _latest: the last prediction, at the row `_row`; _before: the last one at the row before that. Two visits of a
    timestep (Heun, PNDM) are thus corrected with the same `before`.
    """

    _correction: StepCorrection
    _row: int | None = None
    _latest: Tensor | None = None
    _before: Tensor | None = None

    def _corrected(self, guided: Tensor, timestep: Any, sample: Tensor) -> Tensor:
        correction = self._correction
        row = correction.row(timestep)
        if correction.previous is None:
            return correction._applied(row, guided, sample, None)
        back_at_the_start = row == 0 and self._row not in (None, 0)
        if back_at_the_start or (self._latest is not None and self._latest.shape != guided.shape):
            self._forget()  # another sampling run has begun
        if row != self._row:
            self._before = self._latest
        self._row, self._latest = row, guided
        return correction._applied(row, guided, sample, self._before)

    def _forget(self) -> None:
        self._row = self._latest = self._before = None


class Corrector(_Remembering):
    """A correction on its way through one sampling run outside a scheduler; a new run takes a new corrector."""

    def __init__(self, correction: StepCorrection) -> None:
        self._correction = correction

    def __call__(self, guided: Tensor, timestep: Any, sample: Tensor) -> Tensor:
        """The corrected prediction; see `StepCorrection.apply`. Once for every step, in the order of sampling."""
        return self._corrected(guided, timestep, sample)


class CorrectedScheduler(_Remembering):
    """Stands in for a scheduler: corrects what `step` is given and forwards everything else.

    Reading and setting attributes reach the scheduler, except names that start with `_`: copying and pickling ask for
    those before the stand-in has any state, and forwarding them would recurse without end.
    """

    _schedule: Any = None

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
        return functools.update_wrapper(functools.partial(_corrected_step, self, inner), inner)

    def _start_anew_if_asked(self) -> None:
        """Forget the last run's predictions once `set_timesteps` has made a new list of timesteps."""
        # By identity: schedulers make a new list each time, and a copy's list is copied together with `_schedule`.
        schedule = getattr(self._scheduler, "timesteps", None)
        if schedule is not self._schedule:
            self._forget()
            self._schedule = schedule

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


def correction_of(scheduler: Any) -> StepCorrection | None:
    """What a pipeline's scheduler applies to predictions, None if nothing."""
    return scheduler.correction if isinstance(scheduler, CorrectedScheduler) else None


def _corrected_step(
    standing: CorrectedScheduler,
    inner: Any,
    model_output: Tensor,
    timestep: Any,
    sample: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    standing._start_anew_if_asked()
    return inner(standing._corrected(model_output, timestep, sample), timestep, sample, *args, **kwargs)
