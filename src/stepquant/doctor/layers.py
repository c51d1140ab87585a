"""The layers that the doctor looks at: names, channels, bits, and pairs of a layer and its full-precision original."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.model.clock import clock_of
from stepquant.model.families import make_attention_explicit_, timestep_argument
from stepquant.model.layer import Geometry, QuantizedLayer, QuantizedMatmul
from stepquant.model.surgery import quantizable

__all__ = [
    "axis_of_channels",
    "bits_of",
    "clock_following",
    "paired_layers",
    "parts_of_layers",
    "reference_of",
    "still",
    "swapped",
    "tensors_in",
]


def reference_of(full_precision: nn.Module) -> nn.Module:
    """A copy with the matmuls of attention as modules, as in a quantized model. It shares all tensors."""
    shared: dict[int, Any] = {
        id(tensor): tensor for tensor in (*full_precision.parameters(), *full_precision.buffers())
    }
    reference = copy.deepcopy(full_precision, shared)
    make_attention_explicit_(reference)
    return reference


def paired_layers(reference: nn.Module, candidate: nn.Module) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Name -> (full-precision layer, the candidate's), of the layers of both that do not compute the same."""
    theirs = dict(candidate.named_modules())
    return {
        name: (layer, theirs[name])
        for name, layer in quantizable(reference).items()
        if name in theirs and not _same(layer, theirs[name])
    }


def _same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two layers certainly compute the same. Tensor subclasses (quantized by others) count as different."""
    if type(one) is not type(other):
        return False
    ours, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    return ours.keys() == theirs.keys() and all(
        type(ours[name].data) is type(theirs[name].data) is Tensor
        and ours[name].shape == theirs[name].shape
        and torch.equal(ours[name], theirs[name])
        for name in ours
    )


def parts_of_layers(denoiser: nn.Module) -> set[int]:
    """Ids of the modules inside of quantized layers (quantizers, branches): they are looked at as one."""
    return {
        id(part)
        for module in denoiser.modules()
        if isinstance(module, QuantizedLayer | QuantizedMatmul) or hasattr(module, "input_quantizer")
        for part in module.modules()
        if part is not module
    }


def axis_of_channels(module: nn.Module) -> int | None:
    """The axis of a layer's channels, from the end; None for what is no linear layer or convolution."""
    geometry = getattr(module, "geometry", None)
    if isinstance(geometry, Geometry):
        return geometry.channel_axis
    kinds: tuple[tuple[type[nn.Module], int], ...] = ((nn.Linear, -1), (nn.Conv1d, -2), (nn.Conv2d, -3))
    return next((axis for kind, axis in kinds if isinstance(module, kind)), None)


def bits_of(module: nn.Module) -> tuple[int | None, int | None]:
    """Bits of a layer's weight and activations; of two activations the fewer. None is floating point."""

    def bits(attribute: str) -> int | None:
        spec = getattr(getattr(module, attribute, None), "spec", None)
        found: int | None = getattr(spec, "bits", None)
        return found

    operands = [found for found in map(bits, ("input_quantizer", "second_quantizer")) if found is not None]
    return bits("weight_quantizer"), min(operands, default=None)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The floating tensors in nested tuples, lists and mappings, and in `sample` of other objects."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.numel():
            yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)
    elif isinstance(getattr(value, "sample", None), Tensor):
        yield from tensors_in(value.sample)


@contextmanager
def still(*modules: nn.Module) -> Iterator[None]:
    """Inside, modules are in evaluation mode and no parameter asks for a gradient; afterwards as they were."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    asking = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    for part, _ in modes:
        part.training = False
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
        for parameter in asking:
            parameter.requires_grad_(True)


@contextmanager
def swapped(denoiser: nn.Module, name: str, layer: nn.Module) -> Iterator[None]:
    """Inside, `layer` sits wherever the denoiser's module `name` sits."""
    present = denoiser.get_submodule(name)
    places = [
        (parent, key) for parent in denoiser.modules() for key, child in parent._modules.items() if child is present
    ]
    for parent, key in places:
        parent._modules[key] = layer
    try:
        yield
    finally:
        for parent, key in places:
            parent._modules[key] = present


@contextmanager
def clock_following(reference: nn.Module, candidate: nn.Module) -> Iterator[None]:
    """Inside, calls of the reference set the candidate's clock, so that its layers can be called one by one."""
    clock = clock_of(candidate)
    with ExitStack() as stack:
        if clock is not None:
            argument, position = timestep_argument(reference)

            def follow(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                clock.set(kwargs[argument] if argument in kwargs else args[position])

            handle = reference.register_forward_pre_hook(follow, with_kwargs=True)
            stack.callback(handle.remove)
        yield
