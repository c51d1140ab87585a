"""Trajectories that lie on disk while a run needs them: a step is read when somebody asks for it.

A step's tensors are memory-mapped, and the mapping ends when nobody has the step any more, so what is in memory is what
is in use. Schedulers are not read: every step has a copy that is the same for all trajectories, and gets the memory of
earlier steps (`cached_tensors`) from the file. `seal` has checked that the rest of a scheduler does not depend on the
data.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from stepquant.calibrate.steps import Step, cached_tensors, copy_sharing, put_tensor
from stepquant.calibrate.trajectory import Trajectory
from stepquant.calibrate.trajectory_files import Written, decoded_step, packed
from stepquant.storage import errors_name

__all__ = ["Shelf", "StepsOnDisk", "names_in", "spilled"]

_PARTS = ("lead", "steps")

_RECENT = 4
"""Steps that stay open: replaying a step looks at it and at the next one, several times."""


@dataclass
class Shelf:
    """What the trajectories of a run share.

    schedulers: part of a trajectory ("lead", "steps") and index -> a scheduler without its memory of earlier steps.
    recent: file, part and index -> step, the last one used at the end.
    """

    schedulers: dict[tuple[str, int], Any] = field(default_factory=dict)
    recent: OrderedDict[tuple[Path, str, int], Step] = field(default_factory=OrderedDict)


class StepsOnDisk(Written):
    """The steps of one trajectory, read from a safetensors file.

    entry: of the trajectory in the form of `packed`, each step as JSON to save memory, with its "history": path of a
    cached tensor -> name of the tensor. part: which of its steps these are, "lead" or "steps".
    """

    def __init__(self, path: Path, entry: Mapping[str, Any], part: str, shelf: Shelf) -> None:
        self.path, self.part = path, part
        self._entry, self._shelf = entry, shelf

    def __len__(self) -> int:
        return len(self._entry[self.part])

    @overload
    def __getitem__(self, index: int) -> Step: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Step, ...]: ...
    def __getitem__(self, index: int | slice) -> Step | tuple[Step, ...]:
        if isinstance(index, slice):
            return tuple(self[place] for place in range(*index.indices(len(self))))
        place = range(len(self))[index]
        key, recent = (self.path, self.part, place), self._shelf.recent
        if key not in recent:
            recent[key] = self._read(place)
        recent.move_to_end(key)
        while len(recent) > _RECENT:
            recent.popitem(last=False)
        return recent[key]

    def _read(self, index: int) -> Step:
        encoded = json.loads(self._entry[self.part][index])
        history = encoded.pop("history")
        devices: Mapping[str, str] = self._entry["devices"]
        with safe_open(self.path, "pt") as file:

            def tensor(name: str) -> Tensor:
                found: Tensor = file.get_tensor(name)
                return found.to(devices[name]) if name in devices else found

            names = {*names_in(list(encoded.values())), *history.values()}
            tensors = {name: tensor(name) for name in names}
        scheduler = copy_sharing(self._shelf.schedulers[self.part, index], {})
        for path, name in history.items():
            put_tensor(scheduler, path, tensors[name])
        return replace(decoded_step(index, encoded, tensors), scheduler=scheduler)

    def stored(self) -> dict[str, Any]:
        entry = dict(self._entry)
        for part in _PARTS:
            entry[part] = [json.loads(text) for text in entry[part]]
            for encoded in entry[part]:
                del encoded["history"]
        return entry


def spilled(trajectory: Trajectory, path: Path, shelf: Shelf) -> Trajectory:
    """Write a sealed trajectory to a file; the same trajectory with its steps there.

    Raises CalibrationError for arguments that cannot be stored, and OSError that names the path for a full disk.
    """
    entry, tensors = packed(trajectory)
    devices: dict[str, str] = entry["devices"]
    names = {id(tensor): name for name, tensor in tensors.items()}
    kept = dict(tensors)
    for part, steps in zip(_PARTS, (trajectory.lead, trajectory.steps), strict=True):
        for step, encoded in zip(steps, entry[part], strict=True):
            history = cached_tensors(step.scheduler, step.sample.shape)
            for tensor in history.values():
                if id(tensor) not in names:
                    name = names[id(tensor)] = str(len(kept))
                    kept[name] = tensor.detach().contiguous()
                    if tensor.device.type != "cpu":
                        devices[name] = tensor.device.type
            encoded["history"] = {where: names[id(tensor)] for where, tensor in history.items()}
            if (part, step.index) not in shelf.schedulers:
                shelf.schedulers[part, step.index] = _without(step.scheduler, history)
        entry[part] = [json.dumps(encoded) for encoded in entry[part]]
    with errors_name(path):
        save_file(kept, path)
    lead, own = (StepsOnDisk(path, entry, part, shelf) for part in _PARTS)
    painted = None if trajectory.painted is None else trajectory.painted.clone()
    return replace(trajectory, steps=own, lead=lead, painted=painted)


def _without(scheduler: Any, history: Mapping[str, Tensor]) -> Any:
    """A copy without its memory of earlier steps."""
    return copy_sharing(scheduler, {id(tensor): None for tensor in history.values()})


def names_in(encoded: Any) -> Iterator[str]:
    """The tensors that a value in an entry of `packed` refers to."""
    if isinstance(encoded, list):
        for item in encoded:
            yield from names_in(item)
    elif isinstance(encoded, dict):
        ((kind, inner),) = encoded.items()
        if kind == "tensor":
            yield inner
        else:
            yield from names_in(list(inner.values()) if kind == "dict" else inner)
