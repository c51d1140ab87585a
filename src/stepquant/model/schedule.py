"""What schedule a checkpoint was calibrated for, and a guard that refuses another one.

Per-step state (scales of timestep bins, corrections of steps) is fitted on the timesteps of one schedule. Sampling with
another number of steps would run without complaint and give quietly worse images; the guard makes that an error.
Where the timesteps were chosen otherwise than by the scheduler's settings, it is made to walk them.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import inspect
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from stepquant.errors import SpecError

__all__ = [
    "ScheduleFingerprint",
    "chooses_timesteps",
    "config_of",
    "guard_schedule",
    "guarded_by",
    "same_timestep",
    "walk_timesteps",
    "with_constants",
]


@dataclass(frozen=True)
class ScheduleFingerprint:
    """The schedule of a sampling run.

    scheduler: name of its class.
    config: its configuration as JSON values, without diffusers' private entries.
    steps: number of inference steps that was asked for. Some schedulers make more calls (Heun, PNDM): see `timesteps`.
    timesteps: the scheduler's timesteps as `set_timesteps` left them, in the order of sampling. A pipeline that
        skips leading ones (image to image, `max_timestep`) walks a tail of them.
    guidance: how predictions are combined: "none", "cfg(7.5)", "cfg(7.5, rescale=0.7)", or "unknown" before it was
        found.
    """

    scheduler: str
    config: Mapping[str, Any]
    steps: int
    timesteps: tuple[float, ...]
    guidance: str

    @classmethod
    def of(cls, scheduler: Any, *, steps: int, guidance: str) -> Self:
        """The fingerprint of a scheduler whose `set_timesteps` has been called; of the one inside if it is
        corrected.
        """
        return cls(
            scheduler=_name(scheduler),
            config=config_of(scheduler),
            steps=steps,
            timesteps=_timesteps(scheduler),
            guidance=guidance,
        )

    @property
    def timesteps_hash(self) -> str:
        """Sixteen hexadecimal digits that identify `timesteps`."""
        return hashlib.sha256(json.dumps(list(self.timesteps)).encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "timesteps": list(self.timesteps)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`. Raises SpecError for missing or unknown keys and for values of the wrong type."""
        expected = {field.name for field in fields(cls)}
        if set(values) != expected:
            missing, unknown = sorted(expected - set(values)), sorted(set(values) - expected)
            raise SpecError(f"A schedule fingerprint lacks the keys {missing} and has the unknown keys {unknown}.")
        _check_types(values)
        timesteps = tuple(float(timestep) for timestep in values["timesteps"])
        return cls(
            scheduler=values["scheduler"],
            config=dict(values["config"]),
            steps=values["steps"],
            timesteps=timesteps,
            guidance=values["guidance"],
        )

    def differences(self, other: ScheduleFingerprint) -> list[str]:
        """One sentence for each thing in which the other fingerprint differs; empty if they are the same schedule."""
        found = []
        if self.scheduler != other.scheduler:
            found.append(f"The scheduler is {other.scheduler} instead of {self.scheduler}.")
        for key in sorted({*self.config, *other.config}):
            mine, others = self.config.get(key), other.config.get(key)
            if mine != others:
                found.append(f"The scheduler's {key} is {others!r} instead of {mine!r}.")
        if self.steps != other.steps:
            found.append(f"The number of inference steps is {other.steps} instead of {self.steps}.")
        if not _same(self.timesteps, other.timesteps):
            found.append(f"The timesteps are {_shown(other.timesteps)} instead of {_shown(self.timesteps)}.")
        if self.guidance != other.guidance:
            found.append(f"The guidance is {other.guidance} instead of {self.guidance}.")
        return found


def guard_schedule(scheduler: Any, fingerprint: ScheduleFingerprint) -> None:
    """Make `scheduler.set_timesteps` refuse, with a SpecError, every schedule but the fingerprint's.

    Only this instance is changed, and a copy of it (also an unpickled one) is guarded by itself. Guarding again
    replaces the guard.
    """
    current = scheduler.set_timesteps
    if isinstance(current, functools.partial) and current.func is _guarded_set_timesteps:
        current = current.args[1]
    # A partial over a module-level function, not a closure: copy.deepcopy and pickle follow its arguments, so that the
    # guard of a copied scheduler belongs to the copy.
    guard = functools.partial(_guarded_set_timesteps, scheduler, current, fingerprint)
    functools.update_wrapper(guard, current)  # pipelines look for `timesteps` and `sigmas` in the signature
    scheduler.set_timesteps = guard


def guarded_by(scheduler: Any) -> ScheduleFingerprint | None:
    """The schedule that `guard_schedule` holds this scheduler to; None if there is no guard."""
    current = getattr(scheduler, "set_timesteps", None)
    if not isinstance(current, functools.partial) or current.func is not _guarded_set_timesteps:
        return None
    found: ScheduleFingerprint = current.args[2]
    return found


def _guarded_set_timesteps(
    scheduler: Any, original: Callable[..., Any], fingerprint: ScheduleFingerprint, *args: Any, **kwargs: Any
) -> Any:
    result = original(*args, **kwargs)
    found = _timesteps(scheduler)
    if not _same(found, fingerprint.timesteps):
        raise SpecError(
            f"The checkpoint is calibrated for {fingerprint.steps} steps of {fingerprint.scheduler} with timesteps "
            f"{_shown(fingerprint.timesteps)}, but {_name(scheduler)} was set to {_shown(found)}. "
            f"Sample with num_inference_steps={fingerprint.steps}, calibrate for the new schedule, or load the "
            "checkpoint with "
            'schedule="nearest" (`sample --schedule nearest`) to use what was fitted on the nearest timestep.'
        )
    return result


def walk_timesteps(scheduler: Any, fingerprint: ScheduleFingerprint) -> None:
    """Make `set_timesteps` of the fingerprint's number of steps walk the fingerprint's timesteps.

    Only where the scheduler would choose others by itself (those of Beta sampling came from outside) and can be given
    these. Timesteps that a caller brings, and other numbers of steps, are as before. Only this instance is changed.
    """
    current = scheduler.set_timesteps
    if not {"num_inference_steps", "timesteps"} <= set(inspect.signature(current).parameters):
        return
    # Whole numbers, as these schedulers have in their own tables; each once, where a solver steps twice on it.
    wanted = [int(t) if float(t).is_integer() else t for t in dict.fromkeys(fingerprint.timesteps)]
    try:
        if _same(_set(scheduler, num_inference_steps=fingerprint.steps), fingerprint.timesteps):
            return
        if not _same(_set(scheduler, timesteps=wanted), fingerprint.timesteps):
            return
    except (SpecError, TypeError, ValueError):
        return  # needs more than a number from its pipeline, or cannot walk them: the guard will speak
    walk = functools.partial(_walk_timesteps, scheduler, current, fingerprint, wanted)
    functools.update_wrapper(walk, current)
    scheduler.set_timesteps = walk


def _set(scheduler: Any, **arguments: Any) -> tuple[float, ...]:
    """The timesteps of a copy."""
    other = copy.deepcopy(scheduler)
    other.set_timesteps(**arguments)
    return _timesteps(other)


def _walk_timesteps(
    scheduler: Any,  # noqa: ARG001 - copies of the partial belong to copies of it
    original: Callable[..., Any],
    fingerprint: ScheduleFingerprint,
    wanted: list[float],
    *args: Any,
    **kwargs: Any,
) -> Any:
    given = {
        key: value
        for key, value in inspect.signature(original).bind(*args, **kwargs).arguments.items()
        if value is not None
    }
    if given.pop("num_inference_steps", None) != fingerprint.steps or set(given) - {"device"}:
        return original(*args, **kwargs)
    return original(timesteps=list(wanted), **given)


def chooses_timesteps(scheduler: Any) -> list[Any]:
    """What was put between this scheduler and its timesteps, as JSON values; empty for one that chooses them itself."""
    found = []
    current = getattr(scheduler, "set_timesteps", None)
    while isinstance(current, functools.partial):
        if current.func is not _guarded_set_timesteps:  # refuses, and changes nothing
            settings = [
                entry.timesteps_hash if isinstance(entry, ScheduleFingerprint) else entry for entry in current.args[2:]
            ]
            found.append([current.func.__name__, settings])
        current = current.args[1]
    return found


def _name(scheduler: Any) -> str:
    """The scheduler's class, of the one inside if it is corrected."""
    return type(getattr(scheduler, "uncorrected", scheduler)).__name__


def _timesteps(scheduler: Any) -> tuple[float, ...]:
    return tuple(float(timestep) for timestep in scheduler.timesteps)


def _same(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Equal up to the rounding of float32, which may differ between devices and numpy versions."""
    return len(one) == len(other) and all(map(same_timestep, one, other))


def same_timestep(one: float, other: float) -> bool:
    """Equal up to the rounding of float32."""
    return math.isclose(one, other, rel_tol=1e-5, abs_tol=1e-6)


def _shown(timesteps: tuple[float, ...]) -> str:
    texts = [f"{timestep:g}" for timestep in timesteps]
    if len(texts) > 8:
        texts = [*texts[:4], "...", *texts[-2:]]
    return f"[{', '.join(texts)}] ({len(timesteps)} values)"


def config_of(scheduler: Any) -> dict[str, Any]:
    """A scheduler's configuration as JSON values, without diffusers' private entries."""
    config = {key: value for key, value in dict(scheduler.config).items() if not key.startswith("_")}
    decoded: dict[str, Any] = json.loads(json.dumps(config, default=_as_json), parse_constant=str)
    return decoded


def with_constants(config: Mapping[str, Any]) -> dict[str, Any]:
    """A fingerprint's configuration as a scheduler takes it: JSON has no infinity, so there it is a word."""
    return {
        key: float(value) if isinstance(value, str) and value in ("Infinity", "-Infinity", "NaN") else value
        for key, value in config.items()
    }


def _as_json(value: Any) -> Any:
    """numpy arrays, numpy numbers and tensors as lists and numbers; everything else as its text."""
    to_list = getattr(value, "tolist", None)
    return str(value) if to_list is None else to_list()


def _check_types(values: Mapping[str, Any]) -> None:
    good = (
        isinstance(values["scheduler"], str)
        and isinstance(values["guidance"], str)
        and isinstance(values["config"], Mapping)
        and type(values["steps"]) is int
        and isinstance(values["timesteps"], list | tuple)
        and all(type(timestep) in (int, float) for timestep in values["timesteps"])
    )
    if not good:
        raise SpecError(
            "A schedule fingerprint holds values of the wrong type: expected texts for scheduler and guidance, a "
            "mapping for config, "
            f"an integer for steps and a list of numbers for timesteps, found {dict(values)!r}."
        )
