"""What a killed calibration needs to go on: the state after every finished stage, and what long stages keep inside.

    lock, owner.json               which process is at work here
    run.json                       what the run is; another run is refused
    stages.json                    finished stages and their figures
    trajectories/                  what stages gave: trajectories only once,
    calibration-NN.json, plan-NN.json, correction-NN.safetensors, model-NN.json, model-NN.safetensors
                                   the others with the number of the stage that gave them last
    partial-NN-NAME.safetensors    kept by stage NN itself, removed when it has finished
    spill/                         what the process at work does not keep in memory; of no use to any other

Of several processes only the first has the folder. The others begin with a copy of what it holds, in a temporary one.

Every file is written beside its place and renamed, so it is either old or new, never half. A stage has finished when
stages.json says so: what it gave has names of its own until then, so a stage that is killed while its results are
written starts again from what it was given, not from its own results. Tensors are safetensors; nothing is pickled.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stepquant.calibrate.offload import is_offloaded, settle_
from stepquant.calibrate.select import CalibrationSet
from stepquant.calibrate.split import kept
from stepquant.calibrate.step_groups import Schemes
from stepquant.calibrate.trajectory_files import save_trajectories, shards
from stepquant.errors import CalibrationError, SpecError, StepquantError
from stepquant.model.assembly import Structure, assemble_, describe
from stepquant.model.correction import StepCorrection
from stepquant.model.families import network_beside
from stepquant.model.layer import QuantizedLayer
from stepquant.model.surgery import Plan, quantized_layers
from stepquant.processes import Processes
from stepquant.recipe import Job, Stage
from stepquant.run import Run, Spill
from stepquant.storage import errors_name

__all__ = ["OtherRun", "WorkFolder", "hold", "opened", "spilling"]

logger = logging.getLogger(__name__)

_PLAN: TypeAdapter[Plan] = TypeAdapter(Schemes)
_STRUCTURE = TypeAdapter(Structure)
_CALIBRATION = TypeAdapter(CalibrationSet)

_KEPT = ("trajectories", "calibration", "plan", "model", "correction")
_LOCK, _OWNER = "lock", "owner.json"
_SPILL = "spill"
_TENSORS = ".safetensors"


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Inside, no other process works in this folder; it is made if it is not there. May be nested.

    The operating system takes the lock back when a process ends, in whatever way, so a killed run blocks nobody.
    Raises SpecError that names the process which has the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.resolve() / _LOCK, timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except Timeout:
        raise SpecError(
            f"{_owner(folder)} is at work in {folder}. Wait until it has ended, end it, or choose another name for "
            "what it makes."
        ) from None
    try:
        if lock.lock_counter == 1:
            if (folder / _OWNER).exists():
                logger.info("%s has ended and left %s; this process goes on with it.", _owner(folder), folder)
            _write_text(folder / _OWNER, json.dumps({"process": os.getpid(), "machine": socket.gethostname()}))
        yield
    finally:
        lock.release()


def _owner(folder: Path) -> str:
    """ "Process 17 on machine". The file only serves messages, so one that cannot be read is no error."""
    try:
        known = json.loads((folder / _OWNER).read_text())
        return f"Process {known['process']} on {known['machine']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "Another process"


@contextmanager
def _written(path: Path) -> Iterator[Path]:
    """A file beside `path` that takes its place once the body has ended well."""
    partial = path.with_name(path.name + ".partial")
    try:
        with errors_name(path):
            yield partial
            partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def _read(path: Path, folder: Path) -> Iterator[None]:
    """Inside, whatever goes wrong with reading `path` is damage. Only a failing disk or a person's hand does that."""
    try:
        yield
    except StepquantError:
        raise
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, SafetensorError) as error:
        what = (str(error).splitlines() or [""])[0]
        raise CalibrationError(
            f"{path} is damaged or missing ({type(error).__name__}: {what}). Remove {folder} and start anew."
        ) from error


def _write_text(path: Path, text: str) -> None:
    with _written(path) as partial:
        partial.write_text(text)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with _written(path) as partial:
        save_file(plain, partial, metadata={"meta": json.dumps(dict(meta))})


class OtherRun(SpecError):  # noqa: N818 - reads as a sentence where it is raised
    """A work folder of a run with other settings. Nothing in it was touched."""


class WorkFolder:
    """One run's folder. Also the `Keeper` of the stage that is running. The caller has a `hold` of it."""

    def __init__(self, folder: Path, identity: Mapping[str, Any], *, resume: bool) -> None:
        """identity: JSON values that must be the same for a run to be continued.

        Raises SpecError if the folder holds a run and `resume` is not set, or OtherRun if it holds another one;
        CalibrationError if it is damaged.
        """
        self.folder = folder
        self.stage = 0
        self.figures: list[dict[str, Any]] = []
        folder.mkdir(parents=True, exist_ok=True)
        known = folder / "run.json"
        if known.exists():
            self._continue(known, identity, resume=resume)
        else:
            _write_text(known, json.dumps(dict(identity), indent=1))

    def _continue(self, known: Path, identity: Mapping[str, Any], *, resume: bool) -> None:
        if not resume:
            raise SpecError(
                f"{self.folder} holds an unfinished run. Go on with it (--resume, resume=True) or remove the folder."
            )
        with _read(known, self.folder):
            found = dict(json.loads(known.read_text()))
        wanted = json.loads(json.dumps(dict(identity)))
        stages = self.folder / "stages.json"
        if stages.exists():
            with _read(stages, self.folder):
                self.figures = [dict(figures) for figures in json.loads(stages.read_text())]
        different = sorted(key for key in set(found) | set(wanted) if found.get(key) != wanted.get(key))
        if different == ["recipe"] and self._may_follow(found["recipe"], wanted["recipe"]):
            _write_text(known, json.dumps(wanted, indent=1))
        elif different:
            raise OtherRun(
                f"{self.folder} holds another run: {' and '.join(different)} differ{'s' * (len(different) == 1)}"
                f"{_first_difference(found, wanted)}. "
                "Use the settings of that run, or another work folder (on the command line another --out); --overwrite "
                "starts anew."
            )

    def _may_follow(self, before: Mapping[str, Any], recipe: Mapping[str, Any]) -> bool:
        """Whether a recipe begins with the stages that have finished: then a setting of a later one was corrected.

        What the stage under way kept goes, if it is another one now.
        """
        old, new = before.get("stages", []), recipe.get("stages", [])
        if old[: self.finished] != new[: self.finished]:
            return False
        if old[self.finished : self.finished + 1] != new[self.finished : self.finished + 1]:
            for path in self.folder.glob("partial-*"):
                path.unlink()
        return True

    @property
    def finished(self) -> int:
        """Number of stages that need not run again."""
        return len(self.figures)

    def restore(self, job: Job, stages: Sequence[Stage]) -> None:
        """Put everything that finished stages gave back into the job. Raises CalibrationError if it is damaged."""
        given = {noun: number for number, stage in enumerate(stages[: self.finished]) for noun in stage.gives}
        if "trajectories" in given:
            folder = self.folder / "trajectories"
            found = shards(folder, job.pipe.scheduler, network_beside(job.pipe))
            job.handed["trajectories"] = kept(job, found)
        if "calibration" in given:
            path = self._path("calibration", given["calibration"])
            with _read(path, self.folder):
                job.handed["calibration"] = _CALIBRATION.validate_json(path.read_text())
        if "plan" in given:
            path = self._path("plan", given["plan"])
            with _read(path, self.folder):
                job.handed["plan"] = _PLAN.validate_json(path.read_text())
        if "model" in given:
            path = self._path("model", given["model"])
            with _read(path, self.folder):
                job.denoiser = _load_model(path, job.full_precision)
        if "correction" in given:
            path = self._path("correction", given["correction"])
            with _read(path, self.folder):
                tables = load_file(path)
                job.handed["correction"] = StepCorrection(**tables) if "timesteps" in tables else None

    def finish(self, job: Job, stage: Stage, figures: dict[str, Any]) -> None:
        """Write what the stage gave, then that it has finished, then remove what has been outlived.

        Raises CalibrationError for a noun that cannot be kept, OSError that names a path for a disk that is full.
        """
        unknown = set(stage.gives) - set(_KEPT)
        if unknown:
            raise CalibrationError(
                f"Stage {type(stage).__name__} gives {', '.join(sorted(unknown))}, which a work folder cannot keep: "
                "run without one."
            )
        if "trajectories" in stage.gives:
            with errors_name(self.folder / "trajectories"):
                save_trajectories(self.folder / "trajectories", job.handed["trajectories"])
        if "calibration" in stage.gives:
            _write_text(self._path("calibration"), _CALIBRATION.dump_json(job.handed["calibration"]).decode())
        if "plan" in stage.gives:
            _write_text(self._path("plan"), _PLAN.dump_json(job.handed["plan"]).decode())
        if "model" in stage.gives:
            _save_model(self._path("model"), job.denoiser)
        if "correction" in stage.gives:
            correction: StepCorrection | None = job.handed["correction"]
            tables = {"none": torch.zeros(1)} if correction is None else correction.tables()
            _write_tensors(self._path("correction"), tables, {})
        _write_text(self.folder / "stages.json", json.dumps([*self.figures, figures]))
        self.figures.append(figures)
        self._remove_outlived(stage)

    def _path(self, noun: str, stage: int | None = None) -> Path:
        """Where a stage's noun is, without a number that of the stage under way."""
        suffix = "safetensors" if noun == "correction" else "json"
        return self.folder / f"{noun}-{self.stage if stage is None else stage:02d}.{suffix}"

    def _remove_outlived(self, stage: Stage) -> None:
        for noun in set(stage.gives) - {"trajectories"}:
            for path in self.folder.glob(f"{noun}-*"):
                if not path.name.startswith(f"{noun}-{self.stage:02d}."):
                    path.unlink()
        for path in self.folder.glob("partial-*"):
            path.unlink()

    def save(self, name: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Keeper: what the running stage wants back if it is killed."""
        _write_tensors(self._partial(name), tensors, meta)

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Keeper: what `save` wrote under this name in the same stage, or None."""
        path = self._partial(name)
        if not path.exists():
            return None
        with _read(path, self.folder):
            with safe_open(path, "pt") as file:
                meta: dict[str, Any] = json.loads(file.metadata()["meta"])
            return load_file(path), meta

    def _partial(self, name: str) -> Path:
        return self.folder / f"partial-{self.stage:02d}-{name}.safetensors"


class _Copy(WorkFolder):
    """What the first process's folder held when the run began; nothing is written to it."""

    def finish(self, job: Job, stage: Stage, figures: dict[str, Any]) -> None:  # noqa: ARG002
        self.figures.append(figures)

    def save(self, name: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        pass


def _first_difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """In brackets, the first setting of the recipes that differs; nothing where it is not a setting."""
    for number, (old, new) in enumerate(
        zip(*(recipe.get("recipe", {}).get("stages", []) for recipe in (found, wanted)), strict=False)
    ):
        if old.get("stage") != new.get("stage"):
            return f" (stage {number + 1} was {old.get('stage')} and is {new.get('stage')})"
        for key in sorted({*old, *new}):
            if old.get(key) != new.get(key):
                return (
                    f" ({key} of stage {number + 1}, {new.get('stage')}: {old.get(key)!r} before, {new.get(key)!r} now)"
                )
    return ""


@contextmanager
def opened(folder: Path, identity: Mapping[str, Any], *, resume: bool, processes: Processes) -> Iterator[WorkFolder]:
    """A run's folder, locked while it is open; with several processes a copy on all but the first.

    Raises as `hold` and `WorkFolder` do.
    """
    if processes.first:
        with hold(folder):
            work = WorkFolder(folder, identity, resume=resume)
            shutil.rmtree(folder / _SPILL, ignore_errors=True)  # of a run that was killed
            _copied(folder, processes)
            yield work
    else:
        with tempfile.TemporaryDirectory(prefix="stepquant-work-") as temporary:
            copy_of_it = Path(temporary)
            _copied(copy_of_it, processes)
            yield _Copy(copy_of_it, identity, resume=True)


@contextmanager
def spilling(run: Run, work: WorkFolder | None) -> Iterator[Spill | None]:
    """Inside, the folder for what a run with `max_memory` does not keep in memory; None for a run without."""
    if run.max_memory is None:
        yield None
        return
    folder = Path(tempfile.mkdtemp(prefix="stepquant-spill-")) if work is None else work.folder / _SPILL
    folder.mkdir(exist_ok=True)
    try:
        yield Spill(folder, run.max_memory)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _copied(folder: Path, processes: Processes) -> None:
    """Copy what resuming reads from the first process's folder to the others', a file at a time."""
    if processes.count == 1:
        return

    def names() -> list[str]:
        found = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix in (".json", _TENSORS)]
        return [path.relative_to(folder).as_posix() for path in found if path.name != _OWNER]

    for name in processes.from_first(names):
        path = folder / name
        content = processes.from_first(path.read_bytes)
        if not processes.first:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def _save_model(path: Path, denoiser: nn.Module) -> None:
    """The structure as JSON; beside it the tensors, which are written first."""
    on_grid = [n for n, x in quantized_layers(denoiser).items() if isinstance(x, QuantizedLayer) and x.on_grid]
    _write_tensors(path.with_suffix(".safetensors"), denoiser.state_dict(), {"on_grid": on_grid})
    _write_text(path, json.dumps({"structure": _STRUCTURE.dump_python(describe(denoiser), mode="json")}))


def _load_model(path: Path, full_precision: nn.Module) -> nn.Module:
    structure = _STRUCTURE.validate_python(json.loads(path.read_text())["structure"])
    denoiser = copy.deepcopy(full_precision).requires_grad_(False)
    assemble_(denoiser, structure)
    device = next(full_precision.parameters()).device
    settle_(denoiser, device)
    tensors = path.with_suffix(".safetensors")
    through = "cpu" if is_offloaded(denoiser) else str(device)
    with safe_open(tensors, "pt") as file:
        on_grid = set(json.loads(file.metadata()["meta"])["on_grid"])
    denoiser.load_state_dict(load_file(tensors, device=through))
    for name, layer in quantized_layers(denoiser).items():
        if isinstance(layer, QuantizedLayer):
            layer.on_grid = name in on_grid
    return denoiser
