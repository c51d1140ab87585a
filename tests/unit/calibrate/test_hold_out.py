"""Which images validate, and which still calibrate."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stepquant.calibrate.select import CalibrationSet, HeldOut, hold_out, uniform
from stepquant.errors import CalibrationError


def recorded(steps: int, *batches: int, halves: int = 1) -> list[Any]:
    """Trajectories of so many images each; `halves` rows for each image."""
    return [
        SimpleNamespace(
            batch=batch,
            images=batch,
            steps=[
                SimpleNamespace(calls=[SimpleNamespace(prediction=torch.zeros(batch * halves, 1))])
                for _ in range(steps)
            ],
        )
        for batch in batches
    ]


def images_of(trajectories: list[Any], chosen: CalibrationSet) -> set[tuple[int, int]]:
    return {(number, row % trajectories[number].batch) for number, _, row in chosen.entries}


def validation_of(held: HeldOut) -> list[tuple[int, int, int]]:
    return [entry for group in held.groups for entry in group.entries]


@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize(("steps", "batches", "share"), [(20, (8, 8, 4), 0.05), (6, (3, 2), 0.3), (12, (5,), 0.2)])
def test_validation_is_balanced_disjoint_and_of_the_size_asked_for(
    steps: int, batches: tuple[int, ...], share: float, halves: int
) -> None:
    trajectories = recorded(steps, *batches, halves=halves)
    chosen = uniform(trajectories, every=1, samples_per_step=None)
    held = hold_out(trajectories, chosen, share=share, groups=5)
    validation = validation_of(held)
    assert len(set(validation)) == len(validation)
    assert len({len(group) for group in held.groups}) == 1
    assert share * len(chosen) <= len(validation) < share * len(chosen) + 5 * halves
    assert [step for steps in held.steps for step in steps] == list(range(steps))
    assert max(map(len, held.steps)) - min(map(len, held.steps)) <= 1
    for group, of_group in zip(held.groups, held.steps, strict=True):
        counts = Counter(step for _, step, _ in group.entries)
        assert set(counts) <= set(of_group)
        assert max(counts.values()) - min(counts.values()) <= halves
    taken = {image for group in held.groups for image in images_of(trajectories, group)}
    left = images_of(trajectories, held.training)
    assert taken.isdisjoint(left)
    # No more images are lost than the validation set needs, and all that is left of the others calibrates.
    assert len(left) == sum(batches) - -(-len(validation) // (steps * halves))
    assert len(held.training) == len(left) * steps * halves


def test_images_that_do_not_calibrate_validate_first() -> None:
    trajectories = recorded(10, 4, 4)
    chosen = uniform(trajectories, every=2, samples_per_step=5)
    held = hold_out(trajectories, chosen, share=0.2, groups=5)
    assert held.training == chosen
    validation = validation_of(held)
    assert [step for _, step, _ in validation] == [0, 2, 4, 6, 8]  # the steps that calibrate, one a group
    assert {(number, row) for number, _, row in validation} == {(1, 1), (1, 2), (1, 3)}


def test_one_step_is_one_group_and_weights_go_along() -> None:
    trajectories = recorded(3, 4)
    chosen = CalibrationSet(tuple((0, 1, row) for row in range(4)), (1.0, 0.0, 3.0, 1.0))
    held = hold_out(trajectories, chosen, share=0.05, groups=5)
    assert held.steps == ((1,),)
    assert held.training == CalibrationSet(((0, 1, 0), (0, 1, 2)), (1.0, 3.0))  # row 3 validates, row 1 has no weight
    assert validation_of(held) == [(0, 1, 3)]


def test_the_only_image_cannot_be_held_out() -> None:
    trajectories = recorded(5, 1)
    with pytest.raises(CalibrationError, match=r"Holding out 1 of 1 recorded images.*record more samples"):
        hold_out(trajectories, uniform(trajectories, every=1, samples_per_step=None), share=0.05, groups=5)
