"""The layers that the doctor looks at: names, channels, bits, and pairs of a layer and its full-precision original."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.calibrate.own_errors import reference_of
from stepquant.model.layer import Geometry, QuantizedLayer, QuantizedMatmul
from stepquant.model.quantizer import InputQuantizer
from stepquant.model.surgery import quantizable

__all__ = [
    "axis_of_channels",
    "bits_of",
    "differing_modules",
    "other_parts",
    "paired_layers",
    "parts_of_layers",
    "reference_of",
    "swapped",
    "tensors_in",
]


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


def differing_modules(reference: nn.Module, candidate: nn.Module) -> dict[str, float]:
    """Modules that are no layers of `paired_layers` (norms, embeddings) and hold other numbers in the candidate.

    Name -> |a - b| / |a| over the module's own parameters and buffers that both have, the largest first; infinite for
    another shape.
    """
    layers = {id(part) for layer in quantizable(reference).values() for part in layer.modules()}
    theirs = dict(candidate.named_modules())
    found = {
        name: _difference(module, theirs[name])
        for name, module in reference.named_modules()
        if name in theirs and id(module) not in layers
    }
    return {name: value for name, value in sorted(found.items(), key=lambda item: -item[1]) if value > 0}


def _difference(one: nn.Module, other: nn.Module) -> float:
    """Of the floating tensors that both modules hold themselves."""
    ours, theirs = (
        {**dict(part.named_parameters(recurse=False)), **dict(part.named_buffers(recurse=False))}
        for part in (one, other)
    )
    error = norm = 0.0
    for name in ours.keys() & theirs.keys():
        a, b = ours[name].detach(), theirs[name].detach()
        if not a.is_floating_point():
            continue
        if a.shape != b.shape:
            return math.inf
        exact = a.double().cpu()
        error += float((b.double().cpu() - exact).square().sum())
        norm += float(exact.square().sum())
    if error == 0:
        return 0.0
    # NaN is found as a parameter that is not finite; here it is only different.
    return (error / norm) ** 0.5 if norm > 0 and math.isfinite(error) else math.inf


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
    """Bits of a layer's weight and activations; of two activations, and of several steps, the fewest.

    None is floating point.
    """

    def bits(attribute: str) -> int | None:
        quantizer = getattr(module, attribute, None)
        if isinstance(quantizer, InputQuantizer):
            return min(quantizer.bits)
        spec = getattr(quantizer, "spec", None)
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


def other_parts(pipe: Any, denoiser: nn.Module) -> dict[str, nn.Module]:
    """The pipeline's networks beside the denoiser by name: text encoders, the decoder."""
    parts = getattr(pipe, "components", None) or vars(pipe)
    return {name: part for name, part in parts.items() if isinstance(part, nn.Module) and part is not denoiser}


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
