"""Weights of an autoencoder's decoder in few bits, to make it smaller; activations stay in floating point.

The decoder of a latent model runs once an image, and for large images its activations decide about memory and time. So
only its weights are quantized, with a scale for each output channel and without any data; nothing changes over time.
What comes out is an autoencoder of diffusers, which diffusers' own `save_pretrained` saves, packed, and its
`from_pretrained` loads, alone and in a pipeline.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from stepquant.calibrate.ranges import RangeRule, weight_params
from stepquant.errors import ModelError, SpecError
from stepquant.model.clock import StepClock, attach_clock, clock_of
from stepquant.model.components import class_identity
from stepquant.model.layer import QuantizedLayer
from stepquant.model.quantizer import WeightQuantizer
from stepquant.model.surgery import Rule, make_plan, quantizable, quantized_layers, swap_layers_
from stepquant.numerics.spec import LayerScheme, scheme_for
from stepquant.pretrained import attach_

__all__ = ["quantize_decoder"]

LEAST_SHARE = 0.5
"""Of the decoder's weights that must lie in layers that can be quantized."""


@torch.no_grad()
def quantize_decoder(autoencoder: Any, *, weights: int = 8, ranges: RangeRule = "mse") -> Any:
    """A copy of the autoencoder whose decoder has quantized weights; the encoder and the given one stay as they are.

        pipe.vae = quantize_decoder(pipe.vae, weights=8)

    autoencoder: one of diffusers' with a `decoder`: AutoencoderKL, AutoencoderDC, VQModel, AutoencoderTiny, ...
    weights: bits, 2 to 8. The decoder's first and last layer have 8.
    ranges: how scales are chosen, as in `FitWeightRanges`.

    Raises ModelError if there is no decoder, if it is quantized already, or if less than half of its weights are in
    Linear and Conv2d layers (the decoders of videos are made of Conv3d), SpecError for the bits.
    """
    if not isinstance(weights, int) or not 2 <= weights <= 8:
        raise SpecError(f"The decoder's weights take 2 to 8 bits, found {weights!r}.")
    names = _layers_of(autoencoder)
    result = copy.deepcopy(autoencoder).requires_grad_(False).eval()
    eight = LayerScheme(weight=scheme_for(8, None).weight)
    rules = [Rule(name, LayerScheme(weight=scheme_for(weights, None).weight)) for name in names]
    plan = make_plan(result, [*rules, *(Rule(name, eight) for name in _ends(names))])
    swap_layers_(result, plan)
    for name, layer in quantized_layers(result).items():
        spec = plan[name].weight
        assert isinstance(layer, QuantizedLayer)
        assert spec is not None
        quantizer = WeightQuantizer(spec, weight_params(layer.weight, spec, ranges))
        layer.weight_quantizer = quantizer.to(layer.weight.device)
        layer.harden_()
    # A decoder has no timesteps: the clock that every quantized model has stays in its only bin, whatever it reads.
    attach_clock(result, StepClock(torch.empty(0), "sample", 0))
    attach_(result)
    return result


def _layers_of(autoencoder: Any) -> list[str]:
    """The decoder's quantizable layers, by full name, and the one that leads into it."""
    kind = type(autoencoder).__name__
    decoder = getattr(autoencoder, "decoder", None)
    if not isinstance(decoder, nn.Module) or class_identity(autoencoder)[0] != "diffusers":
        raise ModelError(f"Expected an autoencoder of diffusers with a decoder, found {kind}.")
    if clock_of(autoencoder) is not None:
        raise ModelError(f"The {kind} has been quantized before: give the full-precision one.")
    found = quantizable(autoencoder)
    names = [name for name in found if name.startswith("decoder.") or name == "post_quant_conv"]
    held = sum(found[name].weight.numel() for name in names if name.startswith("decoder."))
    share = held / sum(parameter.numel() for parameter in decoder.parameters())
    if share < LEAST_SHARE:
        raise ModelError(
            f"Only {share:.0%} of the weights in the decoder of {kind} are in Linear and Conv2d layers, so quantizing "
            "those would hardly make it smaller. Decoders of videos (Conv3d) are not supported."
        )
    return names


def _ends(names: list[str]) -> tuple[str, str]:
    """The decoder's first and last layer; diffusers builds them in this order."""
    inside = [name for name in names if name.startswith("decoder.")]
    return inside[0], inside[-1]
