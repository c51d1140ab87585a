"""A network that runs beside the denoiser, reads the sample and hands residuals to it: a ControlNet.

    residuals = network(sample, timestep, ...)          in full precision, always
    prediction = denoiser(sample, timestep, ..., residuals)

Recorded residuals belong to the recorded sample. A chain that has left it needs new ones, so the network's calls are
recorded too, it is found out which of its outputs went where, and replay runs it again on the sample at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.calibrate.places import Slot, at, named, rebuilt, tensors, with_tensors, with_value
from stepquant.calibrate.steps import Step
from stepquant.errors import CalibrationError, UnsupportedPipeline

__all__ = ["Arguments", "FindSlots", "Linked", "conditions", "find_linked", "outputs_of"]

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

FindSlots = Callable[[Sequence[Sequence[Any]]], tuple[Slot, ...] | None]
"""Calls of every step -> where the sample stands in each call of a step; None if it cannot be rebuilt."""


@dataclass(frozen=True)
class Linked:
    """How the network's calls are made from the sample, and where its outputs go.

    slots: for each call of the network in a step, where the sample stands.
    places: (call of the denoiser, path of the tensor in its arguments, call of the network, number of the output).
    """

    slots: tuple[Slot, ...]
    places: tuple[tuple[int, str, int, int], ...]

    def filled(
        self, inputs: Sequence[Arguments], sample_scaled: Tensor, step: Step, network: nn.Module | None
    ) -> list[Arguments]:
        """Arguments of the denoiser's calls with what the network says to this sample; differentiable in the sample.

        Raises CalibrationError without a network.
        """
        if network is None:
            raise CalibrationError(
                f"Step {step.index} was recorded with a network beside the denoiser (a ControlNet), which is needed "
                "to replay it. Load the trajectories with the pipeline that they were recorded from."
            )
        found = []
        for slot, call in zip(self.slots, step.conditions, strict=True):
            own = rebuilt(sample_scaled, at(call.args, call.kwargs, slot))
            if own is None:
                raise CalibrationError(
                    f"Step {step.index}: a sample of shape {tuple(sample_scaled.shape)} does not fit where the network "
                    "beside the denoiser was called; replay samples of the trajectory's own shape."
                )
            args, kwargs = with_value(call.args, call.kwargs, slot, own)
            found.append(outputs_of(_called(network, args, kwargs)))
        filled = []
        for number, (args, kwargs) in enumerate(inputs):
            recorded = dict(_all_tensors(args, kwargs))
            others = {
                path: _fitted(found[source][output], recorded[path])
                for call, path, source, output in self.places
                if call == number
            }
            filled.append(
                (
                    tuple(with_tensors(value, str(place), others) for place, value in enumerate(args)),
                    {key: with_tensors(value, key, others) for key, value in kwargs.items()},
                )
            )
        return filled

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {"slots": [list(slot) for slot in self.slots], "places": [list(place) for place in self.places]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Linked:
        """The inverse of `to_dict`. Raises whatever damage leads to."""
        return cls(
            tuple((str(where), which) for where, which in values["slots"]),
            tuple((int(call), str(path), int(source), int(output)) for call, path, source, output in values["places"]),
        )


def outputs_of(output: Any) -> tuple[Tensor, ...]:
    """Every tensor that the network returned, in order."""
    return tuple(tensor for _, tensor in tensors(output, ""))


def _called(network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The network's answer. Gradients flow to the sample, and none are left in the user's parameters."""
    if not torch.is_grad_enabled() or not any(parameter.requires_grad for parameter in network.parameters()):
        return network(*args, **kwargs)
    constants = {name: parameter.detach() for name, parameter in network.named_parameters()}
    return torch.func.functional_call(network, constants, args, dict(kwargs))


def _fitted(output: Tensor, recorded: Tensor) -> Tensor:
    """An output as the denoiser was given it: in guess mode, the rows without a prompt, the first ones, are zeros."""
    missing = recorded.shape[0] - output.shape[0]
    if missing > 0:
        output = torch.cat([output.new_zeros(missing, *output.shape[1:]), output])
    return output.to(recorded.dtype)


def _all_tensors(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    return [found for slot, value in named(args, kwargs) for found in tensors(value, str(slot[1]))]


def conditions(step: Step, number: int, slot: Slot) -> dict[str, Tensor]:
    """Floating tensors of three or more axes besides the sample: feature maps and token embeddings, not timesteps."""
    call = step.calls[number]
    return {
        path: tensor
        for key, value in named(call.args, call.kwargs)
        if key != slot
        for path, tensor in tensors(value, str(key[1]))
        if tensor.is_floating_point() and tensor.ndim >= 3
    }


def find_linked(steps: Sequence[Step], slots: Sequence[Slot], find_slots: FindSlots) -> Linked | None:
    """Which outputs of the network are arguments of the denoiser in every step, bit for bit; None without a network.

    slots: where the sample stands in the denoiser's calls.
    Raises UnsupportedPipeline if the network's own input cannot be rebuilt from the sample.
    """
    counts = [len(step.conditions) for step in steps]
    if not any(counts):
        return None
    if len(set(counts)) != 1:
        raise UnsupportedPipeline(
            f"The network beside the denoiser (a ControlNet) is called {counts[0]} times in step 0 and {counts[-1]} "
            f"times in step {len(steps) - 1}; only calls in all steps can be replayed."
        )
    own = find_slots([step.conditions for step in steps])
    if own is None:
        raise UnsupportedPipeline(
            "The input of the network beside the denoiser (a ControlNet) cannot be rebuilt from the sample, so its "
            "residuals could not be replayed. Calibrate the denoiser without it, and put it in afterwards."
        )
    places = []
    for number, slot in enumerate(slots):
        arguments = [conditions(step, number, slot) for step in steps]
        free = [(source, output) for source in range(counts[0]) for output in range(_count(steps, source))]
        for path in arguments[0]:
            recorded = [found.get(path) for found in arguments]
            where = next((place for place in free if _went_to(steps, place, recorded)), None)
            if where is not None:
                free.remove(where)  # outputs that are all zero look alike, and come in order
                places.append((number, path, *where))
    return Linked(own, tuple(places))


def _count(steps: Sequence[Step], source: int) -> int:
    return min(len(step.conditions[source].outputs) for step in steps)


def _went_to(steps: Sequence[Step], place: tuple[int, int], recorded: Sequence[Tensor | None]) -> bool:
    source, number = place
    return all(
        argument is not None and _equal(step.conditions[source].outputs[number], argument)
        for step, argument in zip(steps, recorded, strict=True)
    )


def _equal(output: Tensor, argument: Tensor) -> bool:
    if output.shape[1:] != argument.shape[1:] or output.shape[0] > argument.shape[0]:
        return False
    return torch.equal(_fitted(output, argument), argument)
