"""Where a command's files go, and what is in the way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from stepquant.errors import CheckpointError, EvaluationError, SpecError

__all__ = [
    "FINISHED_STAGES",
    "WORK_MARK",
    "clear_work",
    "evaluation_path",
    "read_evaluation",
    "refuse_existing",
    "refuse_no_checkpoint",
    "refuse_used_folder",
    "settings_path",
    "work_folder",
]

WORK_MARK = "run.yaml"
"""In every work folder: the settings of the run. A folder without it is not ours to delete."""

FINISHED_STAGES = "stages.json"
"""In a work folder once its first stage is done; `stepquant.work_folder` writes it."""


def _beside(out: Path, suffix: str) -> Path:
    out = Path(out.absolute()) if out.name in ("", "..") else out
    return out.with_name(out.name + suffix)


def work_folder(out: Path) -> Path:
    """`OUT.work`: what a killed run needs to go on."""
    return _beside(out, ".work")


def settings_path(out: Path) -> Path:
    """`OUT.run.yaml`: every setting of the run that made the checkpoint."""
    return _beside(out, ".run.yaml")


def evaluation_path(checkpoint: Path) -> Path:
    """`CHECKPOINT.evaluation.json`: the last evaluation."""
    return _beside(checkpoint, ".evaluation.json")


def refuse_existing(out: Path, *, overwrite: bool) -> None:
    """Refuse an output that is there already, before any work is done for it."""
    if out.exists() and not overwrite:
        raise SpecError(f"{out} exists already. Choose another name, or give --overwrite to replace it.")


def refuse_no_checkpoint(out: Path) -> None:
    """Refuse to overwrite what is no checkpoint: a typo after -o must not cost a folder."""
    from stepquant.manifest import MANIFEST_NAME

    if out.exists() and not (out / MANIFEST_NAME).is_file():
        raise SpecError(f"{out} is no checkpoint of stepquant, so --overwrite does not replace it.")


def refuse_used_folder(folder: Path, *, overwrite: bool) -> None:
    """Refuse a file, and a folder that has something in it."""
    if folder.is_file():
        raise SpecError(f"{folder} is a file, expected a folder to write into.")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise SpecError(f"{folder} is not empty. Choose another folder, or give --overwrite to write into it.")


def clear_work(work: Path, *, resume: bool, overwrite: bool) -> None:
    """Make the work folder ready: kept to resume, removed to overwrite, otherwise refused if it holds a run."""
    if not work.exists() or resume:
        return
    if not overwrite:
        raise SpecError(
            f"{work} holds a run that was interrupted. Give --resume to go on with it, or --overwrite to start anew."
        )
    if not (work / WORK_MARK).is_file():
        raise SpecError(f"{work} is no work folder of stepquant: move it away first.")
    shutil.rmtree(work)


def read_evaluation(checkpoint: Path) -> dict[str, Any] | None:
    """The stored evaluation of a checkpoint, or None where there is none yet."""
    if not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint} is not a folder: expected a checkpoint that `stepquant quantize` wrote.")
    path = evaluation_path(checkpoint)
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise EvaluationError(f"{path} is damaged ({error}). Delete it, or evaluate the checkpoint again.") from None
    if not isinstance(data, dict) or data.get("schema") != 1:
        raise EvaluationError(f"{path} is not an evaluation of schema 1. Delete it, or evaluate the checkpoint again.")
    return data
