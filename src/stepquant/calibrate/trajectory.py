"""Trajectories: watch a pipeline sample, check that it can be replayed, replay it with another denoiser.

    record   run the user's own pipeline and write down every step
    seal     find out how the pipeline goes from sample to denoiser to scheduler, and check it on every recorded step
    advance  one step as a pure function of the state and the denoiser's parameters, with gradients
    replay   advance, step after step

The state of a sampling run is the sample and what the solver remembers of earlier steps:

    state_{k+1} = advance(denoiser, trajectory, k, state_k)

Everything else in a scheduler (step index, counters, tables) does not depend on the data and is taken from the copy
that was recorded before step k. Stochastic steps draw the recorded noise, so that two denoisers are compared under
the same noise.

Precision: schedulers compute in the sample's dtype, but for Euler, ancestral Euler, DPM-Solver++ and flow matching,
which cast the sample to float32 inside `step`; a float64 sample comes back rounded from those. Gradients flow
through all of them.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.calibrate.forms import Form, find_form, scaled_sample
from stepquant.calibrate.known_part import painted_positions
from stepquant.calibrate.recording import Recording, watch
from stepquant.calibrate.steps import (
    DenoiserCall,
    Step,
    cached_tensors,
    copy_sharing,
    forked_devices,
    prediction_of,
    put_tensor,
    run_scheduler,
)
from stepquant.errors import CalibrationError, UnsupportedPipeline
from stepquant.model.correction import Corrector, Finishing, StepCorrection
from stepquant.model.families import network_beside, other_denoisers, writes_known_part
from stepquant.model.pipeline import arguments_of_batch, check_call, refusal_explained, with_labels
from stepquant.model.schedule import ScheduleFingerprint
from stepquant.run import Run

__all__ = [
    "Correct",
    "DenoiserCall",
    "State",
    "Step",
    "Trajectory",
    "advance",
    "follow",
    "predict",
    "quiet",
    "record",
    "replay",
    "scheduler_output",
    "seal",
    "seen_in_steps",
    "state_at",
    "steps_where_nothing_happens",
]

Correct = Callable[[Tensor, Any, Tensor], Tensor]
"""Guided prediction, timestep and sample -> the prediction that the scheduler is given.

A `Corrector` is one; the noise and shift of its correction are then part of the step too.
"""


@dataclass(frozen=True)
class Trajectory:
    """One recorded sampling run of a batch of images.

    steps: in the order of sampling, noise first.
    seeds: of the batch's images.
    fingerprint: the schedule; its guidance is "unknown" before `seal`.
    schedule_arguments: (args, kwargs) with which the pipeline called `set_timesteps`.
    form: found by `seal`; None before.
    network: runs beside the denoiser and reads the sample (ControlNet); the pipeline's own, in full precision.
    painted: bool `[B, 1, ...]`, the positions that are the sampler's; the pipeline writes the known part of the picture
        into the others after every step. None: all.
    lead: the steps before, in which another denoiser was called.
    """

    steps: Sequence[Step]
    seeds: tuple[int, ...]
    fingerprint: ScheduleFingerprint
    schedule_arguments: tuple[tuple[Any, ...], Mapping[str, Any]]
    form: Form | None = None
    network: nn.Module | None = field(default=None, repr=False, compare=False)
    painted: Tensor | None = None
    lead: Sequence[Step] = ()

    @property
    def batch(self) -> int:
        """Rows of the sample. Twice the images where the pipeline carries doubled latents (DiT with guidance)."""
        return self.steps[0].sample.shape[0]

    @property
    def images(self) -> int:
        """Images of the batch: row r of a call belongs to image r modulo this."""
        return self.batch // 2 if self.form is not None and self.form.doubled else self.batch

    @property
    def evaluations(self) -> int:
        """Of the network in the whole run: rows of its calls, so two for an image and step with guidance.

        Steps times those of the first one: the others may be on disk.
        """
        return len(self.steps) * sum(call.prediction.shape[0] for call in self.steps[0].calls)


@dataclass(frozen=True)
class State:
    """Where a sampling run is.

    sample: [B, C, ...].
    history: the scheduler's tensors of earlier steps by path ("model_outputs.0", "ets.1"); empty for one-step
        solvers and after the last step.
    """

    sample: Tensor
    history: Mapping[str, Tensor] = field(default_factory=dict)


def record(
    pipe: Any,
    denoiser: nn.Module,
    *,
    seeds: Sequence[int],
    steps: int,
    batch_size: int,
    run: Run,
    arguments: Mapping[str, Any] | None = None,
) -> list[Trajectory]:
    """Sample with the user's own pipeline and write every step down; one trajectory for every `batch_size` seeds.

    denoiser: the module that the pipeline calls, for example `pipe.unet`. Of a pipeline with several, which take turns
        in the steps (Wan), only this one's steps are recorded, from the sample that the others lead to.
    seeds: image i has a CPU generator of its own, seeded with seeds[i], so it does not depend on `batch_size`.
    steps: handed on as `num_inference_steps`. Some schedulers make more calls (Heun, PNDM).
    arguments: further arguments of the pipeline. A list with one entry per seed (prompts, class labels) is cut into the
        chunks; all else is passed as it is.

    The pipeline is afterwards as it was, and torch's global generator too. Raises CalibrationError for a prediction
    that is not finite, and UnsupportedPipeline if the pipeline takes no generators or does not drive its scheduler
    with the denoiser.
    """
    if not seeds or batch_size < 1:
        raise CalibrationError(
            f"Recording needs at least one seed and batch_size >= 1, got {len(seeds)} and {batch_size}."
        )
    trajectories = []
    with quiet(pipe), run.progress.track("record trajectories", len(seeds)) as done:
        for start in range(0, len(seeds), batch_size):
            chunk = slice(start, start + batch_size)
            trajectories.append(_record_chunk(pipe, denoiser, tuple(seeds), chunk, steps, arguments or {}))
            done(len(seeds[chunk]))
    return trajectories


def _record_chunk(
    pipe: Any, denoiser: nn.Module, seeds: tuple[int, ...], chunk: slice, steps: int, arguments: Mapping[str, Any]
) -> Trajectory:
    chosen = dict(with_labels(pipe, arguments_of_batch(arguments, chunk, len(seeds)), seeds[chunk]))
    call = _pipeline_arguments(pipe, seeds[chunk], steps, chosen)
    device = next(denoiser.parameters(), torch.empty(0)).device
    # Pipelines that do not hand their generators to the scheduler (DiT) draw from the global one: repeatable here.
    repeatable = torch.random.fork_rng(devices=forked_devices(device))
    network, others = network_beside(pipe), other_denoisers(pipe, denoiser)
    watching = watch(pipe.scheduler, denoiser, network=network, others=others)
    with watching as recording, torch.no_grad(), repeatable, refusal_explained(pipe):
        torch.manual_seed(seeds[chunk][0])
        pipe(**call)
    found = _trajectory(recording, seeds[chunk], steps)
    painted = painted_positions(found.steps) if writes_known_part(pipe, denoiser) else None
    return replace(found, network=network, painted=painted)


def _pipeline_arguments(pipe: Any, seeds: tuple[int, ...], steps: int, arguments: Mapping[str, Any]) -> dict[str, Any]:
    accepted = inspect.signature(pipe.__call__).parameters
    if "generator" not in accepted:
        raise UnsupportedPipeline(
            f"{type(pipe).__name__} takes no `generator`, so its images cannot be tied to seeds. Wrap the denoiser "
            "and its scheduler in "
            "stepquant.model.pipeline.DenoiserPipeline."
        )
    check_call(pipe, arguments, steps)
    offered = {
        "batch_size": len(seeds),
        "num_inference_steps": steps,
        "output_type": "latent" if _may_decode(pipe) else "np",
        "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
    }
    return {name: value for name, value in offered.items() if name in accepted} | dict(arguments)


def _may_decode(pipe: Any) -> bool:
    """Whether asking for latents can spare a decoder.

    Not all pipelines without one put up with being asked (ConsistencyModelPipeline).
    """
    parts = getattr(pipe, "components", None)
    return parts is None or sum(isinstance(part, nn.Module) for part in parts.values()) > 1


def _trajectory(recording: Recording, seeds: tuple[int, ...], steps: int) -> Trajectory:
    if not recording.steps or recording.schedule_arguments is None:
        raise UnsupportedPipeline(
            f"The pipeline ran, but {len(recording.steps)} steps of `pipe.scheduler` were seen and `set_timesteps` was "
            f"{'called' if recording.schedule_arguments else 'not called'}. Record pipelines that drive "
            "`pipe.scheduler` themselves."
        )
    rows = recording.steps[0].sample.shape[0]
    if rows % len(seeds):
        raise CalibrationError(
            f"The pipeline sampled {rows} images for {len(seeds)} seeds. Pass one prompt or class label per seed, "
            "as a list."
        )
    fingerprint = ScheduleFingerprint.of(recording.timesteps_scheduler, steps=steps, guidance="unknown")
    lead, own = _of_denoiser(recording.steps)
    return Trajectory(own, seeds, fingerprint, recording.schedule_arguments, lead=lead)


def _of_denoiser(steps: Sequence[Step]) -> tuple[tuple[Step, ...], tuple[Step, ...]]:
    """The steps before those of the denoiser, and its own, counted from 0."""
    called = [step.index for step in steps if step.calls]
    if not called or called != list(range(called[0], called[-1] + 1)):
        raise UnsupportedPipeline(
            f"Of {len(steps)} steps, the denoiser is called in {called or 'none'}; steps that follow each other are "
            "needed. Use more steps, or quantize the pipeline's other denoiser."
        )
    own = steps[called[0] : called[-1] + 1]
    return tuple(steps[: called[0]]), tuple(replace(step, index=index) for index, step in enumerate(own))


def seen_in_steps(denoiser: nn.Module, trajectory: Trajectory, name: str, found: list[Tensor]) -> Iterator[Tensor]:
    """For each step what a hook on the module `name` puts into `found`, `[rows of all calls, ...]`."""
    for step in trajectory.steps:
        found.clear()
        for number, call in enumerate(step.calls, start=1):
            denoiser(*call.args, **call.kwargs)
            if len(found) < number:
                raise CalibrationError(f"{name} did not run in a forward call of the denoiser.")
            del found[number:]  # a module that runs twice counts once
        yield torch.cat(found)


@contextmanager
def quiet(pipe: Any) -> Iterator[None]:
    """Without the pipeline's own progress bar; the setting is put back as it was."""
    configure = getattr(pipe, "set_progress_bar_config", None)
    name = "_progress_bar_config"  # where diffusers' DiffusionPipeline keeps it
    before = dict(vars(pipe))
    try:
        if configure is not None:
            configure(disable=True)
        yield
    finally:
        if name in before:
            setattr(pipe, name, before[name])
        else:
            vars(pipe).pop(name, None)


def seal(trajectory: Trajectory) -> Trajectory:
    """The trajectory with the form under which it can be replayed, after checking it on every recorded step.

    Checked: each step starts where the one before ended; the recorded schedulers repeat the recorded steps bit for
    bit; the denoiser's inputs and the scheduler's model output can be rebuilt (see `forms.find_form`).
    Raises UnsupportedPipeline naming the step that differs, by how much, and what to do.
    """
    for step in trajectory.steps:
        _check_scheduler(step)
    form = find_form(trajectory.steps)
    _check_chain(trajectory, form)
    return replace(trajectory, form=form, fingerprint=replace(trajectory.fingerprint, guidance=form.guidance.name))


def _check_chain(trajectory: Trajectory, form: Form) -> None:
    for before, after in itertools.pairwise(trajectory.steps):
        carried = _painted(trajectory, before.index, form.carried(before.next_sample))
        if carried.shape != after.sample.shape or not torch.equal(carried, after.sample):
            raise UnsupportedPipeline(
                f"The pipeline changes the sample between step {before.index} and step {after.index}"
                f"{_by_how_much(carried, after.sample)} (a callback, another dtype). Calibrate without it."
            )


def _check_scheduler(step: Step) -> None:
    with torch.no_grad():
        scheduler = _scheduler_with(step, _recorded_history(step))
        found = run_scheduler(scheduler, step, guided=step.guided, sample=step.sample)
    if found.shape != step.next_sample.shape or not torch.equal(found, step.next_sample):
        raise UnsupportedPipeline(
            f"Step {step.index}: a copy of {type(step.scheduler).__name__} does not repeat the recorded step"
            f"{_by_how_much(found, step.next_sample)}, so it keeps state outside itself or draws noise that is not "
            "in the pipeline's "
            "generators. Use another scheduler."
        )


def _by_how_much(one: Tensor, other: Tensor) -> str:
    if one.shape != other.shape:
        return f" from shape {tuple(one.shape)} to {tuple(other.shape)}"
    return f" by up to {float((one.double() - other.double()).abs().max()):.3g}"


def state_at(trajectory: Trajectory, index: int) -> State:
    """The full-precision state before step `index`, as recorded; `index` = number of steps is the end.

    Raises CalibrationError outside of 0 .. number of steps.
    """
    count = len(trajectory.steps)
    if not 0 <= index <= count:
        raise CalibrationError(f"There is no state {index}: the trajectory has {count} steps, so states 0 to {count}.")
    if index == count:
        return State(trajectory.steps[-1].next_sample)
    step = trajectory.steps[index]
    return State(step.sample, _recorded_history(step))


def _recorded_history(step: Step) -> dict[str, Tensor]:
    """The scheduler's tensors of earlier steps, just before this one."""
    return cached_tensors(step.scheduler, step.sample.shape)


def advance(
    denoiser: nn.Module, trajectory: Trajectory, index: int, state: State, correct: Correct | None = None
) -> State:
    """The state after step `index`, with `denoiser` in the recorded denoiser's place.

    correct: changes the prediction before the scheduler sees it.

    A pure function of the state and the denoiser's parameters: nothing that was recorded is written to. Gradients
    flow from the new sample and history to the old ones and to the parameters; under `torch.no_grad` none are kept.
    Raises CalibrationError for a trajectory that is not sealed or a state that does not belong to the step.
    """
    begun = _begin(trajectory, index, state)
    guided = begun.predict(denoiser)
    if correct is not None:
        guided = correct(guided, begun.step.timestep, begun.sample)
    return begun.follow(trajectory, guided, correct.correction if isinstance(correct, Corrector) else None)


def predict(denoiser: nn.Module, trajectory: Trajectory, index: int, state: State) -> Tensor:
    """The first half of `advance`: what the scheduler would be given in step `index`, `[B, C, ...]`, guided."""
    return _begin(trajectory, index, state).predict(denoiser)


def follow(
    trajectory: Trajectory, index: int, state: State, guided: Tensor, correction: StepCorrection | None = None
) -> State:
    """The second half of `advance`: the state after step `index` if the scheduler is given `guided`.

    correction: whose noise and shift belong to the step; `guided` is corrected already.
    """
    return _begin(trajectory, index, state).follow(trajectory, guided, correction)


def scheduler_output(trajectory: Trajectory, index: int, state: State, guided: Tensor) -> Tensor:
    """What the scheduler returns in step `index` if it is given `guided`, `[B, C, ...]`; to compare with the recorded
    `next_sample`. A pipeline that carries doubled latents overwrites half of it before the next step.
    """
    begun = _begin(trajectory, index, state)
    return run_scheduler(begun.scheduler, begun.step, guided=guided, sample=begun.sample)


def replay(
    denoiser: nn.Module,
    trajectory: Trajectory,
    start: int,
    stop: int,
    state: State | None = None,
    correct: Correct | None = None,
) -> Iterator[State]:
    """The states after steps start .. stop - 1, from `state`, or from the recorded state before step `start`.

    correct: as for `advance`; a correction that remembers predictions must be a new one for every replay.
    """
    state = state_at(trajectory, start) if state is None else state
    for index in range(start, stop):
        state = advance(denoiser, trajectory, index, state, correct)
        yield state


@dataclass(frozen=True)
class _Begun:
    """A step whose scheduler has been prepared for a state, and may be stepped once."""

    step: Step
    form: Form
    scheduler: Any
    sample: Tensor
    scaled: Tensor
    network: nn.Module | None

    def predict(self, denoiser: nn.Module) -> Tensor:
        inputs = self.form.inputs(self.scaled, self.step, self.network)
        return self.form.combine(self.step, [prediction_of(denoiser(*args, **kwargs)) for args, kwargs in inputs])

    def follow(self, trajectory: Trajectory, guided: Tensor, correction: StepCorrection | None) -> State:
        scheduler = self.scheduler if correction is None else Finishing(self.scheduler, correction)
        sample = run_scheduler(scheduler, self.step, guided=guided, sample=self.sample)
        if self.step.index + 1 < len(trajectory.steps):
            sample = self.form.carried(sample)
        sample = _painted(trajectory, self.step.index, sample)
        return State(sample, _history_after(trajectory, self.step.index, self.scheduler))


def _begin(trajectory: Trajectory, index: int, state: State) -> _Begun:
    step, form = _step(trajectory, index), _form(trajectory)
    scheduler = _scheduler_with(step, state.history)
    sample = form.carried(state.sample)
    scaled = scaled_sample(scheduler, sample, step.timestep, scaled=form.scaled)
    return _Begun(step, form, scheduler, sample, scaled, trajectory.network)


def _painted(trajectory: Trajectory, index: int, sample: Tensor) -> Tensor:
    """The sample after step `index` with the recorded known part, if the pipeline writes one; differentiable.

    What it writes after the last step has not been seen: there it is what the scheduler returned.
    """
    if trajectory.painted is None:
        return sample
    steps = trajectory.steps
    known = steps[index + 1].sample if index + 1 < len(steps) else steps[index].next_sample
    return torch.where(trajectory.painted, sample, known.to(sample))


def steps_where_nothing_happens(trajectory: Trajectory) -> tuple[int, ...]:
    """Indices of the steps that leave the sample as it is, up to rounding.

    Schedules with repeated timesteps have them (b_k = 0): they may be replayed, but have nothing to calibrate.
    """
    return tuple(
        step.index
        for step in trajectory.steps
        if float((step.next_sample.double() - step.sample.double()).norm()) <= 1e-5 * float(step.sample.double().norm())
    )


def _step(trajectory: Trajectory, index: int) -> Step:
    if not 0 <= index < len(trajectory.steps):
        raise CalibrationError(f"There is no step {index}: the trajectory has steps 0 to {len(trajectory.steps) - 1}.")
    return trajectory.steps[index]


def _form(trajectory: Trajectory) -> Form:
    if trajectory.form is None:
        raise CalibrationError(
            "The trajectory is not sealed, so it is not known how to replay it. Call seal(trajectory) first."
        )
    return trajectory.form


def _scheduler_with(step: Step, history: Mapping[str, Tensor]) -> Any:
    """A copy of the recorded scheduler that remembers `history` instead of what was recorded."""
    recorded = _recorded_history(step)
    if set(history) != set(recorded):
        raise CalibrationError(
            f"Step {step.index}: {type(step.scheduler).__name__} remembers {sorted(recorded)} before this step, the "
            "given state has "
            f"{sorted(history)}. Start from state_at(trajectory, {step.index}) or from the state that the step "
            "before returned."
        )
    scheduler = copy_sharing(step.scheduler, {id(tensor): tensor for tensor in recorded.values()})
    for path, tensor in history.items():
        # A clone, because some schedulers add to their tensors in place (PNDM); gradients pass through it.
        put_tensor(scheduler, path, tensor.clone())
    return scheduler


def _history_after(trajectory: Trajectory, index: int, scheduler: Any) -> dict[str, Tensor]:
    """What the scheduler remembers after step `index`, under the paths that were recorded before the next step."""
    if index + 1 == len(trajectory.steps):
        return {}
    following = trajectory.steps[index + 1]
    present = cached_tensors(scheduler, following.sample.shape)
    missing = sorted(set(_recorded_history(following)) - set(present))
    if missing:
        raise CalibrationError(
            f"Step {index}: the scheduler does not remember {missing} as it did when it was recorded."
        )
    return {path: present[path] for path in _recorded_history(following)}
