"""`stepquant compensate`: fit a correction for a quantized model that is there already, and write the corrected one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args

from pydantic import TypeAdapter, ValidationError

from stepquant import api
from stepquant.calibrate.compensation import Compensate, EstimatorChoice
from stepquant.cli import views
from stepquant.cli.arguments import parsed, ready
from stepquant.cli.console import (
    Settings,
    interruptible,
    json_text,
    progress_for,
    replace_text,
    write_json,
)
from stepquant.cli.outputs import (
    FINISHED_STAGES,
    SAVING_MARK,
    WORK_MARK,
    clear_work,
    conclude,
    fit_path,
    is_finished,
    read_origin,
    refuse_existing,
    refuse_no_checkpoint,
    refuse_unwritable_json,
    remove_work,
    work_folder,
)
from stepquant.cli.work import base_model_of, device_named, kept_if_worth_it, prepare, steps_of
from stepquant.config import MOST_SEED, parse_yaml
from stepquant.correction_folder import is_copy
from stepquant.errors import CheckpointError, SpecError, nearest
from stepquant.inspection import inspect_checkpoint
from stepquant.manifest import MANIFEST_NAME
from stepquant.run import Run
from stepquant.work_folder import hold

__all__ = ["CompensateRequest", "compensate"]


@dataclass(frozen=True)
class CompensateRequest:
    """What the user asked `compensate` for.

    candidate: a checkpoint, or what `open_model` opens. against None: the model that the checkpoint was made from.
    steps None: those of the checkpoint.
    """

    candidate: str
    out: Path
    against: str | None
    steps: int | None
    estimator: str
    samples: int
    seed: int
    device: str
    batch_size: int
    arguments: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    resume: bool = False

    def fit(self) -> Compensate:
        """The stage. Raises SpecError for a setting that it does not have, or a value that it does not take."""
        known = [field.name for field in fields(Compensate) if field.name != "estimator"]
        values: dict[str, Any] = {"estimator": self.estimator}
        for option in self.options:
            name, equals, text = option.partition("=")
            if not equals or name not in known:
                hint = "" if name in known else nearest(name, known)
                raise SpecError(f"--set takes key=value of {', '.join(known)}, found {option!r}.{hint}")
            values[name] = parse_yaml(text, source=f"--set {name}")
        try:
            return TypeAdapter(Compensate).validate_python(values)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise SpecError(f"--set {where}: {first['msg']}, found {first['input']!r}.") from None


def compensate(
    request: CompensateRequest, settings: Settings, json_target: str | None, *, overwrite: bool = False
) -> None:
    """Fit a correction for a quantized model, write the corrected one, and say what it gained."""
    maybe_finished = request.resume and not overwrite and request.out.exists()
    if not maybe_finished:
        refuse_existing(request.out, overwrite=overwrite)
    refuse_unwritable_json(json_target)
    _refuse_others(request.out)
    if request.out.resolve() == Path(request.candidate).resolve():
        raise SpecError(f"OUT is the candidate itself, {request.out}: choose another folder.")
    if request.estimator not in get_args(EstimatorChoice):
        known = get_args(EstimatorChoice)
        hint = nearest(request.estimator, known)
        raise SpecError(f"--estimator: there is none named {request.estimator!r}, only {', '.join(known)}.{hint}")
    if request.samples < 2:
        raise SpecError(
            f"--calibration-samples: expected 2 or more, found {request.samples}. A correction is fitted to some "
            "images and judged on others."
        )
    if request.seed > MOST_SEED:
        raise SpecError(f"--seed: expected {MOST_SEED} or less, found {request.seed}.")
    fit = request.fit()
    arguments = ready(parsed(request.arguments), request.samples)
    base, steps = _base_and_steps(request)
    asked: dict[str, Any] = json.loads(json_text(asdict(request) | {"against": base, "steps": steps}))
    del asked["resume"]  # how the command was given, no setting of the fit
    work = work_folder(request.out)
    if maybe_finished:
        if not is_finished(request.out, asked, kept=fit_path(request.out), read=_read_asked):
            refuse_existing(request.out, overwrite=False)
        _show_finished(request.out, asked, settings, json_target)
        return
    with hold(work) if (work / WORK_MARK).is_file() else nullcontext():
        clear_work(work, resume=request.resume, overwrite=overwrite)
    prepare(settings)
    device = device_named(request.device)
    with (
        hold(work),
        kept_if_worth_it(work),
        interruptible(f"What is done so far is in {work}; go on with the same command and --resume."),
    ):
        if not (work / WORK_MARK).exists():
            replace_text(work / WORK_MARK, json_text(asked, indent=1))
        made = api.compensate(
            request.candidate,
            api.open_base(base, request.candidate, device=device),
            steps=steps,
            samples=request.samples,
            batch=request.batch_size,
            estimator=fit.estimator,
            regressors=fit.regressors,
            gamma=fit.gamma,
            ridge=fit.ridge,
            shared=fit.shared,
            held_out=fit.held_out,
            arguments=arguments,
            run=Run(seed=request.seed, work=work, progress=progress_for(settings)),
            resume=request.resume,
        )
        if not request.out.exists():
            (work / SAVING_MARK).touch()
        made.save(request.out, overwrite=overwrite)
        _conclude(request.out, asked, made.figures)
    figures = list(made.figures)
    if json_target is not None:
        write_json({"checkpoint": str(request.out), "against": base, "figures": figures}, json_target)
    if json_target != "-" and not settings.quiet:
        told = made.manifest is not None  # by the checkpoint itself
        further = "" if told else f" --against {base} --steps {steps}"
        views.show_compensated(request.candidate, request.out, figures, further)


def _conclude(out: Path, asked: Mapping[str, Any], figures: Iterable[Mapping[str, Any]]) -> None:
    """What is left to do once the corrected model is complete: the files beside it, then the work folder goes."""
    replace_text(fit_path(out), json_text(asked, indent=1) + "\n")
    conclude(out, figures, kept=fit_path(out))


def _read_asked(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _show_finished(out: Path, asked: Mapping[str, Any], settings: Settings, json_target: str | None) -> None:
    """`--resume` for a run that was killed after the model was complete, or that has nothing left to do at all."""
    work = work_folder(out)
    if work.exists():
        with hold(work):
            _conclude(out, asked, json.loads((work / FINISHED_STAGES).read_text(encoding="utf-8")))
    else:
        remove_work(work)
    if json_target is not None:
        figures = read_origin(out).get("figures", [])
        write_json({"checkpoint": str(out), "against": asked["against"], "figures": figures}, json_target)
    if json_target != "-" and not settings.quiet:
        views.show_finished(out)


def _refuse_others(out: Path) -> None:
    """Refuse to overwrite what neither `quantize` nor this command has made."""
    if not is_copy(out):
        refuse_no_checkpoint(out)


def _base_and_steps(request: CompensateRequest) -> tuple[str, int]:
    """The full-precision model, and the sampling steps to fit for. Only a checkpoint says either."""
    path = Path(request.candidate)
    if not (path / MANIFEST_NAME).is_file():
        if path.is_dir() and not (path / "model_index.json").is_file():
            raise CheckpointError(f"{path} is neither a checkpoint ({MANIFEST_NAME}) nor a diffusers folder.")
        if not path.exists() and request.candidate not in api.SHIPPED_MODELS and not _may_be_on_the_hub(path):
            raise SpecError(
                f"There is no {request.candidate}: expected a checkpoint that `quantize` wrote, a diffusers folder or "
                "a hub id such as owner/name."
            )
        for option, value in (("--against MODEL", request.against), ("--steps N", request.steps)):
            if value is None:
                missing = "" if path.exists() else "is no folder here and "
                raise SpecError(
                    f"{request.candidate} {missing}is no checkpoint of stepquant, so it does not say which "
                    f"full-precision model it was made from, nor how many steps it is for: give {option}."
                )
        return str(request.against), int(request.steps or 0)
    description = inspect_checkpoint(path)
    steps = steps_of(description)
    if request.steps not in (None, steps):
        raise SpecError(f"--steps {request.steps}: {path} is calibrated for {steps}. Leave the option out.")
    return request.against or base_model_of(path, description), steps


def _may_be_on_the_hub(path: Path) -> bool:
    """Whether a name that is no path here may be a hub id, owner/name."""
    return len(path.parts) == 2 and not path.is_absolute() and path.parts[0] != ".."
