"""Activation quantizers whose rows have different bits, for the models of `tiny`."""

from __future__ import annotations

from typing import Any

import torch

from stepquant.model.clock import StepClock
from stepquant.model.quantizer import InputQuantizer
from stepquant.model.surgery import quantized_layers
from stepquant.numerics.affine import QParams, choose_qparams
from stepquant.numerics.spec import QuantSpec, row_spec

BITS = (4, 8, 3)
ROWS = torch.tensor([2, 0, 1, 1, 0])
"""The row of each of the five bins of `tiny.quantize_`."""


def table(spec: QuantSpec, bits: tuple[int, ...], channels: int | None = None) -> QParams:
    """A range for each row, fitted to its own bits; zero points differ."""
    found = []
    for row, own in enumerate(bits):
        top = torch.tensor([1.0 + row]) if channels is None else torch.linspace(1, 2 + row, channels)
        found.append(choose_qparams(-top * (0.3 + 0.4 * row), top, row_spec(spec, own)))
    join = torch.cat if channels is None else torch.stack
    return QParams(join([one.scale for one in found]), join([one.zero_point for one in found]))


def mixed(spec: QuantSpec, clock: StepClock, bits: tuple[int, ...] = BITS) -> InputQuantizer:
    return InputQuantizer(spec, clock, table(spec, bits), ROWS, bits=bits)


def mixed_(denoiser: Any, bits: tuple[int, ...] = BITS) -> Any:
    """Give every static activation quantizer of a denoiser rows of these bits."""
    for layer in quantized_layers(denoiser).values():
        for attribute in ("input_quantizer", "second_quantizer"):
            quantizer = getattr(layer, attribute, None)
            if isinstance(quantizer, InputQuantizer):
                setattr(layer, attribute, mixed(quantizer.spec, quantizer.clock, bits))
    return denoiser
