"""The sentence at the top of the page, derived from the figures by a rule that is all here.

Each checkpoint's images are put into words by PSNR at equal seeds, against two borders:

    PSNR < 30 dB             visibly different from full precision
    30 dB <= PSNR < 40 dB    close to full precision, with differences that show side by side
    40 dB <= PSNR            hardly to be told from full precision

30 to 50 dB is what lossy coding of 8-bit images is usually held to; the borders are a convention, not a measurement of
what people see, so the page states them. A checkpoint whose 95 % interval reaches over a border is said to be on it.
The closest of several is named by PSNR, or by the first other metric that all have; if its interval overlaps with that
of the next one, both are named. Evaluations that were made in different ways are not ranked. Every figure that led to
the words stands behind them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["BORDERS", "CLOSE", "VISIBLE", "verdict"]

VISIBLE = 30.0
"""dB; below, images are called visibly different."""

CLOSE = 40.0
"""dB; from here on, images are called hardly to be told apart."""

BORDERS = (
    f"“Visibly different” is said of a PSNR below {VISIBLE:g} dB, “hardly to be told” of {CLOSE:g} dB and more: a "
    "convention of image coding, not a measurement of what people see."
)

_ORDER = (("psnr", True), ("frechet_to_fp", False), ("drift_final", False))
"""What the closest is named by: key, and whether more is better."""


def verdict(
    names: Sequence[str],
    metrics: Sequence[Mapping[str, Any]],
    *,
    exact: str = "full precision",
    differ: Sequence[str] = (),
) -> list[str]:
    """The verdict in a sentence, and then one sentence for each checkpoint that it says nothing about.

    metrics: of each checkpoint, key -> mapping with "value" and, where it is known, "low" and "high".
    exact: what the reference is called.
    differ: what was measured in different ways, from `report.comparable`; if anything was, none is called the closest.
    """
    if differ:
        said = [f"{name} {_words(found, exact)}." for name, found in zip(names, metrics, strict=True)]
        return [f"The checkpoints are not ranked: their evaluations differ in {'; '.join(differ)}.", *said]
    if len(names) > 1:
        for key, more in _ORDER:
            if all(_value(found, key) is not None for found in metrics):
                return _compared(names, metrics, key, exact, more=more)
    return [f"{name} {_words(found, exact)}." for name, found in zip(names, metrics, strict=True)]


def _compared(
    names: Sequence[str], metrics: Sequence[Mapping[str, Any]], key: str, exact: str, *, more: bool
) -> list[str]:
    order = sorted(range(len(names)), key=lambda n: float(_value(metrics[n], key) or 0.0), reverse=more)
    first, second = order[:2]
    one, two = metrics[first][key], metrics[second][key]
    said = [f"{names[n]} {_words(metrics[n], exact)}." for n in order]
    both = f"{names[first]} and {names[second]}"
    if one["value"] == two["value"]:
        return [f"{both} are equally close to {exact}.", *said]
    if _overlap(one, two):
        return [f"The 95 % intervals of {both} overlap: neither is called the closer one.", *said]
    return [f"{names[first]} is closest to {exact}: it {_words(metrics[first], exact)}.", *said[1:]]


def _overlap(one: Mapping[str, Any], two: Mapping[str, Any]) -> bool:
    """Whether both have intervals and these share a value."""
    ends = [entry.get(end) for entry in (one, two) for end in ("low", "high")]
    if any(end is None for end in ends):
        return False
    return bool(one["low"] <= two["high"] and two["low"] <= one["high"])


def _words(metrics: Mapping[str, Any], exact: str) -> str:
    """What there is to say of one checkpoint, from its verb on."""
    said, figures = _of_psnr(metrics.get("psnr"), exact), []
    drift, frechet = _value(metrics, "drift_final"), _value(metrics, "frechet_to_fp")
    if drift is not None:
        figures.append(f"drift {drift:.4g} RMS after the last step")
    if frechet is not None:
        figures.append(f"Fréchet distance {frechet:.4g} to {exact}")
    if said is None:
        return "has " + ", ".join(figures) if figures else f"has no figure that says how close it is to {exact}"
    return ", ".join([said, *figures])


def _of_psnr(entry: Any, exact: str) -> str | None:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("value"), int | float):
        return None
    value = float(entry["value"])
    low, high = (float(entry[end]) if entry.get(end) is not None else value for end in ("low", "high"))
    figure = f"{value:.4g} dB PSNR at equal seeds"
    for border in (VISIBLE, CLOSE):
        if low < border <= high:
            below = "visible differences" if border == VISIBLE else "hardly any difference"
            return f"is on the border of {below} ({figure}, interval {low:.4g} to {high:.4g})"
    if value < VISIBLE:
        return f"gives images that are visibly different ({figure})"
    if value < CLOSE:
        return f"gives images that are close, with differences that show side by side ({figure})"
    return f"gives images that can hardly be told from {exact}'s ({figure})"


def _value(metrics: Mapping[str, Any], key: str) -> float | None:
    entry = metrics.get(key)
    value = entry.get("value") if isinstance(entry, Mapping) else None
    return float(value) if isinstance(value, int | float) else None
