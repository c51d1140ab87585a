"""Another scheduler for a pipeline, by name, with the noise schedule of its own.

diffusers' way is `pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)`. What it does not do is
said here: settings that the scheduler does not have, schedulers of another kind of model, and pipelines that put their
own kind back when they are opened.
"""

from __future__ import annotations

import copy
import inspect
import logging
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import diffusers
import torch

from stepquant.errors import SpecError, nearest
from stepquant.model.beta_schedule import beta_timesteps, use_beta_timesteps_
from stepquant.model.correction import CorrectedScheduler
from stepquant.model.schedule import (
    ScheduleFingerprint,
    chooses_timesteps,
    config_of,
    walk_timesteps,
    with_constants,
)

__all__ = ["choice_of", "compatible_schedulers", "take_scheduler_", "use_scheduler_"]

_SHORT = {
    "deis": "deismultistep",
    "dpm++": "dpmsolvermultistep",
    "dpmsolver": "dpmsolvermultistep",
    "dpmsolver++": "dpmsolvermultistep",
    "euler": "eulerdiscrete",
    "eulera": "eulerancestraldiscrete",
    "eulerancestral": "eulerancestraldiscrete",
    "flowmatcheuler": "flowmatcheulerdiscrete",
    "flowmatchheun": "flowmatchheundiscrete",
    "heun": "heundiscrete",
    "kdpm2": "kdpm2discrete",
    "kdpm2a": "kdpm2ancestraldiscrete",
    "lms": "lmsdiscrete",
    "unipc": "unipcmultistep",
}
"""What people call schedulers -> their class in diffusers, both without case, separators and "Scheduler"."""

_DISTILLED = ("LCMScheduler", "TCDScheduler")
"""Walk the noise schedule of DDIM's settings, as DDIM does; for models, or adapters, that were distilled for it."""

_OWN_NOISE = ("EDM", "CogVideoX")
"""Schedulers that diffusers counts among the others although they have noise levels of their own."""

logger = logging.getLogger(__name__)


def compatible_schedulers(scheduler: Any) -> dict[str, type]:
    """Schedulers of diffusers that predict what this one does, by class name; itself among them.

    diffusers says which belong together, some of them on one side only; of those for distilled models and of flow
    matching it does not say.
    """
    own = type(scheduler)
    if own.__name__ in _DISTILLED:
        scheduler = diffusers.DDIMScheduler()
    found = {kind.__name__: kind for kind in (own, *getattr(scheduler, "compatibles", ()))}
    if "DDIMScheduler" in found:
        found |= {name: getattr(diffusers, name) for name in _DISTILLED}
    for name in dir(diffusers):
        kind = getattr(diffusers, name) if re.fullmatch(r"\w+Scheduler", name) and "Inverse" not in name else None
        flow = own.__name__.startswith("FlowMatch") and name.startswith("FlowMatch")
        if kind is not None and (flow or own.__name__ in getattr(kind, "_compatibles", ())):
            found[name] = kind

    flows = getattr(getattr(scheduler, "config", None), "prediction_type", None) == "flow_prediction"

    def fits(name: str) -> bool:
        # Where a package is missing, diffusers has an object of the same name that says so, and is no scheduler.
        if not issubclass(found[name], diffusers.SchedulerMixin):
            return False
        other = next((family for family in _OWN_NOISE if name.startswith(family)), None)
        takes_flows = "use_flow_sigmas" in inspect.signature(found[name]).parameters
        return (other is None or own.__name__.startswith(other)) and (takes_flows or not flows)

    return {name: found[name] for name in sorted(found) if fits(name)}


def use_scheduler_(pipe: Any, name: str | None = None, settings: Mapping[str, Any] | None = None) -> None:
    """Give a pipeline another scheduler, or other settings of its own; the noise schedule stays.

    name: a class of diffusers (`DPMSolverMultistepScheduler`), also without "Scheduler" and in small letters, or what
        people call it (`euler`, `dpm++`, `unipc`); None for the class that it has.
    settings: what to set otherwise than the pipeline's own scheduler has it; `timesteps="beta"` are those of Beta
        sampling (`model.beta_schedule`).

    Raises SpecError for a scheduler that does not fit the model, a setting that the scheduler does not have or does not
    take, a pipeline that builds itself with another scheduler or does not scale its samples as the scheduler needs it,
    and a model whose correction belongs to its scheduler.
    """
    current = pipe.scheduler
    if isinstance(current, CorrectedScheduler):
        raise SpecError(
            f"The model has a correction that was fitted with its {type(current.uncorrected).__name__}: sample it with "
            "that, or choose the scheduler before `compensate`."
        )
    kinds = compatible_schedulers(current)
    kind = type(current) if name is None else _named(name, kinds, type(pipe).__name__)
    settings = dict(settings or {})
    timesteps = settings.pop("timesteps", None)
    if timesteps not in (None, "beta"):
        raise SpecError(f"timesteps: there are none named {timesteps!r}, only beta.")
    known = list(inspect.signature(kind).parameters)
    for key in settings:
        if key not in known:
            raise SpecError(f"{kind.__name__} has no setting {key!r}.{nearest(key, known)}")
    try:
        chosen = kind.from_config(current.config, **settings)  # type: ignore[attr-defined]
    except Exception as error:  # constructors check their settings with errors of all kinds
        given = ", ".join(f"{key}={value!r}" for key, value in settings.items())
        raise SpecError(f"{kind.__name__} does not take {given or 'the settings of the model'}: {error}") from error
    _refuse_another(pipe, chosen)
    _refuse_unscaled(pipe, chosen)
    pipe.scheduler = chosen
    if timesteps is not None:
        try:
            use_beta_timesteps_(pipe)
        except SpecError:
            pipe.scheduler = current
            raise
    logger.info("Scheduler: %s%s.", kind.__name__, "" if timesteps is None else ", timesteps of Beta sampling")


def choice_of(scheduler: Any, fingerprint: ScheduleFingerprint | None = None) -> dict[str, Any]:
    """Name and settings that `use_scheduler_` makes this scheduler of, as plain data.

    fingerprint: of its checkpoint, for timesteps of Beta sampling; any others from outside are not said.
    """
    settings = with_constants(config_of(scheduler))
    known = inspect.signature(type(scheduler)).parameters
    found = {"name": type(scheduler).__name__, **{key: value for key, value in settings.items() if key in known}}
    if fingerprint is not None:
        walk_timesteps(other := copy.deepcopy(scheduler), fingerprint)
        beta = beta_timesteps(fingerprint.steps, total=settings.get("num_train_timesteps", 1000))
        if chooses_timesteps(other) and set(map(float, beta)) == set(fingerprint.timesteps):
            found["timesteps"] = "beta"
    return found


def take_scheduler_(pipe: Any, other: Any, fingerprint: ScheduleFingerprint | None = None) -> None:
    """Let a full-precision pipeline sample with the class and the settings of `other`, the scheduler of a checkpoint.

    fingerprint: of the checkpoint, for timesteps that its settings do not say.

    Nothing is changed where it does so already, where it has a correction, which belongs to its own scheduler, and
    where `other` is for another kind of model: what the two have not in common is then refused where they are compared.
    """
    current = pipe.scheduler
    other = getattr(other, "uncorrected", other)
    if isinstance(current, CorrectedScheduler) or type(other) not in compatible_schedulers(current).values():
        return
    if type(other) is not type(current) or config_of(other) != config_of(current):
        pipe.scheduler = type(other).from_config(other.config)
        logger.info(
            "The full-precision model is sampled with the checkpoint's %s instead of its own %s%s.",
            type(other).__name__,
            type(current).__name__,
            _changed(config_of(current), config_of(other)) if type(other) is type(current) else "",
        )
    if fingerprint is not None:
        walk_timesteps(pipe.scheduler, fingerprint)


def _changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    changed = [f"{key}={after.get(key)!r}" for key in sorted({*before, *after}) if before.get(key) != after.get(key)]
    return f" (with {', '.join(changed)})"


def _named(name: str, kinds: Mapping[str, type], pipeline: str) -> type:
    short = {_plain(known): kind for known, kind in kinds.items()}
    wanted = _plain(name)
    found = short.get(_SHORT.get(wanted, wanted))
    if found is None:
        hint = nearest(name, [*kinds, *(short_name for short_name, full in _SHORT.items() if full in short)])
        raise SpecError(
            f"There is no scheduler {name!r} for this {pipeline}.{hint} It takes {_listed(kinds)}; short names such as "
            "euler, dpm++ and unipc do, too."
        )
    return found


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9+]", "", name.lower()).removesuffix("scheduler")


def _listed(kinds: Iterable[str]) -> str:
    return ", ".join(name.removesuffix("Scheduler") for name in kinds)


def _refuse_another(pipe: Any, chosen: Any) -> None:
    """Refuse what a pipeline would not keep: some classes convert the scheduler that they are built with."""
    if not isinstance(pipe, diffusers.DiffusionPipeline):
        return
    parts = {**pipe.components, "scheduler": copy.deepcopy(chosen)}
    known = inspect.signature(type(pipe)).parameters
    arguments = {key: value for key, value in pipe.config.items() if key in known and key not in parts}
    with warnings.catch_warnings():  # what it has to say was said when it was opened
        warnings.simplefilter("ignore")
        kept = type(pipe)(**parts, **arguments).scheduler
    if type(kept) is not type(chosen):
        raise SpecError(
            f"{type(pipe).__name__} samples with {type(kept).__name__} only: it would not keep a "
            f"{type(chosen).__name__}. Open the model as another pipeline class, such as DDPMPipeline."
        )


def _refuse_unscaled(pipe: Any, chosen: Any) -> None:
    """Refuse schedulers that want the noise, or what the network sees, scaled, for pipelines that never do it.

    diffusers would sample noise. Whether a pipeline does it is looked up in its source, where there is one.
    """
    trial, one = copy.deepcopy(chosen), torch.ones(1, 1, 1, 1)
    try:
        trial.set_timesteps(4)
        scales = {
            "scale_model_input": not torch.equal(trial.scale_model_input(one, trial.timesteps[0]), one),
            "init_noise_sigma": abs(float(trial.init_noise_sigma) - 1) > 1e-3,
        }
        source = "".join(inspect.getsource(kind) for kind in type(pipe).__mro__ if kind is not object)
    except (AttributeError, OSError, TypeError, ValueError):
        # The scheduler needs more than a number from its pipeline, or there is no source: nothing can be said.
        return
    if any(needed and name not in source for name, needed in scales.items()):
        raise SpecError(
            f"{type(pipe).__name__} does not scale its samples as {type(chosen).__name__} needs it, and would sample "
            "noise. Use ddim, ddpm, dpm++ or unipc, which need no scaling."
        )
