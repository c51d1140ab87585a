"""Records of one sampling step: what the denoiser was asked and answered, and what the scheduler made of it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepquant.errors import UnsupportedPipeline

__all__ = [
    "ConditionCall",
    "DenoiserCall",
    "Step",
    "cached_tensors",
    "copy_sharing",
    "forked_devices",
    "global_state",
    "prediction_of",
    "previous_sample",
    "put_tensor",
    "run_scheduler",
    "set_global_state",
]


@dataclass(frozen=True)
class DenoiserCall:
    """One call of the denoiser.

    args, kwargs: exactly as passed; tensors are detached and never written to.
    prediction: [B', C', ...]; B' is a multiple of the images where guidance doubles the batch.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    prediction: Tensor


@dataclass(frozen=True)
class ConditionCall:
    """One call of a network beside the denoiser (ControlNet).

    args, kwargs: as for `DenoiserCall`. outputs: every tensor that it returned, in order.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class Step:
    """One call of `scheduler.step`, and the calls of the denoiser that led to it.

    index: 0 is the noise end.
    sample: [B, C, ...] handed to the scheduler.
    timestep: handed to the scheduler, of whatever type the pipeline uses.
    calls: at least one; none in the lead of a trajectory, where another denoiser was called.
    guided: [B, C, ...], the model output handed to the scheduler.
    next_sample: [B, C, ...], what the scheduler returned.
    scheduler: a copy of the scheduler just before the step. Copy it (`copy_sharing`) before stepping it.
    step_kwargs: the other arguments of `scheduler.step`, without the generator.
    generator_states: state of each of the generators just before the step; None if the step was given none.
    draws_globally: the step drew from torch's global generator; its state is the only one of `generator_states`.
    conditions: the calls of a network beside the denoiser.
    """

    index: int
    sample: Tensor
    timestep: Any
    calls: tuple[DenoiserCall, ...]
    guided: Tensor
    next_sample: Tensor
    scheduler: Any
    step_kwargs: Mapping[str, Any]
    generator_states: tuple[Tensor, ...] | None
    draws_globally: bool = False
    conditions: tuple[ConditionCall, ...] = ()


def prediction_of(output: Any) -> Tensor:
    """The tensor in what a denoiser returned: itself, the first of a tuple, or its attribute `sample`.

    Raises UnsupportedPipeline if there is none.
    """
    found = output[0] if isinstance(output, tuple) else output
    if not isinstance(found, Tensor):
        found = getattr(found, "sample", None)
    if not isinstance(found, Tensor):
        raise UnsupportedPipeline(
            f"The denoiser returned {type(output).__name__}; expected a tensor, a tuple that starts with one, or an "
            "object with a "
            "tensor `sample`."
        )
    return found


def cached_tensors(scheduler: Any, shape: torch.Size) -> dict[str, Tensor]:
    """The scheduler's memory of earlier steps: its floating tensors of the sample's shape, by path ("model_outputs.0").

    Found by looking at all attributes, the lists among them, and a scheduler inside (a stand-in keeps one):
    multistep solvers cache under many names. The solver's tables have other shapes, and its counters do not depend
    on the data.
    """
    found: dict[str, Tensor] = {}
    for name, value in vars(scheduler).items():
        if isinstance(value, Tensor):
            items: Iterable[tuple[str, Any]] = [(name, value)]
        elif isinstance(value, list):
            items = [(f"{name}.{position}", item) for position, item in enumerate(value)]
        elif _is_scheduler(value):
            items = [(f"{name}.{path}", item) for path, item in cached_tensors(value, shape).items()]
        else:
            continue
        found.update({path: item for path, item in items if _is_like_sample(item, shape)})
    return found


def put_tensor(scheduler: Any, path: str, tensor: Tensor) -> None:
    """Set one of the scheduler's `cached_tensors`."""
    _put(scheduler, path.split("."), tensor)


def _put(holder: Any, path: Sequence[str], tensor: Tensor) -> None:
    name, *rest = path
    if isinstance(holder, list):
        holder[int(name)] = tensor
    elif rest:
        _put(vars(holder)[name], rest, tensor)
    else:
        vars(holder)[name] = tensor


def _is_scheduler(value: Any) -> bool:
    return (
        hasattr(value, "__dict__") and not isinstance(value, type) and callable(getattr(value, "set_timesteps", None))
    )


def _is_like_sample(value: Any, shape: torch.Size) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.shape == shape


def copy_sharing(scheduler: Any, shared: Mapping[int, Any]) -> Any:
    """A deep copy in which the objects with these ids are replaced by the given ones instead of being copied."""
    return copy.deepcopy(scheduler, dict(shared))


def run_scheduler(scheduler: Any, step: Step, *, guided: Tensor, sample: Tensor) -> Tensor:
    """`scheduler.step` as the pipeline called it in `step`, with the same noise. Advances `scheduler`."""
    if step.generator_states is None:
        return previous_sample(scheduler.step(guided, step.timestep, sample, **step.step_kwargs))
    if step.draws_globally:
        return _run_with_global_generator(scheduler, step, guided=guided, sample=sample)
    generators = [torch.Generator() for _ in step.generator_states]
    for generator, state in zip(generators, step.generator_states, strict=True):
        generator.set_state(state.cpu())
    # diffusers treats a list of one as that one generator for the whole batch.
    generator_argument = generators[0] if len(generators) == 1 else generators
    result = scheduler.step(guided, step.timestep, sample, generator=generator_argument, **step.step_kwargs)
    return previous_sample(result)


def _run_with_global_generator(scheduler: Any, step: Step, *, guided: Tensor, sample: Tensor) -> Tensor:
    assert step.generator_states is not None
    (state,) = step.generator_states
    with torch.random.fork_rng(devices=forked_devices(sample.device)):
        set_global_state(sample.device, state)
        return previous_sample(scheduler.step(guided, step.timestep, sample, **step.step_kwargs))


def previous_sample(result: Any) -> Tensor:
    """The new sample in what `scheduler.step` returned, with `return_dict` or without."""
    found = result[0] if isinstance(result, tuple) else result.prev_sample
    assert isinstance(found, Tensor)
    return found


def forked_devices(device: torch.device) -> list[torch.device]:
    """The devices besides the CPU whose global generators a step on `device` may draw from."""
    return [device] if device.type == "cuda" else []


def global_state(device: torch.device) -> Tensor:
    """State of torch's global generator of the device."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_global_state(device: torch.device, state: Tensor) -> None:
    """The inverse of `global_state`."""
    if device.type == "cuda":
        torch.cuda.set_rng_state(state.cpu(), device)
    else:
        torch.set_rng_state(state.cpu())
