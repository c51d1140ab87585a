"""Which parameter set every activation quantizer uses at every timestep, as numbers and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from stepquant.errors import EvaluationError
from stepquant.model.clock import clock_of
from stepquant.model.families import find_denoiser
from stepquant.model.quantizer import InputQuantizer
from stepquant.model.surgery import quantized_layers
from stepquant.report.figures import INK, as_svg, literal, unobtrusive

__all__ = ["Rows", "bin_timesteps", "groups_svg", "rows_chosen", "rows_over_time"]

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
    """What the page shows of a quantized pipeline that has sampled: names, rows and timesteps for `groups_svg`."""
    _, denoiser = find_denoiser(pipe)
    names, rows = rows_chosen(denoiser)
    return names, rows, bin_timesteps(denoiser, pipe.scheduler.timesteps)


def groups_svg(title: str, names: Sequence[str], rows: Tensor, timesteps: Sequence[float]) -> str:
    """One line of cells for each layer, one column for each timestep, noise on the left, as an `<svg>` element.

    rows `[layers, bins]`: as `rows_chosen` returns them. A cell's colour is its row's place among those of the layer:
    rows of a search by argmax are ordered from narrow (dark) to wide (bright). Layers with one row are left out.
    timesteps: of the bins, ascending.
    Raises EvaluationError if the numbers do not fit together, or if no layer has more than one row.
    """
    if tuple(rows.shape) != (len(names), len(timesteps)):
        raise EvaluationError(
            f"The rows have shape {list(rows.shape)}, for {len(names)} names and {len(timesteps)} timesteps."
        )
    several = [number for number, row in enumerate(rows) if int(row.max()) > 0]
    if not several:
        raise EvaluationError("Every layer uses one parameter set at all timesteps: there is nothing to show.")
    chosen = rows[several].numpy()
    places = chosen / chosen.max(1, keepdims=True)
    # About 100 labels still fit; of more layers every second, third, ... is named.
    every = -(-len(several) // 100)
    figure = Figure(figsize=(6.2, 1.1 + 0.11 * min(len(several), 100)), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(places[:, ::-1], aspect="auto", interpolation="nearest", cmap="viridis", vmin=0.0, vmax=1.0)
    axes.set_title(literal(title), fontsize=11, color=INK)
    axes.set_xlabel("timestep (noise on the left, image on the right)", fontsize=9, color=INK)
    unobtrusive(axes)
    axes.grid(visible=False)
    shown = np.unique(np.linspace(0, len(timesteps) - 1, min(len(timesteps), 8)).round().astype(int))
    axes.set_xticks(shown, [f"{timesteps[len(timesteps) - 1 - column]:g}" for column in shown])
    axes.set_yticks(range(0, len(several), every), [literal(names[number]) for number in several[::every]])
    axes.tick_params(axis="y", labelsize=5, length=0)
    return as_svg(figure, title)
