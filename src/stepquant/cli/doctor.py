"""`stepquant doctor`: examine a checkpoint or a pipeline, show what was found, and write settings that mend it."""

from __future__ import annotations

import fnmatch
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.table import Column, Table

from stepquant import api
from stepquant.calibrate.stages import LayerRule
from stepquant.checkpoint import saved_scheduler
from stepquant.cli.console import (
    Settings,
    interruptible,
    progress_for,
    replace_text,
    stdout_console,
    write_json,
)
from stepquant.cli.outputs import refuse_existing, refuse_unwritable_file, refuse_unwritable_json, settings_path
from stepquant.cli.work import Sampling, device_named, fitted_steps, prepare
from stepquant.config import load_config, resolve
from stepquant.doctor.advice import plain_rules
from stepquant.doctor.examination import Diagnosis, examine
from stepquant.doctor.findings import Finding, Thresholds
from stepquant.errors import SpecError
from stepquant.manifest import MANIFEST_NAME, read_manifest
from stepquant.model.schedule import ScheduleFingerprint
from stepquant.model.scheduler_choice import choice_of
from stepquant.run import Run

__all__ = ["DoctorRequest", "doctor", "patched", "settings_of"]

DEFAULT_STEPS = 20
"""For a model that does not say for how many steps it was calibrated; the default of `sample` and `quantize`."""

_NO_MODEL = "none"
_SHOWN_OF_A_KIND = 8
_SHOWN_DRIVERS = 10


@dataclass(frozen=True)
class DoctorRequest:
    """What the user asked `doctor` for.

    against: the full-precision model; None is the one that a checkpoint was made from, "none" compares with nothing.
    patch: where to write settings with the rules put in; None writes none.
    thresholds: NAME=VALUE.
    """

    source: str
    against: str | None
    sampling: Sampling
    top: int
    thresholds: tuple[str, ...] = ()
    patch: Path | None = None
    overwrite: bool = False

    @property
    def is_checkpoint(self) -> bool:
        """Whether the source is a folder that `quantize` wrote."""
        return (Path(self.source) / MANIFEST_NAME).is_file()


def doctor(request: DoctorRequest, settings: Settings, json_target: str | None) -> None:
    """Examine, show what was found, and write the patch if one was asked for."""
    if request.patch is not None:
        refuse_existing(request.patch, overwrite=request.overwrite)
        refuse_unwritable_file(request.patch)
    refuse_unwritable_json(json_target)
    thresholds = Thresholds.of(request.thresholds)
    diagnosis = _examined(request, thresholds, settings)
    written = _write_patch(request, diagnosis)
    if json_target is not None:
        write_json({**diagnosis.to_dict(), "source": request.source, "command": settings.command}, json_target)
    if json_target != "-" and not settings.quiet:
        _show(request, diagnosis, settings.command, written=written)


def _examined(request: DoctorRequest, thresholds: Thresholds, settings: Settings) -> Diagnosis:
    sampling = request.sampling
    arguments = sampling.pipeline_arguments()
    prepare(settings)
    device = device_named(sampling.device)
    base, steps = request.against, sampling.steps
    if request.is_checkpoint:
        manifest = read_manifest(Path(request.source))
        base = base or manifest.base_model or None
        steps = steps or (manifest.schedule or {}).get("steps")
    options: dict[str, Any] = {"engine": sampling.engine, "schedule": sampling.schedule}
    pipe, _ = api.open_any(request.source, device=device, **options)
    against = None if base in (None, _NO_MODEL) else api.open_base(str(base), request.source, device=device)
    with interruptible("Nothing was written; an examination starts from the beginning."):
        return examine(
            pipe,
            against,
            seeds=sampling.seeds,
            steps=int(steps or fitted_steps(pipe) or DEFAULT_STEPS),
            batch_size=sampling.batch_size,
            top=request.top,
            thresholds=thresholds,
            arguments=arguments,
            run=Run(progress=progress_for(settings)),
        )


def settings_of(source: str) -> dict[str, Any]:
    """The settings that a checkpoint was made with, as `run.yaml` has them; of a model just its name.

    From the file that `quantize` writes beside the checkpoint, otherwise from the checkpoint's own recipe.
    """
    folder = Path(source)
    if not (folder / MANIFEST_NAME).is_file():
        return {"model": source}
    beside = settings_path(folder)
    if beside.is_file():
        return load_config(beside)
    manifest = read_manifest(folder)
    if not manifest.base_model:
        raise SpecError(
            f"{source} does not say which model it was made from, and {beside} is not there: put the rules into your "
            "own settings."
        )
    found: dict[str, Any] = {"model": manifest.base_model}
    if any(stage.get("stage") in ("Place", "Allocate") for stage in manifest.recipe.get("stages", [])):
        found["recipe"] = dict(manifest.recipe)
    found |= {"steps": (manifest.schedule or {}).get("steps"), "seed": manifest.run.get("seed")}
    if (saved := saved_scheduler(folder)) is not None:
        fingerprint = None if manifest.schedule is None else ScheduleFingerprint.from_dict(manifest.schedule)
        found["scheduler"] = choice_of(saved, fingerprint)
    return {key: value for key, value in found.items() if value is not None}


def patched(settings: Mapping[str, Any], rules: Sequence[LayerRule]) -> dict[str, Any]:
    """Settings in the form of `run.yaml` with further rules behind those that they have.

    Bits over time that a rule has asked for stay, unless the activations get more bits.
    Raises SpecError if `stepquant check` would not accept them.
    """
    added = plain_rules(rules)
    changed = dict(settings)
    recipe = changed.get("recipe")
    if recipe is None:
        present = changed.get("rules") or []
        changed["rules"] = [*present, *_over_time_kept(present, added)]
    else:
        stages = [dict(stage) for stage in (recipe["stages"] if isinstance(recipe, Mapping) else recipe)]
        for stage in stages:
            if stage.get("stage") == "Allocate":  # its Place is inside
                stage["place"] = dict(stage["place"])
            place = {"Place": stage, "Allocate": stage.get("place")}.get(str(stage.get("stage")))
            if place is not None:
                present = place.get("rules") or []
                place["rules"] = [*present, *_over_time_kept(present, added)]
        changed["recipe"] = {**recipe, "stages": stages} if isinstance(recipe, Mapping) else stages
    resolve(changed, source="the patched settings")
    return changed


def _over_time_kept(present: Sequence[Mapping[str, Any]], added: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Added rules, with the bits over time of their layers where they would put the fewest of them in their place."""
    found = []
    for rule in added:
        matching = [old for old in present if fnmatch.filter([rule["pattern"]], old["pattern"])]
        bits = matching[-1].get("activations") if matching else None
        if isinstance(bits, list) and min(entry["bits"] for entry in bits) == rule["activations"]:
            found.append({**rule, "activations": bits})
        else:
            found.append(dict(rule))
    return found


def _write_patch(request: DoctorRequest, diagnosis: Diagnosis) -> bool:
    if request.patch is None:
        return False
    if not diagnosis.rules:
        if request.overwrite and request.patch.is_file():
            request.patch.unlink()  # the rules of an earlier examination would pass for those of this one
        return False
    changed = patched(settings_of(request.source), diagnosis.rules)
    head = f"# Settings of {request.source} with the rules of `stepquant doctor`.\n"
    text = yaml.safe_dump(changed, sort_keys=False, allow_unicode=True)
    if request.patch.exists() and not request.patch.is_file():  # a pipe or a device
        request.patch.write_text(head + text, encoding="utf-8")
    else:
        replace_text(request.patch, head + text)
    return True


def _show(request: DoctorRequest, diagnosis: Diagnosis, command: str, *, written: bool) -> None:
    console = stdout_console()
    errors = sum(finding.severity == "error" for finding in diagnosis.findings)
    verdict = "nothing was found"
    if not diagnosis.healthy:
        verdict = f"{_count(errors, 'error')}, {_count(len(diagnosis.findings) - errors, 'warning')}"
    console.print(
        f"{request.source}: {verdict} ({_count(len(diagnosis.seeds), 'image')} of {_count(diagnosis.steps, 'step')})"
    )
    if diagnosis.findings:
        console.print(_findings_table(diagnosis.findings))
    if diagnosis.drivers and diagnosis.drift is not None:
        console.print(_drivers_table(diagnosis))
    elif diagnosis.drift is not None:
        console.print(f"{_drift_text(diagnosis)}.")
    for note in diagnosis.notes:
        console.print(f"Note: {note}")
    if not diagnosis.healthy:
        _show_advice(request, diagnosis, command, written=written)
    if request.patch is not None and not written:
        console.print("No patch was written: no rule would help.")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _findings_table(findings: Sequence[Finding]) -> Table:
    table = Table("", "what", Column("layer", overflow="fold"), Column("step", justify="right"), "value", "limit", "")
    shown: dict[str, int] = {}
    for finding in findings:
        shown[finding.kind] = shown.get(finding.kind, 0) + 1
        if shown[finding.kind] <= _SHOWN_OF_A_KIND:
            table.add_row(
                finding.severity,
                finding.kind.replace("_", " "),
                _layer_text(finding),
                "" if finding.step is None else str(finding.step),
                _number(finding.value),
                _number(finding.threshold),
                finding.what,
            )
    for kind, count in shown.items():
        if count > _SHOWN_OF_A_KIND:
            more = f"and {_count(count - _SHOWN_OF_A_KIND, 'more layer')}: --json FILE has all"
            table.add_row("", kind.replace("_", " "), "", "", "", "", more)
    return table


def _layer_text(finding: Finding) -> str:
    if finding.layer is None:
        return "(images)"
    return finding.layer or "(the whole denoiser)"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _drift_text(diagnosis: Diagnosis) -> str:
    drift, relative = diagnosis.drift or 0.0, diagnosis.relative_drift or 0.0
    return f"Final drift {drift:.4g}, {100 * relative:.3g} % of the sample"


def _drivers_table(diagnosis: Diagnosis) -> Table:
    table = Table(
        Column("layer", overflow="fold"),
        Column("estimated share", justify="right"),
        Column("drift with it in full precision", justify="right"),
        title=f"{_drift_text(diagnosis)}: layers that drive it",
        title_justify="left",
    )
    for driver in diagnosis.drivers[:_SHOWN_DRIVERS]:
        table.add_row(driver.layer, f"{100 * driver.share:.1f} %", _number(driver.restored) or "not measured")
    return table


def _show_advice(request: DoctorRequest, diagnosis: Diagnosis, command: str, *, written: bool) -> None:
    console = stdout_console()
    console.print("What to do:")
    seen: set[str] = set()
    for finding in diagnosis.findings:
        if finding.kind not in seen:
            seen.add(finding.kind)
            console.print(f"- {finding.kind.replace('_', ' ')}: {finding.advice}")
    if not diagnosis.rules:
        return
    out = shlex.quote(f"{Path(request.source).name}-mended")
    if written and request.patch is not None:
        console.print(f"The settings with {_count(len(diagnosis.rules), 'new rule')} are in {request.patch}. Next:")
        console.print(f"  stepquant quantize --config {shlex.quote(str(request.patch))} -o {out}")
        return
    console.print("Rules for run.yaml that do it (null is full precision):")
    console.print(diagnosis.yaml().rstrip())
    console.print("Write them into a copy of the settings, and quantize again:")
    console.print(f"  {command} --patch mended.yaml")
    console.print(f"  stepquant quantize --config mended.yaml -o {out}")
