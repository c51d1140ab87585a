"""The structure of a quantized denoiser as plain data, and back: shared by checkpoints and by resumable work folders.

A structure says which layers are quantized and how, how many timestep bins the clock has, and how many rows each
activation quantizer has. It holds no tensors: `assemble_` gives every quantizer buffers of the right shape, and the
caller loads the values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from stepquant.errors import ModelError
from stepquant.model.clock import StepClock, attach_clock, clock_of
from stepquant.model.families import make_attention_explicit_
from stepquant.model.layer import LowRankBranch, Matmul, QuantizedLayer, QuantizedMatmul
from stepquant.model.quantizer import DynamicQuantizer, InputQuantizer, LogQuantizer, WeightQuantizer
from stepquant.model.surgery import operand_specs, quantizable, quantized_layers, swap_layers_
from stepquant.model.transform import InputTransform, TransformSpec
from stepquant.numerics.affine import QParams, grouped
from stepquant.numerics.spec import LayerScheme, QuantSpec

__all__ = ["ClockStructure", "LayerStructure", "Structure", "assemble_", "channel_axis", "describe"]


@dataclass(frozen=True)
class ClockStructure:
    """bins: number of timestep bins; argument, position: where the denoiser takes its timestep."""

    bins: int
    argument: str
    position: int


@dataclass(frozen=True)
class LayerStructure:
    """scheme: how the layer is quantized. rows: parameter sets of its static activation quantizers, by attribute.

    transform: what happens to its input first. rank: of its branch in floating point. None: there is none.
    """

    scheme: LayerScheme
    rows: dict[str, int]
    transform: TransformSpec | None = None
    rank: int | None = None


@dataclass(frozen=True)
class Structure:
    """explicit_attention: whether attention runs through `ExplicitAttention` (its matmuls are layers)."""

    clock: ClockStructure
    layers: dict[str, LayerStructure]
    explicit_attention: bool


def _spec_of(quantizer: nn.Module | None, where: str) -> QuantSpec | None:
    if quantizer is None:
        return None
    if isinstance(quantizer, WeightQuantizer | InputQuantizer | LogQuantizer | DynamicQuantizer):
        return quantizer.spec
    raise ModelError(
        f"{where} holds {type(quantizer).__name__}, which is only for calibration: the stage that put it there must "
        "harden it before the model is saved."
    )


def describe(denoiser: nn.Module) -> Structure:
    """The structure of a quantized denoiser. Raises ModelError if something is not hardened."""
    clock = clock_of(denoiser)
    if clock is None:
        raise ModelError(f"{type(denoiser).__name__} has no step clock: it has not been quantized.")
    layers: dict[str, LayerStructure] = {}
    for name, layer in quantized_layers(denoiser).items():
        inputs = {"input_quantizer": layer.input_quantizer}
        if isinstance(layer, QuantizedMatmul):
            inputs["second_quantizer"] = layer.second_quantizer
        weight = layer.weight_quantizer if isinstance(layer, QuantizedLayer) else None
        scheme = LayerScheme(
            weight=_spec_of(weight, f"The weight of {name}"),
            input=_spec_of(layer.input_quantizer, f"The input of {name}"),
            second=_spec_of(inputs.get("second_quantizer"), f"The second operand of {name}"),
        )
        rows = {key: value.rows for key, value in inputs.items() if isinstance(value, InputQuantizer | LogQuantizer)}
        transform = layer.input_transform if isinstance(layer, QuantizedLayer) else None
        branch = layer.branch if isinstance(layer, QuantizedLayer) else None
        layers[name] = LayerStructure(
            scheme,
            rows,
            None if transform is None else transform.spec,
            None if branch is None else branch.rank,
        )
    explicit = any(isinstance(layer, QuantizedMatmul) for layer in quantized_layers(denoiser).values())
    explicit = explicit or any(isinstance(module, Matmul) for module in denoiser.modules())
    return Structure(ClockStructure(clock.bins, clock.argument, clock.position), layers, explicit)


def channel_axis(layer: QuantizedLayer) -> int:
    """Axis of a layer's input channels, counted from the end."""
    return layer.geometry.channel_axis


def _empty_input_quantizer(
    spec: QuantSpec, clock: StepClock, rows: int, layer: QuantizedLayer | QuantizedMatmul, name: str
) -> nn.Module:
    """A quantizer of the right shape whose values are still to be loaded."""
    if spec.dynamic:
        return DynamicQuantizer(spec)
    if spec.logarithmic:
        return LogQuantizer(spec, clock, torch.ones(rows), torch.zeros(rows, dtype=torch.bool))
    if spec.granularity != "channel":
        return InputQuantizer(spec, clock, QParams(torch.ones(rows), torch.zeros(rows)))
    if isinstance(layer, QuantizedMatmul):
        raise ModelError(f"{name} is a matmul, whose operands have one scale per tensor, found one per channel.")
    shape = (rows, layer.in_features)
    params = QParams(torch.ones(shape), torch.zeros(shape))
    return InputQuantizer(spec, clock, params, channel_axis=channel_axis(layer))


def _empty_weight_quantizer(spec: QuantSpec, weight: torch.Tensor) -> WeightQuantizer:
    shape = (*grouped(torch.empty(weight.shape, device="meta"), spec).shape[:-1], 1)
    return WeightQuantizer(spec, QParams(torch.ones(shape), torch.zeros(shape)))


def _attach_empty_parts_(layer: QuantizedLayer, described: LayerStructure, name: str) -> None:
    """Transform and branch of the right shape."""
    if described.transform is None and described.rank is None:
        return
    if layer.geometry.groups != 1:
        raise ModelError(
            f"{name} is a convolution of {layer.geometry.groups} groups; inputs are transformed, and branches added, "
            "only without groups."
        )
    if described.transform is not None:
        scale = torch.ones(layer.in_features) if described.transform.scaled else None
        layer.input_transform = InputTransform(
            layer.in_features, layer.geometry.channel_axis, scale=scale, block=described.transform.block
        )
    if described.rank is not None:
        if described.rank < 1:
            raise ModelError(f"The branch of {name} must have a rank of at least 1, found {described.rank}.")
        down = torch.empty(described.rank, *layer.weight.shape[1:], dtype=layer.weight.dtype)
        up = torch.empty(layer.out_features, described.rank, dtype=layer.weight.dtype)
        layer.branch = LowRankBranch(layer.geometry, down, up)


def assemble_(denoiser: nn.Module, structure: Structure) -> None:
    """Turn a float denoiser into the quantized one that `structure` describes; quantizer values are placeholders."""
    if structure.explicit_attention:
        make_attention_explicit_(denoiser)
    known = quantizable(denoiser)
    swap_layers_(denoiser, {name: layer.scheme for name, layer in structure.layers.items()})
    clock = StepClock(torch.arange(structure.clock.bins - 1), structure.clock.argument, structure.clock.position)
    attach_clock(denoiser, clock)
    layers = quantized_layers(denoiser)
    for name, described in structure.layers.items():
        layer = layers[name]
        if isinstance(layer, QuantizedMatmul) and described.scheme.weight is not None:
            raise ModelError(f"{name} is a matmul and has no weight, but its scheme quantizes one.")
        if isinstance(layer, QuantizedLayer) and described.scheme.second is not None:
            raise ModelError(f"{name} is a {type(known[name]).__name__} and has one input, but its scheme has two.")
        if isinstance(layer, QuantizedLayer) and described.scheme.weight is not None:
            layer.weight_quantizer = _empty_weight_quantizer(described.scheme.weight, layer.weight)
        if isinstance(layer, QuantizedLayer):
            _attach_empty_parts_(layer, described, name)
        elif described.transform is not None or described.rank is not None:
            raise ModelError(f"{name} is a matmul, which has neither a transform nor a branch.")
        for attribute, spec in operand_specs(described.scheme):
            rows = described.rows.get(attribute, 1)
            setattr(layer, attribute, _empty_input_quantizer(spec, clock, rows, layer, name))
