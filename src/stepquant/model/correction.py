"""Corrections of a sampling step, per step and channel, and the scheduler stand-in that applies them.

    corrected   = gain * guided + carry * sample + offset + previous * before
    next sample = scheduler's step from `corrected`, with sqrt(1 - variance) of its noise, + shift

`before` is what the denoiser predicted at the timestep before, as it came out of the network (guided, not corrected),
and 0 at the first timestep. The correction is applied before the scheduler sees the prediction, so multistep solvers
keep corrected predictions in their history. The mean that the scheduler puts its noise around stays as it is.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepquant.errors import SpecError, UnsupportedPipeline
from stepquant.model.schedule import guarded_by, same_timestep

__all__ = [
    "CORRECTION_FIELDS",
    "OPTIONAL_FIELDS",
    "CorrectedScheduler",
    "Corrector",
    "Finishing",
    "StepCorrection",
    "correction_of",
    "noise_can_be_scaled",
]

CORRECTION_FIELDS = ("gain", "carry", "offset", "variance")

OPTIONAL_FIELDS = ("previous", "shift")
"""Tables that a correction may do without."""

SCALABLE = ("DDIMScheduler", "DDPMScheduler")
"""Schedulers whose step adds its noise to a mean and keeps nothing for the next one, so that it may be asked twice."""


@dataclass(frozen=True, eq=False)
class StepCorrection:
    """Coefficients of every step and channel, float32 and finite.

    timesteps `[S]`: the distinct timesteps that the rows belong to, in the order of sampling. Solvers that call the
        denoiser twice at a timestep (Heun, PNDM) use the row twice.
    gain, carry, offset `[S, C]`: see the formula above. C is the channels of the prediction, or 1 for all of them.
    variance `[S, C]`: share of the step's own noise variance that quantization noise already supplies (PTQD), in
        [0, 1]; what the scheduler adds is less by it. Of no effect where the scheduler adds nothing (DDIM with eta 0).
    previous `[S, C]`: of the prediction at the timestep before. None where it is not used: then nothing is kept
        between steps.
    shift `[S, C]`: added to the sample that the step returns, so that the denoiser reads it at the next timestep (the
        input bias of TAC, with the other sign); once, where several steps in a row use it. None where it is not used.
    """

    timesteps: Tensor
    gain: Tensor
    carry: Tensor
    offset: Tensor
    variance: Tensor
    previous: Tensor | None = None
    shift: Tensor | None = None

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
        if not bool(((self.variance >= 0) & (self.variance <= 1)).all()):
            raise SpecError(
                f"variance of a correction is a share from 0 to 1, found {float(self.variance.min()):g} to "
                f"{float(self.variance.max()):g}."
            )

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

    @property
    def additions(self) -> list[str]:
        """What this correction has that format version 1 does not know."""
        found = {
            "less noise in the steps": self.scales_noise,
            "a shift of the sample": self.shift is not None,
        }
        return [words for words, there in found.items() if there]

    @property
    def scales_noise(self) -> bool:
        """Whether any step adds less noise than its scheduler would."""
        return bool((self.variance != 0).any())

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
        channels = self.gain.shape[1]
        if channels not in (1, guided.shape[_channel_axis(guided)]) or guided.shape != sample.shape:
            raise SpecError(
                f"A correction of {channels} channels was given a prediction of shape {list(guided.shape)} and a "
                f"sample of shape {list(sample.shape)}: it was fitted for another denoiser."
            )

        def coefficient(table: Tensor) -> Tensor:
            return _beside(table[row], guided)

        corrected = coefficient(self.gain) * guided + coefficient(self.carry) * sample + coefficient(self.offset)
        if self.previous is not None and before is not None:
            corrected = corrected + coefficient(self.previous) * before
        return corrected.to(guided.dtype)

    def finish(
        self, step: Callable[..., Any], guided: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """What `step` of a scheduler returns, with this correction's noise and shift.

        guided: corrected already. args, kwargs: the others of `step`.
        The noise is that of the same step, from the same generators, of a prediction and a sample that are 0.
        """
        return self._finished(True, step, guided, timestep, sample, *args, **kwargs)

    def _finished(
        self,
        shifted: bool,
        step: Callable[..., Any],
        guided: Tensor,
        timestep: Any,
        sample: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """shifted: whether the row's shift is still to be added."""
        row = self.row(timestep)
        share, shift = self.variance[row], self.shift[row] if shifted and self.shift is not None else None
        change: Tensor | None = None
        if bool((share != 0).any()):
            with torch.no_grad(), _rewound(step, guided, timestep, sample, *args, **kwargs):
                nothing = torch.zeros_like(guided), timestep, torch.zeros_like(sample)
                noise = _sample_in(step(*nothing, *args, **kwargs))
            change = _beside((1 - share).sqrt() - 1, noise) * noise
        if shift is not None and bool((shift != 0).any()):
            moved = _beside(shift, sample)
            change = moved if change is None else change + moved
        result = step(guided, timestep, sample, *args, **kwargs)
        if change is None:
            return result
        found = _sample_in(result)
        return _with_sample(result, (found + change).to(found.dtype))


def _channel_axis(sample: Tensor) -> int:
    """Of `[B, C, ...]`, or `[B, T, C]` for sequences of tokens."""
    return 2 if sample.ndim == 3 else 1


def _beside(row: Tensor, sample: Tensor) -> Tensor:
    """One row `[C]` of a table, so that it broadcasts against the sample."""
    shape = [1] * sample.ndim
    shape[_channel_axis(sample)] = len(row)
    return row.to(sample.device).reshape(shape)


def _sample_in(result: Any) -> Tensor:
    """The new sample in what `step` of a scheduler returned, with `return_dict` or without."""
    found: Tensor = result[0] if isinstance(result, tuple) else result.prev_sample
    return found


def _with_sample(result: Any, sample: Tensor) -> Any:
    """What `step` returned, with this new sample."""
    if isinstance(result, tuple):
        return (sample, *result[1:])
    result.prev_sample = sample
    return result


@contextmanager
def _rewound(step: Callable[..., Any], *args: Any, **kwargs: Any) -> Iterator[None]:
    """Inside, `step` may draw; afterwards its generators, or torch's global ones, are where they were."""
    given = inspect.signature(step).bind_partial(*args, **kwargs).arguments.get("generator")
    if given is None:
        device = args[0].device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
        return
    generators = list(given) if isinstance(given, list | tuple) else [given]
    states = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


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

    @property
    def correction(self) -> StepCorrection:
        """The coefficients."""
        return self._correction

    def __call__(self, guided: Tensor, timestep: Any, sample: Tensor) -> Tensor:
        """The corrected prediction; see `StepCorrection.apply`. Once for every step, in the order of sampling."""
        return self._corrected(guided, timestep, sample)


class Finishing:
    """Stands in for a scheduler that is given predictions corrected already: the correction's noise and shift."""

    def __init__(self, scheduler: Any, correction: StepCorrection) -> None:
        self._scheduler = scheduler
        self._correction = correction

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **kwargs: Any) -> Any:
        """The scheduler's step; see `StepCorrection.finish`."""
        return self._correction.finish(self._scheduler.step, model_output, timestep, sample, **kwargs)


class CorrectedScheduler(_Remembering):
    """Stands in for a scheduler: corrects what `step` is given and returns, and forwards everything else.

    Reading and setting attributes reach the scheduler, except names that start with `_`: copying and pickling ask for
    those before the stand-in has any state, and forwarding them would recurse without end.

    Raises UnsupportedPipeline for a correction that lessens the noise of a scheduler whose noise cannot be scaled.
    """

    _schedule: Any = None
    _shifted: int | None = None  # the row whose shift the sample has

    def __init__(self, scheduler: Any, correction: StepCorrection) -> None:
        if correction.scales_noise and not noise_can_be_scaled(scheduler):
            raise UnsupportedPipeline(
                f"The correction lessens the noise of every step, which is possible with {' and '.join(SCALABLE)}, and "
                f"the scheduler is {type(getattr(scheduler, 'uncorrected', scheduler)).__name__}. Sample with the "
                "scheduler that it was fitted on, or fit it without its variance part (variance=False)."
            )
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
            self._schedule, self._shifted = schedule, None

    def _refuse_elsewhere(self, timestep: Any) -> None:
        """Where the schedule is guarded, a step without a row of its own is an error.

        The guard sees all timesteps of the scheduler, of which a pipeline may walk a part (image to image).
        """
        if guarded_by(self) is None:
            return
        own = self._correction.timesteps
        if not same_timestep(float(timestep), float(own[self._correction.row(timestep)])):
            raise SpecError(
                f"The correction has no row for timestep {float(timestep):g}: it was fitted from {float(own[0]):g} to "
                f"{float(own[-1]):g}. Sample from where it was fitted (with image to image the same strength or less), "
                'fit it anew, or load the checkpoint with schedule="nearest" (`sample --schedule nearest`) to use the '
                "nearest row."
            )

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


def noise_can_be_scaled(scheduler: Any) -> bool:
    """Whether the stand-in knows how to lessen the noise of this scheduler's steps."""
    while isinstance(scheduler, CorrectedScheduler):
        scheduler = scheduler.uncorrected
    return any(kind.__name__ in SCALABLE for kind in type(scheduler).__mro__)


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
    standing._refuse_elsewhere(timestep)
    guided = standing._corrected(model_output, timestep, sample)
    row = standing.correction.row(timestep)
    # Gains follow what a step makes of its prediction, a shift does not: on a finer schedule it is still added once.
    first, standing._shifted = row != standing._shifted, row
    return standing.correction._finished(first, inner, guided, timestep, sample, *args, **kwargs)
