"""Few steps from an image instead of from noise, as InvSR restores images with SD-Turbo (Yue et al. 2024).

A small network predicts the noise that puts the encoded image onto the way at an intermediate timestep; from there a
text-to-image U-Net takes one to five steps without guidance, at timesteps of its own choice. The pipeline is none of
diffusers': it belongs to the user, and its denoiser is saved in a DenoiserPipeline.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tiny_pipelines
from stepquant.api import load, quantize, sample
from stepquant.calibrate.trajectory import record, replay, seal
from stepquant.errors import CheckpointError, SpecError
from stepquant.evaluate.compare import evaluate
from stepquant.methods import METHODS
from stepquant.model.pipeline import DenoiserPipeline, PipelineOutput
from stepquant.run import Run

SEEDS = [1, 2]

# InvSR's own, by the number of steps.
TIMESTEPS = {1: [200], 2: [200, 100], 3: [200, 100, 50], 4: [200, 150, 100, 50], 5: [250, 200, 150, 100, 50]}


class NoisePredictor(nn.Module):
    """Mean and logarithm of the variance of the noise, from the encoded image and the timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.time, self.out = nn.Conv2d(4, 8, 3, padding=1), nn.Linear(1, 8), nn.Conv2d(8, 8, 1)

    def forward(self, latents: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        hidden = F.silu(self.image(latents) + self.time(timestep.float().reshape(1, 1) / 1000)[..., None, None])
        mean, log_variance = self.out(hidden).chunk(2, 1)
        return mean, log_variance


class Restoring:
    """Twice as large an image. Has what stepquant asks of any pipeline: a denoiser, a scheduler, generators."""

    def __init__(self) -> None:
        self.unet = tiny_pipelines.text_unet()
        self.vae = tiny_pipelines.vae()
        self.noise_predictor = tiny_pipelines.seeded(NoisePredictor)
        self.scheduler = diffusers.EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing"
        )

    @property
    def components(self) -> dict[str, Any]:
        return dict(vars(self))

    def set_progress_bar_config(self, **_: Any) -> None:
        pass

    @torch.no_grad()
    def __call__(
        self,
        image: Tensor,
        prompt_embeds: Tensor,
        generator: Any = None,
        num_inference_steps: int = 1,
    ) -> PipelineOutput:
        self.scheduler.set_timesteps(timesteps=TIMESTEPS[num_inference_steps])
        start = self.scheduler.timesteps[:1]
        latents = self.start_of(image, start, generator)
        for timestep in self.scheduler.timesteps:
            read = self.scheduler.scale_model_input(latents, timestep)
            noise = self.unet(read, timestep, encoder_hidden_states=prompt_embeds).sample
            latents = self.scheduler.step(noise, timestep, latents).prev_sample
        pictures = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        return PipelineOutput((pictures / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().numpy())

    def start_of(self, image: Tensor, start: Tensor, generator: Any) -> Tensor:
        large = F.interpolate(2 * image - 1, scale_factor=2, mode="bicubic")
        latents = self.vae.encode(large).latent_dist.mode() * self.vae.config.scaling_factor
        mean, log_variance = self.noise_predictor(latents, start)
        drawn = torch.cat([torch.randn((1, *mean.shape[1:]), generator=one) for one in generator])
        noised: Tensor = self.scheduler.add_noise(latents, mean + (log_variance / 2).exp() * drawn, start)
        return noised


def arguments() -> dict[str, Any]:
    images = torch.rand(len(SEEDS), 3, 8, 8, generator=torch.Generator().manual_seed(3))
    return {"image": images, "prompt_embeds": tiny_pipelines.tokens(5, 16)}


def images_of(pipe: Any, steps: int) -> Tensor:
    return sample(pipe, seeds=SEEDS, steps=steps, arguments=arguments())


@pytest.mark.parametrize("steps", TIMESTEPS)
def test_few_steps_from_an_image_are_recorded_and_replayed(steps: int) -> None:
    pipe = Restoring()
    (found,) = record(pipe, pipe.unet, seeds=SEEDS, steps=steps, batch_size=2, run=Run(), arguments=arguments())
    trajectory = seal(found)
    assert [float(step.timestep) for step in trajectory.steps] == TIMESTEPS[steps]
    assert trajectory.fingerprint.guidance == "none"
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    pipe.scheduler.set_timesteps(timesteps=TIMESTEPS[steps])
    start = pipe.start_of(arguments()["image"], pipe.scheduler.timesteps[:1], generators)
    assert torch.equal(trajectory.steps[0].sample, start)
    with torch.no_grad():
        states = list(replay(pipe.unet, trajectory, 0, steps))
    assert torch.equal(states[-1].sample, trajectory.steps[-1].next_sample)


@pytest.mark.parametrize("steps", [1, 4])
def test_quantized_saved_loaded_and_sampled(steps: int, tmp_path: Path) -> None:
    pipe = Restoring()
    full_precision = images_of(pipe, steps)
    recipe = METHODS["accuquant"](
        weights=4, samples=2, batch=2, window=min(2, steps), iterations=2, block_iterations=2, block_lr=5e-2
    )
    made = quantize(pipe, recipe, steps=steps, arguments=arguments())
    images = images_of(made.pipe, steps)
    assert not torch.equal(images, full_precision)
    assert torch.equal(images_of(pipe, steps), full_precision)
    with pytest.raises(CheckpointError, match=r"Restoring is not a pipeline of diffusers.*DenoiserPipeline"):
        made.save(tmp_path / "q")

    held = DenoiserPipeline(made.pipe.unet, made.pipe.scheduler, (4, 8, 8))
    replace(made, pipe=held, denoiser_name="denoiser").save(tmp_path / "q")
    loaded = load(tmp_path / "q", engine="simulated")
    own = copy.copy(pipe)
    own.unet, own.scheduler = loaded.denoiser, loaded.scheduler
    assert torch.equal(images_of(own, steps), images)
    with pytest.raises(SpecError, match=f"calibrated for {steps} steps"):
        images_of(own, 2)


def test_evaluated_against_full_precision() -> None:
    pipe = Restoring()
    made = quantize(pipe, METHODS["rtn"](weights=4, samples=2, batch=2), steps=2, arguments=arguments())
    results = evaluate(made.pipe, pipe, seeds=SEEDS, steps=2, arguments=arguments(), features="none")
    assert 0 < results["metrics"]["psnr"]["value"] < 100
    assert results["metrics"]["drift_final"]["value"] > 0
    with pytest.raises(SpecError, match="calibrated for 2 steps"):
        evaluate(made.pipe, pipe, seeds=SEEDS, steps=3, arguments=arguments(), features="none")
