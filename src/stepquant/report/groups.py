"""Which parameter set every activation quantizer uses at every timestep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.errors import EvaluationError
from stepquant.model.clock import clock_of
from stepquant.model.families import find_denoiser
from stepquant.model.quantizer import InputQuantizer
from stepquant.model.surgery import quantized_layers

__all__ = ["Rows", "bin_timesteps", "rows_chosen", "rows_over_time"]

Rows = tuple[Sequence[str], Tensor, Sequence[float]]
"""Names of layers, the row of each in each bin `[layers, bins]`, and a timestep of each bin."""


def rows_chosen(denoiser: nn.Module) -> tuple[list[str], Tensor]:
    """Names of the static activation quantizers, and the row that each uses in each timestep bin, `[layers, bins]`.

    Rows are int64. Bins count upwards with the timestep, bin 0 is nearest to the image. The second operand of a matmul
    is "name (second)".
    Raises EvaluationError for a model without a step clock.
    """
    clock = clock_of(denoiser)
    if clock is None:
        raise EvaluationError(f"{type(denoiser).__name__} has no step clock: it has not been quantized.")
    names: list[str] = []
    rows: list[Tensor] = []
    for name, layer in quantized_layers(denoiser).items():
        for attribute, ending in (("input_quantizer", ""), ("second_quantizer", " (second)")):
            quantizer = getattr(layer, attribute, None)
            if isinstance(quantizer, InputQuantizer):
                names.append(name + ending)
                rows.append(quantizer.row_of_bin.cpu())
    return names, torch.stack(rows) if rows else torch.zeros(0, clock.bins, dtype=torch.int64)


def bin_timesteps(denoiser: nn.Module, timesteps: Tensor) -> list[float]:
    """A timestep of each bin of the denoiser's clock, ascending: those of a schedule, or the bins' numbers if the
    schedule leaves bins out.
    """
    clock = clock_of(denoiser)
    if clock is None:
        raise EvaluationError(f"{type(denoiser).__name__} has no step clock: it has not been quantized.")
    distinct = torch.unique(timesteps.detach().float())
    bins = torch.bucketize(distinct.to(clock.edges.device), clock.edges)
    complete = torch.equal(bins.cpu(), torch.arange(clock.bins))
    return [float(value) for value in (distinct if complete else range(clock.bins))]


def rows_over_time(pipe: Any) -> Rows:
    """What the page shows of a quantized pipeline that has sampled: names, rows and timesteps."""
    _, denoiser = find_denoiser(pipe)
    names, rows = rows_chosen(denoiser)
    return names, rows, bin_timesteps(denoiser, pipe.scheduler.timesteps)
