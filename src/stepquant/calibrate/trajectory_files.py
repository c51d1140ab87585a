"""Trajectories on disk: one JSON file, and one safetensors file a trajectory. Never pickle.

Schedulers are not stored. On loading, a fresh one is made from the stored configuration, set to the stored schedule,
and walked through the recorded model outputs with the recorded noise; each step must end where it was recorded, bit
for bit.

    folder/trajectories.json              format, and for each trajectory: seeds, fingerprint, form, steps
    folder/trajectory-00000.safetensors   the tensors; JSON refers to them as {"tensor": "12"}
"""

from __future__ import annotations

import json
import os
import shutil
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stepquant.calibrate.forms import form_from_dict, scaled_sample
from stepquant.calibrate.steps import ConditionCall, DenoiserCall, Step, cached_tensors, copy_sharing, run_scheduler
from stepquant.calibrate.trajectory import Trajectory
from stepquant.errors import CalibrationError
from stepquant.model.schedule import ScheduleFingerprint, walk_timesteps, with_constants

__all__ = ["Written", "decoded_step", "load_trajectories", "packed", "save_trajectories", "shards", "unpacked"]

_FORMAT = 2
_INDEX = "trajectories.json"


class Written(Sequence[Step]):
    """Steps of a trajectory that a file holds already. path: of that file."""

    path: Path

    @abstractmethod
    def stored(self) -> dict[str, Any]:
        """The whole trajectory's entry, as `packed` gives it; the file has its tensors, and may have more."""


def save_trajectories(folder: Path, trajectories: Sequence[Trajectory]) -> None:
    """Write the trajectories to a folder, which is replaced if it holds trajectories already.

    Written beside it and renamed, so that a killed run leaves no half of it.
    Raises CalibrationError for a call's argument that JSON and tensors cannot hold, and if the folder holds
    something else.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / _INDEX).exists():
        raise CalibrationError(f"{folder} exists and holds no trajectories; give a new or empty folder.")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    entries = []
    for number, trajectory in enumerate(trajectories):
        if isinstance(trajectory.steps, Written):
            entries.append(trajectory.steps.stored())
            _link(trajectory.steps.path, partial / _shard(number))
            continue
        entry, tensors = packed(trajectory)
        entries.append(entry)
        save_file(tensors, partial / _shard(number))
    (partial / _INDEX).write_text(json.dumps({"format": _FORMAT, "trajectories": entries}, indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def load_trajectories(folder: Path, pipe_scheduler: Any, network: nn.Module | None = None) -> list[Trajectory]:
    """The trajectories of a folder. Tensors are memory-mapped.

    pipe_scheduler: a scheduler of the class that was recorded; it is not changed, and its settings do not matter.
    network: the one beside the denoiser, if there was one (`Trajectory.network`); networks are not stored.
    Raises CalibrationError for a missing or damaged folder, another scheduler class, and steps that the rebuilt
    scheduler does not repeat (another version of diffusers, another device).
    """
    return list(shards(folder, pipe_scheduler, network))


def shards(folder: Path, pipe_scheduler: Any, network: nn.Module | None = None) -> Iterator[Trajectory]:
    """`load_trajectories`, one after the other."""
    index = _read_index(folder)
    for number, entry in enumerate(index):
        path = folder / _shard(number)
        try:
            found = unpacked(entry, load_file(path), pipe_scheduler, network)
        except (KeyError, TypeError, ValueError, OSError, RuntimeError, SafetensorError) as error:
            raise CalibrationError(
                f"{path} is damaged or missing ({type(error).__name__}: {error}). Record again."
            ) from error
        yield found
        del found  # or there would be two of them while the next one is read


def packed(trajectory: Trajectory) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A trajectory as JSON values and the tensors that they refer to: what a folder holds of it.

    Raises CalibrationError for a call's argument that JSON and tensors cannot hold.
    """
    tensors = _Tensors()
    entry = {**_encode_trajectory(trajectory, tensors), "devices": tensors.devices}
    return entry, tensors.by_name


def unpacked(
    entry: Mapping[str, Any], tensors: Mapping[str, Tensor], pipe_scheduler: Any, network: nn.Module | None = None
) -> Trajectory:
    """Undo `packed`; pipe_scheduler and network as for `load_trajectories`. Damage raises whatever it leads to."""
    # Back to where they were: the denoiser is still there, and other devices round differently.
    placed = {name: item.to(entry["devices"].get(name, "cpu")) for name, item in tensors.items()}
    return replace(_decode_trajectory(entry, placed, pipe_scheduler), network=network)


def _link(file: Path, place: Path) -> None:
    """The file in a second place: without a copy, unless the file system wants one."""
    try:
        os.link(file, place)
    except OSError:
        shutil.copyfile(file, place)


def _shard(number: int) -> str:
    return f"trajectory-{number:05d}.safetensors"


def _read_index(folder: Path) -> list[Mapping[str, Any]]:
    path = folder / _INDEX
    try:
        index = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{path} cannot be read ({error}). Record again.") from error
    if not isinstance(index, dict) or index.get("format") != _FORMAT or not isinstance(index.get("trajectories"), list):
        raise CalibrationError(f"{path} is not of format {_FORMAT}, which this version reads. Record again.")
    entries: list[Mapping[str, Any]] = index["trajectories"]
    return entries


class _Tensors:
    """Names tensors and keeps each one once, however often it is referred to."""

    def __init__(self) -> None:
        self.by_name: dict[str, Tensor] = {}
        self.devices: dict[str, str] = {}
        self._names: dict[int, str] = {}

    def name(self, tensor: Tensor) -> str:
        # What is named is kept alive by the trajectory, so ids stay unique.
        if id(tensor) not in self._names:
            self._names[id(tensor)] = str(len(self._names))
            self.by_name[self._names[id(tensor)]] = tensor.contiguous()
            if tensor.device.type != "cpu":
                self.devices[self._names[id(tensor)]] = tensor.device.type
        return self._names[id(tensor)]


def _encode_trajectory(trajectory: Trajectory, tensors: _Tensors) -> dict[str, Any]:
    args, kwargs = trajectory.schedule_arguments
    first = (trajectory.lead or trajectory.steps)[0].scheduler
    if type(first).__name__ != trajectory.fingerprint.scheduler:
        raise CalibrationError(
            f"The trajectory was recorded with a {type(first).__name__} around {trajectory.fingerprint.scheduler}, "
            "which "
            "cannot be rebuilt from its configuration. Keep it in memory, or record without the correction."
        )
    return {
        "seeds": list(trajectory.seeds),
        "fingerprint": trajectory.fingerprint.to_dict(),
        "form": None if trajectory.form is None else trajectory.form.to_dict(),
        # Where a pipeline puts the tables of its schedulers does not change their values.
        "set_timesteps": _encode([args, {key: None if key == "device" else kwargs[key] for key in kwargs}], tensors),
        "timesteps": _encode(first.timesteps, tensors),
        "begin_index": getattr(first, "begin_index", None),
        "painted": _encode(trajectory.painted, tensors),
        "lead": [_encode_step(step, tensors) for step in trajectory.lead],
        "steps": [_encode_step(step, tensors) for step in trajectory.steps],
    }


def _encode_step(step: Step, tensors: _Tensors) -> dict[str, Any]:
    values = {
        "sample": step.sample,
        "timestep": step.timestep,
        "calls": [{"args": call.args, "kwargs": call.kwargs, "prediction": call.prediction} for call in step.calls],
        "guided": step.guided,
        "next_sample": step.next_sample,
        "step_kwargs": step.step_kwargs,
        "generator_states": step.generator_states,
        "draws_globally": step.draws_globally,
        "conditions": [{"args": one.args, "kwargs": one.kwargs, "outputs": one.outputs} for one in step.conditions],
    }
    encoded: dict[str, Any] = {key: _encode(value, tensors) for key, value in values.items()}
    return encoded


def _encode(value: Any, tensors: _Tensors) -> Any:
    if isinstance(value, Tensor):
        return {"tensor": tensors.name(value)}
    if isinstance(value, Mapping):
        return {"dict": {str(key): _encode(item, tensors) for key, item in value.items()}}
    if isinstance(value, tuple):
        return {"tuple": [_encode(item, tensors) for item in value]}
    if isinstance(value, np.ndarray | np.generic):
        return _encode(value.tolist(), tensors)  # sigmas that a pipeline hands to its scheduler, in float64
    if isinstance(value, list):
        return [_encode(item, tensors) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise CalibrationError(
        f"A recorded argument is a {type(value).__name__} ({value!r}), which cannot be stored. Keep the "
        "trajectories in memory (a run "
        "without work folder), or do not pass it to the pipeline."
    )


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "tuple":
        return tuple(_decode(item, tensors) for item in inner)
    if kind == "dict":
        return {key: _decode(item, tensors) for key, item in inner.items()}
    raise ValueError(f"unknown kind of value {kind!r}")


def _decode_trajectory(entry: Mapping[str, Any], tensors: Mapping[str, Tensor], pipe_scheduler: Any) -> Trajectory:
    fingerprint = ScheduleFingerprint.from_dict(entry["fingerprint"])
    arguments = _decode(entry["set_timesteps"], tensors)
    scheduler = _fresh_scheduler(pipe_scheduler, fingerprint, arguments)
    scheduler.timesteps = _decode(entry["timesteps"], tensors)
    if entry["begin_index"] is not None:
        scheduler.set_begin_index(entry["begin_index"])
    # In the order of sampling: the scheduler walks through both.
    lead, steps = (
        tuple(_decode_step(index, encoded, tensors, scheduler) for index, encoded in enumerate(entry[part]))
        for part in ("lead", "steps")
    )
    form = None if entry["form"] is None else form_from_dict(entry["form"])
    return Trajectory(
        steps,
        tuple(entry["seeds"]),
        fingerprint,
        (tuple(arguments[0]), arguments[1]),
        form,
        painted=_decode(entry["painted"], tensors),
        lead=lead,
    )


def _decode_step(index: int, encoded: Mapping[str, Any], tensors: Mapping[str, Tensor], scheduler: Any) -> Step:
    """Advances the scheduler past the step."""
    return _rebuilt_step(scheduler, decoded_step(index, encoded, tensors))


def decoded_step(index: int, encoded: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Step:
    """One of the steps in an entry of `packed`, without its scheduler."""
    values = {key: _decode(value, tensors) for key, value in encoded.items()}
    values["calls"] = tuple(DenoiserCall(**call) for call in values["calls"])
    values["conditions"] = tuple(ConditionCall(**call) for call in values["conditions"])
    return Step(index=index, scheduler=None, **values)


def _fresh_scheduler(pipe_scheduler: Any, fingerprint: ScheduleFingerprint, arguments: Sequence[Any]) -> Any:
    if type(pipe_scheduler).__name__ != fingerprint.scheduler:
        raise CalibrationError(
            f"The trajectories were recorded with {fingerprint.scheduler}, the pipeline has "
            f"{type(pipe_scheduler).__name__}. Give the "
            "pipeline that scheduler, or record again."
        )
    scheduler = type(pipe_scheduler).from_config(with_constants(fingerprint.config))
    walk_timesteps(scheduler, fingerprint)
    args, kwargs = arguments
    scheduler.set_timesteps(*args, **kwargs)
    return scheduler


def _rebuilt_step(scheduler: Any, step: Step) -> Step:
    """The step with a copy of the scheduler; advances the scheduler past it."""
    with torch.no_grad():
        # Some schedulers look their step index up when they scale.
        scaled_sample(scheduler, step.sample, step.timestep, scaled=True)
        shared = {id(item): item.clone() for item in cached_tensors(scheduler, step.sample.shape).values()}
        before = copy_sharing(scheduler, shared)
        found = run_scheduler(scheduler, step, guided=step.guided, sample=step.sample)
    if not torch.equal(found, step.next_sample):
        raise CalibrationError(
            f"Step {step.index}: {type(scheduler).__name__} does not repeat what was recorded, so diffusers or the "
            "device changed since. "
            "Record again."
        )
    values = {name: getattr(step, name) for name in Step.__dataclass_fields__}
    return Step(**{**values, "scheduler": before})
