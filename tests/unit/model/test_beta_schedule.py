"""Timesteps of Beta sampling, and schedulers that walk them or cannot."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
)

import tiny
from stepquant.calibrate.trajectory import record, replay, seal
from stepquant.errors import SpecError
from stepquant.model.beta_schedule import beta_quantile, beta_timesteps, use_beta_timesteps_
from stepquant.model.pipeline import DenoiserPipeline
from stepquant.model.schedule import guard_schedule
from stepquant.run import Run


class Headless(DDPMScheduler):
    """Leaves the first timestep out."""

    def set_timesteps(self, num_inference_steps: Any = None, device: Any = None, timesteps: Any = None) -> None:
        super().set_timesteps(num_inference_steps, device, timesteps[1:] if timesteps else None)


def pipe_with(scheduler: Any) -> DenoiserPipeline:
    return DenoiserPipeline(tiny.TinyNet(), scheduler, (2, 4, 4))


def timesteps_of(scheduler: Any, steps: int = 8) -> list[float]:
    scheduler.set_timesteps(steps)
    return [float(timestep) for timestep in scheduler.timesteps]


def test_the_quantile_is_the_inverse_of_known_distributions() -> None:
    u = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(beta_quantile(u, 1, 1), u)  # uniform
    # Beta(1/2, 1/2), the arcsine law: F^-1(u) = sin^2(pi u / 2)
    torch.testing.assert_close(beta_quantile(u, 0.5, 0.5), torch.sin(math.pi * u / 2) ** 2)
    torch.testing.assert_close(beta_quantile(u, 2, 1), u.sqrt())  # F(x) = x^2


def test_timesteps_by_hand() -> None:
    # u = 1, 3/4, 1/2, 1/4 and sin^2(pi u / 2) = 1, 0.853553, 0.5, 0.146447, of 1000 timesteps
    assert beta_timesteps(4, total=1001, alpha=0.5, beta=0.5) == (1000, 854, 500, 146)
    assert beta_timesteps(1) == (999,)


def test_steps_are_dense_at_both_ends_and_sparse_in_the_middle() -> None:
    chosen = beta_timesteps(30)
    gaps = [one - other for one, other in itertools.pairwise(chosen)]
    middle = gaps[len(gaps) // 2]
    assert middle > 2 * gaps[0]  # the distribution function instead of its inverse has it the other way round
    assert middle > 1.3 * gaps[-1]
    assert all(gap > 0 for gap in gaps)


def test_timesteps_that_coincide_are_run_once() -> None:
    chosen = beta_timesteps(50, total=20)
    assert len(chosen) < 50
    assert list(chosen) == sorted(set(chosen), reverse=True)


@pytest.mark.parametrize("scheduler", [DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler])
def test_schedulers_with_custom_timesteps_walk_them(scheduler: Any) -> None:
    pipe = pipe_with(scheduler())
    use_beta_timesteps_(pipe)
    assert timesteps_of(pipe.scheduler) == list(map(float, beta_timesteps(8)))
    use_beta_timesteps_(pipe, alpha=0.9, beta=0.7)  # replaces
    assert timesteps_of(pipe.scheduler) == list(map(float, beta_timesteps(8, alpha=0.9, beta=0.7)))
    assert timesteps_of(scheduler()) != timesteps_of(pipe.scheduler)  # others of its class are as before


def test_a_scheduler_that_doubles_its_timesteps_walks_each_of_them() -> None:
    pipe = pipe_with(HeunDiscreteScheduler())
    use_beta_timesteps_(pipe)
    found = timesteps_of(pipe.scheduler)
    assert sorted(set(found), reverse=True) == list(map(float, beta_timesteps(8)))
    assert len(found) > 8


def test_timesteps_of_the_callers_own_come_first() -> None:
    pipe = pipe_with(DDPMScheduler())
    use_beta_timesteps_(pipe)
    pipe.scheduler.set_timesteps(timesteps=[900, 10])
    assert pipe.scheduler.timesteps.tolist() == [900, 10]


def test_copies_walk_by_themselves() -> None:
    pipe = pipe_with(DDPMScheduler())
    use_beta_timesteps_(pipe)
    for other in (copy.deepcopy(pipe.scheduler), pickle.loads(pickle.dumps(pipe.scheduler))):
        assert timesteps_of(other, 5) == list(map(float, beta_timesteps(5)))
    assert pipe.scheduler.num_inference_steps is None  # untouched by its copies


def test_what_cannot_walk_them_is_refused() -> None:
    with pytest.raises(SpecError, match="DDIMScheduler takes no custom timesteps"):
        use_beta_timesteps_(pipe_with(DDIMScheduler()))
    karras = pipe_with(DPMSolverMultistepScheduler(use_karras_sigmas=True))
    use_beta_timesteps_(karras)
    with pytest.raises(SpecError, match=r"refused the 4 timesteps.*karras"):
        karras.scheduler.set_timesteps(4)
    with pytest.raises(SpecError, match=r"FlowMatchEulerDiscreteScheduler shifts its sigmas.*use_beta_sigmas"):
        use_beta_timesteps_(pipe_with(FlowMatchEulerDiscreteScheduler(shift=3.0)))
    headless = pipe_with(Headless())
    use_beta_timesteps_(headless)
    with pytest.raises(SpecError, match=r"given the 4 timesteps 999 \.\. 176 of Beta sampling and walks 3 others"):
        headless.scheduler.set_timesteps(4)
    with pytest.raises(SpecError, match="above 0"):
        use_beta_timesteps_(pipe_with(DDPMScheduler()), alpha=0.0)
    with pytest.raises(SpecError, match="at least one step"):
        beta_timesteps(0)


def test_a_recording_has_them_in_its_fingerprint_and_replays() -> None:
    pipe = pipe_with(DPMSolverMultistepScheduler())
    plain = record(pipe, pipe.denoiser, seeds=[1, 2], steps=4, batch_size=2, run=Run())[0].fingerprint
    use_beta_timesteps_(pipe)
    (trajectory,) = record(pipe, pipe.denoiser, seeds=[1, 2], steps=4, batch_size=2, run=Run())
    assert trajectory.fingerprint.timesteps == tuple(map(float, beta_timesteps(4)))
    assert trajectory.fingerprint.steps == 4
    sealed = seal(trajectory)
    *_, last = replay(pipe.denoiser, sealed, 0, 4)
    assert torch.equal(last.sample, trajectory.steps[-1].next_sample)
    assert any("timesteps" in sentence for sentence in plain.differences(trajectory.fingerprint))


def test_the_guard_of_a_checkpoint_asks_for_them() -> None:
    """A loaded scheduler is guarded and does not know about Beta sampling until it is told."""
    pipe = pipe_with(DDPMScheduler())
    use_beta_timesteps_(pipe)
    (trajectory,) = record(pipe, pipe.denoiser, seeds=[1], steps=4, batch_size=1, run=Run())
    loaded = pipe_with(DDPMScheduler())
    guard_schedule(loaded.scheduler, trajectory.fingerprint)
    with pytest.raises(SpecError, match="calibrated for 4 steps"):
        loaded.scheduler.set_timesteps(4)
    use_beta_timesteps_(loaded)
    assert timesteps_of(loaded.scheduler, 4) == list(trajectory.fingerprint.timesteps)
    with pytest.raises(SpecError, match="calibrated for 4 steps"):
        loaded.scheduler.set_timesteps(5)
    guard_schedule(pipe.scheduler, trajectory.fingerprint)  # the other way round
    assert timesteps_of(pipe.scheduler, 4) == list(trajectory.fingerprint.timesteps)
