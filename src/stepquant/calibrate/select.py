"""Which recorded denoiser inputs calibrate, and with what weight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepquant.calibrate.steps import DenoiserCall
from stepquant.calibrate.trajectory import Trajectory
from stepquant.errors import CalibrationError, SpecError

__all__ = ["CalibrationSet", "Entry", "HeldOut", "at_steps", "hold_out", "inputs", "uniform"]

Entry = tuple[int, int, int]


@dataclass(frozen=True)
class CalibrationSet:
    """Chosen denoiser inputs.

    entries: (trajectory, step, row). A step's rows are those of all its calls one after the other, so that the two
        halves of classifier-free guidance are rows of their own, whether they share a call or not.
    weights: one for each entry, not negative, in whatever unit; the reconstruction divides by their sum.
    """

    entries: tuple[Entry, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.entries or len(self.entries) != len(self.weights):
            raise SpecError(
                f"A calibration set needs entries and as many weights; got {len(self.entries)} entries and "
                f"{len(self.weights)} weights."
            )
        if min(self.weights) < 0 or sum(self.weights) <= 0:
            raise SpecError("The weights of a calibration set must not be negative, and not all zero.")

    def __len__(self) -> int:
        return len(self.entries)


def uniform(trajectories: Sequence[Trajectory], *, every: int, samples_per_step: int | None) -> CalibrationSet:
    """Steps 0, every, 2 * every, ... and of each the first images, all with weight 1 (Q-Diffusion, Li et al. 2023,
    sec. 3.2).

    samples_per_step: images of a step over all trajectories; each brings both halves of its guidance. None takes all.
    Raises SpecError for an `every` or `samples_per_step` below 1, and CalibrationError without trajectories.
    """
    if every < 1 or (samples_per_step is not None and samples_per_step < 1):
        raise SpecError(f"every={every} and samples_per_step={samples_per_step} must be at least 1.")
    if not trajectories:
        raise CalibrationError("There are no trajectories to choose calibration inputs from; record some first.")
    entries: list[Entry] = []
    for step_index in range(0, max(len(trajectory.steps) for trajectory in trajectories), every):
        left = samples_per_step
        for number, trajectory in enumerate(trajectories):
            if step_index >= len(trajectory.steps):
                continue
            images = trajectory.images if left is None else min(left, trajectory.images)
            entries += [(number, step_index, row) for row in _rows_of(trajectory, step_index, images)]
            left = None if left is None else left - images
    return CalibrationSet(tuple(entries), (1.0,) * len(entries))


def at_steps(trajectories: Sequence[Trajectory], picks: Sequence[tuple[int, int]]) -> CalibrationSet:
    """Chosen (step, image) pairs; one that is picked n times has weight n.

    image: counted over all trajectories, one after the other; each brings both halves of its guidance.
    Raises CalibrationError for a step or image that is not recorded.
    """
    places = [(number, image) for number, trajectory in enumerate(trajectories) for image in range(trajectory.images)]
    weights: dict[Entry, float] = {}
    for step_index, image in picks:
        if not 0 <= image < len(places) or not 0 <= step_index < len(trajectories[places[image][0]].steps):
            raise CalibrationError(
                f"Image {image} at step {step_index} is not recorded: there are {len(places)} images. Record more, or "
                "pick among these."
            )
        number, place = places[image]
        trajectory = trajectories[number]
        rows = sum(call.prediction.shape[0] for call in trajectory.steps[step_index].calls)
        for row in range(place, rows, trajectory.images):
            entry = (number, step_index, row)
            weights[entry] = weights.get(entry, 0.0) + 1.0
    return CalibrationSet(tuple(weights), tuple(weights.values()))


@dataclass(frozen=True)
class HeldOut:
    """A calibration set without some images, and inputs of those images to validate on.

    training: the entries of all other images, with the weights that they had.
    groups: validation entries of each timestep group, noise first; none of their images is in `training`.
    steps: the step indices of each group.
    """

    training: CalibrationSet
    groups: tuple[CalibrationSet, ...]
    steps: tuple[tuple[int, ...], ...]


def hold_out(trajectories: Sequence[Trajectory], chosen: CalibrationSet, *, share: float, groups: int) -> HeldOut:
    """Split off a timestep-balanced validation set of about `share` of the calibration set's size.

    The set's steps are cut into `groups` runs of consecutive steps, of equal length up to one, at most one for each
    step. Every group gets the same number of (step, image) pairs, at least one, spread over its steps; a pair brings
    both halves of its guidance. Images that are recorded but calibrate nothing are taken first; only where they do
    not suffice the set's last images are taken out of it. Entries of weight 0 are left out.
    Raises CalibrationError if no image is left to calibrate on.
    """
    steps = _step_groups(sorted({step for _, step, _ in chosen.entries}), groups)
    every = [(number, image) for number, trajectory in enumerate(trajectories) for image in range(trajectory.images)]
    image_of = {entry: (entry[0], entry[2] % trajectories[entry[0]].images) for entry in chosen.entries}
    used = set(image_of.values())
    rows = len(at_steps(trajectories, [(steps[0][0], 0)]))
    pairs = max(1, math.ceil(share * len(chosen) / (rows * len(steps))))
    needed = max(math.ceil(pairs / len(group)) for group in steps)
    held = [position for position, image in enumerate(every) if image not in used][: pairs * len(steps)]
    if len(held) < needed:
        in_use = [position for position, image in enumerate(every) if image in used]
        held += in_use[len(held) - needed :]
    taken = {every[position] for position in held}
    kept = [
        (entry, weight)
        for entry, weight in zip(chosen.entries, chosen.weights, strict=True)
        if weight > 0 and image_of[entry] not in taken
    ]
    if not kept:
        raise CalibrationError(
            f"Holding out {len(taken)} of {len(every)} recorded images for validation leaves none to calibrate on: "
            "record more samples."
        )
    return HeldOut(
        CalibrationSet(tuple(entry for entry, _ in kept), tuple(weight for _, weight in kept)),
        tuple(
            at_steps(trajectories, _spread(group, held, pairs, first=number * pairs))
            for number, group in enumerate(steps)
        ),
        steps,
    )


def _step_groups(steps: Sequence[int], count: int) -> tuple[tuple[int, ...], ...]:
    """Runs of consecutive steps, of equal length up to one; no more of them than steps."""
    count = min(count, len(steps))
    return tuple(tuple(steps[i * len(steps) // count : (i + 1) * len(steps) // count]) for i in range(count))


def _spread(steps: Sequence[int], images: Sequence[int], pairs: int, *, first: int) -> list[tuple[int, int]]:
    """Different pairs of steps and images: the steps in equal numbers, the images in turn from the `first` on."""
    distinct = min(pairs, len(steps))
    places = [(2 * place + 1) * len(steps) // (2 * distinct) for place in range(distinct)]  # middles of equal parts
    return [
        (steps[places[pair % distinct]], images[(first + pair // distinct + pair % distinct) % len(images)])
        for pair in range(pairs)
    ]


def _rows_of(trajectory: Trajectory, step_index: int, images: int) -> list[int]:
    """The rows of the first images: row r belongs to image r modulo their number."""
    rows = sum(call.prediction.shape[0] for call in trajectory.steps[step_index].calls)
    return [row for row in range(rows) if row % trajectory.images < images]


def inputs(
    trajectories: Sequence[Trajectory], calibration_set: CalibrationSet, positions: Sequence[int]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The denoiser's arguments for a mini-batch: one row for each position in the set, of whatever steps.

    Tensors that have one row per sample are cut and joined. Single values (the timestep as a scheduler gives it, a
    tensor without axes or with one element) become one per row, [n]. All else must be the same in all entries.
    Raises CalibrationError naming the argument if entries do not go together, or if an entry is not recorded.
    """
    if not positions:
        raise CalibrationError("A mini-batch needs at least one position.")
    rows = [_row(trajectories, calibration_set.entries[position]) for position in positions]
    args = tuple(
        _collated([(call.args[place], call, row) for call, row in rows], f"argument {place}")
        for place in range(_same_count(rows))
    )
    kwargs = {key: _collated([(call.kwargs[key], call, row) for call, row in rows], key) for key in rows[0][0].kwargs}
    return args, kwargs


def _row(trajectories: Sequence[Trajectory], entry: Entry) -> tuple[DenoiserCall, int]:
    """The call that holds the entry's row, and the row's place in it."""
    number, step_index, row = entry
    if 0 <= number < len(trajectories) and 0 <= step_index < len(trajectories[number].steps) and row >= 0:
        left = row
        for call in trajectories[number].steps[step_index].calls:
            if left < call.prediction.shape[0]:
                return call, left
            left -= call.prediction.shape[0]
    raise CalibrationError(
        f"The calibration set names row {row} of step {step_index} of trajectory {number}, which is not recorded."
    )


def _same_count(rows: Sequence[tuple[DenoiserCall, int]]) -> int:
    count, keys = len(rows[0][0].args), set(rows[0][0].kwargs)
    if any(len(call.args) != count or set(call.kwargs) != keys for call, _ in rows):
        raise CalibrationError(
            "The denoiser was called with different sets of arguments; calibrate on calls of one kind."
        )
    return count


def _collated(values: Sequence[tuple[Any, DenoiserCall, int]], name: str) -> Any:
    first = values[0][0]
    if isinstance(first, Mapping):
        return {
            key: _collated([(value[key], call, row) for value, call, row in values], f"{name}.{key}") for key in first
        }
    if isinstance(first, list | tuple):
        items = [
            _collated([(value[place], call, row) for value, call, row in values], f"{name}.{place}")
            for place in range(len(first))
        ]
        return type(first)(items)
    if isinstance(first, Tensor):
        return _joined([_cut(value, call, row) for value, call, row in values], first, name)
    if any(value != first for value, _, _ in values):
        return _numbers([value for value, _, _ in values], name)
    return first


def _cut(value: Tensor, call: DenoiserCall, row: int) -> Tensor | None:
    """The value's row [1, ...]; None if the value is not per sample."""
    if value.numel() == 1 and value.ndim <= 1:
        return value.reshape(1)
    return value[row : row + 1] if value.shape[0] == call.prediction.shape[0] else None


def _joined(cut: Sequence[Tensor | None], whole: Tensor, name: str) -> Tensor:
    parts = [part for part in cut if part is not None]
    if not parts:
        return whole  # positions, masks: shared by all samples of a shape
    shapes = {tuple(part.shape) for part in parts}
    if len(parts) != len(cut) or len(shapes) != 1:
        raise CalibrationError(
            f"The denoiser's {name} has rows of different shapes {sorted(shapes)}; calibrate on one shape."
        )
    return torch.cat(parts)


def _numbers(values: Sequence[Any], name: str) -> Tensor:
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        raise CalibrationError(
            f"The denoiser's {name} differs between entries of the calibration set and is not a number."
        )
    return torch.tensor(values)
