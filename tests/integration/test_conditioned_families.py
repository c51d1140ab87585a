"""Pipelines in which more than the denoiser's prediction decides about the next sample.

A ControlNet, whose residuals follow the sample; inpainting with an ordinary UNet, where the pipeline writes into the
sample; two denoisers that take turns.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny_pipelines
from stepquant.api import Quantized, compensate, load, quantize, sample
from stepquant.calibrate.known_part import painted_positions
from stepquant.calibrate.trajectory import State, Trajectory, advance, record, replay, seal, state_at
from stepquant.calibrate.trajectory_files import load_trajectories, save_trajectories
from stepquant.errors import CalibrationError, CheckpointError, ModelError, SpecError, UnsupportedPipeline
from stepquant.evaluate.compare import evaluate
from stepquant.methods import METHODS
from stepquant.model.families import find_denoiser
from stepquant.run import Run
from tiny_pipelines import BATCH, FAMILIES

pytest.importorskip("transformers", reason="diffusers defines these pipelines only beside transformers")

SEEDS = [1, 2]
ROUNDING = METHODS["rtn"](weights=4, activations=8, samples=BATCH, batch=BATCH)
GUESSING = {"guess_mode": True, "control_guidance_end": 0.5}
CONDITIONED = {"controlnet": {}, "guess mode": GUESSING, "inpaint-unet": {}}


def pipe_of(family: str) -> tuple[Any, dict[str, Any]]:
    known = FAMILIES["controlnet" if family == "guess mode" else family]
    return known.build(), {**known.arguments(), **CONDITIONED[family]}


def recorded(pipe: Any, denoiser: Any, arguments: dict[str, Any], steps: int = 3) -> Trajectory:
    (trajectory,) = record(pipe, denoiser, seeds=SEEDS, steps=steps, batch_size=BATCH, run=Run(), arguments=arguments)
    return trajectory


@torch.no_grad()
def walked(denoiser: Any, trajectory: Trajectory) -> list[Tensor]:
    return [state.sample for state in replay(denoiser, trajectory, 0, len(trajectory.steps))]


@pytest.mark.parametrize("family", CONDITIONED)
def test_replay_is_what_the_pipeline_samples_with_another_denoiser(family: str) -> None:
    """Replay of the quantized network on the full-precision recording, and the quantized pipeline itself."""
    pipe, arguments = pipe_of(family)
    quantized = quantize(pipe, ROUNDING, steps=3, arguments=arguments).pipe
    trajectory = seal(recorded(pipe, pipe.unet, arguments))
    found = walked(quantized.unet, trajectory)
    own = recorded(quantized, quantized.unet, arguments)
    for index, sample_after in enumerate(found[:-1]):
        assert torch.equal(sample_after, own.steps[index + 1].sample)
        assert not torch.equal(sample_after, trajectory.steps[index + 1].sample)
    painted = torch.ones_like(found[-1]) > 0 if trajectory.painted is None else trajectory.painted
    assert torch.equal(found[-1].where(painted, 0), own.steps[-1].next_sample.where(painted, 0))


@pytest.mark.parametrize("family", CONDITIONED)
def test_stored_trajectories_replay(family: str, tmp_path: Path) -> None:
    pipe, arguments = pipe_of(family)
    trajectory = seal(recorded(pipe, pipe.unet, arguments))
    save_trajectories(tmp_path / "t", [trajectory])
    (loaded,) = load_trajectories(tmp_path / "t", pipe.scheduler, getattr(pipe, "controlnet", None))
    pipe.unet.conv_in.weight.data *= 1.01
    assert all(map(torch.equal, walked(pipe.unet, loaded), walked(pipe.unet, trajectory)))


def test_residuals_are_not_replayed_without_their_network() -> None:
    pipe, arguments = pipe_of("controlnet")
    trajectory = replace(seal(recorded(pipe, pipe.unet, arguments)), network=None)
    with pytest.raises(CalibrationError, match=r"Step 0 was recorded with a network beside the denoiser"):
        walked(pipe.unet, trajectory)


def test_gradients_flow_through_the_network_and_leave_nothing_in_it() -> None:
    """The derivative along a direction, beside a central difference in float64."""
    pipe, arguments = pipe_of("controlnet")
    pipe.to(torch.float64)
    arguments = {key: value.double() if isinstance(value, Tensor) else value for key, value in arguments.items()}
    pipe.unet.requires_grad_(False)
    trajectory = seal(recorded(pipe, pipe.unet, arguments, steps=2))
    assert any(parameter.requires_grad for parameter in pipe.controlnet.parameters())
    start = state_at(trajectory, 0).sample
    generator = torch.Generator().manual_seed(0)
    direction, weight = (torch.randn(start.shape, generator=generator, dtype=start.dtype) for _ in range(2))

    def value(moved: Tensor) -> Tensor:
        return (advance(pipe.unet, trajectory, 0, State(moved)).sample * weight).sum()

    sample_before = start.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(value(sample_before), sample_before)
    with torch.no_grad():
        expected = (value(start + 1e-5 * direction) - value(start - 1e-5 * direction)) / 2e-5
        fixed = _with_recorded_residuals(trajectory)
        assert trajectory.form is not None
        stale = advance(pipe.unet, fixed, 0, State(start + 0.1 * direction)).sample
        assert not torch.equal(stale, advance(pipe.unet, trajectory, 0, State(start + 0.1 * direction)).sample)
    torch.testing.assert_close((gradient * direction).sum(), expected, rtol=1e-6, atol=0)
    value(sample_before).backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is None for parameter in pipe.controlnet.parameters())


def _with_recorded_residuals(trajectory: Trajectory) -> Trajectory:
    """What replay would do if nothing were known of the network."""
    assert trajectory.form is not None
    return replace(trajectory, form=replace(trajectory.form, linked=None))


@pytest.mark.parametrize("family", ["controlnet", "inpaint-unet"])
def test_windows_are_fitted(family: str, tmp_path: Path) -> None:
    pipe, arguments = pipe_of(family)
    recipe = METHODS["accuquant"](
        weights=4, samples=BATCH, batch=BATCH, window=2, iterations=2, block_iterations=0, lr_weights=5e-2
    )
    quantized = quantize(pipe, recipe, steps=2, arguments=arguments)
    before = sample(quantized.pipe, seeds=SEEDS, steps=2, arguments=arguments)
    quantized.save(tmp_path / "q")
    loaded = load(tmp_path / "q", engine="simulated")
    assert torch.equal(sample(loaded, seeds=SEEDS, steps=2, arguments=arguments), before)


def test_drift_counts_what_is_painted() -> None:
    """The known part is the reference's, in every step."""
    pipe, arguments = pipe_of("inpaint-unet")
    quantized = quantize(pipe, ROUNDING, steps=2, arguments=arguments)
    trajectory = seal(recorded(pipe, pipe.unet, arguments, steps=2))
    assert trajectory.painted is not None
    assert trajectory.painted[..., 4:].all()
    assert not trajectory.painted[..., :4].any()
    ends = walked(quantized.pipe.unet, trajectory)
    for index, end in enumerate(ends):
        difference = end - state_at(trajectory, index + 1).sample
        assert not difference[..., :4].any()
        assert difference[..., 4:].any()
    results = evaluate(quantized.pipe, pipe, seeds=SEEDS, steps=2, arguments=arguments, features="none")
    expected = (ends[-1] - trajectory.steps[-1].next_sample).double().square().flatten(1).mean(1).sqrt().mean()
    assert results["metrics"]["drift_final"]["value"] == pytest.approx(float(expected), rel=1e-6)


def test_a_mask_that_changes_is_refused() -> None:
    pipe, arguments = pipe_of("inpaint-unet")
    steps = list(recorded(pipe, pipe.unet, arguments).steps)
    changed = steps[2].sample.clone()
    changed[0, :, 0, 7] += 1
    steps[2] = replace(steps[2], sample=changed)
    with pytest.raises(UnsupportedPipeline, match="changes other positions of the sample after step 1"):
        painted_positions(steps)


def test_a_change_of_everything_is_no_mask() -> None:
    """A callback beside the mask: taking every sample from the recording would hide all of the drift."""
    pipe, arguments = pipe_of("inpaint-unet")

    def brighter(_pipe: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": tensors["latents"] * 1.01}

    with pytest.raises(UnsupportedPipeline, match="changes every position of the sample"):
        recorded(pipe, pipe.unet, {**arguments, "callback_on_step_end": brighter})


def test_several_controlnets_are_refused_before_anything_runs() -> None:
    from diffusers import MultiControlNetModel

    pipe, arguments = pipe_of("controlnet")
    pipe.register_modules(controlnet=MultiControlNetModel([pipe.controlnet, pipe.controlnet]))
    with pytest.raises(UnsupportedPipeline, match="a list of ControlNets"):
        quantize(pipe, ROUNDING, steps=2, arguments=arguments)


EXPERTS = ("transformer", "transformer_2")


def experts() -> tuple[Any, dict[str, Any]]:
    return tiny_pipelines.wan(experts=2), {**FAMILIES["wan"].arguments(), "guidance_scale_2": 2.0}


@cache
def quantized_expert(name: str) -> Quantized:
    pipe, arguments = experts()
    return quantize(pipe, ROUNDING, steps=4, arguments=arguments, denoiser=name)


def test_each_expert_is_calibrated_on_its_own_steps() -> None:
    pipe, arguments = experts()
    first, second = (seal(recorded(pipe, getattr(pipe, name), arguments, steps=4)) for name in EXPERTS)
    assert (len(first.steps), len(first.lead), len(second.steps), len(second.lead)) == (2, 0, 2, 2)
    assert torch.equal(second.steps[0].sample, first.steps[-1].next_sample)
    assert (first.fingerprint.guidance, second.fingerprint.guidance) == ("cfg(3)", "cfg(2)")
    for name, trajectory in zip(EXPERTS, (first, second), strict=True):
        made = quantized_expert(name)
        assert made.figures[0]["steps"] == 2
        found = walked(getattr(made.pipe, name), trajectory)
        own = recorded(made.pipe, getattr(made.pipe, name), arguments, steps=4)
        assert torch.equal(found[-1], own.steps[-1].next_sample)
        assert not torch.equal(found[-1], trajectory.steps[-1].next_sample)


def test_stored_steps_of_the_second_expert_replay(tmp_path: Path) -> None:
    """Its solver remembers predictions of the first expert's steps."""
    pipe, arguments = experts()
    trajectory = seal(recorded(pipe, pipe.transformer_2, arguments, steps=4))
    assert state_at(trajectory, 0).history
    save_trajectories(tmp_path / "t", [trajectory])
    (loaded,) = load_trajectories(tmp_path / "t", pipe.scheduler)
    assert torch.equal(walked(pipe.transformer_2, loaded)[-1], trajectory.steps[-1].next_sample)


def test_two_checkpoints_load_onto_one_pipeline(tmp_path: Path) -> None:
    _, arguments = experts()
    made = {name: quantized_expert(name) for name in EXPERTS}
    for name in EXPERTS:
        made[name].save(tmp_path / name)
    # Simulated without being asked: the denoisers are told from the rest of the pipeline by their class.
    alone = load(tmp_path / "transformer")
    both = load(tmp_path / "transformer_2", onto=alone)
    images = sample(both, seeds=SEEDS, steps=4, arguments=arguments)
    assert [find_denoiser(load(tmp_path / name))[0] for name in EXPERTS] == [*EXPERTS]
    expected, _ = experts()
    expected.transformer, expected.transformer_2 = (getattr(made[name].pipe, name) for name in EXPERTS)
    assert torch.equal(images, sample(expected, seeds=SEEDS, steps=4, arguments=arguments))
    assert not torch.equal(images, sample(alone, seeds=SEEDS, steps=4, arguments=arguments))
    with pytest.raises(SpecError, match="calibrated for 4 steps"):
        sample(both, seeds=SEEDS, steps=3, arguments=arguments)
    with pytest.raises(CheckpointError, match=r"transformer is quantized too.*holds one quantized denoiser"):
        replace(made["transformer_2"], pipe=both).save(tmp_path / "both")
    with pytest.raises(UnsupportedPipeline, match=r"transformer is quantized already.*onto=pipe"):
        quantize(alone, ROUNDING, steps=4, arguments=arguments, denoiser="transformer_2")
    with pytest.raises(SpecError, match=r"of a WanPipeline, and onto= is a StableDiffusionPipeline"):
        load(tmp_path / "transformer", onto=FAMILIES["sd15"].build())
    other = quantize(experts()[0], ROUNDING, steps=6, arguments=arguments, denoiser="transformer")
    with pytest.raises(SpecError, match=r"for 4 steps of .* for 6 steps"):
        load(tmp_path / "transformer_2", onto=other.pipe)


def test_an_expert_is_chosen_by_name() -> None:
    pipe, arguments = experts()
    with pytest.raises(UnsupportedPipeline, match=r"switches between transformer and transformer_2.*denoiser="):
        quantize(pipe, ROUNDING, steps=4, arguments=arguments)
    with pytest.raises(ModelError, match=r"no denoiser 'transformer_3'. Did you mean 'transformer_2'"):
        quantize(pipe, ROUNDING, steps=4, arguments=arguments, denoiser="transformer_3")
    with pytest.raises(UnsupportedPipeline, match=r"the denoiser is called in none"):
        quantize(pipe, ROUNDING, steps=1, arguments=arguments, denoiser="transformer_2")


class KilledError(Exception):
    pass


@pytest.mark.parametrize("family", ["controlnet", "inpaint-unet", "wan"])
def test_a_resumed_run_replays_what_was_stored(family: str, tmp_path: Path) -> None:
    """Killed after three stages; the second run takes the trajectories from the disk, and leaves them there."""
    pipe, arguments = experts() if family == "wan" else pipe_of(family)
    name = "transformer_2" if family == "wan" else None
    recipe = METHODS["accuquant"](weights=4, samples=BATCH, batch=BATCH, window=2, iterations=1, block_iterations=0)

    def quantized(run: Run, *, resume: bool = False) -> dict[str, Tensor]:
        made = quantize(pipe, recipe, steps=4, arguments=arguments, run=run, resume=resume, denoiser=name)
        found: dict[str, Tensor] = getattr(made.pipe, made.denoiser_name).state_dict()
        return found

    def kill(number: int, _figures: Any) -> None:
        if number == 2:
            raise KilledError

    with pytest.raises(KilledError):
        quantized(Run(work=tmp_path / "w", finished=kill))
    resumed = quantized(Run(work=tmp_path / "w", max_memory=1), resume=True)
    for key, tensor in quantized(Run()).items():
        assert torch.equal(resumed[key], tensor), key


def test_corrections_are_refused_for_experts() -> None:
    """They belong to the scheduler, and would change the other expert's steps."""
    pipe, arguments = experts()
    recipe = METHODS["tac"](samples=BATCH, batch=BATCH)
    with pytest.raises(UnsupportedPipeline, match=r"corrects the scheduler's steps.*transformer_2"):
        quantize(pipe, recipe, steps=4, arguments=arguments, denoiser="transformer")
    with pytest.raises(UnsupportedPipeline, match="one denoiser in all steps only"):
        compensate(pipe, pipe, steps=4, samples=BATCH, arguments=arguments)


def test_an_expert_is_evaluated_without_drift() -> None:
    pipe, arguments = experts()
    made = quantized_expert("transformer_2")
    results = evaluate(made.pipe, pipe, seeds=SEEDS, steps=4, arguments=arguments, features="none")
    assert 0 < results["metrics"]["psnr"]["value"] < 100
    assert "drift_final" not in results["metrics"]
    assert any("switches between transformer and transformer_2" in note for note in results["notes"])
    assert any("videos of 5 frames" in note for note in results["notes"])
