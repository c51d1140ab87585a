"""Pictures of the report: curves as SVG, images as PNG, all as text that goes into the page.

Figures are drawn on objects of their own; nothing changes matplotlib's global state.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from PIL import Image

from stepquant.errors import EvaluationError

__all__ = [
    "COLOURS",
    "INK",
    "MOST_PIXELS",
    "Curve",
    "as_svg",
    "comparison_picture",
    "curves_svg",
    "difference",
    "fitted",
    "image_data_uri",
    "levels",
    "literal",
    "unobtrusive",
]

Curve = tuple[str, Sequence[float], Sequence[float]]
"""Label, values across (timesteps) and values up."""

COLOURS = ("#3b7dd8", "#d8663b", "#2f9e6e", "#a04fc4", "#b8901f", "#5a6b7b")
"""Of the checkpoints, in the order in which they were given; readable on white and on near-black."""

_DIFFERENCE_GAIN = 4.0
INK = "#87898b"
"""Of lines and text. In an `<svg>` element it becomes the page's colour for soft text, another one in the dark."""

_PAGE_INK = f"var(--soft, {INK})"

MOST_PIXELS = 512
"""Larger images are scaled down to this many pixels on the page; differences are taken before."""

_LEGEND_LETTERS = 80
"""About as many letters fit side by side below a plot."""


def curves_svg(title: str, unit: str, curves: Sequence[tuple[Curve, str, str]], *, logarithmic: bool = False) -> str:
    """One plot over the sampling steps as an `<svg>` element; noise is on the left.

    curves: the curve, its colour and its line style ("-", "--", ":").
    """
    figure = Figure(figsize=(5.2, 3.3), layout="constrained")
    axes = figure.add_subplot()
    for (label, across, up), colour, style in curves:
        values = np.asarray(up, dtype=float)
        if logarithmic:
            values = np.where(values > 0, values, np.nan)
        axes.plot(np.asarray(across, dtype=float), values, style, color=colour, label=literal(label), linewidth=1.6)
    axes.set_title(literal(title), fontsize=11, color=INK)
    axes.set_xlabel("timestep (noise on the left, image on the right)", fontsize=9, color=INK)
    axes.set_ylabel(literal(unit), fontsize=9, color=INK)
    axes.invert_xaxis()
    if logarithmic and any(np.nanmax(np.asarray(up, dtype=float), initial=0.0) > 0 for (_, _, up), _, _ in curves):
        axes.set_yscale("log")
    unobtrusive(axes)
    # Below the plot, where it hides no curve.
    longest = max((len(label) for (label, _, _), _, _ in curves), default=0)
    columns = max(1, min(len(curves), 3, _LEGEND_LETTERS // (longest + 8)))
    figure.legend(loc="outside lower center", ncols=columns, fontsize=8, frameon=False, labelcolor=INK)
    return as_svg(figure, title)


def unobtrusive(axes: Any) -> None:
    """Grey lines on no background: fits a light and a dark page."""
    axes.patch.set_alpha(0.0)
    axes.grid(visible=True, color=INK, alpha=0.25, linewidth=0.6)
    axes.tick_params(which="both", colors=INK, labelsize=8)
    for name, spine in axes.spines.items():
        spine.set_color(INK)
        spine.set_visible(name in ("left", "bottom"))


def literal(text: str) -> str:
    """Text that matplotlib does not take for a formula, nor a legend for a label to leave out."""
    escaped = text.replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped


def as_svg(figure: Figure, title: str) -> str:
    """The figure as an `<svg>` element whose ids begin with the title, so that several fit into one page."""
    figure.patch.set_alpha(0.0)
    stream = io.StringIO()
    # Empty metadata and ids that follow from the title: no date and no address in the page, and the same bytes for the
    # same numbers.
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with rc_context({"svg.hashsalt": title}):
        FigureCanvasSVG(figure).print_svg(stream, metadata=nothing)
    text = stream.getvalue()
    body = text[text.index("<svg") :]
    body = re.sub(r"\s*<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = body.replace(INK, _PAGE_INK)
    return _with_own_ids(body, title)


def _with_own_ids(svg: str, prefix: str) -> str:
    """Several plots share one page, so the ids of each get a prefix of their own."""
    own = re.sub(r"\W+", "-", prefix)
    svg = re.sub(r'\bid="', f'id="{own}-', svg)
    svg = re.sub(r'href="#', f'href="#{own}-', svg)
    return re.sub(r"url\(#", f"url(#{own}-", svg)


def levels(images: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """uint8 `[N, H, W, C]` from floats `[N, C, H, W]` in [0, 1], array or tensor; C = 1 or 3.

    Of videos `[N, frames, C, H, W]` the first frames.
    """
    array = np.asarray(images, dtype=np.float32)
    array = array[:, 0] if array.ndim == 5 else array
    if array.ndim != 4 or array.shape[1] not in (1, 3):
        raise EvaluationError(f"Images of a report have shape [N, 1 or 3, H, W], found {list(array.shape)}.")
    # NaN, which a broken model gives, is shown as black.
    clean = np.nan_to_num(array, nan=0.0, posinf=1.0, neginf=0.0).clip(0.0, 1.0)
    return np.round(clean.transpose(0, 2, 3, 1) * 255).astype(np.uint8)


def difference(images: Any, reference: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Grey is equal, brighter is more and darker is less, four times enlarged: `[N, C, H, W]` in [0, 1]."""
    delta = np.asarray(images, dtype=np.float32) - np.asarray(reference, dtype=np.float32)
    return (0.5 + 0.5 * _DIFFERENCE_GAIN * delta).clip(0.0, 1.0).astype(np.float32)


def image_data_uri(image: np.ndarray[Any, np.dtype[np.uint8]]) -> str:
    """A `data:` address with the PNG of one image `[H, W, C]`, as it is."""
    stream = io.BytesIO()
    Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(stream, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def fitted(image: np.ndarray[Any, np.dtype[np.uint8]], most: int = MOST_PIXELS) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """An image `[H, W, C]`, scaled down if it has more than `most` pixels on a side."""
    if max(image.shape[:2]) <= most:
        return image
    picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    picture.thumbnail((most, most), Image.Resampling.LANCZOS)
    return np.atleast_3d(np.asarray(picture))


def comparison_picture(rows: Mapping[str, Any], seeds: Sequence[int]) -> bytes:
    """PNG with one labelled row of images for each entry, the same seeds below each other.

    rows: label -> floats `[N, C, H, W]` in [0, 1].
    """
    figure = Figure(figsize=(1.75 + 1.02 * len(seeds), 0.35 + 1.04 * len(rows)), dpi=120, facecolor="white")
    grid = figure.add_gridspec(
        len(rows), len(seeds), left=1.7 / figure.get_figwidth(), right=0.995, bottom=0.01,
        top=1 - 0.32 / figure.get_figheight(), wspace=0.04, hspace=0.04,
    )  # fmt: skip
    for row, (label, images) in enumerate(rows.items()):
        for column, image in enumerate(levels(images)):
            axes = figure.add_subplot(grid[row, column])
            shown = image[:, :, 0] if image.shape[2] == 1 else image
            axes.imshow(shown, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            if row == 0:
                axes.set_title(f"seed {seeds[column]}", fontsize=8, pad=3)
            if column == 0:
                axes.set_ylabel(literal(label), fontsize=10, rotation=0, ha="right", va="center", labelpad=8)
    stream = io.BytesIO()
    FigureCanvasAgg(figure).print_png(stream)
    return stream.getvalue()
