"""What `quantize` and `sample` do, and what all commands share: requests, the device, the libraries' manners."""

from __future__ import annotations

import json
import logging
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from stepquant import api
from stepquant.allocator import tune_allocator
from stepquant.cli import estimate, views
from stepquant.cli.arguments import parsed, ready, recorded_images, with_prompts
from stepquant.cli.console import Interrupted, Settings, interruptible, progress_for, stdout_console, write_json
from stepquant.cli.outputs import (
    FINISHED_STAGES,
    SAVING_MARK,
    WORK_MARK,
    clear_work,
    conclude,
    is_finished,
    read_origin,
    refuse_existing,
    refuse_no_checkpoint,
    refuse_unwritable_json,
    refuse_used_folder,
    remove_work,
    settings_path,
    work_folder,
)
from stepquant.cli.scalars import Scalars
from stepquant.config import Resolved, apply_overrides, dump, load_config, resolve
from stepquant.engines.base import check_name
from stepquant.errors import CheckpointError, SpecError
from stepquant.evaluate.images import save_png, to_grid
from stepquant.inspection import inspect_checkpoint
from stepquant.manifest import MANIFEST_NAME
from stepquant.model.schedule import guarded_by
from stepquant.processes import joined
from stepquant.run import Run
from stepquant.work_folder import OtherRun, hold

__all__ = [
    "QuantizeRequest",
    "Sampling",
    "base_model_of",
    "device_named",
    "fitted_steps",
    "kept_if_worth_it",
    "prepare",
    "quantize",
    "refuse_onto_a_model",
    "run_quantize",
    "sample",
    "show_plan",
    "steps_of",
    "write_images",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuantizeRequest:
    """What the user asked `quantize` or `check` for.

    out: None where nothing is to be written.
    tensorboard: folder for scalars of the stages' figures, None for none.
    max_memory: as for `Run`. offload: whether the denoiser's blocks stay in main memory.
    flags: settings of the command line under their names in `run.yaml`.
    """

    out: Path | None
    config: Path | None
    overrides: tuple[str, ...]
    flags: Mapping[str, Any]
    resume: bool = False
    overwrite: bool = False
    tensorboard: Path | None = None
    max_memory: int | None = None
    offload: bool = False

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
    """Which images to sample and how.

    steps: None for the checkpoint's own.
    onto: the checkpoint of the pipeline's other denoiser, whose pipeline the sampled checkpoint is loaded onto.
    scheduler: of models, as for `api.open_model`; None for their own.
    """

    seeds: list[int]
    steps: int | None = None
    batch_size: int = 16
    arguments: tuple[str, ...] = field(default=())
    engine: str = "auto"
    device: str = "auto"
    schedule: Literal["strict", "nearest"] = "strict"
    onto: Path | None = None
    scheduler: Mapping[str, Any] | None = None

    def pipeline_arguments(self, count: int | None = None) -> dict[str, Any]:
        """The `--argument KEY=VALUE` of the command line as keyword arguments for `count` images, one for each seed."""
        return ready(parsed(self.arguments), len(self.seeds) if count is None else count)


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
        if device.type == "meta":
            raise RuntimeError  # has shapes, and no numbers
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


def show_plan(request: QuantizeRequest, settings: Settings, json_target: str | None, *, measured: bool = False) -> None:
    """Print what a run would do; with `measured` also what it would take, for which a few steps are sampled."""
    prepare(settings)
    resolved = request.resolved()
    plan = views.plan_of(resolved)
    if measured and "note" not in plan:
        pipe, onto = _opened(resolved, offload=request.offload)
        plan["estimate"] = estimate.estimate_of(pipe, resolved, request.max_memory, onto)
    if json_target is not None:
        write_json(plan, json_target)
    if json_target != "-":
        views.show_plan(plan)
        if plan.get("estimate"):
            stdout_console().print(estimate.sentence(plan["estimate"]))
        stdout_console().print("Nothing was written.")


def quantize(request: QuantizeRequest, settings: Settings, json_target: str | None) -> None:
    """Quantize and say what came out."""
    out = _required(request.out)
    refuse_unwritable_json(json_target)
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
        max_memory=request.max_memory,
        offload=request.offload,
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
        if is_finished(out, resolved.to_dict(), kept=settings_path(out), read=load_config):
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
    max_memory: int | None = None,
    offload: bool = False,
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

    pipe, onto = _opened(resolved, offload=offload)
    work = work_folder(out)
    run = Run(
        seed=resolved.seed,
        work=work,
        progress=progress_for(settings),
        finished=finished,
        processes=processes,
        max_memory=max_memory,
        offload=onto,
    )
    with (
        hold(work) if processes.first else nullcontext(),
        kept_if_worth_it(work) if processes.first else nullcontext(),
        interruptible(f"What is done so far is in {work}; go on with the same command and --resume."),
    ):
        if processes.first and not (work / WORK_MARK).exists():
            dump(resolved, work / WORK_MARK)
        if processes.first and not resume:
            found = estimate.estimate_of(pipe, resolved, max_memory, onto)
            if found is not None:
                logger.info("%s", estimate.sentence(found), extra={"data": found})
        quantized = api.quantize(
            pipe,
            resolved.recipe,
            steps=resolved.steps,
            run=run,
            arguments=ready(resolved.arguments, recorded_images(resolved) or 1),
            base_model=resolved.model,
            resume=resume,
            denoiser=resolved.denoiser,
        )
        if processes.first:
            if not out.exists():
                (work / SAVING_MARK).touch()
            quantized.save(out, overwrite=overwrite)
            _conclude(resolved, out, quantized.figures)
    if scalars is not None:
        scalars.close()
    return list(quantized.figures)


def _opened(resolved: Resolved, *, offload: bool) -> tuple[Any, Any]:
    """The model where it is calibrated, and with `offload` the device that its blocks come to (`Run.offload`)."""
    device = device_named(resolved.device)
    if not offload:
        return api.open_model(resolved.model, device=device, scheduler=resolved.scheduler), None
    if device.type == "cpu":
        logger.warning("With --offload on the CPU, blocks are copied within main memory: it takes longer for nothing.")
    return api.open_model(resolved.model, scheduler=resolved.scheduler), device


def _conclude(resolved: Resolved, out: Path, figures: Iterable[Mapping[str, Any]]) -> None:
    """What is left to do once the checkpoint is complete: the files beside it, then the work folder goes."""
    dump(resolved, settings_path(out))
    conclude(out, figures, kept=settings_path(out))


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
        views.show_finished(out)


@contextmanager
def kept_if_worth_it(work: Path) -> Iterator[None]:
    """Remove the work folder of a run that failed before its first stage was done: it would only be in the way."""
    try:
        yield
    except (Interrupted, OtherRun):
        raise
    except Exception:
        if not (work / FINISHED_STAGES).exists():
            shutil.rmtree(work)
        else:
            logger.warning(
                "The stages that have finished are in %s: correct the setting and go on with --resume, or start anew "
                "with --overwrite.",
                work,
            )
        raise


def sample(
    source: str, out: Path, sampling: Sampling, settings: Settings, *, grid: bool = False, overwrite: bool = False
) -> None:
    """Sample images into a folder."""
    processes = joined()
    processes.from_first(lambda: refuse_used_folder(out, overwrite=overwrite))
    arguments = sampling.pipeline_arguments()
    prepare(settings)
    check_name(sampling.engine)
    options: dict[str, Any] = {"engine": sampling.engine, "schedule": sampling.schedule}
    if sampling.onto is not None:
        refuse_onto_a_model(source)
        options["onto"] = api.load(sampling.onto, **options)
    device = device_named(sampling.device)
    pipe, kind = api.open_any(source, device=device, scheduler=sampling.scheduler, **options)
    if kind == "model" and sampling.engine not in ("auto", "simulated"):
        logger.warning("%s is a full-precision model, which engine %s does not run.", source, sampling.engine)
    steps = sampling.steps
    if steps is None:
        steps = steps_of(inspect_checkpoint(Path(source))) if kind == "checkpoint" else fitted_steps(pipe) or 20
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


def remove_images(folder: Path) -> None:
    """Remove what an earlier `write_images` left: they would be taken for images of the model that is sampled now."""
    for path in folder.glob("*"):
        if path.name == "grid.png" or re.fullmatch(r"\d{6,}\.png", path.name):
            path.unlink()
        elif path.is_dir() and re.fullmatch(r"\d{6,}", path.name):
            for frame in path.glob("*.png"):
                frame.unlink()
            with suppress(OSError):  # something of the user's is in it
                path.rmdir()


def write_images(images: Any, seeds: Sequence[int], folder: Path, *, grid: bool) -> None:
    """One PNG a seed, and with `grid` all of them in one picture.

    images: `[N, C, H, W]`, or videos `[N, frames, C, H, W]`, which get a folder a seed with a PNG a frame; the picture
        of all then has their first frames.
    """
    videos = images.ndim == 5
    remove_images(folder)
    for image, seed in zip(images, seeds, strict=True):
        frames = image if videos else [image]
        for number, frame in enumerate(frames):
            save_png(frame, folder / f"{seed:06d}" if videos else folder, seed=number if videos else seed)
    if grid:
        columns = max(1, round(len(seeds) ** 0.5))
        to_grid(images[:, 0] if videos else images, columns).save(folder / "grid.png")


def refuse_onto_a_model(source: str) -> None:
    """`--onto` joins two checkpoints; a full-precision model has both of its denoisers."""
    if not (Path(source) / MANIFEST_NAME).is_file():
        raise SpecError(
            f"--onto goes with a checkpoint of the other denoiser, and {source} is none: give both checkpoints, in "
            "any order."
        )


def base_model_of(checkpoint: Path, description: Mapping[str, Any]) -> str:
    """The full-precision model that a checkpoint was made from."""
    base = description.get("base_model")
    if not base:
        raise CheckpointError(
            f"{checkpoint} does not say which model it was made from: name the full-precision model with --against."
        )
    return str(base)


def steps_of(description: Mapping[str, Any]) -> int:
    """Sampling steps that a checkpoint was calibrated for."""
    schedule = description.get("schedule") or {}
    steps = description.get("steps", schedule.get("steps"))
    if steps is None:
        raise CheckpointError("The checkpoint does not say for how many steps it was calibrated: give --steps.")
    return int(steps)


def fitted_steps(pipe: Any) -> int | None:
    """Sampling steps that the correction of a model of others is for; None for a pipeline that takes any number."""
    fitted = guarded_by(getattr(pipe, "scheduler", None))
    return None if fitted is None else fitted.steps


def _required(out: Path | None) -> Path:
    if out is None:
        raise SpecError("There is no folder to write to: give -o OUT.")
    return out
