"""The parts of a correction that act on what a step returns: less noise, and a shift of the sample."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor

from stepquant.calibrate.trajectory import record, replay, seal
from stepquant.checkpoint import load_checkpoint, save_checkpoint
from stepquant.doctor.drivers import final_states
from stepquant.errors import CheckpointError, SpecError, UnsupportedPipeline
from stepquant.evaluate.clean_samples import clean_samples
from stepquant.evaluate.drift import measure_drift
from stepquant.manifest import MANIFEST_NAME
from stepquant.model.correction import CorrectedScheduler, Corrector, StepCorrection, noise_can_be_scaled
from stepquant.model.pipeline import DenoiserPipeline
from stepquant.run import Run
from stepquant.storage import write_summed
from tiny import TinyNet, quantize_

SHAPE = (2, 2, 4, 4)


def stepped(scheduler: Any, share: float | None, generator: Any, **arguments: Any) -> Tensor:
    """One step at timestep 500 of five; share None: without the stand-in."""
    scheduler.set_timesteps(4)
    identity = StepCorrection.identity(torch.tensor([750.0, 500.0, 250.0, 0.0]), 2)
    if share is not None:
        variance = torch.zeros(4, 2)
        variance[1] = share
        scheduler = CorrectedScheduler(scheduler, replace(identity, variance=variance))
    guided, sample = (torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    result = scheduler.step(guided, torch.tensor(500), sample, generator=generator, **arguments)
    found: Tensor = result[0] if isinstance(result, tuple) else result.prev_sample
    return found


SCHEDULERS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "ddpm": (lambda: DDPMScheduler(clip_sample=False), {}),
    "ddpm clipped": (lambda: DDPMScheduler(clip_sample=True), {}),
    "ddpm v": (lambda: DDPMScheduler(clip_sample=False, prediction_type="v_prediction"), {}),
    "ddim": (lambda: DDIMScheduler(clip_sample=False), {"eta": 0.7}),
    "ddim sample": (lambda: DDIMScheduler(clip_sample=True, prediction_type="sample"), {"eta": 1.0}),
}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("kind", ["one", "one each", "global"])
def test_the_noise_and_nothing_else_is_scaled(name: str, kind: str) -> None:
    build, arguments = SCHEDULERS[name]

    def run(share: float | None, seed: int = 5) -> Tensor:
        if kind == "global":
            torch.manual_seed(seed)
            return stepped(build(), share, None, **arguments)
        generator = seeded(seed) if kind == "one" else [seeded(seed), seeded(seed + 1)]
        return stepped(build(), share, generator, **arguments)

    mean, whole = run(1.0), run(None)
    torch.testing.assert_close(run(1.0, seed=6), mean, atol=1e-6, rtol=0)  # without noise the seed does not matter
    assert (whole - mean).std() > 0.01
    torch.testing.assert_close(run(0.75), mean + 0.5 * (whole - mean), atol=1e-6, rtol=0)
    assert torch.equal(run(0.0), whole)


def test_without_noise_the_mean_of_ddpm_is_left() -> None:
    # Ho et al. 2020, eq. 11, with one step of 250 timesteps.
    scheduler = DDPMScheduler(clip_sample=False)
    guided, sample = (torch.randn(SHAPE, generator=seeded(seed)) for seed in (1, 2))
    now, then = scheduler.alphas_cumprod[500], scheduler.alphas_cumprod[250]
    alpha = now / then
    mean = (sample - (1 - alpha) / (1 - now).sqrt() * guided) / alpha.sqrt()
    torch.testing.assert_close(stepped(scheduler, 1.0, seeded(3)), mean, atol=1e-5, rtol=1e-5)


def test_every_channel_has_its_own_share() -> None:
    whole, none = stepped(DDPMScheduler(), None, seeded(3)), stepped(DDPMScheduler(), 1.0, seeded(3))
    scheduler = DDPMScheduler()
    scheduler.set_timesteps(4)
    identity = StepCorrection.identity(torch.tensor([500.0]), 2)
    standing = CorrectedScheduler(scheduler, replace(identity, variance=torch.tensor([[0.0, 1.0]])))
    guided, sample = (torch.randn(SHAPE, generator=seeded(seed)) for seed in (1, 2))
    found = standing.step(guided, 500, sample, generator=seeded(3)).prev_sample
    torch.testing.assert_close(found[:, 0], whole[:, 0])
    torch.testing.assert_close(found[:, 1], none[:, 1])


@pytest.mark.parametrize("kind", ["one", "global"])
def test_generators_end_where_they_would_without_the_correction(kind: str) -> None:
    states = []
    for share in (None, 0.5):
        generator = seeded(5) if kind == "one" else None
        torch.manual_seed(4)
        stepped(DDPMScheduler(), share, generator)
        states.append(torch.get_rng_state() if generator is None else generator.get_state())
    assert torch.equal(*states)


def test_tuples_and_half_precision_pass_through() -> None:
    found = stepped(DDPMScheduler(), 0.5, seeded(5), return_dict=False)
    assert torch.equal(found, stepped(DDPMScheduler(), 0.5, seeded(5)))
    scheduler = DDPMScheduler()
    scheduler.set_timesteps(4)
    identity = StepCorrection.identity(torch.tensor([500.0]), 1)
    standing = CorrectedScheduler(
        scheduler, replace(identity, variance=torch.tensor([[0.5]]), shift=torch.tensor([[0.25]]))
    )
    half = torch.ones(SHAPE, dtype=torch.float16)
    assert standing.step(half, 500, half, generator=seeded(1)).prev_sample.dtype == torch.float16


def test_a_deterministic_step_is_left_alone() -> None:
    assert torch.equal(stepped(DDIMScheduler(), 0.9, seeded(1)), stepped(DDIMScheduler(), None, seeded(1)))


def test_schedulers_whose_noise_cannot_be_scaled_are_refused() -> None:
    identity = StepCorrection.identity(torch.tensor([500.0]), 2)
    lessening = replace(identity, variance=torch.full((1, 2), 0.5))
    with pytest.raises(UnsupportedPipeline, match="the scheduler is EulerAncestralDiscreteScheduler"):
        CorrectedScheduler(EulerAncestralDiscreteScheduler(), lessening)
    CorrectedScheduler(EulerAncestralDiscreteScheduler(), identity)
    inside = CorrectedScheduler(DDPMScheduler(), lessening)
    assert noise_can_be_scaled(CorrectedScheduler(inside, lessening))


def test_shares_outside_of_0_to_1_are_refused() -> None:
    identity = StepCorrection.identity(torch.tensor([500.0]), 2)
    for bad in (-0.1, 1.1):
        with pytest.raises(SpecError, match="variance of a correction is a share"):
            replace(identity, variance=torch.full((1, 2), bad))


def test_the_shift_is_added_to_what_the_step_returns() -> None:
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(4)
    identity = StepCorrection.identity(scheduler.timesteps, 2)
    shift = torch.zeros(4, 2)
    shift[1] = torch.tensor([0.5, -0.25])
    standing = CorrectedScheduler(scheduler, replace(identity, shift=shift))
    guided, sample = (torch.randn(SHAPE, generator=seeded(seed)) for seed in (1, 2))
    for row, timestep in enumerate(scheduler.timesteps):
        plain = scheduler.step(guided, timestep, sample)
        moved = standing.step(guided, timestep, sample)
        wanted = plain.prev_sample + shift[row][:, None, None]
        assert torch.equal(moved.prev_sample, wanted)
        assert torch.equal(moved["prev_sample"], wanted), "outputs of diffusers are mappings too"
        assert torch.equal(moved.pred_original_sample, plain.pred_original_sample)
    standing.set_timesteps(4)
    tokens = standing.step(guided.flatten(2).mT, 500, sample.flatten(2).mT).prev_sample
    standing.set_timesteps(4)  # another run: within one, the shift is there already
    assert torch.equal(tokens.mT.reshape(SHAPE), standing.step(guided, 500, sample).prev_sample)


STEPS = 4


def corrected(scheduler: Any) -> tuple[Any, list[Any], StepCorrection]:
    """A quantized network, full-precision trajectories, and a correction that does everything."""
    torch.manual_seed(3)
    net = TinyNet()
    pipe = DenoiserPipeline(net, scheduler, (2, 4, 4))
    trajectories = [seal(one) for one in record(pipe, net, seeds=(3, 1), steps=STEPS, batch_size=2, run=Run())]
    timesteps = torch.tensor([float(step.timestep) for step in trajectories[0].steps])
    identity = StepCorrection.identity(timesteps, 2)
    shift = torch.randn(STEPS, 2, generator=seeded(1)) * 0.1
    variance = torch.full((STEPS, 2), 0.4 if noise_can_be_scaled(scheduler) else 0.0)
    correction = replace(
        identity, gain=identity.gain * 0.9, previous=identity.gain * 0.1, shift=shift, variance=variance
    )
    return quantize_(copy.deepcopy(net)), trajectories, correction


@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler, UniPCMultistepScheduler])
def test_every_walk_takes_the_steps_that_the_sampler_takes(scheduler: Any) -> None:
    net, trajectories, correction = corrected(scheduler())
    pipe = DenoiserPipeline(net, CorrectedScheduler(scheduler(), correction), (2, 4, 4))
    generators = [seeded(3), seeded(1)]
    ends = pipe(batch_size=2, generator=generators, num_inference_steps=STEPS, output_type="latent").images
    with torch.no_grad():
        *_, last = replay(net, trajectories[0], 0, STEPS, correct=Corrector(correction))
    assert torch.equal(last.sample, ends)
    assert torch.equal(final_states(net, trajectories, correction)[0], ends)
    error = (ends - trajectories[0].steps[-1].next_sample).double().square().flatten(1).mean(1).sqrt().mean()
    assert measure_drift(net, trajectories, correction).accumulated[-1] == pytest.approx(float(error), rel=1e-5)
    without = clean_samples(net, trajectories[0], replace(correction, shift=None))
    moved = clean_samples(net, trajectories[0], correction)
    assert torch.equal(moved[0], without[0])
    assert not torch.equal(moved[1], without[1])


def save(tmp_path: Path, correction: StepCorrection) -> Any:
    net, _, _ = corrected(DDPMScheduler())
    pipe = DenoiserPipeline(net, CorrectedScheduler(DDPMScheduler(), correction), (2, 4, 4))
    return save_checkpoint(
        tmp_path / "q", pipe=pipe, denoiser_name="denoiser", denoiser=net, base_model="tiny", created="2026-01-01"
    )


@pytest.mark.parametrize("part", ["shift", "variance", "neither"])
def test_a_checkpoint_with_noise_or_shift_has_version_2(part: str, tmp_path: Path) -> None:
    _, _, correction = corrected(DDPMScheduler())
    if part != "shift":
        correction = replace(correction, shift=None)
    if part != "variance":
        correction = replace(correction, variance=torch.zeros_like(correction.variance))
    manifest = save(tmp_path, correction)
    assert manifest.format_version == (1 if part == "neither" else 2)
    assert ("stepquant_correction.shift" in manifest.checksums) == (part == "shift")
    pipe, _ = load_checkpoint(tmp_path / "q", denoiser=TinyNet())
    found = pipe.scheduler.correction.tables()
    assert found.keys() == correction.tables().keys()
    assert all(torch.equal(found[name], table) for name, table in correction.tables().items())
    if part == "neither":
        return
    path = tmp_path / "q" / MANIFEST_NAME
    edited = path.read_text().replace('"format_version": 2', '"format_version": 1')
    assert json.loads(edited)["format_version"] == 1
    write_summed(path, edited)
    words = "a shift of the sample" if part == "shift" else "less noise in the steps"
    with pytest.raises(CheckpointError, match=f"the correction has {words}, which format version 1 does not have"):
        load_checkpoint(tmp_path / "q", denoiser=TinyNet())


def test_a_checkpoint_whose_scheduler_was_exchanged_is_refused(tmp_path: Path) -> None:
    _, _, correction = corrected(DDPMScheduler())
    save(tmp_path, correction)
    with pytest.raises(CheckpointError, match="the scheduler is EulerAncestralDiscreteScheduler"):
        load_checkpoint(tmp_path / "q", denoiser=TinyNet(), components={"scheduler": EulerAncestralDiscreteScheduler()})
