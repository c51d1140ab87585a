"""Learning the scales of weights whose rounding stays.

A common factor f of all scales of one output channel comes out of the layer's operator,

    operator(x, f W) = f operator(x, W),        dL/df = sum(dL/dy * operator(x, W)) over everything but the channel

so that learning it needs no gradient of the weight, nor a copy of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import torch
from torch import Tensor, nn

from stepquant.model.layer import Geometry, QuantizedLayer
from stepquant.model.quantizer import WeightQuantizer

__all__ = ["closed_scale_", "learnt_scale_", "rescale_"]

_FACTOR = "weight_factor"


@dataclass(frozen=True)
class _Scaled(Geometry):
    """Stands in the place of a layer's geometry: what is applied has its weight scaled by the layer's factor."""

    layer: QuantizedLayer = field(kw_only=True, repr=False, compare=False)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # Asked of the layer in each call: where blocks come to the device in turn, the factor there is another tensor.
        factor: Tensor = getattr(self.layer, _FACTOR)
        y = super().apply(x, weight, None)
        shape = (-1, *(1,) * (-1 - self.channel_axis))
        y = y * factor.to(y.dtype).reshape(shape)
        return y if bias is None else y + bias.reshape(shape)

    def plain(self) -> Geometry:
        return Geometry(**{one.name: getattr(self, one.name) for one in fields(Geometry)})


def learnt_scale_(layer: QuantizedLayer) -> nn.Parameter:
    """Open the scales of a hardened weight: the factor of each output channel, float32 `[O]`, 1 at first.

    Of a weight with one scale for all of it, one factor, `[1]`.
    """
    quantizer = layer.weight_quantizer
    assert isinstance(quantizer, WeightQuantizer)
    assert layer.on_grid
    factor = nn.Parameter(torch.ones(len(quantizer.scale), device=quantizer.scale.device))
    layer.register_parameter(_FACTOR, factor)
    layer.geometry = _Scaled(**vars(layer.geometry), layer=layer)
    return factor


def closed_scale_(layer: QuantizedLayer) -> None:
    """Multiply the scales by what was learnt, for good."""
    stand_in, quantizer = layer.geometry, layer.weight_quantizer
    assert isinstance(stand_in, _Scaled)
    assert isinstance(quantizer, WeightQuantizer)
    factor: Tensor = getattr(layer, _FACTOR).detach()
    layer.geometry = stand_in.plain()
    delattr(layer, _FACTOR)
    rescale_(layer, quantizer.scale * factor.reshape(-1, *(1,) * (quantizer.scale.ndim - 1)))


def rescale_(layer: QuantizedLayer, scale: Tensor) -> None:
    """Give a hardened weight these scales; its levels stay."""
    quantizer = layer.weight_quantizer
    assert isinstance(quantizer, WeightQuantizer)
    levels = quantizer.levels(layer.weight.detach())
    quantizer.scale.copy_(scale)
    layer.weight.data = quantizer.restore(levels).to(layer.weight.dtype)
