"""Rounding that is learnt behind quantized activations, of which a random share stays in full precision.

    x~ = m * x + (1 - m) * x_hat,   m ~ Bernoulli(p) for every element, drawn anew in every iteration

x_hat is the quantized activation, x what goes into the quantizer. The inputs of the unit are mixed in the same way: x
from the full-precision prefix, x_hat from the quantized one.

Source: Wei et al. 2022, "QDrop: Randomly Dropping Quantization for Extremely Low-bit Post-Training Quantization".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stepquant.errors import SpecError

__all__ = ["DroppingQuantizer", "QDrop", "dropping", "mixed"]


@dataclass(frozen=True)
class QDrop:
    """Activations are quantized while a unit's rounding is learnt, some of their elements at random not.

    activations: share of the elements of every quantized activation that stays in full precision, p.
    inputs: share of the elements of the unit's inputs that comes from the full-precision prefix.
    lr_scales: activation scales are learnt together with the rounding at this rate, relative to each scale, with cosine
        decay to 0; 0 keeps them.
    decay_rounding: the rate of the rounding decays by the same cosine.
    """

    activations: float = 0.5
    inputs: float = 0.5
    lr_scales: float = 4e-3
    decay_rounding: bool = False

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    """A nested dataclass ignores unknown keys otherwise."""

    def __post_init__(self) -> None:
        for name in ("activations", "inputs"):
            if not 0 <= getattr(self, name) <= 1:
                raise SpecError(f"{name} of QDrop is a share and must lie in [0, 1], found {getattr(self, name)}.")
        if self.lr_scales < 0:
            raise SpecError(f"lr_scales of QDrop must not be negative, found {self.lr_scales}.")


class DroppingQuantizer(nn.Module):
    """Stands in a quantizer's place and lets a random share of the elements through as they are."""

    def __init__(self, quantizer: nn.Module, share: float, generator: torch.Generator) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.share = share
        self.generator = generator

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = mixed(self.quantizer(x), x, self.share, self.generator)
        return found


def mixed(quantized: Any, plain: Any, share: float, generator: torch.Generator) -> Any:
    """`quantized` with a random share of its elements from `plain`, each element for itself.

    Only floating tensors of one shape are mixed; anything else is `quantized` as it is. The generator lives on the CPU,
    so the numbers do not depend on the device.
    """
    if not (isinstance(quantized, Tensor) and isinstance(plain, Tensor) and quantized.is_floating_point()):
        return quantized
    if quantized.shape != plain.shape:
        return quantized
    kept = torch.rand(quantized.shape, generator=generator) < share
    return torch.where(kept.to(quantized.device), plain, quantized)


@contextmanager
def dropping(layers: Mapping[str, nn.Module], share: float, generator: torch.Generator) -> Iterator[None]:
    """Inside, every activation quantizer of the layers drops; afterwards the quantizers are in place as before."""
    before: list[tuple[nn.Module, str, nn.Module]] = []
    for layer in layers.values():
        for attribute in ("input_quantizer", "second_quantizer"):
            quantizer = getattr(layer, attribute, None)
            if quantizer is not None:
                before.append((layer, attribute, quantizer))
                setattr(layer, attribute, DroppingQuantizer(quantizer, share, generator))
    try:
        yield
    finally:
        for layer, attribute, quantizer in before:
            setattr(layer, attribute, quantizer)
