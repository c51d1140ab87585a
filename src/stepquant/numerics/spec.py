"""What a quantized tensor and a quantized layer look like: bits, granularity, symmetry."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

from stepquant.errors import SpecError

__all__ = [
    "Granularity",
    "LayerScheme",
    "QuantSpec",
    "RowSpec",
    "finer_at_8",
    "parse_bits",
    "row_spec",
    "scheme_for",
    "weight_at",
    "weight_spec",
]

Granularity = Literal["tensor", "channel", "group", "token", "channel_token"]


@dataclass(frozen=True)
class QuantSpec:
    """How one tensor is quantized.

    bits: 2 to 8.
    granularity: which elements share a scale: the whole tensor, one output channel (axis 0; for an
        activation, one of its own channels), `group_size` consecutive weights of one output channel, or one token
        (activations only: everything but the last axis). "channel_token" has two factors, one for each channel of a
        sample and one for each token (symmetric dynamic activations only).
    symmetric: zero point fixed at level 0 and levels from -2^(bits-1); otherwise levels start at 0 and the zero point
        is fitted.
    nonnegative: the tensor is never below zero (softmax output): the zero point is `qmin` and all levels are spent
        above zero.
    dynamic: the range is taken from each tensor at run time instead of from calibration (activations only).
    logarithmic: the levels may lie at powers of two, `numerics.log2`, as each row of the timestep table says
        (nonnegative static activations with one scale only).
    """

    bits: int
    granularity: Granularity = "tensor"
    symmetric: bool = False
    nonnegative: bool = False
    dynamic: bool = False
    group_size: int | None = None
    logarithmic: bool = False

    most_bits: ClassVar[int] = 8

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 2 <= self.bits <= self.most_bits:
            raise SpecError(f"bits must be a whole number from 2 to {self.most_bits}, found {self.bits!r}.")
        if self.granularity not in get_args(Granularity):
            raise SpecError(
                f"granularity must be one of {', '.join(get_args(Granularity))}, found {self.granularity!r}."
            )
        if (self.granularity == "group") != (self.group_size is not None):
            raise SpecError(
                f"group_size goes with granularity 'group' and only with it, found granularity {self.granularity!r} "
                f"and group_size {self.group_size!r}."
            )
        if self.group_size is not None and self.group_size < 1:
            raise SpecError(f"group_size must be at least 1, found {self.group_size}.")
        if self.symmetric and self.nonnegative:
            raise SpecError("A tensor that is never negative wastes half of a symmetric range: choose one of the two.")
        if self.granularity == "token" and not self.dynamic:
            raise SpecError("One scale per token is only known at run time: granularity 'token' needs dynamic=True.")
        if self.granularity == "channel_token" and not (self.dynamic and self.symmetric):
            raise SpecError(
                "Scales of channels and tokens are only known at run time, and both are sizes: granularity "
                "'channel_token' needs dynamic=True and symmetric=True."
            )
        if self.logarithmic and (not self.nonnegative or self.dynamic or self.granularity != "tensor"):
            raise SpecError(
                "Levels at powers of two are for static tensors that are never negative, with one scale: logarithmic "
                f"needs nonnegative=True, dynamic=False and granularity 'tensor', found {self}."
            )

    @property
    def qmin(self) -> int:
        """Lowest level, inclusive."""
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def qmax(self) -> int:
        """Highest level, inclusive."""
        return (1 << (self.bits - 1)) - 1 if self.symmetric else (1 << self.bits) - 1


@dataclass(frozen=True)
class RowSpec(QuantSpec):
    """Of one parameter set of an activation over time, which may have up to 16 bits. For arithmetic, not for schemes:
    beyond 8 bits levels fit no byte, so that no engine runs them.
    """

    most_bits: ClassVar[int] = 16


def row_spec(spec: QuantSpec, bits: int) -> RowSpec:
    """A spec with other bits, up to 16. Raises SpecError for a number out of range."""
    return RowSpec(**{**vars(spec), "bits": bits})


@dataclass(frozen=True)
class LayerScheme:
    """How one layer is quantized. None leaves that tensor in floating point.

    weight: the weight of a convolution or linear layer; must be None for a matmul.
    input: the layer's input; the left operand of a matmul.
    second: the right operand of a matmul, or the second part of an input that is split; None for every other layer.
    """

    weight: QuantSpec | None = None
    input: QuantSpec | None = None
    second: QuantSpec | None = None

    @property
    def quantizes(self) -> bool:
        """Whether anything at all is quantized."""
        return any(spec is not None for spec in (self.weight, self.input, self.second))


def parse_bits(text: str) -> tuple[int | None, int | None]:
    """`"W4A8"` -> (4, 8). 16 and 32 stand for floating point: `"W4A32"` -> (4, None)."""
    found = re.fullmatch(r"[wW](\d+)[aA](\d+)", text.strip())
    if not found:
        raise SpecError(f"A bit setting looks like 'W4A8' (weights 4 bits, activations 8), found {text!r}.")
    weight, activation = (None if int(part) in (16, 32) else int(part) for part in found.groups())
    return weight, activation


def weight_spec(bits: int, group_size: int | None = None) -> QuantSpec:
    """The usual levels of a weight: asymmetric, a scale per output channel or for every `group_size` inputs.

    Symmetric at 8 bits with a scale per channel: with a zero point they would take nine bits, which int8 kernels lack.
    """
    if group_size is not None:
        return QuantSpec(bits, "group", group_size=group_size)
    return QuantSpec(bits, "channel", symmetric=bits == QuantSpec.most_bits)


def finer_at_8(spec: QuantSpec) -> QuantSpec:
    """A weight's levels at 8 bits for the few layers where more matters than speed: the usual ones get a zero point.

    The last layer's weights make the prediction itself: an error of them is in every step, and leans the same way.
    """
    usual = spec == weight_spec(spec.bits, spec.group_size)
    return replace(spec, bits=QuantSpec.most_bits, symmetric=spec.symmetric and not usual)


def weight_at(spec: QuantSpec, bits: int) -> QuantSpec:
    """The levels of a weight at other bits: again the usual ones if they were, otherwise the same but for the bits."""
    usual = spec == weight_spec(spec.bits, spec.group_size)
    return weight_spec(bits, spec.group_size) if usual else replace(spec, bits=bits)


def scheme_for(weight_bits: int | None, activation_bits: int | None, group_size: int | None = None) -> LayerScheme:
    """The usual scheme of the diffusion literature at these bit widths.

    Weights as `weight_spec` has them, activations asymmetric per tensor (Q-Diffusion, PTQD, TFMQ-DM). None means
    floating point.
    """
    return LayerScheme(
        weight=None if weight_bits is None else weight_spec(weight_bits, group_size),
        input=None if activation_bits is None else QuantSpec(activation_bits),
    )
