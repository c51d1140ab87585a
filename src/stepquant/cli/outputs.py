"""Where a command's files go, and what is in the way."""

from __future__ import annotations

import glob
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from stepquant.cli.console import json_text, replace_text
from stepquant.errors import CheckpointError, EvaluationError, SpecError

__all__ = [
    "FINISHED_STAGES",
    "SAVING_MARK",
    "WORK_MARK",
    "card_path",
    "clear_work",
    "conclude",
    "evaluation_path",
    "figures_path",
    "fit_path",
    "is_finished",
    "read_evaluation",
    "read_origin",
    "refuse_existing",
    "refuse_no_checkpoint",
    "refuse_unwritable",
    "refuse_unwritable_file",
    "refuse_unwritable_json",
    "refuse_used_folder",
    "remove_work",
    "settings_path",
    "speed_path",
    "work_folder",
    "write_figures",
]

WORK_MARK = "run.yaml"
"""In every work folder: the settings of the run. A folder without it is not ours to delete."""

FINISHED_STAGES = "stages.json"
"""In a work folder once its first stage is done; `stepquant.work_folder` writes it."""

SAVING_MARK = "saving"
"""In a work folder while a checkpoint is written where there was none: if there is one, it is this run's."""

_LOCK_FILES = {"lock", "owner.json"}


def _beside(out: Path, suffix: str) -> Path:
    out = Path(out.absolute()) if out.name in ("", "..") else out
    return out.with_name(out.name + suffix)


def work_folder(out: Path) -> Path:
    """`OUT.work`: what a killed run needs to go on."""
    return _beside(out, ".work")


def settings_path(out: Path) -> Path:
    """`OUT.run.yaml`: every setting of the run that made the checkpoint."""
    return _beside(out, ".run.yaml")


def fit_path(out: Path) -> Path:
    """`OUT.compensate.json`: every setting of the `compensate` that corrected the checkpoint or copy."""
    return _beside(out, ".compensate.json")


def figures_path(out: Path) -> Path:
    """`OUT.figures.jsonl`: what every stage of the run measured, losses and times included; one stage a line."""
    return _beside(out, ".figures.jsonl")


def speed_path(checkpoint: Path) -> Path:
    """`CHECKPOINT.speed.json`: how fast engines were when `report --speed` last asked."""
    return _beside(checkpoint, ".speed.json")


def card_path(checkpoint: Path) -> Path:
    """`CHECKPOINT/README.md`: the model card, where hubs look for it. The one file in the folder that `card` wrote."""
    return checkpoint / "README.md"


def write_figures(figures: Iterable[Mapping[str, Any]], out: Path) -> None:
    """Keep the figures of the stages beside a checkpoint, for `report`."""
    lines = "".join(json_text(entry) + "\n" for entry in figures)
    replace_text(figures_path(out), lines)


def read_origin(checkpoint: Path) -> dict[str, Any]:
    """What is kept beside a checkpoint about how it came about: see `report.page.Origin`. What is missing is left out.

    Raises EvaluationError for a file that cannot be read.
    """
    found: dict[str, Any] = {}
    if (path := settings_path(checkpoint)).is_file():
        found |= {"settings_file": str(path), "settings": path.read_text(encoding="utf-8")}
    try:
        if (path := figures_path(checkpoint)).is_file():
            found["figures"] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if (path := speed_path(checkpoint)).is_file():
            found["speed"] = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(found["speed"], dict) or found["speed"].get("schema") != 1:
                raise ValueError("it has no schema 1")
    except (ValueError, RecursionError) as error:
        raise EvaluationError(f"{path} is damaged ({error}). Delete it: the report does without it.") from None
    return found


def evaluation_path(checkpoint: Path) -> Path:
    """`CHECKPOINT.evaluation.json`: the last evaluation."""
    return _beside(checkpoint, ".evaluation.json")


def refuse_existing(out: Path, *, overwrite: bool) -> None:
    """Refuse an output that is there already, or cannot be there, before any work is done for it."""
    if out.is_symlink():
        raise SpecError(f"{out} is a symbolic link. Name the folder itself: {out.readlink()}.")
    if out.exists() and not overwrite:
        raise SpecError(f"{out} exists already. Choose another name, or give --overwrite to replace it.")
    refuse_unwritable(out)


def refuse_no_checkpoint(out: Path) -> None:
    """Refuse to overwrite what is no checkpoint: a typo after -o must not cost a folder."""
    from stepquant.manifest import MANIFEST_NAME

    if out.exists() and not (out / MANIFEST_NAME).is_file():
        raise SpecError(f"{out} is no checkpoint of stepquant, so --overwrite does not replace it.")


def refuse_unwritable(path: Path) -> None:
    """Refuse a file or folder that cannot be written, before any work is done for it."""
    if path.is_symlink() and not path.exists():
        raise SpecError(f"{path} is a link to {path.readlink()}, which is not there.")
    there = next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())
    if there != path.absolute() and not there.is_dir():
        raise SpecError(f"{path} cannot be written: {there} is no folder.")
    if not os.access(there, os.W_OK):
        raise SpecError(f"{path} cannot be written: {there} is read-only for this user.")


def refuse_unwritable_json(target: str | None) -> None:
    """Refuse a file given with `--json` that cannot be written; "-" is the screen."""
    if target not in (None, "-"):
        refuse_unwritable_file(Path(target))


def refuse_unwritable_file(path: Path) -> None:
    """Refuse a folder, and what cannot be written, before any work is done for it."""
    if path.is_dir():
        raise SpecError(f"{path} is a folder, expected a file to write.")
    refuse_unwritable(path)


def refuse_used_folder(folder: Path, *, overwrite: bool) -> None:
    """Refuse what is no folder, one that cannot be written, and one that has something in it."""
    refuse_unwritable(folder)
    if folder.exists() and not folder.is_dir():
        raise SpecError(f"{folder} is a file, expected a folder to write into.")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise SpecError(
            f"{folder} is not empty. Choose another folder, or give --overwrite to replace the images in it."
        )


def clear_work(work: Path, *, resume: bool, overwrite: bool) -> None:
    """Make the work folder ready: kept to resume, removed to overwrite, otherwise refused if it holds a run."""
    if not work.exists() or resume:
        return
    if not overwrite:
        raise SpecError(
            f"{work} holds a run that was interrupted. Give --resume to go on with it, or --overwrite to start anew."
        )
    names = {path.name for path in work.iterdir()}
    if WORK_MARK not in names and (not names or names - _LOCK_FILES):
        raise SpecError(f"{work} is no work folder of stepquant: move it away first.")
    remove_work(work)


def remove_work(work: Path) -> None:
    """Remove a work folder, if there is one: a run that is killed on the way leaves all of it or none under its name.

    Also removes what runs that were killed here left under the other name.
    """
    if work.exists():
        work.rename(work.with_name(f".{work.name}.{os.getpid()}.removed"))
    for removed in work.parent.glob(f".{glob.escape(work.name)}.*.removed"):
        shutil.rmtree(removed, ignore_errors=True)


def is_finished(out: Path, settings: Mapping[str, Any], *, kept: Path, read: Callable[[Path], Any]) -> bool:
    """Whether the checkpoint `out` is there and is what a run with these settings made.

    kept: where the settings of a run that is complete are, beside `out`; those of one under way are in its work folder.
    read: reads either. A run may be killed after its checkpoint is complete, with the work folder still there or gone.
    """
    work = work_folder(out)
    known = work / WORK_MARK if (work / SAVING_MARK).exists() else kept
    if not out.is_dir() or not known.is_file() or (work.exists() and known.parent != work):
        return False
    with suppress(SpecError, ValueError, RecursionError):
        return bool(read(known) == dict(settings))
    return False


def conclude(out: Path, figures: Iterable[Mapping[str, Any]], *, kept: Path) -> None:
    """What is left to do once a checkpoint is complete and its settings are in `kept`, as for `is_finished`."""
    write_figures(figures, out)
    # What is known of a checkpoint that was here before says nothing about this one.
    for path in (settings_path(out), fit_path(out), evaluation_path(out), speed_path(out)):
        if path != kept:
            path.unlink(missing_ok=True)
    remove_work(work_folder(out))


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
