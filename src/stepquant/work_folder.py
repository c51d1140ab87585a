"""What a killed calibration needs to go on: the state after every finished stage, and what long stages keep inside.

    run.json                       what the run is; another run is refused
    stages.json                    finished stages and their figures
    trajectories/, calibration.json, plan.json, correction.safetensors
    model.json, model-NN.safetensors   the half-quantized denoiser after stage NN
    partial-NN-NAME.safetensors    kept by stage NN itself, removed when it has finished

Every file is written beside its place and renamed, so it is either old or new, never half. Tensors are safetensors;
nothing is pickled.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stepquant.calibrate.select import CalibrationSet
from stepquant.calibrate.trajectory_files import load_trajectories, save_trajectories
from stepquant.errors import CalibrationError, SpecError
from stepquant.model.assembly import Structure, assemble_, describe
from stepquant.model.correction import StepCorrection
from stepquant.model.layer import QuantizedLayer
from stepquant.model.surgery import Plan, quantized_layers
from stepquant.recipe import Job, Stage

__all__ = ["WorkFolder"]

_PLAN = TypeAdapter(Plan)
_STRUCTURE = TypeAdapter(Structure)
_CALIBRATION = TypeAdapter(CalibrationSet)


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(plain, partial, metadata={"meta": json.dumps(dict(meta))})
    partial.replace(path)


class WorkFolder:
    """One run's folder. Also the `Keeper` of the stage that is running."""

    def __init__(self, folder: Path, identity: Mapping[str, Any], *, resume: bool) -> None:
        """identity: JSON values that must be the same for a run to be continued.

        Raises SpecError if the folder holds a run and `resume` is not set, or if it holds another run.
        """
        self.folder = folder
        self.stage = 0
        self.figures: list[dict[str, Any]] = []
        folder.mkdir(parents=True, exist_ok=True)
        known = folder / "run.json"
        if known.exists():
            self._continue(json.loads(known.read_text()), identity, resume=resume)
        else:
            _write_text(known, json.dumps(dict(identity), indent=1))

    def _continue(self, found: dict[str, Any], identity: Mapping[str, Any], *, resume: bool) -> None:
        if not resume:
            raise SpecError(
                f"{self.folder} holds an unfinished run. Go on with it (--resume, resume=True) or remove the folder."
            )
        wanted = json.loads(json.dumps(dict(identity)))
        different = sorted(key for key in set(found) | set(wanted) if found.get(key) != wanted.get(key))
        if different:
            raise SpecError(
                f"{self.folder} holds another run: {', '.join(different)} differ. Use the settings of that run, or "
                "another work folder."
            )
        stages = self.folder / "stages.json"
        if stages.exists():
            self.figures = json.loads(stages.read_text())

    @property
    def finished(self) -> int:
        """Number of stages that need not run again."""
        return len(self.figures)

    def restore(self, job: Job, stages: tuple[Stage, ...]) -> None:
        """Put everything that finished stages gave back into the job."""
        given = {noun for stage in stages[: self.finished] for noun in stage.gives}
        if "trajectories" in given:
            folder = self.folder / "trajectories"
            job.handed["trajectories"] = load_trajectories(folder, job.pipe.scheduler)
        if "calibration" in given:
            job.handed["calibration"] = _CALIBRATION.validate_json((self.folder / "calibration.json").read_text())
        if "plan" in given:
            job.handed["plan"] = _PLAN.validate_json((self.folder / "plan.json").read_text())
        if "model" in given:
            job.denoiser = self._load_model(job.full_precision)
        if "correction" in given:
            tables = load_file(self.folder / "correction.safetensors")
            job.handed["correction"] = StepCorrection(**tables) if "timesteps" in tables else None

    def finish(self, job: Job, stage: Stage, figures: dict[str, Any]) -> None:
        """Write what the stage gave, then that it has finished, then remove what it kept inside."""
        if "trajectories" in stage.gives:
            save_trajectories(self.folder / "trajectories", job.handed["trajectories"])
        if "calibration" in stage.gives:
            _write_text(self.folder / "calibration.json", _CALIBRATION.dump_json(job.handed["calibration"]).decode())
        if "plan" in stage.gives:
            _write_text(self.folder / "plan.json", _PLAN.dump_json(job.handed["plan"]).decode())
        if "model" in stage.gives:
            self._save_model(job.denoiser)
        if "correction" in stage.gives:
            correction: StepCorrection | None = job.handed["correction"]
            tables = {"none": torch.zeros(1)} if correction is None else correction.tables()
            _write_tensors(self.folder / "correction.safetensors", tables, {})
        unknown = set(stage.gives) - {"trajectories", "calibration", "plan", "model", "correction"}
        if unknown:
            raise CalibrationError(
                f"Stage {type(stage).__name__} gives {', '.join(sorted(unknown))}, which a work folder cannot keep: "
                "run without one."
            )
        self.figures.append(figures)
        _write_text(self.folder / "stages.json", json.dumps(self.figures))
        for path in self.folder.glob(f"partial-{self.stage:02d}-*"):
            path.unlink()

    def _save_model(self, denoiser: nn.Module) -> None:
        on_grid = [n for n, x in quantized_layers(denoiser).items() if isinstance(x, QuantizedLayer) and x.on_grid]
        name = f"model-{self.stage:02d}.safetensors"
        _write_tensors(self.folder / name, denoiser.state_dict(), {"on_grid": on_grid})
        structure = _STRUCTURE.dump_python(describe(denoiser), mode="json")
        before = list(self.folder.glob("model-*.safetensors"))
        _write_text(self.folder / "model.json", json.dumps({"file": name, "structure": structure}))
        for path in before:
            if path.name != name:
                path.unlink()

    def _load_model(self, full_precision: nn.Module) -> nn.Module:
        known = json.loads((self.folder / "model.json").read_text())
        path = self.folder / known["file"]
        denoiser = copy.deepcopy(full_precision).requires_grad_(False)
        assemble_(denoiser, _STRUCTURE.validate_python(known["structure"]))
        device = next(full_precision.parameters()).device
        denoiser.to(device)
        with safe_open(path, "pt") as file:
            on_grid = set(json.loads(file.metadata()["meta"])["on_grid"])
        denoiser.load_state_dict(load_file(path, device=str(device)))
        for name, layer in quantized_layers(denoiser).items():
            if isinstance(layer, QuantizedLayer):
                layer.on_grid = name in on_grid
        return denoiser

    def save(self, name: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Keeper: what the running stage wants back if it is killed."""
        _write_tensors(self.folder / f"partial-{self.stage:02d}-{name}.safetensors", tensors, meta)

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Keeper: what `save` wrote under this name in the same stage, or None."""
        path = self.folder / f"partial-{self.stage:02d}-{name}.safetensors"
        if not path.exists():
            return None
        with safe_open(path, "pt") as file:
            meta: dict[str, Any] = json.loads(file.metadata()["meta"])
        return load_file(path), meta
