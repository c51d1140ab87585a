"""`stepquant compensate`: fit a correction for a checkpoint that is there already, and write the corrected one."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

from pydantic import TypeAdapter, ValidationError

from stepquant import api
from stepquant.calibrate.compensation import Compensate, EstimatorChoice
from stepquant.cli import views
from stepquant.cli.arguments import parsed, ready
from stepquant.cli.console import Settings, interruptible, progress_for, write_json
from stepquant.cli.outputs import (
    evaluation_path,
    refuse_existing,
    refuse_no_checkpoint,
    settings_path,
    speed_path,
    write_figures,
)
from stepquant.cli.work import base_model_of, device_named, prepare, steps_of
from stepquant.config import parse_yaml
from stepquant.errors import SpecError, nearest
from stepquant.inspection import inspect_checkpoint
from stepquant.run import Run

__all__ = ["CompensateRequest", "compensate"]


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
    options: tuple[str, ...] = ()

    def fit(self) -> Compensate:
        """The stage. Raises SpecError for a setting that it does not have, or a value that it does not take."""
        known = [field.name for field in fields(Compensate) if field.name != "estimator"]
        values: dict[str, Any] = {"estimator": self.estimator}
        for option in self.options:
            name, equals, text = option.partition("=")
            if not equals or name not in known:
                raise SpecError(f"--set takes key=value of {', '.join(known)}, found {option!r}.{nearest(name, known)}")
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
    """Fit a correction for a checkpoint, write the corrected one, and say what it gained."""
    refuse_existing(request.out, overwrite=overwrite)
    refuse_no_checkpoint(request.out)
    if request.out.resolve() == request.candidate.resolve():
        raise SpecError(f"OUT is the candidate itself, {request.out}: choose another folder.")
    if request.estimator not in get_args(EstimatorChoice):
        known = get_args(EstimatorChoice)
        raise SpecError(f"--estimator: there is none named {request.estimator!r}.{nearest(request.estimator, known)}")
    fit = request.fit()
    arguments = ready(parsed(request.arguments), request.samples)
    description = inspect_checkpoint(request.candidate)
    base = request.against or base_model_of(request.candidate, description)
    prepare(settings)
    device = device_named(request.device)
    with interruptible(f"Nothing was written; {request.candidate} is as it was."):
        made = api.compensate(
            request.candidate,
            api.open_model(base, device=device),
            steps=steps_of(description),
            samples=request.samples,
            batch=request.batch_size,
            estimator=fit.estimator,
            regressors=fit.regressors,
            gamma=fit.gamma,
            ridge=fit.ridge,
            shared=fit.shared,
            held_out=fit.held_out,
            arguments=arguments,
            run=Run(seed=request.seed, progress=progress_for(settings)),
        )
        made.save(request.out, overwrite=overwrite)
    # What is known of a checkpoint that was here before says nothing about this one.
    evaluation_path(request.out).unlink(missing_ok=True)
    speed_path(request.out).unlink(missing_ok=True)
    settings_path(request.out).unlink(missing_ok=True)
    figures = list(made.figures)
    write_figures(figures, request.out)
    if json_target is not None:
        write_json({"checkpoint": str(request.out), "against": base, "figures": figures}, json_target)
    if json_target != "-" and not settings.quiet:
        views.show_compensated(request.candidate, request.out, figures)
