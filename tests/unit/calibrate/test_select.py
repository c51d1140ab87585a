"""Which recorded denoiser inputs calibrate, and how they are put together."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tiny_pipelines
from stepquant.calibrate.select import CalibrationSet, at_steps, hold_out, inputs, uniform
from stepquant.calibrate.steps import DenoiserCall
from stepquant.calibrate.trajectory import record, seal
from stepquant.errors import CalibrationError, SpecError
from stepquant.run import Run


def call(rows: int, timestep: Any, *, width: int = 3, **extra: Any) -> DenoiserCall:
    sample = torch.arange(rows * 2.0).reshape(rows, 2) + 100 * float(torch.as_tensor(timestep).flatten()[0])
    text = torch.arange(rows * width * 1.0).reshape(rows, width)
    return DenoiserCall((sample, timestep), {"text": text, "return_dict": False, **extra}, torch.zeros(rows, 2))


def trajectory(*steps: tuple[DenoiserCall, ...], batch: int) -> Any:
    return SimpleNamespace(steps=[SimpleNamespace(calls=calls) for calls in steps], batch=batch, images=batch)


def test_uniform_takes_strided_steps_and_both_halves_of_the_first_images() -> None:
    doubled = trajectory(*[(call(4, torch.tensor(t)),) for t in (9, 6, 3)], batch=2)
    assert uniform([doubled], every=2, samples_per_step=1).entries == ((0, 0, 0), (0, 0, 2), (0, 2, 0), (0, 2, 2))
    everything = uniform([doubled], every=1, samples_per_step=None)
    assert len(everything) == 12
    assert everything.weights == (1.0,) * 12


def test_uniform_counts_images_over_all_trajectories() -> None:
    plain = [trajectory((call(2, torch.tensor(5)),), batch=2) for _ in range(3)]
    assert uniform(plain, every=1, samples_per_step=3).entries == ((0, 0, 0), (0, 0, 1), (1, 0, 0))


def test_images_of_doubled_latents_bring_both_halves() -> None:
    """DiT carries its latents twice, so that a trajectory's batch has twice as many rows as images."""
    pipe = tiny_pipelines.dit()
    arguments = {"class_labels": [1, 2, 3], "guidance_scale": 3.0}
    found = record(pipe, pipe.transformer, seeds=range(3), steps=2, batch_size=3, run=Run(), arguments=arguments)
    (recorded,) = [seal(one) for one in found]
    assert (recorded.batch, recorded.images) == (6, 3)
    assert uniform([recorded], every=2, samples_per_step=2).entries == ((0, 0, 0), (0, 0, 1), (0, 0, 3), (0, 0, 4))
    assert at_steps([recorded], [(1, 2)]).entries == ((0, 1, 2), (0, 1, 5))
    with pytest.raises(CalibrationError, match="there are 3 images"):
        at_steps([recorded], [(1, 3)])
    held = hold_out([recorded], uniform([recorded], every=1, samples_per_step=None), share=0.1, groups=2)
    training = {row % 3 for _, _, row in held.training.entries}
    validation = [row for group in held.groups for _, _, row in group.entries]
    assert training.isdisjoint(row % 3 for row in validation)
    assert len([row for row in validation if row < 3]) == len([row for row in validation if row >= 3]) > 0


def test_inputs_cuts_rows_and_joins_timesteps() -> None:
    tables = torch.ones(7, 3)
    steps = [(call(4, torch.tensor(t), ids=tables, added={"size": torch.ones(4, 1) * t}),) for t in (9, 6)]
    recorded = trajectory(*steps, batch=2)
    chosen = CalibrationSet(((0, 0, 1), (0, 1, 3)), (1.0, 1.0))
    args, kwargs = inputs([recorded], chosen, [1, 0])
    assert torch.equal(args[0], torch.tensor([[606.0, 607.0], [902.0, 903.0]]))
    assert torch.equal(args[1], torch.tensor([6, 9]))
    assert torch.equal(kwargs["text"], torch.tensor([[9.0, 10.0, 11.0], [3.0, 4.0, 5.0]]))
    assert torch.equal(kwargs["added"]["size"], torch.tensor([[6.0], [9.0]]))
    assert kwargs["ids"] is tables
    assert kwargs["return_dict"] is False


def test_rows_run_on_over_separate_calls() -> None:
    recorded = trajectory((call(2, torch.tensor([7, 7])), call(2, torch.tensor([8, 8]))), batch=2)
    args, _ = inputs([recorded], CalibrationSet(((0, 0, 1), (0, 0, 2)), (1.0, 1.0)), [0, 1])
    assert torch.equal(args[1], torch.tensor([7, 8]))


def test_timesteps_that_are_numbers_become_a_tensor_where_they_differ() -> None:
    recorded = trajectory((call(1, 9),), (call(1, 6),), batch=1)
    chosen = uniform([recorded], every=1, samples_per_step=None)
    assert torch.equal(inputs([recorded], chosen, [0, 1])[0][1], torch.tensor([9, 6]))
    assert inputs([recorded], chosen, [0])[0][1] == 9


def test_misuse_is_named() -> None:
    recorded = trajectory((call(2, torch.tensor(5)),), (call(2, torch.tensor(4), width=4),), batch=2)
    chosen = CalibrationSet(((0, 0, 0), (0, 1, 0), (0, 0, 2)), (1.0, 2.0, 1.0))
    with pytest.raises(CalibrationError, match="text has rows of different shapes"):
        inputs([recorded], chosen, [0, 1])
    with pytest.raises(CalibrationError, match="row 2 of step 0 of trajectory 0"):
        inputs([recorded], chosen, [2])
    with pytest.raises(CalibrationError, match="at least one position"):
        inputs([recorded], chosen, [])
    with pytest.raises(CalibrationError, match="no trajectories"):
        uniform([], every=1, samples_per_step=None)
    with pytest.raises(SpecError, match="at least 1"):
        uniform([recorded], every=0, samples_per_step=None)
    with pytest.raises(SpecError, match="1 entries and 0 weights"):
        CalibrationSet(((0, 0, 0),), ())
    with pytest.raises(SpecError, match="negative"):
        CalibrationSet(((0, 0, 0),), (-1.0,))
    extra = trajectory((call(2, torch.tensor(5)),), (call(2, torch.tensor(4), mask=None),), batch=2)
    with pytest.raises(CalibrationError, match="different sets of arguments"):
        inputs([extra], chosen, [0, 1])
    named = trajectory((call(2, torch.tensor(5), mode="a"),), (call(2, torch.tensor(4), mode="b"),), batch=2)
    with pytest.raises(CalibrationError, match="mode differs"):
        inputs([named], chosen, [0, 1])
