"""What the commands do: check what is in the way, call the library, say where things are."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

from stepquant import api
from stepquant.allocator import tune_allocator
from stepquant.calibrate.compensation import EstimatorChoice
from stepquant.cli import views
from stepquant.cli.console import Interrupted, Settings, interruptible, progress_for, stdout_console, write_json
from stepquant.cli.outputs import (
    FINISHED_STAGES,
    WORK_MARK,
    clear_work,
    evaluation_path,
    read_evaluation,
    refuse_existing,
    refuse_no_checkpoint,
    refuse_used_folder,
    settings_path,
    work_folder,
)
from stepquant.config import Resolved, apply_overrides, dump, load_config, parse_yaml, resolve
from stepquant.errors import CheckpointError, SpecError, nearest
from stepquant.evaluate.compare import evaluate as compare
from stepquant.evaluate.images import save_png, to_grid
from stepquant.inspection import inspect_checkpoint
from stepquant.run import Run

__all__ = [
    "CompensateRequest",
    "QuantizeRequest",
    "Sampling",
    "compensate",
    "device_named",
    "evaluate",
    "evaluate_and_keep",
    "measure",
    "prepare",
    "quantize",
    "report",
    "run_quantize",
    "sample",
    "show_plan",
    "write_images",
    "write_page",
]

_IMAGES_IN_REPORT = 8


@dataclass(frozen=True)
class QuantizeRequest:
    """What the user asked `quantize` or `check` for.

    out: None where nothing is to be written.
    flags: settings of the command line under their names in `run.yaml`.
    """

    out: Path | None
    config: Path | None
    overrides: tuple[str, ...]
    flags: Mapping[str, Any]
    resume: bool = False
    overwrite: bool = False

    def resolved(self) -> Resolved:
        """preset < file < command line."""
        data = {} if self.config is None else load_config(self.config)
        source = "--set" if self.config is None else str(self.config)
        return resolve(apply_overrides(data, self.overrides), source=source, flags=self.flags)


@dataclass(frozen=True)
class Sampling:
    """Which images to sample and how. steps None: the checkpoint's own."""

    seeds: list[int]
    steps: int | None = None
    batch_size: int = 16
    arguments: tuple[str, ...] = field(default=())
    engine: str = "auto"
    device: str = "auto"
    schedule: Literal["strict", "nearest"] = "strict"

    def pipeline_arguments(self) -> dict[str, Any]:
        """The `--argument KEY=VALUE` of the command line as keyword arguments."""
        return _pipeline_arguments(self.arguments)


@dataclass(frozen=True)
class CompensateRequest:
    """What the user asked `compensate` for. against None: the model that the checkpoint was made from."""

    candidate: Path
    out: Path
    against: str | None
    estimator: str
    samples: int
    seed: int
    device: str
    batch_size: int
    arguments: tuple[str, ...] = ()


def _pipeline_arguments(texts: Iterable[str]) -> dict[str, Any]:
    """KEY=VALUE as keyword arguments; values are read as YAML."""
    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise SpecError(f"--argument takes key=value, such as prompt='a cat', found {text!r}.")
        found[key] = parse_yaml(value, source=f"--argument {key}")
    return found


def prepare(settings: Settings) -> None:
    """What every command that computes needs first: a fast allocator, and libraries that keep to themselves."""
    tune_allocator()
    if settings.debug:
        return
    from diffusers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def device_named(name: str) -> Any:
    """The torch device that a user means; `auto` is a GPU where there is one."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise SpecError(f"There is no device {name!r}: expected auto, cpu, cuda, cuda:1, ...") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SpecError(f"Device {name!r} was asked for, but torch sees {torch.cuda.device_count()} CUDA devices here.")
    return device


def show_plan(request: QuantizeRequest, settings: Settings, json_target: str | None) -> None:
    """Print what a run would do."""
    prepare(settings)
    resolved = request.resolved()
    plan = views.plan_of(resolved)
    if json_target is not None:
        write_json(plan, json_target)
    if json_target != "-":
        views.show_plan(plan)


def quantize(request: QuantizeRequest, settings: Settings, json_target: str | None) -> None:
    """Quantize and say what came out."""
    out = _required(request.out)
    refuse_existing(out, overwrite=request.overwrite)
    refuse_no_checkpoint(out)
    if request.config is not None and request.config.resolve() == settings_path(out).resolve():
        raise SpecError(
            f"The settings of the run will be written to {settings_path(out)}, which is the file given with --config: "
            "choose another OUT."
        )
    clear_work(work_folder(out), resume=request.resume, overwrite=request.overwrite)
    resolved = request.resolved()
    figures = run_quantize(resolved, out, settings, resume=request.resume, overwrite=request.overwrite)
    description = inspect_checkpoint(out)
    if json_target is not None:
        write_json({"checkpoint": str(out), "bytes": description.get("bytes"), "figures": figures}, json_target)
    if json_target != "-" and not settings.quiet:
        views.show_quantized(out, resolved, description, figures)


def run_quantize(
    resolved: Resolved, out: Path, settings: Settings, *, resume: bool = False, overwrite: bool = False
) -> list[dict[str, Any]]:
    """Quantize, save, and remove the work folder. Returns the figures of the stages."""
    prepare(settings)
    pipe = api.open_model(resolved.model, device=device_named(resolved.device))
    work = work_folder(out)
    work.mkdir(parents=True, exist_ok=True)
    if not (work / WORK_MARK).exists():
        dump(resolved, work / WORK_MARK)
    run = Run(seed=resolved.seed, work=work, progress=progress_for(settings))
    with (
        _kept_if_worth_it(work),
        interruptible(f"What is done so far is in {work}; go on with the same command and --resume."),
    ):
        quantized = api.quantize(
            pipe,
            resolved.recipe,
            steps=resolved.steps,
            run=run,
            arguments=resolved.arguments,
            base_model=resolved.model,
            resume=resume,
        )
        quantized.save(out, overwrite=overwrite)
    dump(resolved, settings_path(out))
    # An evaluation of the checkpoint that was here before says nothing about this one.
    evaluation_path(out).unlink(missing_ok=True)
    shutil.rmtree(work)
    return list(quantized.figures)


@contextmanager
def _kept_if_worth_it(work: Path) -> Iterator[None]:
    """Remove the work folder of a run that failed before its first stage was done: it would only be in the way."""
    try:
        yield
    except Interrupted:
        raise
    except Exception:
        if not (work / FINISHED_STAGES).exists():
            shutil.rmtree(work)
        raise


def sample(
    source: str, out: Path, sampling: Sampling, settings: Settings, *, grid: bool = False, overwrite: bool = False
) -> None:
    """Sample images into a folder."""
    refuse_used_folder(out, overwrite=overwrite)
    arguments = sampling.pipeline_arguments()
    prepare(settings)
    options = {"engine": sampling.engine, "schedule": sampling.schedule}
    pipe, kind = api.open_any(source, device=device_named(sampling.device), **options)
    steps = sampling.steps
    if steps is None:
        steps = _steps_of(inspect_checkpoint(Path(source))) if kind == "checkpoint" else 20
    with interruptible(f"No images were written to {out}."):
        images = api.sample(
            pipe,
            seeds=sampling.seeds,
            steps=steps,
            batch_size=sampling.batch_size,
            arguments=arguments,
            progress=progress_for(settings),
        )
    write_images(images, sampling.seeds, out, grid=grid)
    if not settings.quiet:
        stdout_console().print(f"{len(sampling.seeds)} images of {steps} steps are in {out}.")


def write_images(images: Any, seeds: Sequence[int], folder: Path, *, grid: bool) -> None:
    """One PNG a seed, and with `grid` all of them in one picture."""
    for image, seed in zip(images, seeds, strict=True):
        save_png(image, folder, seed=seed)
    if grid:
        columns = max(1, round(len(seeds) ** 0.5))
        to_grid(images, columns).save(folder / "grid.png")


def evaluate(
    checkpoint: Path, against: str | None, sampling: Sampling, settings: Settings, json_target: str | None
) -> None:
    """Evaluate, keep the result beside the checkpoint, and show it."""
    results = measure(checkpoint, against, sampling, settings)
    kept = _keep(results, checkpoint)
    if json_target is not None:
        write_json(results, json_target)
    if json_target != "-" and not settings.quiet:
        views.show_results(results)
        if kept:
            stdout_console().print(f"Kept as {evaluation_path(checkpoint)} for `stepquant report`.")


def measure(checkpoint: Path, against: str | None, sampling: Sampling, settings: Settings) -> dict[str, Any]:
    """Results of schema 1 for a checkpoint beside its full-precision model."""
    arguments = sampling.pipeline_arguments()
    description = inspect_checkpoint(checkpoint)
    prepare(settings)
    device = device_named(sampling.device)
    base = against or _base_model(checkpoint, description)
    reference = api.open_model(base, device=device)
    candidate = api.load(checkpoint, engine=sampling.engine, device=device, schedule=sampling.schedule)
    with interruptible("Nothing was written; an evaluation starts from the beginning."):
        results = compare(
            candidate,
            reference,
            seeds=sampling.seeds,
            steps=sampling.steps or _steps_of(description),
            batch_size=sampling.batch_size,
            run=Run(progress=progress_for(settings)),
            arguments=arguments,
        )
    return {**results, "candidate": str(checkpoint), "against": base, "command": settings.command}


def evaluate_and_keep(checkpoint: Path, sampling: Sampling, settings: Settings) -> dict[str, Any]:
    """Evaluate against the model that was quantized, and keep the result beside the checkpoint."""
    results = measure(checkpoint, None, sampling, settings)
    _keep(results, checkpoint)
    return results


def _keep(results: Mapping[str, Any], checkpoint: Path) -> bool:
    """Write the results beside the checkpoint; a place where nothing can be written is no reason to lose them."""
    try:
        write_json(results, str(evaluation_path(checkpoint)))
    except OSError:
        return False
    return True


def compensate(
    request: CompensateRequest, settings: Settings, json_target: str | None, *, overwrite: bool = False
) -> None:
    """Fit a correction for a checkpoint, write the corrected one, and say what it gained."""
    refuse_existing(request.out, overwrite=overwrite)
    refuse_no_checkpoint(request.out)
    if request.out.resolve() == request.candidate.resolve():
        raise SpecError(f"OUT is the candidate itself, {request.out}: choose another folder.")
    if request.estimator not in get_args(EstimatorChoice):
        known = get_args(EstimatorChoice)
        raise SpecError(f"--estimator: there is none named {request.estimator!r}.{nearest(request.estimator, known)}")
    arguments = _pipeline_arguments(request.arguments)
    description = inspect_checkpoint(request.candidate)
    base = request.against or _base_model(request.candidate, description)
    prepare(settings)
    device = device_named(request.device)
    with interruptible(f"Nothing was written; {request.candidate} is as it was."):
        made = api.compensate(
            request.candidate,
            api.open_model(base, device=device),
            steps=_steps_of(description),
            samples=request.samples,
            batch=request.batch_size,
            estimator=cast(EstimatorChoice, request.estimator),
            arguments=arguments,
            run=Run(seed=request.seed, progress=progress_for(settings)),
        )
        made.save(request.out, overwrite=overwrite)
    evaluation_path(request.out).unlink(missing_ok=True)
    figures = list(made.figures)
    if json_target is not None:
        write_json({"checkpoint": str(request.out), "against": base, "figures": figures}, json_target)
    if json_target != "-" and not settings.quiet:
        views.show_compensated(request.candidate, request.out, figures)


def report(
    checkpoints: Sequence[Path],
    out: Path,
    seeds: list[int],
    settings: Settings,
    device_and_batch: tuple[str, int],
    *,
    overwrite: bool = False,
) -> None:
    """Write the page; checkpoints without an evaluation are evaluated first."""
    refuse_existing(out, overwrite=overwrite)
    device, batch_size = device_and_batch
    results = []
    for checkpoint in checkpoints:
        found = read_evaluation(checkpoint)
        if found is None:
            found = evaluate_and_keep(checkpoint, Sampling(seeds, batch_size=batch_size, device=device), settings)
        results.append(found)
    write_page(checkpoints, results, out, settings, (device, batch_size))
    if not settings.quiet:
        stdout_console().print(f"The report is {out}.")


def write_page(
    checkpoints: Sequence[Path],
    results: Sequence[Mapping[str, Any]],
    out: Path,
    settings: Settings,
    device_and_batch: tuple[str, int],
) -> dict[str, Any]:
    """Sample the images to show, write the page, and return the images (see `report.page.Images`)."""
    from stepquant.report.page import write_report  # matplotlib is slow to import

    descriptions = [inspect_checkpoint(checkpoint) for checkpoint in checkpoints]
    images = _images_for(checkpoints, results, settings, device_and_batch)
    write_report([dict(result) for result in results], images, descriptions, out)
    return images


def _images_for(
    checkpoints: Sequence[Path],
    results: Sequence[Mapping[str, Any]],
    settings: Settings,
    device_and_batch: tuple[str, int],
) -> dict[str, Any]:
    """The same few seeds of the full-precision model and of every checkpoint, and the checkpoints' rows over time."""
    from stepquant.report.groups import rows_over_time  # matplotlib is slow to import

    name, batch_size = device_and_batch
    prepare(settings)
    device = device_named(name)
    first = results[0]
    seeds = [int(seed) for seed in first["images"]["seeds"]][:_IMAGES_IN_REPORT]
    common: dict[str, Any] = {"seeds": seeds, "steps": int(first["steps"]), "batch_size": batch_size}
    progress = progress_for(settings)
    reference = api.open_model(str(first["against"]), device=device)
    found: dict[str, Any] = {"seeds": seeds, "candidates": [], "rows": []}
    with interruptible("The report was not written; evaluations that were finished are kept."):
        found["reference"] = api.sample(reference, progress=progress, **common)
        for checkpoint in checkpoints:
            pipe = api.load(checkpoint, device=device, schedule="nearest")
            found["candidates"].append(api.sample(pipe, progress=progress, **common))
            found["rows"].append(rows_over_time(pipe))
    return found


def _base_model(checkpoint: Path, description: Mapping[str, Any]) -> str:
    base = description.get("base_model")
    if not base:
        raise CheckpointError(
            f"{checkpoint} does not say which model it was made from: name the full-precision model with --against."
        )
    return str(base)


def _steps_of(description: Mapping[str, Any]) -> int:
    """Sampling steps that a checkpoint was calibrated for."""
    schedule = description.get("schedule") or {}
    steps = description.get("steps", schedule.get("steps"))
    if steps is None:
        raise CheckpointError("The checkpoint does not say for how many steps it was calibrated: give --steps.")
    return int(steps)


def _required(out: Path | None) -> Path:
    if out is None:
        raise SpecError("There is no folder to write to: give -o OUT.")
    return out
