"""The three verbs of stepquant: quantize, load, sample.

pipe = open_model("digits-unet")
quantize(pipe, accuquant(weights=4, activations=8), steps=20).save("digits-w4a8")
images = sample(load("digits-w4a8"), seeds=range(16), steps=20)
"""

from __future__ import annotations

import copy
import datetime
import functools
import hashlib
import importlib.resources
import inspect
import io
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from stepquant.calibrate.compensation import AS_IT_IS, Compensate, EstimatorChoice, Regressor
from stepquant.calibrate.estimate import Estimate, estimated
from stepquant.calibrate.noise_correction import CorrectNoise
from stepquant.calibrate.offload import offloaded, released_
from stepquant.calibrate.offloadable import refuse_offload
from stepquant.calibrate.split import agree_
from stepquant.calibrate.stages import Record
from stepquant.calibrate.steps import forked_devices
from stepquant.calibrate.trajectory import Trajectory, quiet
from stepquant.calibrate.walked_correction import CorrectProgressively
from stepquant.checkpoint import load_checkpoint, replacing, save_checkpoint, saved_scheduler
from stepquant.correction_folder import (
    CORRECTION_NAME,
    TABLES_NAME,
    attached,
    is_copy,
    read_correction,
    write_correction,
)
from stepquant.engines.base import GraphEngine, place
from stepquant.errors import CheckpointError, EngineError, ModelError, SpecError, UnsupportedPipeline, nearest
from stepquant.manifest import MANIFEST_NAME, Manifest, read_manifest
from stepquant.model.clock import clock_of
from stepquant.model.correction import CorrectedScheduler, StepCorrection, correction_of
from stepquant.model.families import (
    find_denoiser,
    network_beside,
    other_denoisers,
    refuse_unsupported,
    several_denoisers,
)
from stepquant.model.layer import QuantizedLayer
from stepquant.model.pipeline import arguments_of_batch, check_call, refusal_explained, step_arguments, with_labels
from stepquant.model.schedule import (
    ScheduleFingerprint,
    chooses_timesteps,
    config_of,
    guard_schedule,
    guarded_by,
    walk_timesteps,
)
from stepquant.model.scheduler_choice import take_scheduler_, use_scheduler_
from stepquant.model.surgery import check_finite, quantized_layers
from stepquant.pretrained import attach_
from stepquant.processes import ALONE, Processes
from stepquant.recipe import Checked, Job, Recipe, Stage
from stepquant.run import Progress, Run, SilentProgress
from stepquant.storage import checksum
from stepquant.work_folder import WorkFolder, opened, spilling

__all__ = [
    "SHIPPED_MODELS",
    "Compensated",
    "Quantized",
    "calibrations_of",
    "compensate",
    "estimate",
    "load",
    "open_any",
    "open_base",
    "open_model",
    "quantize",
    "sample",
    "with_correction",
    "with_denoiser",
]

logger = logging.getLogger(__name__)

SHIPPED_MODELS = ("digits-unet", "digits-dit")
"""Models inside the package: they open with no network."""


_CALIBRATIONS = "stepquant_calibrations"
"""Attribute of pipelines that `quantize`, `compensate` and `load` made."""

_TOLD = "stepquant_told_of_arguments"
"""Attribute of pipelines whose user was warned that they are sampled otherwise than they were calibrated."""


def calibrations_of(pipe: Any) -> tuple[Mapping[str, Any], ...]:
    """How a pipeline was calibrated: `recipe` and `run` as in a manifest, for each of its calibrations.

    Of a checkpoint that diffusers has opened (`from_pretrained`), what its folder says, if that is still there. Empty
    for a pipeline that stepquant did not make.
    """
    found: tuple[Mapping[str, Any], ...] = getattr(pipe, _CALIBRATIONS, ())
    if found or not isinstance(getattr(pipe, "components", None), Mapping):
        return found
    manifests = [
        read_manifest(folder)
        for part in pipe.components.values()
        if isinstance(part, nn.Module) and clock_of(part) is not None
        for folder in _opened_from(part)
    ]
    return tuple({"recipe": manifest.recipe, "run": manifest.run} for manifest in manifests)


def _opened_from(denoiser: nn.Module) -> list[Path]:
    """The checkpoint folder that diffusers remembers for a denoiser: it, or its subfolder, was given to diffusers."""
    name = getattr(getattr(denoiser, "config", None), "_name_or_path", None)
    folders = (Path(name), Path(name).parent) if isinstance(name, str | Path) and str(name) else ()
    return [folder for folder in folders if (folder / MANIFEST_NAME).is_file()][:1]


def open_model(
    model: str, *, device: torch.device | str | None = None, scheduler: Mapping[str, Any] | str | None = None
) -> Any:
    """A full-precision diffusers pipeline.

    model: a shipped model ("digits-unet", "digits-dit"), a diffusers folder, or a hub id ("owner/name"). A folder that
        `compensate` has written comes with its correction, and samples on no other schedule.
    scheduler: another one than the model's, "euler" or `{"name": "euler", "use_karras_sigmas": True}`, and without a
        name other settings of its own (`model.scheduler_choice.use_scheduler_`).
    Raises ModelError if there is none of these, naming the nearest shipped model; CheckpointError for a damaged
    correction; SpecError for a scheduler that does not fit.
    """
    pipe = _without_correction(model)
    if model not in SHIPPED_MODELS and (Path(model) / CORRECTION_NAME).is_file():
        pipe = with_correction(pipe, Path(model))
    if scheduler:
        settings = {"name": scheduler} if isinstance(scheduler, str) else dict(scheduler)
        use_scheduler_(pipe, settings.pop("name", None), settings)
    return pipe if device is None else pipe.to(device)


def open_base(model: str, candidate: Path | str, *, device: torch.device | str | None = None) -> Any:
    """The full-precision model to compare a candidate with: `open_model`, with the candidate's scheduler if that is a
    checkpoint.

    A model whose scheduler is of another kind, or is corrected, keeps it.
    """
    pipe = open_model(model, device=device)
    if not (Path(candidate) / MANIFEST_NAME).is_file():
        return pipe
    saved, schedule = saved_scheduler(candidate), read_manifest(Path(candidate)).schedule
    if saved is not None:
        take_scheduler_(pipe, saved, None if schedule is None else ScheduleFingerprint.from_dict(schedule))
    return pipe


def _without_correction(model: str) -> Any:
    path = Path(model)
    if model in SHIPPED_MODELS:
        with importlib.resources.as_file(importlib.resources.files("stepquant") / "assets" / model) as folder:
            pipe = _from_folder(folder, dtype=torch.float32)
    elif (path / MANIFEST_NAME).is_file():
        base = read_manifest(path).base_model
        raise ModelError(
            f"{model} is a stepquant checkpoint, not a full-precision model: give the model that it was made from"
            f"{f', {base}' * bool(base)}. In Python, load() opens a checkpoint."
        )
    elif (path / "model_index.json").is_file():
        pipe = _from_folder(path)
    elif path.exists():
        raise ModelError(f"{model} exists but is no diffusers pipeline: it has no model_index.json.")
    elif "/" in model and not model.startswith((".", "/")):
        pipe = _from_hub(model)
    else:
        raise ModelError(
            f"There is no model {model!r}: expected a shipped model ({', '.join(SHIPPED_MODELS)}), a diffusers folder "
            f"or a hub id such as 'owner/name'.{nearest(model, SHIPPED_MODELS)}"
        )
    return pipe


def _from_folder(folder: Path, **options: Any) -> Any:
    """A diffusers folder, without the progress bar and the advice that diffusers prints while it loads."""
    from diffusers import DiffusionPipeline
    from diffusers.utils import is_accelerate_available
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.disable_progress_bar()
    # JSON has no numbers as keys, so diffusers warns about every pipeline that says what its classes are called.
    logging.getLogger("diffusers.pipelines.pipeline_utils").addFilter(_not_about_names_of_classes)
    if not is_accelerate_available():
        options["low_cpu_mem_usage"] = False
    try:
        return DiffusionPipeline.from_pretrained(folder, local_files_only=True, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"{folder} could not be opened as a diffusers pipeline: {error}") from error


def _not_about_names_of_classes(record: logging.LogRecord) -> bool:
    return "Expected types for id2label" not in record.getMessage()


def _from_hub(model: str) -> Any:
    from diffusers import DiffusionPipeline

    try:
        return DiffusionPipeline.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{model!r} is no folder here and could not be had from the hub ({type(error).__name__}). Check the "
            "spelling and the connection, or give the path of a downloaded diffusers folder."
        ) from error


def with_correction(pipe: Any, folder: Path | str) -> Any:
    """A pipeline like `pipe` that corrects every step as `Compensated.save_correction` has written it.

    For models that other software has quantized and opened. Sampling on another schedule than that of the fit is
    refused; everything but the scheduler is shared with `pipe`.
    Raises CheckpointError for a damaged correction, or one of another scheduler.
    """
    corrected, said = attached(pipe, Path(folder))
    setattr(corrected, _CALIBRATIONS, (*calibrations_of(pipe), {"run": said.run}))
    return corrected


def with_denoiser(pipe: Any, name: str, denoiser: nn.Module) -> Any:
    """A pipeline like `pipe` with another denoiser and a scheduler of its own; all else is shared."""
    other = copy.copy(pipe)
    setattr(other, name, denoiser)
    other.scheduler = copy.deepcopy(pipe.scheduler)
    return other


@dataclass(frozen=True)
class Quantized:
    """What `quantize` made.

    pipe: like the given pipeline, with the quantized denoiser in simulated arithmetic.
    figures: what each stage measured, in order, with its seconds.
    arguments: of the pipeline's call, those that change its steps (`model.pipeline.step_arguments`).
    """

    pipe: Any
    denoiser_name: str
    schedule: ScheduleFingerprint
    recipe: Recipe
    seed: int
    base_model: str
    figures: tuple[dict[str, Any], ...]
    arguments: Mapping[str, float] = field(default_factory=dict)

    def save(self, folder: Path | str, *, overwrite: bool = False) -> None:
        """Write a checkpoint folder. With `overwrite` an existing one is replaced once the new one is complete."""
        save_checkpoint(
            folder,
            pipe=self.pipe,
            denoiser_name=self.denoiser_name,
            denoiser=getattr(self.pipe, self.denoiser_name),
            base_model=self.base_model,
            created=_today(),
            schedule=self.schedule.to_dict(),
            recipe=self.recipe.to_dict(),
            run=_run_of(self.seed, self.figures, self.arguments),
            overwrite=overwrite,
        )


def _run_of(seed: int, figures: Sequence[Mapping[str, Any]], arguments: Mapping[str, float]) -> dict[str, Any]:
    """How a checkpoint or a correction came about, as manifests have it."""
    run = {"seed": seed, "stages": [_summary(entry) for entry in figures]}
    return run | ({"arguments": dict(arguments)} if arguments else {})


def _summary(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The figures that belong into a checkpoint: numbers and words, not curves, and no times (bytes must repeat).

    Infinity and NaN as words: JSON has none.
    """
    return {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in figures.items()
        if isinstance(value, int | float | str) and key != "seconds"
    }


def quantize(
    pipe: Any,
    recipe: Recipe,
    *,
    steps: int = 20,
    run: Run | None = None,
    arguments: Mapping[str, Any] | None = None,
    base_model: str = "",
    resume: bool = False,
    denoiser: str | None = None,
) -> Quantized:
    """Quantize a pipeline's denoiser; the given pipeline stays as it was.

    pipe: a diffusers pipeline, or a DenoiserPipeline around any torch module.
    steps: sampling steps to calibrate for.
    arguments: what the pipeline is called with beside seeds and steps (prompts, guidance scale, class labels).
    base_model: what the checkpoint will say it was made from.
    resume: go on with what `run.work` holds of the same run.
    run: may name several processes that all call this with the same arguments; every one gets the result. With
        `offload` the pipeline must be in main memory, and so is what is returned.
    denoiser: which one, of a pipeline that switches between several ("transformer", "transformer_2"). It is calibrated
        on its own steps; quantize the other from the same pipeline, and load one checkpoint onto the other.

    Raises ModelError for a model that cannot be quantized (NaN weights, no denoiser), UnsupportedPipeline if its
    sampling cannot be replayed, SpecError for settings that fit no layer.
    """
    run = run or Run()
    name, full_precision = _to_quantize(pipe, recipe, steps, denoiser)
    refuse_offload(recipe, run)
    with _still(full_precision), offloaded(pipe, full_precision, run.offload):
        quantizing = copy.deepcopy(full_precision).requires_grad_(False)
        job = Job(pipe, full_precision, quantizing, run, steps, dict(arguments or {}), stages=recipe.stages)
        _check_stages(job, recipe)
        identity = {}
        if run.work is not None or run.processes.count > 1:
            identity = _identity(recipe.to_dict(), run, steps, job)
            run.processes.check_same("runs", {**identity, "work": run.work is not None, "resume": resume})
        with (
            nullcontext()
            if run.work is None
            else opened(run.work, identity, resume=resume, processes=run.processes) as work,
            spilling(run, work) as job.spill,
        ):
            figures = _run_stages(job, recipe.stages, work)
        if run.offload is not None:
            released_(job.denoiser)
    if "plan" not in job.handed:
        raise SpecError(f"Recipe {recipe.name!r} places no quantizers: it needs the stage Place.")
    for layer in quantized_layers(job.denoiser).values():
        if isinstance(layer, QuantizedLayer):
            layer.harden_()
    attach_(job.denoiser)
    trajectories: list[Trajectory] = job.handed["trajectories"]
    quantized = with_denoiser(pipe, name, job.denoiser)
    correction: StepCorrection | None = job.handed.get("correction")
    if correction is not None:
        quantized.scheduler = CorrectedScheduler(quantized.scheduler, correction)
    guard_schedule(quantized.scheduler, trajectories[0].fingerprint)
    # Not Recipe.to_dict: stages that somebody else wrote need not be written into files.
    stages = [
        {"stage": type(stage).__name__, **{key: getattr(stage, key, 0) for key in ("samples", "rounds")}}
        for stage in recipe.stages
    ]
    called_with = step_arguments(pipe, arguments or {})
    own = {"recipe": {"stages": stages}, "run": {"seed": run.seed, "arguments": called_with}}
    setattr(quantized, _CALIBRATIONS, (*calibrations_of(pipe), own))
    return Quantized(
        pipe=quantized,
        denoiser_name=name,
        schedule=trajectories[0].fingerprint,
        recipe=recipe,
        seed=run.seed,
        base_model=base_model,
        figures=tuple(figures),
        arguments=called_with,
    )


def _to_quantize(pipe: Any, recipe: Recipe, steps: int, denoiser: str | None) -> tuple[str, nn.Module]:
    """The denoiser and its name in the pipeline, if it can be quantized."""
    if steps < 1:
        raise SpecError(f"steps must be at least 1, found {steps}.")
    name, full_precision = find_denoiser(pipe, denoiser)
    refuse_unsupported(pipe, denoiser)
    _refuse_correction(pipe, recipe)
    _refuse_corrected(pipe)
    check_finite(full_precision)
    return name, full_precision


def _check_stages(job: Job, recipe: Recipe) -> None:
    for stage in recipe.stages:
        if isinstance(stage, Checked):
            stage.check(job)


def _refuse_correction(pipe: Any, recipe: Recipe) -> None:
    """A correction belongs to the scheduler, and would change the steps of a pipeline's other denoisers too."""
    fitting = [type(stage).__name__ for stage in recipe.stages if "correction" in stage.gives]
    if fitting and several_denoisers(pipe):
        raise UnsupportedPipeline(
            f"{fitting[0]} of recipe {recipe.name!r} corrects the scheduler's steps, and {type(pipe).__name__} "
            f"switches between {' and '.join(several_denoisers(pipe))}, whose steps it would change too. Use a recipe "
            "without it."
        )


def _refuse_corrected(pipe: Any) -> None:
    """A correction was fitted for the denoiser that its pipeline had, and would be recorded as the model's own."""
    if correction_of(getattr(pipe, "scheduler", None)) is not None:
        raise SpecError(
            "The pipeline corrects its steps for the quantized denoiser that the correction was fitted for, and a "
            "full-precision pipeline is needed here: give one without it (pipe.scheduler = pipe.scheduler.uncorrected)."
        )


def estimate(
    pipe: Any,
    recipe: Recipe,
    *,
    steps: int,
    run: Run | None = None,
    arguments: Mapping[str, Any] | None = None,
    denoiser: str | None = None,
) -> Estimate | None:
    """What `quantize` with the same arguments will take in memory, on disk and in time; None if it records nothing.

    Samples one image in a few steps, where the pipeline is; nothing is changed. Raises as `quantize` does for what
    cannot be recorded or quantized.
    """
    _, full_precision = _to_quantize(pipe, recipe, steps, denoiser)
    run = run or Run()
    refuse_offload(recipe, run)
    with _still(full_precision), offloaded(pipe, full_precision, run.offload):
        job = Job(pipe, full_precision, full_precision, run, steps, dict(arguments or {}), stages=recipe.stages)
        _check_stages(job, recipe)
        return estimated(job, recipe)


_CORRECTING_STAGES = {stage.__name__ for stage in (Compensate, CorrectNoise, CorrectProgressively)}
_CORRECTING_METHODS = ("cec", "ptqd", "d2_dpm", "tac")


@dataclass(frozen=True)
class Compensated:
    """What `compensate` made.

    pipe: like the candidate, with a scheduler that corrects the predictions; without one if nothing was better. Its own
        correction, if it had one, is kept where nothing was better than that, and replaced otherwise: see `own` in the
        last of the figures ("kept", "replaced", "removed").
    schedule: the one that the correction was fitted on; the pipeline refuses others.
    figures: of the recording and of the fit, with their seconds.
    manifest: of the candidate, if it was a checkpoint. source: the candidate's name, if it was a model of others.
    arguments: of the pipeline's call, those that change its steps.
    kept_run: how the candidate's own correction came about, where that was kept; None where it was not.
    """

    pipe: Any
    denoiser_name: str
    schedule: ScheduleFingerprint
    seed: int
    figures: tuple[dict[str, Any], ...]
    settings: Compensate
    manifest: Manifest | None = None
    source: str | None = None
    arguments: Mapping[str, float] = field(default_factory=dict)
    kept_run: Mapping[str, Any] | None = None

    def save(self, folder: Path | str, *, overwrite: bool = False) -> None:
        """Write the candidate with its correction, and how that was made.

        Of a checkpoint, a checkpoint. Of a diffusers folder of others, a copy of it, whatever format its denoiser has,
        and of a model of the hub what diffusers saves, with the correction beside it: `open_model` opens both.

        Raises ModelError for a pipeline whose denoiser stepquant has not quantized (`save_correction` writes the
        correction alone), and CheckpointError for one that an engine has packed: give `compensate` the candidate's
        folder instead of the loaded pipeline.
        """
        if self.source is not None:
            self._save_copy(Path(folder), self.source, overwrite=overwrite)
            return
        if clock_of(getattr(self.pipe, self.denoiser_name)) is None:
            raise ModelError(
                f"{self.denoiser_name} has not been quantized by stepquant, so there is no checkpoint of it. Save the "
                "pipeline in its own way and the correction with save_correction(folder), which "
                "stepquant.api.with_correction(pipe, folder) puts on again; or give `compensate` the pipeline's folder."
            )
        before = self.manifest
        recipe: Mapping[str, Any] = {} if before is None else before.recipe
        if self.kept_run is None:
            # An earlier correction has been replaced, so it is no part of how this one came about.
            kept = [part for part in str(recipe.get("name", "")).split("+") if part not in ("", *_CORRECTING_METHODS)]
            stages = [stage for stage in recipe.get("stages", []) if stage.get("stage") not in _CORRECTING_STAGES]
            stage = {"stage": "Compensate", **TypeAdapter(Compensate).dump_python(self.settings, mode="json")}
            recipe = {**recipe, "name": "+".join([*kept, "cec"]), "stages": [*stages, stage]}
        save_checkpoint(
            folder,
            pipe=self.pipe,
            denoiser_name=self.denoiser_name,
            denoiser=getattr(self.pipe, self.denoiser_name),
            base_model="" if before is None else before.base_model,
            created=_today(),
            schedule=self.schedule.to_dict(),
            recipe=recipe,
            run={**({} if before is None else before.run), **self._run},
            overwrite=overwrite,
        )

    def save_correction(self, folder: Path | str) -> None:
        """Write the correction alone, into a new folder or beside a model: for pipelines that others save and open.

        Raises CheckpointError if the folder has a correction already.
        """
        write_correction(Path(folder), correction_of(self.pipe.scheduler), self.schedule, run=self._run)

    @property
    def _run(self) -> dict[str, Any]:
        """How it was fitted, or kept, as in manifests."""
        return _corrected_run(_run_of(self.seed, self.figures, self.arguments), self.kept_run)

    def _save_copy(self, target: Path, source: str, *, overwrite: bool) -> None:
        if target.exists() and not overwrite:
            raise CheckpointError(f"{target} exists already: choose another folder or pass overwrite=True.")
        if target.exists() and not is_copy(target):
            raise CheckpointError(f"{target} was not made by `compensate`, so overwrite=True does not remove it.")
        if target.resolve() == Path(source).resolve():
            raise CheckpointError(f"{target} is the candidate itself: choose another folder.")
        with replacing(target) as partial:
            if Path(source).is_dir():
                names = (CORRECTION_NAME, TABLES_NAME)  # an earlier correction, which has been replaced
                shutil.copytree(source, partial, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*names))
            else:
                plain = copy.copy(self.pipe)
                plain.scheduler = getattr(self.pipe.scheduler, "uncorrected", self.pipe.scheduler)
                plain.save_pretrained(partial)
            correction = correction_of(self.pipe.scheduler)
            write_correction(partial, correction, self.schedule, run=self._run, copy_of=source)


def _corrected_run(own: dict[str, Any], kept_run: Mapping[str, Any] | None) -> dict[str, Any]:
    """The part of a manifest's `run` about its correction. own: the run of `compensate` as `_run_of` has it.

    kept_run: of the correction that was kept; what it was judged on then stands beside what it was fitted on.
    """
    if kept_run is None:
        return {"compensation": own}
    fitted_on = {key: kept_run[key] for key in ("compensation",) if key in kept_run}
    # Fitted in a recipe, it was at the recipe's arguments, which are those of now: another one is not judged.
    return {**(fitted_on or {"arguments": own.get("arguments", {})}), "judged": own}


def compensate(
    candidate: Any,
    against: Any,
    *,
    steps: int,
    samples: int = 64,
    batch: int = 16,
    estimator: EstimatorChoice = "auto",
    regressors: tuple[Regressor, ...] | None = None,
    gamma: Literal[0, 1] = 0,
    ridge: float | None = None,
    shared: bool = False,
    held_out: int = 4,
    arguments: Mapping[str, Any] | None = None,
    run: Run | None = None,
    resume: bool = False,
) -> Compensated:
    """Fit a correction for a model that is quantized already, by whomever; both pipelines stay as they were.

    candidate: a pipeline around any quantized denoiser, the folder of a checkpoint, or the folder or hub id of a model
        that others have quantized and diffusers opens. Corrections do not stack. One that it has already is judged on
        the same held-out images: with the estimator "auto" it is kept where nothing is better, a named one replaces it.
        If it is for other steps, another guidance or another `eta`, it is replaced without having been judged.
    against: the full-precision pipeline of the same model, with the same scheduler settings.
    steps: sampling steps to fit for. samples: images to record, `batch` at a time, on the run's calibration seeds.
    estimator, regressors, gamma, ridge, shared, held_out: see `calibrate.compensation.Compensate`.
    arguments: what the pipelines are called with beside seeds and steps.
    resume: go on with what `run.work` holds of the same fit.

    Raises SpecError if the two pipelines would sample with different schedules or the full-precision one corrects its
    own, UnsupportedPipeline if sampling cannot be replayed, CalibrationError for fewer than two images, CheckpointError
    for a candidate whose own correction is damaged.
    """
    run = run or Run()
    settings = Compensate(estimator, regressors, gamma, ridge, shared, held_out)
    if several_denoisers(against):
        raise UnsupportedPipeline(
            f"{type(against).__name__} switches between {' and '.join(several_denoisers(against))}; a correction can "
            "be fitted for one denoiser in all steps only."
        )
    _, full_precision = find_denoiser(against)
    _refuse_corrected(against)
    check_finite(full_precision)
    pipe, manifest = _candidate(candidate, full_precision)
    name, quantized = find_denoiser(pipe)
    own = _own_correction(candidate, pipe, manifest)
    called_with = step_arguments(pipe, arguments or {})

    def run_stage(stage: Stage, job: Job) -> Mapping[str, Any]:
        if not isinstance(stage, Compensate):
            return stage.run(job)
        recorded: Trajectory = job.handed["trajectories"][0]
        _check_same_schedule(pipe, recorded)
        elsewhere = [] if own is None else own.differences(recorded.fingerprint, called_with)
        if own is not None and not elsewhere:
            job.handed["correction"] = own.correction
        found = stage.run(job)
        if elsewhere:
            found["own"] = "removed" if found["chosen"] == "none" else "replaced"
            found["own_not_judged"] = " ".join(elsewhere)
        return found

    with _still(full_precision), _still(quantized):
        job = Job(against, full_precision, quantized, run, steps, dict(arguments or {}))
        stages = (Record(samples, batch), settings)
        identity = {} if run.work is None else _fit_identity(stages, job, pipe, own)
        with (
            nullcontext()
            if run.work is None
            else opened(run.work, identity, resume=resume, processes=run.processes) as work
        ):
            figures = _run_stages(job, stages, work, run_stage)
    result = with_denoiser(pipe, name, quantized)
    result.scheduler = getattr(result.scheduler, "uncorrected", result.scheduler)
    if job.handed["correction"] is not None:
        result.scheduler = CorrectedScheduler(result.scheduler, job.handed["correction"])
    schedule: ScheduleFingerprint = job.handed["trajectories"][0].fingerprint
    guard_schedule(result.scheduler, schedule)
    kept_run = own.run if own is not None and figures[-1]["chosen"] == AS_IT_IS else None
    now = _corrected_run(_run_of(run.seed, figures, called_with), kept_run)
    setattr(result, _CALIBRATIONS, (*calibrations_of(result), {"run": now}))
    source = str(candidate) if isinstance(candidate, str | Path) and manifest is None else None
    return Compensated(
        result, name, schedule, run.seed, tuple(figures), settings, manifest, source, called_with, kept_run
    )


@dataclass(frozen=True)
class _Own:
    """The correction that a candidate of `compensate` has already.

    schedule: the one that it was fitted on; None where nothing says it, as with `schedule="nearest"`.
    run: how it came about, as in manifests; empty where nothing says it.
    """

    correction: StepCorrection
    schedule: ScheduleFingerprint | None
    run: Mapping[str, Any]

    def differences(self, recorded: ScheduleFingerprint, called_with: Mapping[str, float]) -> list[str]:
        """Sentences that say why it cannot be judged on these steps; empty if it can.

        Settings of the scheduler that leave the timesteps alone are the candidate's own business.
        """
        found = []
        if self.schedule is not None:
            found = replace(self.schedule, config=recorded.config).differences(recorded)
        known = _fitted_at(self.run)
        return found + [
            f"The {name} is {asked:g} instead of {known[name]:g}."
            for name, asked in called_with.items()
            if isinstance(known.get(name), int | float) and not math.isclose(known[name], asked)
        ]


def _fit_identity(stages: Sequence[Stage], job: Job, candidate: Any, own: _Own | None) -> dict[str, Any]:
    """What must be the same for a fit to be continued."""
    settings = [
        {"stage": type(stage).__name__, **TypeAdapter(type(stage)).dump_python(stage, mode="json")} for stage in stages
    ]
    tables = {} if own is None else own.correction.tables()
    return {
        **_identity({"name": "compensate", "stages": settings}, job.run, job.steps, job),
        "candidate": _digest(job.denoiser),
        "candidate_scheduler": _scheduler_identity(getattr(candidate.scheduler, "uncorrected", candidate.scheduler)),
        "candidate_correction": {name: checksum(table) for name, table in tables.items()},
    }


def _own_correction(candidate: Any, pipe: Any, manifest: Manifest | None) -> _Own | None:
    """The correction that a candidate brings along. pipe: the candidate, opened; of a folder of others without it."""
    if manifest is None and isinstance(candidate, str | Path):
        folder = Path(candidate)
        if str(candidate) in SHIPPED_MODELS or not (folder / CORRECTION_NAME).is_file():
            return None
        said, correction = read_correction(folder)
        return None if correction is None else _Own(correction, ScheduleFingerprint.from_dict(said.schedule), said.run)
    correction = correction_of(pipe.scheduler)
    if correction is None:
        return None
    runs = [calibration["run"] for calibration in calibrations_of(pipe)] if manifest is None else [manifest.run]
    return _Own(correction, guarded_by(pipe.scheduler), runs[-1] if runs else {})


def _fitted_at(run: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments that a correction was fitted at. run: as in manifests; empty where it does not say them."""
    found: Mapping[str, Any] = (run.get("compensation") or run).get("arguments") or {}
    return found


def _candidate(candidate: Any, full_precision: nn.Module) -> tuple[Any, Manifest | None]:
    """The pipeline, and the manifest of a checkpoint. Layers are not packed, so that they can be saved."""
    if not isinstance(candidate, str | Path):
        return candidate, None
    if not (Path(candidate) / MANIFEST_NAME).is_file():
        pipe, device = _without_correction(str(candidate)), next(full_precision.parameters()).device
        # Some formats are on their device once they are opened, and refuse to be moved.
        if any(parameter.device != device for parameter in find_denoiser(pipe)[1].parameters()):
            pipe.to(device)
        return pipe, None
    plain = read_manifest(Path(candidate)).denoiser.library == "plain"
    pipe, manifest = load_checkpoint(candidate, denoiser=full_precision if plain else None)
    _refuse_edited_scheduler(candidate, pipe, manifest)
    pipe.to(next(full_precision.parameters()).device)
    if manifest.schedule is not None:
        calibrated = ScheduleFingerprint.from_dict(manifest.schedule)
        walk_timesteps(pipe.scheduler, calibrated)
        guard_schedule(pipe.scheduler, calibrated)
    return pipe, manifest


def _check_same_schedule(pipe: Any, recorded: Trajectory) -> None:
    """The candidate must sample on the schedule of the recording, up to guidance, which is the arguments' business."""
    scheduler = copy.deepcopy(pipe.scheduler)
    args, kwargs = recorded.schedule_arguments
    scheduler.set_timesteps(*args, **kwargs)
    expected = recorded.fingerprint
    own = ScheduleFingerprint.of(scheduler, steps=expected.steps, guidance=expected.guidance)
    found = expected.differences(own)
    if found:
        raise SpecError(
            f"The candidate would not sample on the schedule of the full-precision pipeline: {' '.join(found)} Give "
            "both the same scheduler."
        )


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


@contextmanager
def _still(denoiser: nn.Module) -> Iterator[None]:
    """Inside, the denoiser is in evaluation mode; afterwards it is in the mode it was in."""
    training = denoiser.training
    denoiser.eval()
    try:
        yield
    finally:
        denoiser.train(training)


def _identity(recipe: Mapping[str, Any], run: Run, steps: int, job: Job) -> dict[str, Any]:
    """What must be the same for a run to be continued. recipe: as `Recipe.to_dict` has it."""
    beside = network_beside(job.pipe)
    others = other_denoisers(job.pipe, job.full_precision)
    return {
        "recipe": dict(recipe),
        "seed": run.seed,
        "steps": steps,
        "arguments": json.loads(json.dumps(dict(job.arguments), default=repr)),
        "weights": _digest(job.full_precision, *([] if beside is None else [beside]), *others),
        "scheduler": _scheduler_identity(getattr(job.pipe, "scheduler", None)),
    }


def _digest(*modules: nn.Module) -> str:
    """SHA-256 of all names and values of the modules' state."""
    digest = hashlib.sha256()
    for module in modules:
        for key, tensor in module.state_dict().items():
            digest.update(key.encode())
            plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
            if plain and not tensor.is_quantized:
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            else:  # others' formats, and extra state that is no tensor, as they would be saved
                whole = io.BytesIO()
                torch.save(tensor, whole)
                digest.update(whole.getvalue())
    return digest.hexdigest()


def _scheduler_identity(scheduler: Any) -> dict[str, Any]:
    """Class and configuration of a pipeline's scheduler as JSON values; empty for a pipeline without."""
    if scheduler is None:
        return {}
    chosen = chooses_timesteps(scheduler)
    return {"class": type(scheduler).__name__, **config_of(scheduler)} | ({"set_timesteps": chosen} if chosen else {})


def _run_stages(
    job: Job,
    stages: Sequence[Stage],
    work: WorkFolder | None,
    run_stage: Callable[[Stage, Job], Mapping[str, Any]] = lambda stage, job: stage.run(job),
) -> list[dict[str, Any]]:
    """The figures of all stages; those that the work folder has are not run again."""
    figures: list[dict[str, Any]] = []
    if work is not None:
        figures += work.figures
        work.restore(job, stages)
        job.keeper = work
    for number in range(len(figures), len(stages)):
        stage = stages[number]
        if work is not None:
            work.stage = number
        began = time.perf_counter()
        found = run_stage(stage, job)
        entry = {"stage": type(stage).__name__, "seconds": round(time.perf_counter() - began, 3), **found}
        figures.append(entry)
        agree_(job, stage.gives)
        if work is not None:
            work.finish(job, stage, entry)
        job.run.finished(number, entry)
    return figures


def load(
    folder: Path | str,
    *,
    engine: str | GraphEngine = "auto",
    device: torch.device | str | None = None,
    denoiser: nn.Module | None = None,
    schedule: Literal["strict", "nearest"] = "strict",
    onto: Any = None,
) -> Any:
    """Open a checkpoint as an ordinary pipeline whose denoiser is quantized.

    engine: what runs the layers. "simulated" is the arithmetic of the calibration: the same bits as before saving, with
        gradients, on any device, and the only one whose pipeline takes adapters and `save_pretrained`. "openvino" runs
        the whole denoiser as one int8 graph, "openvino-bf16" with its float parts in bfloat16, and so does an
        OpenVINOEngine with other settings. "auto" is "openvino" where that runs the layers with quantized weight and
        input on integers, or those with half of their weights, as on a CPU with VNNI ("openvino-bf16" if it runs all of
        them so and the processor multiplies bfloat16), and "simulated" elsewhere, also if the first call shows that
        there is no graph of the denoiser (a warning says why). Pipelines that switch between two denoisers are
        simulated. The log says what was chosen.
    denoiser: the float module, for a checkpoint of a plain torch denoiser.
    schedule: "strict" refuses to sample with other timesteps than those of the calibration; "nearest" lets every
        timestep use the parameters of the nearest calibrated one.
    onto: a pipeline that all parts but the quantized denoiser are taken from. A pipeline that switches between two
        denoisers has a checkpoint for each: `load("second", onto=load("first"))` has both.
    Raises CheckpointError for a damaged checkpoint, UnknownEngine for an engine that there is not.
    """
    if schedule not in ("strict", "nearest"):
        raise SpecError(f"schedule must be 'strict' or 'nearest', found {schedule!r}.")
    given = None if onto is None else _parts_for(Path(folder), onto)
    pipe, manifest = load_checkpoint(folder, denoiser=denoiser, components=given)
    if schedule == "strict" and onto is None:
        _refuse_edited_scheduler(folder, pipe, manifest)
    setattr(pipe, _CALIBRATIONS, ({"recipe": manifest.recipe, "run": manifest.run}, *calibrations_of(onto)))
    if device is not None:
        pipe.to(device)
    if engine == "auto" and several_denoisers(pipe):
        # The two are told from the rest of the pipeline by their class, which is another one for a graph.
        logger.info("Engine 'simulated': the pipeline switches between %s.", " and ".join(several_denoisers(pipe)))
        engine = "simulated"
    simulated = getattr(pipe, manifest.denoiser.name)
    placed, _ = place(simulated, engine)
    setattr(pipe, manifest.denoiser.name, placed)
    if placed is not simulated and hasattr(pipe, "save_pretrained"):
        pipe.save_pretrained = functools.partial(_refuse_to_save, manifest.denoiser.name)
    if manifest.schedule is not None:
        calibrated = ScheduleFingerprint.from_dict(manifest.schedule)
        walk_timesteps(pipe.scheduler, calibrated)
        if schedule == "strict":
            guard_schedule(pipe.scheduler, calibrated)
    return pipe


def _refuse_edited_scheduler(folder: Path | str, pipe: Any, manifest: Manifest) -> None:
    """Raise CheckpointError where the saved scheduler's settings are not those of the calibration.

    Settings that one side does not know are those of another version of diffusers.
    """
    if manifest.schedule is None:
        return
    calibrated, found = ScheduleFingerprint.from_dict(manifest.schedule), config_of(pipe.scheduler)
    edited = [
        f"{key} is {found[key]!r} instead of {value!r}"
        for key, value in calibrated.config.items()
        if key in found and found[key] != value
    ]
    if edited:
        raise CheckpointError(
            f"The scheduler in {Path(folder) / 'scheduler'} is not the one of the calibration: {'; '.join(edited)}. "
            "Put the file back; to sample with these settings, load with schedule='nearest' (--schedule nearest)."
        )


def _refuse_to_save(name: str, *_: Any, **__: Any) -> None:
    """In the place of a pipeline's `save_pretrained`, which would leave out a module that is none of diffusers'."""
    raise EngineError(
        f"{name} runs as a graph, or may, and diffusers would save the pipeline without it. Load the checkpoint with "
        "engine='simulated' to save it, or copy its folder."
    )


def _parts_for(folder: Path, onto: Any) -> dict[str, Any]:
    """What a checkpoint takes from another pipeline: everything but the denoiser that it holds."""
    manifest = read_manifest(folder)
    if type(onto).__name__ != manifest.pipeline.class_name or not hasattr(onto, "components"):
        raise SpecError(
            f"{folder} is a checkpoint of a {manifest.pipeline.class_name}, and onto= is a {type(onto).__name__}. Load "
            "it onto a pipeline of its own kind."
        )
    wanted = None if manifest.schedule is None else ScheduleFingerprint.from_dict(manifest.schedule)
    present = guarded_by(onto.scheduler)
    if wanted is not None and present is not None and wanted.timesteps != present.timesteps:
        raise SpecError(
            f"{folder} is calibrated for {wanted.steps} steps of {wanted.scheduler}, and the pipeline in onto= for "
            f"{present.steps} steps of {present.scheduler}: both must be for one schedule."
        )
    parts = {name: part for name, part in onto.components.items() if name != manifest.denoiser.name}
    return {**parts, "scheduler": copy.deepcopy(onto.scheduler)}


def open_any(
    source: str,
    *,
    device: torch.device | str | None = None,
    scheduler: Mapping[str, Any] | None = None,
    **options: Any,
) -> tuple[Any, str]:
    """A checkpoint (`load` with the options) or a full-precision model; says which: "checkpoint" or "model".

    scheduler: as for `open_model`. Raises SpecError for one with a checkpoint, which samples with its own.
    """
    path = Path(source)
    if (path / MANIFEST_NAME).is_file():
        if scheduler:
            raise SpecError(
                f"{source} is a checkpoint, and samples with the scheduler that it was calibrated for: quantize the "
                "model with the other one."
            )
        return load(path, device=device, **options), "checkpoint"
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise CheckpointError(f"{source} is neither a checkpoint ({MANIFEST_NAME}) nor a diffusers folder.")
    return open_model(source, device=device, scheduler=scheduler), "model"


@torch.no_grad()
def sample(
    pipe: Any,
    *,
    seeds: Sequence[int],
    steps: int,
    batch_size: int = 16,
    arguments: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    processes: Processes = ALONE,
) -> Tensor:
    """Images `[N, C, H, W]` in [0, 1], float32 on the CPU, one per seed; videos are `[N, frames, C, H, W]`.

    Every image has a generator of its own, so the noise of image 17 does not depend on which other seeds are asked for.
    Batches of another size may add in another order: equal up to rounding, which a quantizer can turn into a level.
    arguments: further arguments of the pipeline's call; a list with one entry per seed is cut with the seeds.
    processes: take turns with the batches; all of them get all images, the same as one process alone would sample.
    Raises UnsupportedPipeline for a pipeline that returns neither images nor frames.
    """
    batches = sampled(
        pipe,
        seeds=seeds,
        steps=steps,
        batch_size=batch_size,
        arguments=arguments,
        progress=progress,
        processes=processes,
    )
    return torch.cat(list(batches))


@torch.no_grad()
def sampled(
    pipe: Any,
    *,
    seeds: Sequence[int],
    steps: int,
    batch_size: int = 16,
    arguments: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    processes: Processes = ALONE,
) -> Iterator[Tensor]:
    """Like `sample`, batch by batch."""
    seeds = list(seeds)
    if not seeds or batch_size < 1:
        raise SpecError(f"Sampling needs at least one seed and a batch size of at least 1, found {len(seeds)} seeds.")
    accepted = inspect.signature(pipe.__call__).parameters
    check_call(pipe, arguments or {}, steps)
    _check_other_steps(pipe, arguments or {})

    def images_of(start: int) -> Tensor:
        chunk = seeds[start : start + batch_size]
        own = arguments_of_batch(arguments or {}, slice(start, start + batch_size), len(seeds))
        own = dict(with_labels(pipe, own, chunk))
        generators = [torch.Generator().manual_seed(seed) for seed in chunk]
        offered = {"batch_size": len(chunk), "num_inference_steps": steps, "output_type": "np"}
        if any(key.startswith("prompt") for key in own) and isinstance(own.get("prompt"), list):
            offered.pop("batch_size")
        known = {key: value for key, value in offered.items() if key in accepted and key not in own}
        # Pipelines that do not hand their generators to the scheduler (DiT) draw from the global one, which must not
        # remember the batches before, nor be left changed.
        with torch.random.fork_rng(devices=forked_devices(torch.device(getattr(pipe, "device", "cpu")))):
            torch.manual_seed(chunk[0])
            # A list of one generator is taken by diffusers as one generator for the batch: the same thing here.
            with refusal_explained(pipe):
                output = pipe(generator=generators, **known, **own)
        return torch.from_numpy(_pictures(pipe, output)).movedim(-1, -3).float().contiguous()

    starts = range(0, len(seeds), batch_size)
    with quiet(pipe), (progress or SilentProgress()).track("Sampling", len(seeds)) as advance:
        for start, images in zip(starts, processes.in_turn(images_of, starts), strict=True):
            advance(len(seeds[start : start + batch_size]))
            yield images


def _check_other_steps(pipe: Any, arguments: Mapping[str, Any]) -> None:
    """Ranges are of the guidance and the noise that were calibrated with, which is worth a warning. A correction holds
    for those that it was fitted at, and is refused at others; its guard sees the timesteps alone.
    """
    scheduler = getattr(pipe, "scheduler", None)
    if correction_of(scheduler) is None or guarded_by(scheduler) is None:
        _warn_of_other_steps(pipe, arguments)
        return
    fitted: Mapping[str, Any] = {}  # of checkpoints that do not say it, nothing is known
    for calibration in calibrations_of(pipe):  # the last one is of the correction
        fitted = _fitted_at(calibration["run"])
    for name, asked in step_arguments(pipe, arguments).items():
        known = fitted.get(name)
        if isinstance(known, int | float) and not math.isclose(known, asked):
            raise SpecError(
                f"The correction was fitted with {name}={known:g}, and the pipeline is called with "
                f"{name}={asked:g}. Sample as it was fitted, fit it anew, or load the checkpoint with "
                'schedule="nearest" to use it all the same.'
            )


def _warn_of_other_steps(pipe: Any, arguments: Mapping[str, Any]) -> None:
    if getattr(pipe, _TOLD, False):
        return
    asked = step_arguments(pipe, arguments)
    for calibration in calibrations_of(pipe):
        for name, known in (calibration["run"].get("arguments") or {}).items():
            if name in asked and isinstance(known, int | float) and not math.isclose(known, asked[name]):
                logger.warning(
                    "The checkpoint was calibrated with %s=%g and is sampled with %s=%g: give that argument, too, to "
                    "sample as it was calibrated.",
                    name,
                    known,
                    name,
                    asked[name],
                )
                setattr(pipe, _TOLD, True)


def _pictures(pipe: Any, output: Any) -> np.ndarray[Any, Any]:
    """`[B, H, W, C]` of images or `[B, frames, H, W, C]` of videos, as diffusers' pipelines return them."""
    for name in ("images", "frames"):
        found = getattr(output, name, None)
        if isinstance(found, np.ndarray):
            return found
    raise UnsupportedPipeline(
        f"{type(pipe).__name__} returned {type(output).__name__}; expected an array in its `images` or `frames`."
    )
