"""What the stages of a calibration reported: a table of their cost, plots of their losses, and learnt sample weights.

Figures of a stage are JSON values. A loss is what stands under a key that ends in "loss" or "losses", under "rounds"
or "history", or under "candidates"; its shape says how it is drawn:

    {name: {"before": a, "after": b}}        one pair of dots for each layer or block
    [[group, loss], ...]                     one curve over the iterations for each group
    [{"loss": a, ...}, ...]                  one curve for the values under "loss"
    [a, b, ...]                              one curve
    [{"candidate": name, "held_out_rms": a}] one bar for each candidate

Rounds that also have "entropy" and "timestep" (`SearchGroups`) get a second plot: one curve of the entropy, and a mark
for the timestep that each round chose. A "weighting" beside "before" and "after" (`RoundBlocks` with `SampleWeighting`)
is a row of a table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from stepquant.report.figures import COLOURS, INK, as_svg, literal, unobtrusive

__all__ = ["loss_plots", "stage_rows", "weighting_rows"]

Pairs = Sequence[tuple[float, float]]


def stage_rows(figures: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Stage, seconds and network evaluations (None where unknown) of each stage, in order."""
    return [
        {"stage": str(entry.get("stage", "")), "seconds": entry.get("seconds"), "evaluations": entry.get("evaluations")}
        for entry in figures
    ]


def weighting_rows(figures: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of every unit whose sample weights were learnt, in order; see `WeightLearner.update_`.

    effective_samples; cosine: before and after; percent: of all weight, in each timestep group, noise first. None, or
    an empty list, for what is not there or not finite.
    """
    rows = []
    for entry in figures:
        losses = entry.get("losses")
        for name, each in losses.items() if isinstance(losses, Mapping) else ():
            found = each.get("weighting") if isinstance(each, Mapping) else None
            if isinstance(found, Mapping):
                mass, cosine = _numbers(found.get("mass")), _numbers(found.get("cosine"))
                effective = found.get("effective_samples")
                rows.append(
                    {
                        "unit": str(name),
                        "effective_samples": effective if _number(effective) else None,
                        "cosine": cosine if len(cosine) == 2 else None,
                        "percent": [100 * share for share in mass],
                    }
                )
    return rows


def loss_plots(name: str, figures: Sequence[Mapping[str, Any]], colour: str) -> list[str]:
    """An `<svg>` element for every loss that the stages report, in order. name: of the checkpoint."""
    plots = []
    for entry in figures:
        for key, value in entry.items():
            if not (key.endswith(("loss", "losses")) or key in ("rounds", "history", "candidates")):
                continue
            title = f"{name}: {entry.get('stage', '')} {key}"
            figure = _drawn(value, entry, colour)
            if figure is not None:
                plots.append(_finished(figure, title))
            if key == "rounds" and (rounds := _searched(value)):
                plots.append(_finished(_entropy(rounds, colour), f"{name}: {entry.get('stage', '')} entropy"))
    return plots


def _searched(value: Any) -> list[tuple[float, float]]:
    """(entropy, chosen timestep) of every round, NaN for null; empty if a round has no timestep, or none an entropy."""
    if not isinstance(value, Sequence) or not all(isinstance(each, Mapping) for each in value):
        return []
    found = [(each.get("entropy"), each.get("timestep")) for each in value]
    if not any(_number(entropy) for entropy, _ in found):
        return []
    if not all(_number(timestep) and (entropy is None or _number(entropy)) for entropy, timestep in found):
        return []
    return [(_float(entropy), float(timestep)) for entropy, timestep in found]


def _drawn(value: Any, entry: Mapping[str, Any], colour: str) -> Figure | None:
    """The figure for a loss of a known shape, None for another one."""
    if isinstance(value, Mapping):
        pairs = [
            (float(each["before"]), float(each["after"]))
            for each in value.values()
            if isinstance(each, Mapping) and _number(each.get("before")) and _number(each.get("after"))
        ]
        return _before_and_after(pairs, colour) if pairs else None
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        return None
    if all(isinstance(each, Mapping) for each in value):
        bars = {str(each.get("candidate")): each.get("held_out_rms") for each in value if "held_out_rms" in each}
        if bars:
            return _bars({name: float(bar) for name, bar in bars.items() if _number(bar)}, colour)
        value = [each.get("loss") for each in value]
    if any(map(_number, value)) and all(each is None or _number(each) for each in value):
        return _curves({"": [(float(number), _float(loss)) for number, loss in enumerate(value)]}, colour)
    if all(
        isinstance(each, Sequence) and len(each) == 2 and _number(each[0]) and (each[1] is None or _number(each[1]))
        for each in value
    ):
        groups: dict[str, list[tuple[float, float]]] = {}
        windows = entry.get("windows") or []
        for iteration, (group, loss) in enumerate(value):
            groups.setdefault(_group_name(int(group), windows), []).append((float(iteration), _float(loss)))
        return _curves(dict(sorted(groups.items(), key=lambda item: _first_number(item[0]))), colour)
    return None


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _numbers(value: Any) -> list[float]:
    """A list of finite numbers as it is, anything else empty."""
    if not isinstance(value, Sequence) or not all(_number(each) and math.isfinite(each) for each in value):
        return []
    return [float(each) for each in value]


def _float(value: float | None) -> float:
    """NaN of null: a loss that was not finite leaves a gap."""
    return math.nan if value is None else float(value)


def _group_name(group: int, windows: Any) -> str:
    """Windows are pairs (first step, step after the last)."""
    if isinstance(windows, Sequence) and group < len(windows) and len(windows[group]) == 2:
        return f"steps {windows[group][0]} to {windows[group][1] - 1}"
    return f"part {group}"


def _first_number(text: str) -> int:
    return int(text.split()[1])


def _before_and_after(pairs: Pairs, colour: str) -> Figure:
    figure = Figure(figsize=(5.2, 3.3), layout="constrained")
    axes = figure.add_subplot()
    before, after = (np.asarray([pair[end] for pair in pairs], dtype=float) for end in (0, 1))
    numbers = np.arange(1, len(pairs) + 1)
    axes.vlines(numbers, _positive(before), _positive(after), color=INK, linewidth=0.8, alpha=0.6)
    axes.plot(numbers, _positive(before), "o", color=INK, markersize=3, label="before")
    axes.plot(numbers, _positive(after), "o", color=colour, markersize=3.5, label="after")
    axes.set_xlabel("layers or blocks, in order", fontsize=9, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _logarithmic(axes, np.concatenate([before, after]))
    return figure


def _curves(curves: Mapping[str, Pairs], colour: str) -> Figure:
    figure = Figure(figsize=(5.2, 3.3), layout="constrained")
    axes = figure.add_subplot()
    few = [colour] if len(curves) == 1 else COLOURS[: len(curves)]
    # Many groups are consecutive parts of the way: neighbours get neighbouring colours, none too dark for a dark page.
    many = matplotlib.colormaps["viridis"](np.linspace(0.3, 0.9, len(curves)))
    shades = few if len(curves) <= len(COLOURS) else many
    for (label, points), shade in zip(curves.items(), shades, strict=True):
        across, up = np.asarray(points, dtype=float).T
        axes.plot(across, _positive(up), "-", color=shade, linewidth=1.3, label=literal(label) if label else None)
    axes.set_xlabel("iteration", fontsize=9, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _logarithmic(axes, np.concatenate([np.asarray(points, dtype=float)[:, 1] for points in curves.values()]))
    return figure


def _entropy(rounds: Pairs, colour: str) -> Figure:
    figure = Figure(figsize=(5.2, 3.3), layout="constrained")
    axes = figure.add_subplot()
    entropy, timesteps = np.asarray(rounds, dtype=float).T
    axes.plot(entropy, "-", color=colour, linewidth=1.3, label="entropy of the shares")
    axes.plot([], [], "o", color=INK, markersize=3, label="timestep chosen")  # for the legend
    axes.set_xlabel("round", fontsize=9, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("entropy, nats", fontsize=9, color=INK)
    beside = axes.twinx()
    beside.plot(timesteps, "o", color=INK, markersize=3, alpha=0.7)
    beside.set_ylabel("timestep chosen", fontsize=9, color=INK)
    unobtrusive(beside)
    beside.grid(visible=False)
    beside.spines["left"].set_visible(False)
    beside.spines["right"].set_visible(True)
    return figure


def _bars(bars: Mapping[str, float], colour: str) -> Figure | None:
    if not bars:
        return None
    figure = Figure(figsize=(5.2, 1.0 + 0.25 * len(bars)), layout="constrained")
    axes = figure.add_subplot()
    axes.barh(range(len(bars)), list(bars.values()), color=colour, height=0.7)
    axes.set_yticks(range(len(bars)), [literal(name) for name in bars])
    axes.invert_yaxis()
    axes.set_xlabel("final error on held-out images, RMS", fontsize=9, color=INK)
    return figure


def _positive(values: np.ndarray[Any, np.dtype[Any]]) -> np.ndarray[Any, np.dtype[Any]]:
    """What a logarithmic axis can show; all else is left out of the curve."""
    return np.where(np.isfinite(values) & (values > 0), values, np.nan)


def _logarithmic(axes: Any, values: np.ndarray[Any, np.dtype[Any]]) -> None:
    axes.set_ylabel("loss", fontsize=9, color=INK)
    if bool((np.isfinite(values) & (values > 0)).any()):
        axes.set_yscale("log")


def _finished(figure: Figure, title: str) -> str:
    axes = figure.axes[0]
    axes.set_title(literal(title), fontsize=11, color=INK)
    unobtrusive(axes)
    labels = axes.get_legend_handles_labels()[1]
    if labels:
        figure.legend(loc="outside lower center", ncols=min(3, len(labels)), fontsize=8, frameon=False, labelcolor=INK)
    return as_svg(figure, title)
