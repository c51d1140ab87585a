"""Fingerprints of schedules, and the guard that refuses another one."""

from __future__ import annotations

import copy
import inspect
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from stepquant.errors import SpecError
from stepquant.model.schedule import ScheduleFingerprint, guard_schedule


def fingerprint(scheduler: Any, steps: int = 10) -> ScheduleFingerprint:
    scheduler.set_timesteps(steps)
    return ScheduleFingerprint.of(scheduler, steps=steps, guidance="none")


def test_round_trip() -> None:
    one = fingerprint(FlowMatchEulerDiscreteScheduler())
    assert ScheduleFingerprint.from_dict(one.to_dict()) == one
    assert one.timesteps[0] == 1000.0
    assert len(one.timesteps_hash) == 16
    assert one.timesteps_hash != fingerprint(FlowMatchEulerDiscreteScheduler(), 11).timesteps_hash


def test_config_of_arrays_is_json() -> None:
    assert fingerprint(DDIMScheduler(trained_betas=np.linspace(0.1, 0.2, 1000))).config["trained_betas"][0] == 0.1


@pytest.mark.parametrize(
    "change",
    [{"steps": "10"}, {"timesteps": 3}, {"timesteps": ["a"]}, {"more": 1}, {"config": None}, {"guidance": None}],
)
def test_reading_is_strict(change: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="fingerprint"):
        ScheduleFingerprint.from_dict({**fingerprint(DDIMScheduler()).to_dict(), **change})


def test_a_missing_key_is_named() -> None:
    values = fingerprint(DDIMScheduler()).to_dict()
    del values["guidance"]
    with pytest.raises(SpecError, match="guidance"):
        ScheduleFingerprint.from_dict(values)


def test_differences_are_sentences() -> None:
    one = fingerprint(DDIMScheduler())
    assert one.differences(one) == []
    assert replace(one, guidance="cfg(7.5)").differences(one) == ["The guidance is none instead of cfg(7.5)."]
    found = one.differences(fingerprint(DDIMScheduler(beta_end=0.03), 20))
    assert found[0] == "The scheduler's beta_end is 0.03 instead of 0.02."
    assert found[1] == "The number of inference steps is 20 instead of 10."
    assert found[2].startswith("The timesteps are [950, 900, 850, 800, ..., 50, 0] (20 values) instead of [900,")
    assert any("DDPMScheduler" in sentence for sentence in one.differences(fingerprint(DDPMScheduler())))


def test_the_guard_lets_its_schedule_pass_and_refuses_others() -> None:
    scheduler = DPMSolverMultistepScheduler()
    guard_schedule(scheduler, fingerprint(scheduler))
    scheduler.set_timesteps(10)
    with pytest.raises(SpecError, match=r"for 10 steps.*set to .*\(12 values\).*num_inference_steps=10.*nearest"):
        scheduler.set_timesteps(12)


def test_pipelines_see_the_signature_through_the_guard() -> None:
    """As diffusers' `retrieve_timesteps` looks at it, which cannot be imported without transformers."""
    scheduler = DDPMScheduler()
    guard_schedule(scheduler, fingerprint(scheduler))
    assert "timesteps" in set(inspect.signature(scheduler.set_timesteps).parameters.keys())
    scheduler.set_timesteps(timesteps=list(range(900, -1, -100)), device="cpu")
    with pytest.raises(SpecError):
        scheduler.set_timesteps(timesteps=[900, 500], device="cpu")


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_the_guard_of_a_copy_belongs_to_the_copy(duplicate: Any) -> None:
    scheduler = DDIMScheduler()
    guard_schedule(scheduler, fingerprint(scheduler))
    copied = duplicate(scheduler)
    with pytest.raises(SpecError):
        copied.set_timesteps(7)
    assert len(copied.timesteps) == 7
    assert len(scheduler.timesteps) == 10


def test_guarding_again_replaces_the_guard() -> None:
    scheduler = DDIMScheduler()
    guard_schedule(scheduler, fingerprint(DDIMScheduler(), 10))
    guard_schedule(scheduler, fingerprint(DDIMScheduler(), 20))
    scheduler.set_timesteps(20)
