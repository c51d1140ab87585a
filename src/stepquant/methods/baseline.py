"""Round to nearest, and the stages that every method starts from.

    w_hat = scale * (clamp(round(w / scale) + zero_point) - zero_point), scale by the best of 80 shrunk ranges

No learning: what every other method has to beat at the same bits. Also the start of every recipe: record the
full-precision pipeline, choose calibration samples, place quantizers, fit first ranges.

Differs from the paper: there is no paper; ranges follow the public code of Q-Diffusion (80 candidates, p = 2.4).
"""

from __future__ import annotations

from typing import Literal

from stepquant.calibrate.bias_correction import CorrectBiases
from stepquant.calibrate.gram import RoundLayers
from stepquant.calibrate.ranges import RangeRule
from stepquant.calibrate.stages import FitInputRanges, FitWeightRanges, LayerRule, Place, Record, Select
from stepquant.errors import SpecError, nearest
from stepquant.model.surgery import Ends
from stepquant.recipe import Recipe, Stage

__all__ = [
    "BIBTEX",
    "BLOCKS",
    "DRAWN_PRESETS",
    "LAYERS_FIRST",
    "PRESETS",
    "corrected_biases",
    "layers_first",
    "rows_over_time",
    "rtn",
    "start",
]

BIBTEX = ""

PRESETS: dict[str, dict[str, object]] = {
    "quick": {"samples": 32},
    "standard": {"samples": 64},
    "full": {"samples": 256},
}

LAYERS_FIRST: dict[str, object] = {"layer_rounding": True, "lr_weights": 1e-2, "together": 4}
"""In presets with few iterations: blocks start from rounded layers, and at a higher rate."""

BLOCKS: dict[str, dict[str, object]] = {
    "quick": {**LAYERS_FIRST, "iterations_weights": 100, "iterations_activations": 100, "lr_activations": 2e-3},
    "standard": {**LAYERS_FIRST, "iterations_weights": 800, "iterations_activations": 400, "lr_activations": 5e-3},
}
"""In presets of methods that reconstruct blocks for weights, and then for activation scales."""

DRAWN_PRESETS: dict[str, dict[str, object]] = {
    "quick": {
        "samples": 32,
        "batch": 8,
        "draws": 160,
        "rows": "step",
        "iterations": 150,
        "lr_scales": 2e-3,
        **LAYERS_FIRST,
    },
    "standard": {
        "samples": 64,
        "batch": 16,
        "draws": 320,
        "rows": "step",
        "iterations": 1_000,
        "lr_scales": 2e-3,
        **LAYERS_FIRST,
    },
}
"""Of methods that draw calibration samples, and reconstruct weights and activation scales together."""


def start(select: Stage, *placing: Stage, samples: int, batch: int, ranges: RangeRule) -> tuple[Stage, ...]:
    """Record, select, place, fit weight ranges: the common beginning of all recipes.

    placing: `Place`, or what stands for it, and what changes layers before their weights get ranges.
    """
    return (Record(samples=samples, batch=batch), select, *placing, FitWeightRanges(ranges))


KEEP_ROUNDING = 0.6
"""Block-wise rounding begins this far from the fraction towards what `RoundLayers` found: near enough to turn back."""


def layers_first(
    asked: bool, *, weights: int | None, batch: int, together: int
) -> tuple[tuple[RoundLayers, ...], float]:
    """`RoundLayers` if it is asked for, and the `keep_rounding` of the block-wise rounding behind it."""
    if not asked or weights is None:
        return (), 0.0
    return (RoundLayers(batch=batch, together=together),), KEEP_ROUNDING


def corrected_biases(asked: bool, *, batch: int) -> tuple[CorrectBiases, ...]:
    """`CorrectBiases` if it is asked for: behind the ranges of activations, whose rounding it is to see."""
    return (CorrectBiases(batch=batch),) if asked else ()


def rows_over_time(
    rows: str, lengths: tuple[int, ...] | None = None, allowed: tuple[str, ...] = ("shared", "step")
) -> tuple[int, ...] | Literal["step"] | None:
    """`FitInputRanges.windows` for a method's option `rows`: which timesteps share activation parameters."""
    if rows not in allowed:
        raise SpecError(f"rows must be one of {', '.join(allowed)}, found {rows!r}.{nearest(rows, allowed)}")
    return "step" if rows == "step" else lengths if rows == "window" else None


def rtn(
    *,
    weights: int | None = 4,
    activations: int | None = 8,
    samples: int = 64,
    batch: int = 16,
    every: int = 1,
    samples_per_step: int | None = None,
    rows: Literal["shared", "step"] = "shared",
    ends: Ends = "8bit",
    softmax_bits: int | None = 8,
    group_size: int | None = None,
    ranges: RangeRule = "mse",
    rules: tuple[LayerRule, ...] = (),
) -> Recipe:
    """Round every weight to the nearest level; activation ranges from recorded samples.

    rows: "step" gives every timestep an activation range of its own, "shared" one to all.
    """
    select = Select(every=every, samples_per_step=samples_per_step)
    place = Place(weights, activations, ends=ends, softmax_bits=softmax_bits, group_size=group_size, rules=rules)
    beginning = start(select, place, samples=samples, batch=batch, ranges=ranges)
    return Recipe("rtn", (*beginning, FitInputRanges(ranges, windows=rows_over_time(rows))))
