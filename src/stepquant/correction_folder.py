"""A correction beside a model that other software has quantized: three files in the model's diffusers folder.

    stepquant_correction.json           the schedule that it was fitted on, how, and the tables' hashes
    stepquant_correction.json.sha256    the sum of that file
    stepquant_correction.safetensors    the tables of `model.correction.StepCorrection`, float32

What stepquant has quantized itself has its correction in the checkpoint. These files go with any pipeline, whatever
its denoiser's own format is: `attached` puts a corrected scheduler into a pipeline that somebody else has opened.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from stepquant._version import __version__
from stepquant.errors import CheckpointError, SpecError, UnsupportedPipeline
from stepquant.manifest import read_checked
from stepquant.model.correction import CORRECTION_FIELDS, OPTIONAL_FIELDS, CorrectedScheduler, StepCorrection
from stepquant.model.schedule import ScheduleFingerprint, guard_schedule, walk_timesteps
from stepquant.storage import check_sum, checksum, open_tensors, write_summed, write_tensors

__all__ = [
    "CORRECTION_NAME",
    "TABLES_NAME",
    "CorrectionFile",
    "attached",
    "is_copy",
    "read_correction",
    "write_correction",
]

CORRECTION_NAME = "stepquant_correction.json"
TABLES_NAME = "stepquant_correction.safetensors"


@dataclass(frozen=True)
class CorrectionFile:
    """What `stepquant_correction.json` says.

    schedule: `ScheduleFingerprint.to_dict()`.
    run: how it was fitted; its seeds keep evaluations off the calibration's images.
    copy_of: the folder whose copy this is, with the correction; None where a correction was put beside a model that
        was there already. Only a copy may be replaced.
    checksums: table -> SHA-256 of its bytes; empty where nothing was better than no correction.
    """

    format_version: Literal[1]
    stepquant: str
    schedule: dict[str, Any]
    run: dict[str, Any]
    copy_of: str | None
    checksums: dict[str, str]


_ADAPTER = TypeAdapter(CorrectionFile)


def write_correction(
    folder: Path,
    correction: StepCorrection | None,
    schedule: ScheduleFingerprint,
    *,
    run: Mapping[str, Any],
    copy_of: str | None = None,
) -> None:
    """Put the files into a folder; one is made if there is none. Raises CheckpointError if they are there."""
    present = [name for name in (CORRECTION_NAME, TABLES_NAME) if (folder / name).exists()]
    if present:
        raise CheckpointError(
            f"{folder} has {present[0]} already: choose another folder, or remove {' and '.join(present)} first."
        )
    folder.mkdir(parents=True, exist_ok=True)
    tables = {} if correction is None else correction.tables()
    sums = {name: checksum(table) for name, table in tables.items()}
    said = CorrectionFile(1, __version__, schedule.to_dict(), dict(run), copy_of, sums)
    try:
        text = json.dumps(_ADAPTER.dump_python(said, mode="json"), indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{CORRECTION_NAME} would not be JSON: {error}.") from None
    if tables:
        write_tensors(folder / TABLES_NAME, tables)
    # Last: a folder without it has no correction, whatever else lies there.
    write_summed(folder / CORRECTION_NAME, text + "\n")


def read_correction(folder: Path) -> tuple[CorrectionFile, StepCorrection | None]:
    """The files of a folder. Raises CheckpointError if they are not there, damaged, or of another version."""
    said = _read(folder / CORRECTION_NAME)
    if not said.checksums:
        return said, None
    path = folder / TABLES_NAME
    if not path.is_file():
        raise CheckpointError(f"{folder} lacks {TABLES_NAME}, which its {CORRECTION_NAME} speaks of.")
    known = {"timesteps", *CORRECTION_FIELDS, *OPTIONAL_FIELDS}
    with open_tensors(path) as file:
        if set(file.entries) != set(said.checksums) or not set(said.checksums) <= known:
            raise CheckpointError(
                f"{path}: {CORRECTION_NAME} declares the tables {sorted(said.checksums)}, found {sorted(file.entries)}."
            )
        for name, expected in said.checksums.items():
            if file.checksum(name) != expected:
                raise CheckpointError(
                    f"{path}, {name}: the bytes are not those that were written. The file is damaged."
                )
        tables = {name: file.read(name) for name in file.entries}
    missing = {"timesteps", *CORRECTION_FIELDS} - set(tables)
    if missing:
        raise CheckpointError(f"{path} lacks the table {sorted(missing)[0]}.")
    try:
        return said, StepCorrection(**tables)
    except SpecError as error:
        raise CheckpointError(f"{path}: {error}") from error


def is_copy(folder: Path) -> bool:
    """Whether `compensate` has made this folder, so that it may replace it."""
    return (folder / CORRECTION_NAME).is_file() and _read(folder / CORRECTION_NAME).copy_of is not None


def _read(path: Path) -> CorrectionFile:
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no correction: there is no {CORRECTION_NAME} in it.")
    said = read_checked(path, _ADAPTER, newest=1)
    check_sum(path)
    return said


def attached(pipe: Any, folder: Path) -> tuple[Any, CorrectionFile]:
    """A pipeline like `pipe` with the correction of this folder, and what the folder says of it.

    It refuses other schedules. All but the scheduler is shared.

    Raises CheckpointError if the folder's correction is damaged or for another scheduler than the pipeline's.
    """
    said, correction = read_correction(folder)
    other = copy.copy(pipe)
    scheduler = copy.deepcopy(pipe.scheduler)
    other.scheduler = getattr(scheduler, "uncorrected", scheduler)
    if correction is None:
        return other, said
    path = folder / CORRECTION_NAME
    try:
        schedule = ScheduleFingerprint.from_dict(said.schedule)
        _refuse_other_scheduler(path, other.scheduler, schedule)
        other.scheduler = CorrectedScheduler(other.scheduler, correction)
    except (SpecError, UnsupportedPipeline) as error:
        raise CheckpointError(f"{path}: {error}") from error
    walk_timesteps(other.scheduler, schedule)
    guard_schedule(other.scheduler, schedule)
    return other, said


def _refuse_other_scheduler(path: Path, scheduler: Any, fitted: ScheduleFingerprint) -> None:
    """The class and the settings must be those that the correction was fitted on; timesteps show when sampling.

    Settings that only one side has are those of another version of diffusers.
    """
    own = ScheduleFingerprint.of(scheduler, steps=fitted.steps, guidance=fitted.guidance)
    both = own.config.keys() & fitted.config.keys()
    alike = replace(
        own,
        timesteps=fitted.timesteps,
        config={key: own.config[key] if key in both else value for key, value in fitted.config.items()},
    )
    found = fitted.differences(alike)
    if found:
        raise CheckpointError(f"{path} was fitted for another scheduler. {' '.join(found)}")
