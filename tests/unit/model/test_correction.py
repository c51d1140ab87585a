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
from stepquant.model.correction import CorrectedScheduler, StepCorrection
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
