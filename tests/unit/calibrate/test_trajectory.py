"""Recording, sealing, replaying and storing trajectories; the oracles are diffusers' schedulers and hand-written
chains.
"""

from __future__ import annotations

import copy
import functools
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from torch import Tensor, nn

from stepquant.calibrate.forms import ClassifierFreeGuidance, DoubledLatentsGuidance, NoGuidance, form_from_dict
from stepquant.calibrate.steps import prediction_of
from stepquant.calibrate.trajectory import (
    State,
    Trajectory,
    advance,
    record,
    replay,
    seal,
    state_at,
    steps_where_nothing_happens,
)
from stepquant.calibrate.trajectory_files import load_trajectories, save_trajectories
from stepquant.errors import CalibrationError, UnsupportedPipeline
from stepquant.model.correction import CorrectedScheduler, StepCorrection
from stepquant.model.pipeline import DenoiserPipeline
from stepquant.run import Run

SEEDS = (3, 1, 4)


class TinyDenoiser(nn.Module):
    """Two convolutions that know the timestep and, if asked, a class; returns twice the channels for a learned
    variance.
    """

    def __init__(self, channels: int = 2, outputs: int = 2) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.inner = nn.Linear(channels, 4)  # a convolution this small would spend its time on starting threads
        self.outer = nn.Linear(4, outputs)
        self.classes = nn.Embedding(3, 4)
        for parameter in self.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)

    def forward(self, sample: Tensor, timestep: Tensor, labels: Tensor | None = None) -> Tensor:
        phase = torch.sin(torch.as_tensor(timestep, dtype=sample.dtype) / 100).reshape(-1, 1, 1, 1)
        hidden = self.inner(sample.movedim(1, -1)) + 0.1 * phase
        if labels is not None:
            hidden = hidden + self.classes(labels)[:, None, None]
        return self.outer(torch.tanh(hidden)).movedim(-1, 1)


SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (DDIMScheduler(), {}),
    "ddim eta=1": (DDIMScheduler(), {"eta": 1.0}),
    "ddpm": (DDPMScheduler(), {}),
    "euler": (EulerDiscreteScheduler(), {}),
    "euler ancestral": (EulerAncestralDiscreteScheduler(), {}),
    "dpm++ 2m": (DPMSolverMultistepScheduler(), {}),
    "dpm++ 2m sde": (DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), {}),
    "dpm++ 3m karras": (DPMSolverMultistepScheduler(solver_order=3, use_karras_sigmas=True), {}),
    "flow euler": (FlowMatchEulerDiscreteScheduler(), {}),
    "pndm": (PNDMScheduler(), {}),
    "pndm plms": (PNDMScheduler(skip_prk_steps=True), {}),
    "unipc": (UniPCMultistepScheduler(), {}),
    "heun": (HeunDiscreteScheduler(), {}),
}


def tiny_pipe(scheduler: Any | None = None) -> DenoiserPipeline:
    return DenoiserPipeline(TinyDenoiser(), copy.deepcopy(scheduler or DDIMScheduler()), (2, 6, 6))


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in SEEDS]


def recorded(pipe: Any, denoiser: nn.Module, steps: int = 6, **arguments: Any) -> Trajectory:
    (trajectory,) = record(pipe, denoiser, seeds=SEEDS, steps=steps, batch_size=8, run=Run(), arguments=arguments)
    return trajectory


@torch.no_grad()
def end_of(denoiser: nn.Module, trajectory: Trajectory, start: int, state: State | None = None) -> Tensor:
    *_, last = replay(denoiser, trajectory, start, len(trajectory.steps), state)
    return last.sample


@pytest.mark.parametrize("name", SCHEDULERS)
def test_replay_of_the_full_precision_model_is_exact(name: str) -> None:
    scheduler, arguments = SCHEDULERS[name]
    pipe = tiny_pipe(scheduler)
    undisturbed = pipe(
        batch_size=3, generator=generators(), num_inference_steps=6, output_type="latent", **arguments
    ).images
    trajectory = seal(recorded(pipe, pipe.denoiser, **arguments))
    assert torch.equal(trajectory.steps[-1].next_sample, undisturbed)
    with torch.no_grad():
        for index, state in enumerate(replay(pipe.denoiser, trajectory, 0, len(trajectory.steps)), start=1):
            expected = state_at(trajectory, index)
            assert torch.equal(state.sample, expected.sample)
            assert state.history.keys() == expected.history.keys()
            assert all(torch.equal(state.history[path], expected.history[path]) for path in state.history)
    # Restart in the middle, with the solver's memory.
    assert torch.equal(end_of(pipe.denoiser, trajectory, len(trajectory.steps) // 2), undisturbed)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_stored_trajectories_come_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    scheduler, arguments = SCHEDULERS[name]
    pipe = tiny_pipe(scheduler)
    trajectory = seal(recorded(pipe, pipe.denoiser, **arguments))
    save_trajectories(tmp_path / "t", [trajectory])
    save_trajectories(tmp_path / "t", [trajectory])  # replaces
    (loaded,) = load_trajectories(tmp_path / "t", pipe.scheduler)
    assert loaded.fingerprint == trajectory.fingerprint
    assert (loaded.seeds, loaded.form) == (trajectory.seeds, trajectory.form)
    assert loaded.batch == 3
    for index in range(len(trajectory.steps) + 1):
        one, other = state_at(trajectory, index), state_at(loaded, index)
        assert torch.equal(one.sample, other.sample)
        assert one.history.keys() == other.history.keys()
        assert all(torch.equal(one.history[path], other.history[path]) for path in one.history)
    middle = len(trajectory.steps) // 2
    assert torch.equal(end_of(pipe.denoiser, loaded, middle), trajectory.steps[-1].next_sample)


def test_a_diffusers_pipeline_is_recorded_as_it_samples() -> None:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()
    pipe = DDIMPipeline(unet, DDIMScheduler())
    trajectory = seal(recorded(pipe, unet, steps=3, eta=0.5))
    # Asked for after the recording: the pipeline must be as it was. Its progress bar was silenced and is back.
    assert "_progress_bar_config" not in vars(pipe)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(batch_size=3, generator=generators(), num_inference_steps=3, eta=0.5, output_type="pt").images
    assert torch.equal((trajectory.steps[-1].next_sample / 2 + 0.5).clamp(0, 1), images)
    assert torch.equal(end_of(unet, trajectory, 0), trajectory.steps[-1].next_sample)
    assert trajectory.fingerprint.guidance == "none"
    assert trajectory.fingerprint.timesteps == (666.0, 333.0, 0.0)


def test_images_do_not_depend_on_the_batch_size() -> None:
    pipe = tiny_pipe()
    together = recorded(pipe, pipe.denoiser)
    alone = record(pipe, pipe.denoiser, seeds=SEEDS, steps=6, batch_size=1, run=Run())
    assert [trajectory.seeds for trajectory in alone] == [(3,), (1,), (4,)]
    for row, trajectory in enumerate(alone):
        torch.testing.assert_close(trajectory.steps[-1].next_sample[0], together.steps[-1].next_sample[row])


def test_recording_shares_equal_tensors() -> None:
    trajectory = recorded(tiny := tiny_pipe(DPMSolverMultistepScheduler()), tiny.denoiser)
    for before, after in zip(trajectory.steps, trajectory.steps[1:], strict=False):
        assert before.next_sample is after.sample
        assert after.calls[0].args[0] is after.sample


def test_pipe_is_unchanged_after_record_and_after_an_exception() -> None:
    pipe = tiny_pipe()
    before = (set(vars(pipe)), type(pipe.scheduler), set(vars(pipe.scheduler)), dict(pipe.denoiser._forward_hooks))
    random_state = torch.get_rng_state()
    recorded(pipe, pipe.denoiser)

    def unchanged() -> bool:
        now = (set(vars(pipe)), type(pipe.scheduler), set(vars(pipe.scheduler)), dict(pipe.denoiser._forward_hooks))
        return now == before and torch.equal(random_state, torch.get_rng_state())

    assert unchanged()
    pipe.denoiser.outer.bias.data.fill_(float("nan"))
    with pytest.raises(CalibrationError, match=r"Step 0.*not finite"):
        recorded(pipe, pipe.denoiser)
    assert unchanged()


def test_recorded_steps_hold_no_instrumentation_and_can_be_copied() -> None:
    pipe = tiny_pipe()
    trajectory = recorded(pipe, pipe.denoiser)
    for step in trajectory.steps:
        assert type(step.scheduler) is DDIMScheduler
        assert copy.deepcopy(step.scheduler).step.__self__ is not step.scheduler


def _halving_step(scheduler: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
    result = original(*args, **kwargs)
    result.prev_sample = result.prev_sample * scheduler.correction
    return result


def test_a_corrected_scheduler_is_recorded_with_its_correction() -> None:
    pipe = tiny_pipe()
    pipe.scheduler.correction = 0.9
    corrected = functools.update_wrapper(
        functools.partial(_halving_step, pipe.scheduler, pipe.scheduler.step), pipe.scheduler.step
    )
    pipe.scheduler.step = corrected
    trajectory = seal(recorded(pipe, pipe.denoiser))
    assert pipe.scheduler.step is corrected
    copied = trajectory.steps[2].scheduler
    assert copied.step.args[0] is copied
    assert torch.equal(end_of(pipe.denoiser, trajectory, 2), trajectory.steps[-1].next_sample)


def test_memory_of_a_scheduler_inside_a_stand_in_is_found() -> None:
    inner = DPMSolverMultistepScheduler()
    gain = torch.full((6, 2), 0.9)
    zero = torch.zeros(6, 2)
    inner.set_timesteps(6)
    correction = StepCorrection(
        **{**vars(StepCorrection.identity(inner.timesteps.float(), 2)), "gain": gain, "offset": zero + 0.1}
    )
    pipe = tiny_pipe(CorrectedScheduler(inner, correction))
    undisturbed = pipe(batch_size=3, generator=generators(), num_inference_steps=6, output_type="latent").images
    trajectory = seal(recorded(pipe, pipe.denoiser))
    assert trajectory.fingerprint.scheduler == "DPMSolverMultistepScheduler"
    assert set(state_at(trajectory, 3).history) == {"_scheduler.model_outputs.0", "_scheduler.model_outputs.1"}
    assert torch.equal(trajectory.steps[-1].next_sample, undisturbed)
    assert torch.equal(end_of(pipe.denoiser, trajectory, 3), undisturbed)


# Gradients


def ddim_chain(
    denoiser: nn.Module, scheduler: DDIMScheduler, sample: Tensor, timesteps: list[int], ratio: int
) -> Tensor:
    """DDIM by hand: x' = a x + b eps with a = sqrt(alpha'/alpha), b = sqrt(1 - alpha') - a sqrt(1 - alpha)."""
    for timestep in timesteps:
        alpha = scheduler.alphas_cumprod[timestep].double()
        following = timestep - ratio
        next_alpha = scheduler.alphas_cumprod[following].double() if following >= 0 else scheduler.final_alpha_cumprod
        a = (next_alpha / alpha).sqrt()
        b = (1 - next_alpha).sqrt() - a * (1 - alpha).sqrt()
        sample = a * sample + b * denoiser(sample, torch.tensor(timestep))
    return sample


def test_gradients_through_advance_equal_autograd_through_ddim() -> None:
    denoiser = TinyDenoiser().double()
    scheduler = DDIMScheduler(clip_sample=False)
    pipe = DenoiserPipeline(denoiser, scheduler, (2, 6, 6))
    trajectory = seal(recorded(pipe, denoiser, steps=5))
    start = state_at(trajectory, 1).sample

    def gradients(last: Tensor, first: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(last.square().sum(), [first, *denoiser.inner.parameters()]))

    ours = start.clone().requires_grad_()
    *_, last = replay(denoiser, trajectory, 1, 4, State(ours))
    theirs = start.clone().requires_grad_()
    by_hand = ddim_chain(denoiser, scheduler, theirs, [600, 400, 200], ratio=200)
    # The scheduler's alphas are float32 numbers and its products round in float32 before they meet the sample.
    torch.testing.assert_close(last.sample, by_hand, rtol=1e-6, atol=1e-6)
    for mine, other in zip(gradients(last.sample, ours), gradients(by_hand, theirs), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["dpm++ 2m", "pndm", "unipc", "heun"])
def test_gradients_flow_through_the_memory_of_multistep_solvers(name: str) -> None:
    """Step by step with adjoints for sample and history = autograd through the whole window."""
    pipe = tiny_pipe(SCHEDULERS[name][0])
    trajectory = seal(recorded(pipe, pipe.denoiser))
    start = state_at(trajectory, 3)
    weight = pipe.denoiser.inner.weight

    *_, last = replay(pipe.denoiser, trajectory, 3, 6)
    (whole,) = torch.autograd.grad(last.sample.square().sum(), weight)

    states = [start]
    with torch.no_grad():
        states += replay(pipe.denoiser, trajectory, 3, 6)
    adjoints: dict[str, Tensor] = {"sample": 2 * states[-1].sample}
    total = torch.zeros_like(weight)
    for index in (5, 4, 3):
        leaves = {"sample": states[index - 3].sample, **{f"h.{k}": v for k, v in states[index - 3].history.items()}}
        leaves = {key: value.clone().requires_grad_() for key, value in leaves.items()}
        history = {key[2:]: value for key, value in leaves.items() if key != "sample"}
        after = advance(pipe.denoiser, trajectory, index, State(leaves["sample"], history))
        outputs = {"sample": after.sample, **{f"h.{key}": value for key, value in after.history.items()}}
        seen = [key for key in outputs if key in adjoints and outputs[key].requires_grad]
        grads = torch.autograd.grad(
            [outputs[key] for key in seen],
            [weight, *leaves.values()],
            [adjoints[key] for key in seen],
            allow_unused=True,
        )
        total += grads[0]
        adjoints = {
            key: torch.zeros_like(value) if grad is None else grad
            for (key, value), grad in zip(leaves.items(), grads[1:], strict=True)
        }
    torch.testing.assert_close(total, whole, rtol=1e-4, atol=1e-5)


def test_advance_writes_to_nothing() -> None:
    pipe = tiny_pipe(PNDMScheduler())  # it adds to its tensors in place
    trajectory = seal(recorded(pipe, pipe.denoiser))
    state = state_at(trajectory, 2)
    before = {path: tensor.clone() for path, tensor in state.history.items()}
    one = advance(pipe.denoiser, trajectory, 2, state)
    two = advance(pipe.denoiser, trajectory, 2, state)
    assert torch.equal(one.sample, two.sample)
    assert all(torch.equal(before[path], state.history[path]) for path in before)
    assert all(torch.equal(one.history[path], two.history[path]) for path in one.history)


# Forms


class FakePipeline:
    """A conditional pipeline; `guide` turns (unconditional, conditional) into what the scheduler gets."""

    def __init__(self, guide: Any, *, layout: str = "doubled", outputs: int = 2, between: Any = None) -> None:
        self._between = between or (lambda sample, timestep: sample)
        self.unet = TinyDenoiser(outputs=outputs)
        self.scheduler = EulerDiscreteScheduler()
        self._guide = guide
        self._layout = layout

    def __call__(self, labels: list[int], generator: list[torch.Generator], num_inference_steps: int = 4) -> None:
        rows = [torch.randn(1, 2, 6, 6, generator=one) for one in generator]
        self.scheduler.set_timesteps(num_inference_steps)
        sample = torch.cat(rows) * self.scheduler.init_noise_sigma
        conditional, none = torch.tensor(labels), torch.zeros(len(labels), dtype=torch.int64)
        for timestep in self.scheduler.timesteps:
            sample = self._between(sample, timestep)
            scaled = self.scheduler.scale_model_input(sample, timestep)
            if self._layout == "doubled":
                both = self.unet(torch.cat([scaled] * 2), timestep, labels=torch.cat([none, conditional]))
                unguided, guided = both.chunk(2)
            else:
                unguided = self.unet(sample=scaled, timestep=timestep, labels=none)
                guided = self.unet(sample=scaled, timestep=timestep, labels=conditional)
            sample = self.scheduler.step(self._guide(unguided, guided, timestep), timestep, sample)[0]


def cfg(scale: float) -> Any:
    return lambda u, c, t: u + scale * (c - u)


def rescaled(scale: float, phi: float) -> Any:
    def guide(u: Tensor, c: Tensor, t: Any) -> Tensor:
        guided = u + scale * (c - u)
        axes = list(range(1, c.ndim))
        fixed = guided * (c.std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True))
        return phi * fixed + (1 - phi) * guided

    return guide


def sealed(pipe: FakePipeline) -> Trajectory:
    return seal(recorded(pipe, pipe.unet, steps=4, labels=[1, 2, 1]))


@pytest.mark.parametrize(
    ("guide", "layout", "outputs", "expected", "name"),
    [
        (cfg(7.5), "doubled", 2, ClassifierFreeGuidance(0, 1, 7.5), "cfg(7.5)"),
        (cfg(7.5), "separate", 2, ClassifierFreeGuidance(0, 1, 7.5), "cfg(7.5)"),
        (lambda u, c, t: c + 3.0 * (c - u), "doubled", 2, ClassifierFreeGuidance(1, 0, -3.0), "cfg(4)"),
        (lambda u, c, t: (u + 2.5 * (c - u))[:, :2], "doubled", 4, ClassifierFreeGuidance(0, 1, 2.5, 0, 2), "cfg(2.5)"),
        (rescaled(7.5, 0.7), "doubled", 2, ClassifierFreeGuidance(0, 1, 7.5, 0.7), "cfg(7.5, rescale=0.7)"),
    ],
)
def test_guidance_is_found(guide: Any, layout: str, outputs: int, expected: Any, name: str) -> None:
    pipe = FakePipeline(guide, layout=layout, outputs=outputs)
    trajectory = sealed(pipe)
    assert trajectory.form is not None
    assert trajectory.form.guidance == expected
    assert trajectory.fingerprint.guidance == name
    assert trajectory.evaluations == 4 * 2 * 3
    assert form_from_dict(trajectory.form.to_dict()) == trajectory.form
    assert torch.equal(end_of(pipe.unet, trajectory, 0), trajectory.steps[-1].next_sample)


def test_a_scale_that_is_no_round_number_is_recovered_within_rounding() -> None:
    pipe = FakePipeline(cfg(22 / 7))
    trajectory = sealed(pipe)
    assert trajectory.form is not None
    assert trajectory.form.guidance.scale == pytest.approx(22 / 7, rel=1e-6)
    torch.testing.assert_close(end_of(pipe.unet, trajectory, 0), trajectory.steps[-1].next_sample)


@pytest.mark.parametrize(
    "guide",
    [
        lambda u, c, t: torch.tanh(u + 3.0 * (c - u)),
        lambda u, c, t: (u + 3.0 * (c - u)) * 1.001 if t < 500 else u + 3.0 * (c - u),
    ],
)
def test_what_no_form_explains_is_refused(guide: Any) -> None:
    with pytest.raises(UnsupportedPipeline, match=r"differs by .* at step \d.*Calibrate without"):
        sealed(FakePipeline(guide))


def test_a_sample_that_changes_between_steps_is_refused() -> None:
    pipe = FakePipeline(cfg(2.0), between=lambda sample, timestep: sample + 0.25 if timestep < 500 else sample)
    with pytest.raises(UnsupportedPipeline, match=r"between step 1 and step 2 by up to 0\.25"):
        sealed(pipe)


def test_inputs_that_follow_the_sample_are_refused() -> None:
    class Controlled(nn.Module):
        def forward(self, sample: Tensor, timestep: Tensor, residual: Tensor) -> Tensor:
            return sample + residual

    class Pipeline(DenoiserPipeline):
        def __init__(self) -> None:
            inner = Controlled()
            super().__init__(nn.Identity(), DDIMScheduler(), (2, 6, 6))
            self.denoiser = inner
            self.called = lambda x, t: inner(x, t, residual=0.1 * x)

        def __call__(self, *, batch_size: int, generator: Any, num_inference_steps: int) -> None:  # type: ignore[override]
            self.scheduler.set_timesteps(num_inference_steps)
            sample = torch.randn(batch_size, 2, 6, 6, generator=generator[0])
            for timestep in self.scheduler.timesteps:
                sample = self.scheduler.step(self.called(sample, timestep), timestep, sample).prev_sample

    pipe = Pipeline()
    with pytest.raises(UnsupportedPipeline, match="'residual' changes from step 0 to step 1"):
        seal(recorded(pipe, pipe.denoiser))


class FakeDiT:
    """DiTPipeline's loop: doubled latents, guidance over the first channels, variance handed on to DDPM."""

    def __init__(self, scheduler: Any, *, keep_rest: bool) -> None:
        self._keep_rest = keep_rest
        self.transformer = TinyDenoiser(outputs=4)
        self.scheduler = scheduler

    def __call__(self, class_labels: list[int], generator: list[torch.Generator], num_inference_steps: int = 4) -> None:
        latents = torch.cat([torch.randn(1, 2, 6, 6, generator=one) for one in generator])
        doubled = torch.cat([latents] * 2)
        labels = torch.cat([torch.tensor(class_labels), torch.zeros(len(class_labels), dtype=torch.int64)])
        self.scheduler.set_timesteps(num_inference_steps)
        for timestep in self.scheduler.timesteps:
            half = doubled[: len(doubled) // 2]
            doubled = self.scheduler.scale_model_input(torch.cat([half, half]), timestep)
            prediction = self.transformer(doubled, timestep=timestep[None].expand(len(doubled)), labels=labels)
            eps, rest = prediction[:, :2], prediction[:, 2:]
            conditional, unconditional = eps.chunk(2)
            half_eps = unconditional + 4.0 * (conditional - unconditional)
            output = torch.cat([half_eps, half_eps])
            if self._keep_rest:
                output = torch.cat([output, rest], dim=1)
            doubled = self.scheduler.step(output, timestep, doubled).prev_sample


@pytest.mark.parametrize(
    ("scheduler", "keep_rest"), [(DDPMScheduler(variance_type="learned_range"), True), (DDIMScheduler(), False)]
)
def test_dits_guidance_over_doubled_latents_is_found(scheduler: Any, keep_rest: bool) -> None:
    pipe = FakeDiT(copy.deepcopy(scheduler), keep_rest=keep_rest)
    trajectory = seal(recorded(pipe, pipe.transformer, steps=4, class_labels=[1, 2, 1]))
    assert trajectory.batch == 6
    assert trajectory.evaluations == 4 * 6
    assert trajectory.form is not None
    assert trajectory.form.guidance == DoubledLatentsGuidance(1, 0, 4.0, 2, keep_rest=keep_rest)
    assert form_from_dict(trajectory.form.to_dict()) == trajectory.form
    # DDPM draws from the global generator here, as in diffusers' DiTPipeline.
    assert trajectory.steps[0].draws_globally == keep_rest
    with torch.no_grad():
        for index, state in enumerate(replay(pipe.transformer, trajectory, 0, 4), start=1):
            assert torch.equal(state.sample, state_at(trajectory, index).sample)


# Misuse


def test_misuse_is_named() -> None:
    pipe = tiny_pipe(DPMSolverMultistepScheduler())
    trajectory = recorded(pipe, pipe.denoiser)
    with pytest.raises(CalibrationError, match="not sealed"):
        advance(pipe.denoiser, trajectory, 0, state_at(trajectory, 0))
    trajectory = seal(trajectory)
    assert trajectory.form is not None
    assert trajectory.form.guidance == NoGuidance()
    with pytest.raises(CalibrationError, match="remembers"):
        advance(pipe.denoiser, trajectory, 2, State(trajectory.steps[2].sample))
    with pytest.raises(CalibrationError, match="no state 9"):
        state_at(trajectory, 9)
    with pytest.raises(CalibrationError, match="no step 6"):
        advance(pipe.denoiser, trajectory, 6, state_at(trajectory, 6))
    with pytest.raises(UnsupportedPipeline, match="without a call of the denoiser"):
        recorded(pipe, nn.Identity())
    with pytest.raises(CalibrationError, match="at least one seed"):
        record(pipe, pipe.denoiser, seeds=(), steps=2, batch_size=1, run=Run())
    with pytest.raises(UnsupportedPipeline, match="no `generator`"):
        recorded(SimpleNamespace(scheduler=pipe.scheduler, __call__=lambda steps: None), pipe.denoiser)
    with pytest.raises(UnsupportedPipeline, match="returned int"):
        prediction_of(3)


def test_damaged_folders_are_named(tmp_path: Path) -> None:
    pipe = tiny_pipe()
    trajectory = seal(recorded(pipe, pipe.denoiser))
    folder = tmp_path / "t"
    save_trajectories(folder, [trajectory])
    with pytest.raises(CalibrationError, match="recorded with DDIMScheduler"):
        load_trajectories(folder, EulerDiscreteScheduler())
    with pytest.raises(CalibrationError, match="cannot be read"):
        load_trajectories(tmp_path / "nowhere", pipe.scheduler)
    text = (folder / "trajectories.json").read_text()
    (folder / "trajectories.json").write_text(text.replace('"format": 2', '"format": 7'))
    with pytest.raises(CalibrationError, match="format 2"):
        load_trajectories(folder, pipe.scheduler)
    (folder / "trajectories.json").write_text(text.replace('"beta_end": 0.02', '"beta_end": 0.03'))
    with pytest.raises(CalibrationError, match="does not repeat"):
        load_trajectories(folder, pipe.scheduler)
    (folder / "trajectories.json").write_text(text)
    (folder / "trajectory-00000.safetensors").write_bytes(b"12345678901")
    with pytest.raises(CalibrationError, match=r"00000.safetensors is damaged or missing"):
        load_trajectories(folder, pipe.scheduler)
    (folder / "trajectory-00000.safetensors").unlink()
    with pytest.raises(CalibrationError, match=r"00000.safetensors is damaged or missing"):
        load_trajectories(folder, pipe.scheduler)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(CalibrationError, match="holds no trajectories"):
        save_trajectories(tmp_path / "other", [trajectory])


def test_repeated_timesteps_are_allowed() -> None:
    pipe = tiny_pipe(DDIMScheduler(clip_sample=False))
    original = pipe.scheduler.set_timesteps

    def repeating(num_inference_steps: int, device: Any = None) -> None:
        original(num_inference_steps, device)
        # A ratio of 0 between neighbours: DDIM computes t - T // n, so make T // n = 0.
        pipe.scheduler.num_inference_steps = 10_000

    pipe.scheduler.set_timesteps = functools.wraps(original)(repeating)
    trajectory = seal(recorded(pipe, pipe.denoiser, steps=4))
    assert steps_where_nothing_happens(trajectory) == (0, 1, 2, 3)
    torch.testing.assert_close(end_of(pipe.denoiser, trajectory, 0), trajectory.steps[0].sample)


def test_signatures_stay_visible_while_recording() -> None:
    pipe = tiny_pipe()
    seen = []
    handle = pipe.denoiser.register_forward_hook(
        lambda *_: seen.append(set(inspect.signature(pipe.scheduler.step).parameters))
    )
    recorded(pipe, pipe.denoiser)
    handle.remove()
    assert {"eta", "generator"} <= seen[0]
