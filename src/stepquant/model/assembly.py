"""The structure of a quantized denoiser as plain data, and back: shared by checkpoints and by resumable work folders.

A structure says which layers are quantized and how, how many timestep bins the clock has, and how many rows each
activation quantizer has. It holds no tensors: `assemble_` gives every quantizer buffers of the right shape, and the
caller loads the values.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from stepquant.errors import ModelError, SpecError
from stepquant.model.clock import StepClock, attach_clock, clock_of
from stepquant.model.families import make_attention_explicit_
from stepquant.model.first_token import FirstToken
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

    row_bits: bits of each of these rows, for those quantizers whose rows do not all have the bits of the scheme.
    transform: what happens to its input first. rank: of its branch in floating point. None: there is none.
    first_token: whether the first token passes by its input quantizer.
    split: channels of the first part of an input with two quantizers, None for one.
    """

    scheme: LayerScheme
    rows: dict[str, int]
    transform: TransformSpec | None = None
    rank: int | None = None
    row_bits: dict[str, tuple[int, ...]] = field(default_factory=dict)
    first_token: bool = False
    split: int | None = None


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
        split = layer.split if isinstance(layer, QuantizedLayer) else None
        if isinstance(layer, QuantizedMatmul) or split is not None:
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
            {
                key: value.row_bits
                for key, value in inputs.items()
                if isinstance(value, InputQuantizer) and value.row_bits is not None
            },
            isinstance(layer, QuantizedLayer) and layer.first_token is not None,
            split,
        )
    explicit = any(isinstance(layer, QuantizedMatmul) for layer in quantized_layers(denoiser).values())
    explicit = explicit or any(isinstance(module, Matmul) for module in denoiser.modules())
    return Structure(ClockStructure(clock.bins, clock.argument, clock.position), layers, explicit)


def channel_axis(layer: QuantizedLayer) -> int:
    """Axis of a layer's input channels, counted from the end."""
    return layer.geometry.channel_axis


def _empty_input_quantizer(
    spec: QuantSpec,
    clock: StepClock,
    rows: int,
    axis: int,
    channels: int | None,
    name: str,
    bits: tuple[int, ...] | None,
) -> nn.Module:
    """A quantizer of the right shape whose values are still to be loaded.

    channels, axis: of the operand; None for a matmul. bits: of each row, where they differ.
    """
    if bits is not None and (spec.dynamic or spec.logarithmic):
        raise ModelError(f"{name} has bits for each row of a quantizer without such rows: {spec}.")
    if spec.dynamic:
        return DynamicQuantizer(spec)
    if spec.logarithmic:
        return LogQuantizer(spec, clock, torch.ones(rows), torch.zeros(rows, dtype=torch.bool))
    if spec.granularity != "channel":
        quantizer = InputQuantizer(spec, clock, QParams(torch.ones(rows), torch.zeros(rows)), bits=bits)
    elif channels is None:
        raise ModelError(f"{name} is a matmul, whose operands have one scale per tensor, found one per channel.")
    else:
        shape = (rows, channels)
        params = QParams(torch.ones(shape), torch.zeros(shape))
        quantizer = InputQuantizer(spec, clock, params, channel_axis=axis, bits=bits)
    if bits is not None and quantizer.row_bits is None:
        raise ModelError(f"All {rows} rows of {name} have {bits[0]} bits: that is for the scheme to say.")
    return quantizer


def _empty_weight_quantizer(spec: QuantSpec, weight: torch.Tensor) -> WeightQuantizer:
    shape = (*grouped(torch.empty(weight.shape, device="meta"), spec).shape[:-1], 1)
    return WeightQuantizer(spec, QParams(torch.ones(shape), torch.zeros(shape)))


def _attach_empty_parts_(layer: QuantizedLayer, described: LayerStructure, name: str) -> None:
    """Transform, branch and first token of the right shape."""
    if described.first_token:
        if layer.geometry.kind != "linear":
            raise ModelError(f"{name} is a convolution, which has no tokens, but it has a first token of its own.")
        dtype = layer.weight.dtype
        empty = (torch.empty(size, dtype=dtype) for size in (layer.in_features, layer.out_features))
        layer.first_token = FirstToken(*empty)
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


def _split_(layer: QuantizedLayer | QuantizedMatmul, at: int, name: str) -> None:
    if isinstance(layer, QuantizedMatmul):
        raise ModelError(f"{name} is a matmul, which has two operands and no input in two parts.")
    try:
        layer.split_input_(at)
    except SpecError as error:
        raise ModelError(f"{name}: {error}") from None


def _channels_of(layer: QuantizedLayer | QuantizedMatmul, attribute: str) -> tuple[int | None, int]:
    """How many channels the operand of a quantizer has, and their axis; None for a matmul."""
    if isinstance(layer, QuantizedMatmul):
        return None, -1
    channels = layer.in_features
    if layer.split is not None:
        channels = layer.split if attribute == "input_quantizer" else channels - layer.split
    return channels, channel_axis(layer)


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
        if isinstance(layer, QuantizedLayer) and described.split is None and described.scheme.second is not None:
            raise ModelError(f"{name} is a {type(known[name]).__name__} and has one input, but its scheme has two.")
        if isinstance(layer, QuantizedLayer) and described.scheme.weight is not None:
            layer.weight_quantizer = _empty_weight_quantizer(described.scheme.weight, layer.weight)
        if isinstance(layer, QuantizedLayer):
            _attach_empty_parts_(layer, described, name)
        elif described.transform is not None or described.rank is not None or described.first_token:
            raise ModelError(f"{name} is a matmul, which has neither a transform, nor a branch, nor a first token.")
        if described.split is not None:
            _split_(layer, described.split, name)
        operands = operand_specs(described.scheme)
        for attribute in described.row_bits:
            if attribute not in dict(operands):
                raise ModelError(f"{name} has bits for the rows of {attribute}, which its scheme does not quantize.")
        for attribute, spec in operands:
            rows, bits = described.rows.get(attribute, 1), described.row_bits.get(attribute)
            channels, axis = _channels_of(layer, attribute)
            setattr(layer, attribute, _empty_input_quantizer(spec, clock, rows, axis, channels, name, bits))
