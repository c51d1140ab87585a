"""Watching a pipeline while it samples: a forward hook on the denoiser, and watched methods on its scheduler.

Nothing of the pipeline is rewritten or subclassed, so that what is recorded is what the user's own code does.
"""

from __future__ import annotations

import functools
import inspect
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.calibrate.conditioning import outputs_of
from stepquant.calibrate.steps import (
    ConditionCall,
    DenoiserCall,
    Step,
    cached_tensors,
    copy_sharing,
    global_state,
    prediction_of,
    previous_sample,
)
from stepquant.errors import CalibrationError, UnsupportedPipeline

__all__ = ["Recording", "watch"]


@dataclass
class Recording:
    """What has been seen so far.

    steps: one for each call of `scheduler.step`.
    schedule_arguments: (args, kwargs) of the last `set_timesteps` before the first step; None if there was none.
    timesteps_scheduler: a copy of the scheduler just after that call.
    """

    steps: list[Step] = field(default_factory=list)
    schedule_arguments: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    timesteps_scheduler: Any = None


@contextmanager
def watch(
    scheduler: Any, denoiser: nn.Module, *, network: nn.Module | None = None, others: Sequence[nn.Module] = ()
) -> Iterator[Recording]:
    """Record what happens to scheduler and denoiser inside; both are as before afterwards, also after an exception.

    network: beside the denoiser (ControlNet), whose calls are recorded too.
    others: denoisers that take over in some steps, which are recorded without calls.
    Raises CalibrationError from within for a prediction that is not finite, and UnsupportedPipeline for a step
    without a call of the denoiser or with generators that are not on the CPU.
    """
    plain = type(scheduler)
    watcher = _Watcher(scheduler, plain)
    methods = {
        # functools.wraps keeps the signature, in which pipelines look for `eta`, `generator` and `timesteps`.
        "step": functools.wraps(scheduler.step)(watcher.around_step(scheduler.step)),
        "set_timesteps": functools.wraps(scheduler.set_timesteps)(
            watcher.around_set_timesteps(scheduler.set_timesteps)
        ),
    }
    watched = _watched_class(scheduler, methods)
    handles = [denoiser.register_forward_hook(watcher.after_forward, with_kwargs=True)]
    if network is not None:
        handles.append(network.register_forward_hook(watcher.after_condition, with_kwargs=True))
    handles += [other.register_forward_hook(watcher.after_other) for other in others]
    try:
        object.__setattr__(scheduler, "__class__", watched)
        yield watcher.recording
    finally:
        object.__setattr__(scheduler, "__class__", plain)
        for handle in handles:
            handle.remove()
        # A class is part of a cycle, so it would keep the recording in memory until Python looks for cycles.
        methods.clear()


def _watched_class(scheduler: Any, methods: Mapping[str, Callable[..., Any]]) -> type:
    """A class for this one scheduler, whose methods are ours.

    Setting methods on the instance would do for a plain scheduler, but a stand-in sends what is set on it to the
    scheduler inside, so the correction would be applied twice. Properties come before whatever the instance holds.
    """
    plain = type(scheduler)

    def watched(name: str) -> property:
        def look_up(self: Any) -> Any:
            if self is scheduler:
                return methods[name]
            return vars(self)[name] if name in vars(self) else getattr(super(created, self), name)

        return property(look_up)

    created = type(plain.__name__, (plain,), {name: watched(name) for name in methods})
    return created


class _Pool:
    """Keeps detached copies, and hands the same copy out for equal tensors.

    Text embeddings are the same in all steps, one step's new sample is the next one's sample, and multistep solvers
    cache predictions; comparing with what was kept last of the same kind saves several times the memory.
    """

    def __init__(self) -> None:
        self._recent: defaultdict[tuple[object, ...], deque[Tensor]] = defaultdict(lambda: deque(maxlen=32))

    def keep(self, tensor: Tensor) -> Tensor:
        recent = self._recent[tensor.shape, tensor.dtype, tensor.device, tensor.stride()]
        for known in recent:
            if torch.equal(known, tensor):
                return known
        # Tensors made in inference mode could not enter a graph later.
        with torch.inference_mode(False):
            kept = tensor.detach().clone()
        recent.append(kept)
        return kept

    def keep_all(self, value: Any) -> Any:
        """The same for every tensor in nested lists, tuples and mappings; other values as they are."""
        if isinstance(value, Tensor):
            return self.keep(value)
        if isinstance(value, Mapping):
            return {key: self.keep_all(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.keep_all(item) for item in value]
        if isinstance(value, tuple):
            return tuple(self.keep_all(item) for item in value)
        return value


class _Watcher:
    """Gathers the denoiser's calls and closes a step with each call of the scheduler."""

    def __init__(self, scheduler: Any, plain: type) -> None:
        self.recording = Recording()
        self._scheduler = scheduler
        self._plain = plain
        self._pool = _Pool()
        self._calls: list[DenoiserCall] = []
        self._conditions: list[ConditionCall] = []
        self._elsewhere = False

    def after_forward(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        prediction = prediction_of(output)
        index = len(self.recording.steps)
        if not bool(torch.isfinite(prediction).all()):
            raise CalibrationError(
                f"Step {index}: the full-precision denoiser's prediction has values that are not finite. Calibrate "
                "in a wider dtype "
                "(bfloat16 or float32), or start at a smaller timestep if the schedule's first alpha_bar is almost 0."
            )
        self._calls.append(
            DenoiserCall(self._pool.keep_all(tuple(args)), self._pool.keep_all(kwargs), self._pool.keep(prediction))
        )

    def after_condition(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        outputs = tuple(self._pool.keep(tensor) for tensor in outputs_of(output))
        self._conditions.append(ConditionCall(self._pool.keep_all(tuple(args)), self._pool.keep_all(kwargs), outputs))

    def after_other(self, _module: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        self._elsewhere = True

    def around_set_timesteps(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def set_timesteps(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if not self.recording.steps:
                self.recording.schedule_arguments = (args, kwargs)
                self.recording.timesteps_scheduler = self._bare_copy({})
            return result

        return set_timesteps

    def around_step(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            given = _step_arguments(original, args, kwargs)
            started = self._start_step(given)
            global_before = global_state(started.sample.device)
            result = original(*args, **kwargs)
            self._finish_step(started, previous_sample(result), global_before)
            return result

        return step

    def _start_step(self, given: dict[str, Any]) -> Step:
        index = len(self.recording.steps)
        if not self._calls and not self._elsewhere:
            raise UnsupportedPipeline(
                f"Step {index}: the scheduler was stepped without a call of the denoiser before it. Give the module "
                "that the pipeline calls "
                "(pipe.unet, pipe.transformer), and record pipelines with a single denoiser."
            )
        sample = self._pool.keep(given.pop("sample"))
        guided = self._pool.keep(given.pop("model_output"))
        timestep = self._pool.keep_all(given.pop("timestep"))
        states = _generator_states(given.pop("generator", None), index)
        cached = cached_tensors(self._scheduler, sample.shape)
        shared = {id(tensor): self._pool.keep(tensor) for tensor in cached.values()}
        return Step(
            index=index,
            sample=sample,
            timestep=timestep,
            calls=tuple(self._calls),
            guided=guided,
            next_sample=sample,
            scheduler=self._bare_copy(shared),
            step_kwargs=self._pool.keep_all(given),
            generator_states=None if states is None else tuple(self._pool.keep(state) for state in states),
            conditions=tuple(self._conditions),
        )

    def _finish_step(self, started: Step, next_sample: Tensor, global_before: Tensor) -> None:
        changes: dict[str, Any] = {"next_sample": self._pool.keep(next_sample)}
        if started.generator_states is None and not torch.equal(global_before, global_state(started.sample.device)):
            changes.update(generator_states=(global_before,), draws_globally=True)
        values = {name: getattr(started, name) for name in Step.__dataclass_fields__}
        self.recording.steps.append(Step(**{**values, **changes}))
        self._calls, self._conditions, self._elsewhere = [], [], False

    def _bare_copy(self, shared: Mapping[int, Any]) -> Any:
        """A copy of the scheduler in its own class; methods that others had put on the instance are copied with it."""
        bare = copy_sharing(self._scheduler, shared)
        object.__setattr__(bare, "__class__", self._plain)
        return bare


def _step_arguments(step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `scheduler.step` by name; a stand-in that takes `*args` has diffusers' order."""
    names = list(inspect.signature(step).parameters)
    if "sample" not in names:
        names = ["model_output", "timestep", "sample"]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _generator_states(generator: Any, index: int) -> list[Tensor] | None:
    if generator is None:
        return None
    generators = list(generator) if isinstance(generator, list | tuple) else [generator]
    if any(one.device.type != "cpu" for one in generators):
        raise UnsupportedPipeline(
            f"Step {index}: the scheduler was given a generator on {generators[0].device}; noise can be repeated "
            "from generators on the CPU "
            "only. Hand the pipeline's generators on to the scheduler as they are."
        )
    return [one.get_state() for one in generators]
