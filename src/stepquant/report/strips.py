"""Thin pictures that sit in a table: a line of coloured cells for each layer, a line of frames for each film.

The text beside them is the page's own, so that it can be read, searched and copied at every width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np

from stepquant.errors import EvaluationError
from stepquant.report.figures import fitted, image_data_uri, levels

__all__ = ["MISSING", "film_uri", "log_places", "scale_uri", "strip_uri", "ticks"]

MISSING = (255, 0, 170)
"""Colour of a cell without a finite value; the colour map has none like it."""

_MAP = "viridis"
FRAME = 96
"""Larger frames of a film are scaled down to this many pixels."""


def strip_uri(places: Sequence[float | None]) -> str:
    """A picture one pixel high, one pixel for each place in [0, 1] from dark to bright; None in the colour MISSING."""
    if not places:
        raise EvaluationError("A strip needs at least one cell.")
    known = np.asarray([0.0 if place is None else place for place in places])
    pixels = np.round(matplotlib.colormaps[_MAP](known.clip(0.0, 1.0))[:, :3] * 255).astype(np.uint8)
    pixels[[place is None for place in places]] = MISSING
    return image_data_uri(pixels[None])


def scale_uri() -> str:
    """The colours from 0 to 1, for a legend."""
    return strip_uri([number / 63 for number in range(64)])


def log_places(values: Sequence[float | None], low: float, high: float) -> list[float | None]:
    """Where values lie between low and high on a logarithmic scale, in [0, 1]; low and high positive."""
    span = math.log(high / low) or 1.0
    return [None if value is None else min(1.0, max(0.0, math.log(max(value, low) / low) / span)) for value in values]


def film_uri(frames: Any) -> str:
    """Frames `[S, C, H, W]` in [0, 1] side by side in one picture; large ones are scaled down to `FRAME` pixels."""
    shown = [fitted(frame, FRAME) for frame in levels(frames)]
    return image_data_uri(np.concatenate(shown, axis=1))


def ticks(count: int, most: int) -> list[int]:
    """At most `most` of 0 .. count - 1, evenly spread, first and last among them, ascending."""
    return sorted({round(place) for place in np.linspace(0, count - 1, min(count, most))})
