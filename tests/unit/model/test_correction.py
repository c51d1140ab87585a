"""Step corrections and the scheduler stand-in."""

from __future__ import annotations

import copy
import inspect
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler, PNDMScheduler

from stepquant.errors import SpecError
from stepquant.model.correction import CorrectedScheduler, Corrector, StepCorrection
from stepquant.model.schedule import ScheduleFingerprint, guard_schedule
from tiny import sampled, tiny_pipe


@pytest.mark.parametrize(
    "scheduler", [DDIMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler, PNDMScheduler]
)
def test_the_identity_changes_no_bit(scheduler: type) -> None:
    pipe, _ = tiny_pipe()
    inner = scheduler(num_train_timesteps=1000)
    inner.set_timesteps(5)
    unet = pipe.unet
    timesteps = torch.unique(inner.timesteps.float()).flip(0)

    def chain(standing: object) -> torch.Tensor:
        sample = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))
        standing.set_timesteps(5)  # type: ignore[attr-defined]
        sample = sample * standing.init_noise_sigma  # type: ignore[attr-defined]
        for t in standing.timesteps:  # type: ignore[attr-defined]
            with torch.no_grad():
                prediction = unet(standing.scale_model_input(sample, t), t).sample  # type: ignore[attr-defined]
            sample = standing.step(prediction, t, sample).prev_sample  # type: ignore[attr-defined]
        return sample

    corrected = CorrectedScheduler(copy.deepcopy(inner), StepCorrection.identity(timesteps, 1))
    assert torch.equal(chain(inner), chain(corrected))


def test_the_formula_by_hand() -> None:
    zeros = torch.zeros(2, 2)
    correction = StepCorrection(
        timesteps=torch.tensor([900.0, 100.0]),
        gain=torch.tensor([[1.0, 1.0], [2.0, 3.0]]),
        carry=torch.tensor([[0.0, 0.0], [0.5, 0.0]]),
        offset=torch.tensor([[0.0, 0.0], [0.25, -1.0]]),
        variance=zeros,
    )
    guided, sample = torch.full((1, 2, 1, 1), 2.0), torch.full((1, 2, 1, 1), 4.0)
    assert correction.apply(guided, torch.tensor(100), sample).flatten().tolist() == [6.25, 5.0]
    assert correction.apply(guided, 900, sample).flatten().tolist() == [2.0, 2.0]
    tokens = correction.apply(guided.reshape(1, 1, 2), 100, sample.reshape(1, 1, 2))
    assert tokens.flatten().tolist() == [6.25, 5.0]
    assert correction.apply(guided.half(), 100, sample.half()).dtype == torch.float16
    assert correction.row(480) == 1, "the nearest timestep"
    with pytest.raises(SpecError, match=r"2 channels .* \[1, 3, 1, 1\]"):
        correction.apply(torch.zeros(1, 3, 1, 1), 100, torch.zeros(1, 3, 1, 1))


def test_tables_that_make_no_sense_are_refused() -> None:
    good = StepCorrection.identity(torch.tensor([2.0, 1.0]), 3)
    with pytest.raises(SpecError, match="must be distinct"):
        StepCorrection.identity(torch.tensor([1.0, 1.0]), 3)
    with pytest.raises(SpecError, match=r"carry of a correction has shape \[2, 1\], expected \[2, 3\]"):
        replace(good, carry=torch.zeros(2, 1))
    with pytest.raises(SpecError, match="offset of a correction must be finite"):
        replace(good, offset=torch.full((2, 3), float("nan")))
    with pytest.raises(SpecError, match=r"\[S, C\]"):
        replace(good, gain=torch.zeros(2))


def stand_in() -> CorrectedScheduler:
    inner = DDIMScheduler()
    inner.set_timesteps(4)
    correction = StepCorrection.identity(inner.timesteps, 1)
    return CorrectedScheduler(inner, replace(correction, gain=correction.gain * 2))


def test_the_stand_in_forwards_everything_but_underscores() -> None:
    standing = stand_in()
    assert standing.config.num_train_timesteps == 1000
    assert len(standing) == 1000
    standing.timesteps = standing.timesteps[1:]
    assert len(standing.uncorrected.timesteps) == 3
    assert {"eta", "generator"} <= set(inspect.signature(standing.step).parameters)
    with pytest.raises(AttributeError, match="_internal_dict"):
        _ = standing._internal_dict
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = standing.no_such_thing


def test_step_corrects_positional_and_keyword_calls() -> None:
    standing = stand_in()
    inner = copy.deepcopy(standing.uncorrected)
    prediction, sample = torch.randn(1, 1, 4, 4), torch.randn(1, 1, 4, 4)
    wanted = inner.step(prediction * 2, 500, sample).prev_sample
    assert torch.equal(standing.step(prediction, 500, sample, eta=0.0).prev_sample, wanted)
    named = standing.step(model_output=prediction, timestep=500, sample=sample, return_dict=False)[0]
    assert torch.equal(named, wanted)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value)), copy.copy])
def test_copies_are_stand_ins_of_their_own(copied: object) -> None:
    standing = stand_in()
    other = copied(standing)  # type: ignore[operator]
    assert isinstance(other, CorrectedScheduler)
    assert torch.equal(other.correction.gain, standing.correction.gain)
    prediction, sample = torch.randn(1, 1, 4, 4), torch.randn(1, 1, 4, 4)
    assert torch.equal(
        other.step(prediction, 500, sample).prev_sample, standing.step(prediction, 500, sample).prev_sample
    )
    if copied is not copy.copy:
        assert other.uncorrected is not standing.uncorrected


def test_a_stand_in_inside_a_stand_in() -> None:
    inner = stand_in()
    outer = CorrectedScheduler(inner, inner.correction)
    prediction, sample = torch.randn(1, 1, 4, 4), torch.randn(1, 1, 4, 4)
    wanted = inner.uncorrected.step(prediction * 4, 500, sample).prev_sample
    assert torch.equal(copy.deepcopy(outer).step(prediction, 500, sample).prev_sample, wanted)


def test_a_pipeline_runs_with_it() -> None:
    pipe, _ = tiny_pipe()
    before = sampled(pipe, 4)
    pipe.scheduler = CorrectedScheduler(pipe.scheduler, StepCorrection.identity(torch.tensor([750.0, 0.0]), 1))
    assert np.array_equal(before, sampled(pipe, 4))


def remembering(scheduler: type = DDIMScheduler, steps: int = 4) -> CorrectedScheduler:
    """Of every step only what was predicted at the timestep before is left."""
    inner = scheduler(num_train_timesteps=1000)
    inner.set_timesteps(steps)
    timesteps = torch.unique(inner.timesteps.float()).flip(0)
    identity = StepCorrection.identity(timesteps, 1)
    zero = torch.zeros_like(identity.gain)
    return CorrectedScheduler(inner, replace(identity, gain=zero, previous=zero + 1.0))


def given_to(standing: CorrectedScheduler, predictions: list[torch.Tensor]) -> list[torch.Tensor]:
    """What the inner scheduler is given when the steps of a run come to these predictions."""
    seen: list[torch.Tensor] = []
    inner_step = standing.uncorrected.step

    def spying(model_output: torch.Tensor, *args: object, **kwargs: object) -> object:
        seen.append(model_output)
        return inner_step(model_output, *args, **kwargs)

    standing.uncorrected.step = spying
    sample = torch.ones_like(predictions[0])
    for timestep, prediction in zip(standing.timesteps, predictions, strict=True):
        sample = standing.step(prediction, timestep, sample).prev_sample
    del standing.uncorrected.step
    return seen


def numbered(count: int, batch: int = 1) -> list[torch.Tensor]:
    return [torch.full((batch, 1, 2, 2), float(number + 1)) for number in range(count)]


def values(seen: list[torch.Tensor]) -> list[float]:
    return [float(tensor.unique()) for tensor in seen]


def test_the_prediction_before_by_hand() -> None:
    identity = StepCorrection.identity(torch.tensor([900.0, 100.0]), 2)
    correction = replace(identity, previous=torch.tensor([[0.0, 0.0], [0.5, -1.0]]))
    guided, before = torch.full((1, 2, 1, 1), 2.0), torch.full((1, 2, 1, 1), 4.0)
    assert correction.apply(guided, 100, guided, before).flatten().tolist() == [4.0, -2.0]
    assert correction.apply(guided, 100, guided, None).flatten().tolist() == [2.0, 2.0], "nothing at the first step"
    half = correction.apply(guided.half(), 100, guided.half(), before.half())
    assert half.dtype == torch.float16
    assert set(correction.tables()) == {"timesteps", "gain", "carry", "offset", "variance", "previous"}
    assert "previous" not in identity.tables()
    with pytest.raises(SpecError, match=r"previous of a correction has shape \[2, 1\], expected \[2, 2\]"):
        replace(identity, previous=torch.zeros(2, 1))


def test_it_is_the_raw_prediction_before_and_forgotten_when_sampling_starts_anew() -> None:
    standing = remembering()
    assert values(given_to(standing, numbered(4))) == [0.0, 1.0, 2.0, 3.0]
    standing.set_timesteps(4)
    assert values(given_to(standing, numbered(4))) == [0.0, 1.0, 2.0, 3.0], "a second run"
    standing.set_timesteps(4)
    assert values(given_to(standing, numbered(4, batch=3))) == [0.0, 1.0, 2.0, 3.0], "another batch size"
    # A run that was broken off, the next one begins with the same timesteps.
    standing.set_timesteps(4)
    for number in range(2):
        standing.step(numbered(4)[number], standing.timesteps[number], torch.ones(1, 1, 2, 2))
    standing.set_timesteps(4)
    assert values(given_to(standing, numbered(4))) == [0.0, 1.0, 2.0, 3.0]
    # Even where nobody sets the timesteps again.
    assert values(given_to(standing, numbered(4))) == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize("scheduler", [HeunDiscreteScheduler, PNDMScheduler])
def test_both_visits_of_a_timestep_see_the_same_prediction_before(scheduler: type) -> None:
    standing = remembering(scheduler)
    timesteps = standing.timesteps.tolist()
    assert len(set(timesteps)) < len(timesteps)
    expected, before, latest = [], 0.0, 0.0
    for number, timestep in enumerate(timesteps):
        if number > 0 and timestep != timesteps[number - 1]:
            before = latest
        latest = number + 1.0
        expected.append(before)
    assert values(given_to(standing, numbered(len(timesteps)))) == expected


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_a_copy_in_the_middle_of_a_run_goes_on_by_itself(copied: object) -> None:
    standing = remembering()
    first, second, third, _ = numbered(4)
    sample = torch.ones_like(first)
    standing.step(first, standing.timesteps[0], sample)
    other = copied(standing)  # type: ignore[operator]
    standing.step(third, standing.timesteps[1], sample)
    # The copy still has the first prediction before it; a row of zeros would be what a forgetful copy is given.
    found = other.step(second, other.timesteps[1], sample).prev_sample
    assert torch.equal(found, standing.uncorrected.step(first, standing.timesteps[1], sample).prev_sample)


def test_a_corrector_does_what_the_stand_in_does() -> None:
    standing = remembering(PNDMScheduler)
    predictions = [torch.randn(2, 1, 2, 2) for _ in standing.timesteps]
    corrector = Corrector(standing.correction)
    found = [
        corrector(prediction, timestep, prediction)
        for timestep, prediction in zip(standing.timesteps, predictions, strict=True)
    ]
    assert all(torch.equal(*pair) for pair in zip(found, given_to(standing, predictions), strict=True))


def test_a_guard_holds_around_the_stand_in_and_its_copies() -> None:
    standing = remembering()
    guard_schedule(standing, ScheduleFingerprint.of(standing, steps=4, guidance="none"))
    other = copy.deepcopy(standing)
    for guarded in (standing, other):
        guarded.set_timesteps(4)
        assert values(given_to(guarded, numbered(4))) == [0.0, 1.0, 2.0, 3.0]
        with pytest.raises(SpecError, match="calibrated for 4 steps"):
            guarded.set_timesteps(5)
    assert other.uncorrected is not standing.uncorrected
    guard_schedule(standing, ScheduleFingerprint.of(_set(standing.uncorrected, 5), steps=5, guidance="none"))
    standing.set_timesteps(5)


def _set(scheduler: DDIMScheduler, steps: int) -> DDIMScheduler:
    free = DDIMScheduler.from_config(scheduler.config)
    free.set_timesteps(steps)
    return free


def with_shift(timesteps: torch.Tensor, amount: float) -> StepCorrection:
    identity = StepCorrection.identity(timesteps, 1)
    shift = torch.zeros_like(identity.gain)
    shift[0] = amount
    return replace(identity, shift=shift)


@pytest.mark.parametrize("steps", [4, 8, 20])
def test_a_shift_is_added_once_on_a_finer_schedule(steps: int) -> None:
    coarse, fine = DDIMScheduler(clip_sample=False), DDIMScheduler(clip_sample=False)
    coarse.set_timesteps(4)
    fine.set_timesteps(steps)
    standing = CorrectedScheduler(fine, with_shift(coarse.timesteps.float(), 0.5))
    for _ in range(2):  # and once more in another run
        standing.set_timesteps(steps)
        moved = 0.0
        for timestep in standing.timesteps:
            nothing = torch.zeros(1, 1, 2, 2), timestep, torch.zeros(1, 1, 2, 2)
            moved += float(standing.step(*nothing).prev_sample.mean())
        assert moved == pytest.approx(0.5)


def test_a_guarded_correction_refuses_a_step_it_was_not_fitted_on() -> None:
    """Image to image fits the tail of a schedule; a greater strength begins before it."""
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(5)
    fitted = scheduler.timesteps[2:].float()
    standing = CorrectedScheduler(scheduler, StepCorrection.identity(fitted, 1))
    step = torch.zeros(1, 1, 2, 2), scheduler.timesteps[0], torch.zeros(1, 1, 2, 2)
    standing.step(*step)  # without a guard the nearest row serves
    guard_schedule(standing, ScheduleFingerprint.of(standing, steps=5, guidance="none"))
    with pytest.raises(SpecError, match="no row for timestep 800: it was fitted from 400 to 0"):
        standing.step(*step)
    standing.step(step[0], scheduler.timesteps[2], step[2])
