"""What the commands do: check what is in the way, call the library, say where things are."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

from stepquant import api
from stepquant.allocator import tune_allocator
from stepquant.calibrate.compensation import EstimatorChoice
from stepquant.cli import views
from stepquant.cli.arguments import parsed, ready, recorded_images, with_prompts
from stepquant.cli.console import Interrupted, Settings, interruptible, progress_for, stdout_console, write_json
from stepquant.cli.outputs import (
    FINISHED_STAGES,
    SAVING_MARK,
    WORK_MARK,
    clear_work,
    evaluation_path,
    is_finished,
    read_evaluation,
    read_origin,
    refuse_existing,
    refuse_no_checkpoint,
    refuse_used_folder,
    remove_work,
    settings_path,
    work_folder,
    write_figures,
)
from stepquant.cli.scalars import Scalars
from stepquant.config import Resolved, apply_overrides, dump, load_config, resolve
from stepquant.errors import CheckpointError, SpecError, StepquantError, nearest
from stepquant.evaluate.arguments import first_of
from stepquant.evaluate.clip import ClipScore
from stepquant.evaluate.compare import METRICS
from stepquant.evaluate.compare import evaluate as compare
from stepquant.evaluate.features import Features
from stepquant.evaluate.folder import discard
from stepquant.evaluate.gates import check_gates, parse_gates
from stepquant.evaluate.images import save_png, to_grid
from stepquant.evaluate.lpips import Lpips
from stepquant.evaluate.named_features import features_named
from stepquant.evaluate.seeds import refuse_calibration_seeds
from stepquant.evaluate.source import PipelineSource, Source, open_source
from stepquant.evaluate.weights import MissingWeights
from stepquant.inspection import inspect_checkpoint
from stepquant.manifest import MANIFEST_NAME
from stepquant.processes import joined
from stepquant.run import Run
from stepquant.work_folder import hold

__all__ = [
    "CompensateRequest",
    "Measuring",
    "QuantizeRequest",
    "Sampling",
    "compensate",
    "device_named",
    "evaluate",
    "evaluate_and_keep",
    "kept_if_worth_it",
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

logger = logging.getLogger(__name__)

_IMAGES_IN_REPORT = 8
_EVALUATED = range(1000, 1256)
"""Seeds of an evaluation that names none and compares no folder of images."""


@dataclass(frozen=True)
class QuantizeRequest:
    """What the user asked `quantize` or `check` for.

    out: None where nothing is to be written.
    tensorboard: folder for scalars of the stages' figures, None for none.
    flags: settings of the command line under their names in `run.yaml`.
    """

    out: Path | None
    config: Path | None
    overrides: tuple[str, ...]
    flags: Mapping[str, Any]
    resume: bool = False
    overwrite: bool = False
    tensorboard: Path | None = None

    def resolved(self) -> Resolved:
        """preset < file < command line; of arguments, each by itself."""
        source = "--set" if self.config is None else str(self.config)
        data = apply_overrides({} if self.config is None else load_config(self.config), self.overrides)
        flags = dict(self.flags)
        known = data.get("arguments")
        if "arguments" in flags and isinstance(known, dict):
            flags["arguments"] = {**known, **flags["arguments"]}
        return with_prompts(resolve(data, source=source, flags=flags))


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

    def pipeline_arguments(self, count: int | None = None) -> dict[str, Any]:
        """The `--argument KEY=VALUE` of the command line as keyword arguments for `count` images, one for each seed."""
        return ready(parsed(self.arguments), len(self.seeds) if count is None else count)


@dataclass(frozen=True)
class Measuring:
    """What `evaluate` measures beside the defaults, and what it does with what is there already.

    features: "digits", "inception=FILE", "mobilenetv2=FILE" or "none"; None takes the shipped ones where they fit.
    protocol: a preset of `evaluate.protocol`. lpips: weights of its backbone. clip: folder or hub id of a CLIP
        model. gates: such as "psnr<28".
    """

    features: str | None = None
    protocol: str | None = None
    lpips: Path | None = None
    clip: str | None = None
    gates: tuple[str, ...] = ()
    resume: bool = False
    overwrite: bool = False
    allow_calibration_seeds: bool = False


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


def prepare(settings: Settings) -> None:
    """What every command that computes needs first: a fast allocator, and libraries that keep to themselves."""
    tune_allocator()
    if settings.debug:
        return
    from diffusers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if settings.quiet:
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()  # transformers looks here when it is imported
        if "transformers" in sys.modules:
            sys.modules["transformers"].utils.logging.disable_progress_bar()


def device_named(name: str) -> Any:
    """The torch device that a user means; `auto` is a GPU where there is one. Of several processes each has its own."""
    import torch

    processes = joined()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if processes.count == 1:
            return torch.device(name)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise SpecError(f"There is no device {name!r}: expected auto, cpu, cuda, cuda:1, ...") from None
    if device.type == "cuda" and processes.count > 1:
        if ":" in name:
            raise SpecError(
                f"Device {name!r} was asked for by {processes.count} processes, and each needs a GPU of its own: give "
                "--device cuda."
            )
        device = torch.device("cuda", processes.local)
        name = str(device)
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
    processes = joined()
    if not processes.from_first(lambda: _is_to_do(request, out, settings, json_target)):
        return
    resolved = request.resolved()
    figures = run_quantize(
        resolved,
        out,
        settings,
        resume=request.resume,
        overwrite=request.overwrite,
        tensorboard=request.tensorboard,
    )
    if not processes.first:
        return
    description = inspect_checkpoint(out)
    if json_target is not None:
        write_json({"checkpoint": str(out), "bytes": description.get("bytes"), "figures": figures}, json_target)
    if json_target != "-" and not settings.quiet:
        views.show_quantized(out, resolved, description, figures)


def _is_to_do(request: QuantizeRequest, out: Path, settings: Settings, json_target: str | None) -> bool:
    """Whether the run is still to be done; makes room for it. One that is finished already is shown."""
    work = work_folder(out)
    if request.resume and not request.overwrite and out.exists():
        resolved = request.resolved()
        if is_finished(out, resolved.to_dict()):
            _show_finished(resolved, out, settings, json_target)
            return False
    refuse_existing(out, overwrite=request.overwrite)
    refuse_no_checkpoint(out)
    if request.config is not None and request.config.resolve() == settings_path(out).resolve():
        raise SpecError(
            f"The settings of the run will be written to {settings_path(out)}, which is the file given with --config: "
            "choose another OUT."
        )
    with hold(work) if (work / WORK_MARK).is_file() else nullcontext():
        clear_work(work, resume=request.resume, overwrite=request.overwrite)
    return True


def run_quantize(
    resolved: Resolved,
    out: Path,
    settings: Settings,
    *,
    resume: bool = False,
    overwrite: bool = False,
    tensorboard: Path | None = None,
) -> list[dict[str, Any]]:
    """Quantize, save, and remove the work folder. Returns the figures of the stages.

    Of several processes only the first writes.
    """
    prepare(settings)
    processes = joined()
    scalars = Scalars(tensorboard) if tensorboard is not None and processes.first else None

    def finished(number: int, figures: Mapping[str, Any]) -> None:
        logger.info("Stage %d, %s, has finished.", number + 1, figures["stage"], extra={"data": figures})
        if scalars is not None:
            scalars.add(number, figures)

    pipe = api.open_model(resolved.model, device=device_named(resolved.device))
    work = work_folder(out)
    run = Run(seed=resolved.seed, work=work, progress=progress_for(settings), finished=finished, processes=processes)
    with (
        hold(work) if processes.first else nullcontext(),
        kept_if_worth_it(work) if processes.first else nullcontext(),
        interruptible(f"What is done so far is in {work}; go on with the same command and --resume."),
    ):
        if processes.first and not (work / WORK_MARK).exists():
            dump(resolved, work / WORK_MARK)
        quantized = api.quantize(
            pipe,
            resolved.recipe,
            steps=resolved.steps,
            run=run,
            arguments=ready(resolved.arguments, recorded_images(resolved) or 1),
            base_model=resolved.model,
            resume=resume,
        )
        if processes.first:
            if not out.exists():
                (work / SAVING_MARK).touch()
            quantized.save(out, overwrite=overwrite)
            _conclude(resolved, out, quantized.figures)
    if scalars is not None:
        scalars.close()
    return list(quantized.figures)


def _conclude(resolved: Resolved, out: Path, figures: Iterable[Mapping[str, Any]]) -> None:
    """What is left to do once the checkpoint is complete: the files beside it, then the work folder goes."""
    dump(resolved, settings_path(out))
    write_figures(figures, out)
    # An evaluation of the checkpoint that was here before says nothing about this one.
    evaluation_path(out).unlink(missing_ok=True)
    remove_work(work_folder(out))


def _show_finished(resolved: Resolved, out: Path, settings: Settings, json_target: str | None) -> None:
    """`--resume` for a run that was killed after its checkpoint was complete, or that has nothing left to do at all."""
    work = work_folder(out)
    if work.exists():
        with hold(work):
            _conclude(resolved, out, json.loads((work / FINISHED_STAGES).read_text()))
    else:
        remove_work(work)
    description, figures = inspect_checkpoint(out), read_origin(out).get("figures", [])
    if json_target is not None:
        write_json({"checkpoint": str(out), "bytes": description.get("bytes"), "figures": figures}, json_target)
    if json_target != "-" and not settings.quiet:
        stdout_console().print(f"{out} is complete: nothing was left to do.")


@contextmanager
def kept_if_worth_it(work: Path) -> Iterator[None]:
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
    processes = joined()
    processes.from_first(lambda: refuse_used_folder(out, overwrite=overwrite))
    arguments = sampling.pipeline_arguments()
    prepare(settings)
    options = {"engine": sampling.engine, "schedule": sampling.schedule}
    pipe, kind = api.open_any(source, device=device_named(sampling.device), **options)
    steps = sampling.steps
    if steps is None:
        steps = _steps_of(inspect_checkpoint(Path(source))) if kind == "checkpoint" else 20
    with interruptible(f"No images were written to {out}."):
        how: dict[str, Any] = {
            "seeds": sampling.seeds,
            "steps": steps,
            "batch_size": sampling.batch_size,
            "arguments": arguments,
            "progress": progress_for(settings),
            "processes": processes,
        }
        if not processes.first:
            for _ in api.sampled(pipe, **how):
                pass  # the images of all processes might not fit into one machine as often as there are processes
            return
        images = api.sample(pipe, **how)
    write_images(images, sampling.seeds, out, grid=grid)
    if not settings.quiet:
        what = "videos, a folder of frames each," if images[0].ndim == 4 else "images"
        stdout_console().print(f"{len(sampling.seeds)} {what} of {steps} steps are in {out}.")


def write_images(images: Any, seeds: Sequence[int], folder: Path, *, grid: bool) -> None:
    """One PNG a seed, and with `grid` all of them in one picture.

    images: `[N, C, H, W]`, or videos `[N, frames, C, H, W]`, which get a folder a seed with a PNG a frame; the picture
        of all then has their first frames.
    """
    videos = images.ndim == 5
    for image, seed in zip(images, seeds, strict=True):
        frames = image if videos else [image]
        for number, frame in enumerate(frames):
            save_png(frame, folder / f"{seed:06d}" if videos else folder, seed=number if videos else seed)
    if grid:
        columns = max(1, round(len(seeds) ** 0.5))
        to_grid(images[:, 0] if videos else images, columns).save(folder / "grid.png")


def evaluate(
    candidate: str,
    against: str | None,
    sampling: Sampling,
    measuring: Measuring,
    settings: Settings,
    json_target: str | None,
) -> bool:
    """Evaluate, keep the result beside the candidate, and show it. Returns whether all gates held."""
    gates = parse_gates(measuring.gates, METRICS)
    processes = joined()
    if measuring.overwrite:
        processes.from_first(lambda: discard(_evaluation_work(candidate)))
    results = measure(candidate, against, sampling, settings, measuring)
    if gates:
        results["gates"] = check_gates(gates, results["metrics"])
    failed = [gate for gate in results.get("gates", []) if gate["failed"]]
    if not processes.first:
        return not failed
    kept = _keep(results, Path(candidate))
    if json_target is not None:
        write_json(results, json_target)
    if kept or json_target is not None:
        discard(_evaluation_work(candidate))
    if json_target != "-" and not settings.quiet:
        views.show_results(results)
        if kept:
            stdout_console().print(f"Kept as {evaluation_path(Path(candidate))} for `stepquant report`.")
    views.complain_of_gates(failed)
    return not failed


def measure(
    candidate: str | Path,
    against: str | None,
    sampling: Sampling,
    settings: Settings,
    measuring: Measuring | None = None,
) -> dict[str, Any]:
    """Results of schema 1. candidate and against: whatever `evaluate.source.open_source` opens.

    against None: the model that the candidate, a checkpoint then, was made from.
    """
    measuring = measuring or Measuring()
    prepare(settings)
    device = device_named(sampling.device)
    options = {"device": device, "engine": sampling.engine, "schedule": sampling.schedule}
    source = open_source(str(candidate), **options)
    base = against or _base_model(Path(candidate), _description(candidate))
    reference = open_source(base, **options)
    seeds = sampling.seeds or source.seeds or reference.seeds or list(_EVALUATED)
    arguments = sampling.pipeline_arguments(len(seeds))
    if not measuring.allow_calibration_seeds:
        for name in (str(candidate), base):
            refuse_calibration_seeds(seeds, _description(name).get("manifest") or {}, name=name)
    features, lpips, clip, remarks = _networks(measuring, device)
    work, processes = _evaluation_work(candidate), joined()
    with (
        _evaluation_kept(work) if processes.first else nullcontext(),
        interruptible(f"What is measured so far is in {work}; go on with the same command and --resume."),
    ):
        results = compare(
            source,
            reference,
            seeds=seeds,
            steps=_common_steps(sampling, (source, reference)),
            batch_size=sampling.batch_size,
            run=Run(
                work=work if os.access(work.parent, os.W_OK) else None,
                progress=progress_for(settings),
                processes=processes,
            ),
            arguments=arguments,
            features=features,
            protocol=measuring.protocol,
            lpips=lpips,
            clip=clip,
            resume=measuring.resume,
            remarks=remarks,
        )
    return {**results, "candidate": str(Path(candidate)), "against": base, "command": settings.command}


def _description(source: str | Path) -> dict[str, Any]:
    """What a checkpoint holds; nothing for any other source."""
    return inspect_checkpoint(Path(source)) if (Path(source) / MANIFEST_NAME).is_file() else {}


def _common_steps(sampling: Sampling, sources: Iterable[Source]) -> int | None:
    """Steps as asked for, else of the first checkpoint, else 20; None if there is nothing to sample."""
    pipelines = [source for source in sources if source.seeds is None]
    if sampling.steps is not None or not pipelines:
        return sampling.steps
    described = [_description(source.name) for source in pipelines]
    return next((_steps_of(found) for found in described if found), 20)


def _networks(
    measuring: Measuring, device: Any
) -> tuple[Features | Literal["shipped", "none"], Lpips | None, ClipScore | None, list[str]]:
    """Networks whose weights the user named. One whose file is not there is a remark: other figures do not need it."""
    features: Features | Literal["shipped", "none"] = "shipped"
    lpips, clip, remarks = None, None, []
    if measuring.features == "none":
        features = "none"
    elif measuring.features is not None:
        try:
            features = features_named(measuring.features, device=device)
        except MissingWeights as error:
            features = "none"
            remarks.append(f"No distances of distributions (FID and the like): {error}")
    if measuring.lpips is not None:
        try:
            lpips = Lpips(measuring.lpips, device=device)
        except MissingWeights as error:
            remarks.append(f"No LPIPS: {error}")
    if measuring.clip is not None:
        try:
            clip = ClipScore.from_pretrained(measuring.clip, device=device)
        except MissingWeights as error:
            remarks.append(f"No CLIP score: {error}")
    return features, lpips, clip, remarks


def _evaluation_work(candidate: str | Path) -> Path:
    """`CANDIDATE.evaluation.work`; of a model that is no folder here, in the current one."""
    path = Path(candidate)
    beside = path if path.exists() else Path(str(candidate).replace("/", "--"))
    return evaluation_path(beside).with_suffix(".work")


@contextmanager
def _evaluation_kept(work: Path) -> Iterator[None]:
    """Leave nothing of an evaluation that cannot go on as it is, or has nothing to go on from.

    What was there before stays, and so does what an interruption or a lack of memory has left.
    """
    before = work.exists()
    try:
        yield
    except Interrupted:
        raise
    except Exception as error:
        if not before and (isinstance(error, StepquantError) or not any(work.glob("*.safetensors"))):
            discard(work)
        raise


def evaluate_and_keep(checkpoint: Path, sampling: Sampling, settings: Settings) -> dict[str, Any]:
    """Evaluate against the model that was quantized, and keep the result beside the checkpoint.

    Goes on with what an interruption left.
    """
    results = measure(checkpoint, None, sampling, settings, Measuring(resume=True))
    _keep(results, checkpoint)
    discard(_evaluation_work(checkpoint))
    return results


def _keep(results: Mapping[str, Any], candidate: Path) -> bool:
    """Write the results beside the candidate; a place where nothing can be written is no reason to lose them."""
    if not candidate.is_dir():  # a shipped model or a hub id has no place of its own
        return False
    try:
        write_json(results, str(evaluation_path(candidate)))
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
    arguments = ready(parsed(request.arguments), request.samples)
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
    # What is known of a checkpoint that was here before says nothing about this one.
    evaluation_path(request.out).unlink(missing_ok=True)
    settings_path(request.out).unlink(missing_ok=True)
    figures = list(made.figures)
    write_figures(figures, request.out)
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
    from stepquant.report.page import Origin, write_report  # matplotlib is slow to import

    descriptions = [inspect_checkpoint(checkpoint) for checkpoint in checkpoints]
    origins = [cast(Origin, read_origin(checkpoint)) for checkpoint in checkpoints]
    images = _images_for(checkpoints, results, settings, device_and_batch)
    found = [dict(result) for result in results]
    write_report(found, images, descriptions, out, origins=origins, command=settings.command)
    return images


_NOT_KEPT = (
    "No images: they were made with arguments that the evaluation only names, such as tensors or pictures. "
    "`stepquant sample` makes images with the same arguments."
)


def _images_for(
    checkpoints: Sequence[Path],
    results: Sequence[Mapping[str, Any]],
    settings: Settings,
    device_and_batch: tuple[str, int],
) -> dict[str, Any]:
    """The same few seeds of the reference and of every checkpoint, and the way of each from noise to image
    (see `report.page.Images`).
    """
    from stepquant.report.groups import rows_over_time  # matplotlib is slow to import
    from stepquant.report.walks import Walks

    name, batch_size = device_and_batch
    prepare(settings)
    device = device_named(name)
    first = results[0]
    seeds = [int(seed) for seed in first["images"]["seeds"]][:_IMAGES_IN_REPORT]
    arguments = first_of(first.get("arguments", {}), int(first["n"]), len(seeds))
    if arguments is None:
        return {"seeds": seeds, "candidates": [], "notes": [_NOT_KEPT]}
    common: dict[str, Any] = {"seeds": seeds, "steps": int(first["steps"]), "batch_size": batch_size}
    common["arguments"] = arguments
    progress = progress_for(settings)
    reference = open_source(str(first["against"]), device=device, schedule="nearest")
    found: dict[str, Any] = {"seeds": seeds, "candidates": [], "rows": []}
    with interruptible("The report was not written; evaluations that were finished are kept."):
        walks = None
        if isinstance(reference, PipelineSource):
            found["reference"] = api.sample(reference.pipe, progress=progress, **common)
            walks = Walks(
                reference.pipe, seeds=seeds, steps=common["steps"], run=Run(progress=progress), arguments=arguments
            )
        else:
            found["reference"] = reference.images(seeds, steps=None, arguments={})
            found["notes"] = ["No films and no errors of layers: the reference is a folder of images."]
        for checkpoint in checkpoints:
            pipe = api.load(checkpoint, device=device, schedule="nearest")
            found["candidates"].append(api.sample(pipe, progress=progress, **common))
            found["rows"].append(rows_over_time(pipe))
            if walks is not None:
                walks.add(pipe)
    return found if walks is None else found | walks.found()


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
