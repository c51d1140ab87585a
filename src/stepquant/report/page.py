"""Results of evaluations -> one HTML page that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from stepquant._version import __version__
from stepquant.errors import EvaluationError
from stepquant.report.figures import COLOURS, Curve, curves_svg, difference, image_data_uri, levels
from stepquant.report.groups import Rows, groups_svg

__all__ = ["Images", "render_report", "write_report"]


class Images(TypedDict):
    """What the page shows: the same seeds of every pipeline, floats `[N, C, H, W]` in [0, 1], arrays or tensors.

    candidates: in the order of the results.
    rows: of each candidate, what `rows_over_time` says; may be left out.
    """

    seeds: Sequence[int]
    reference: Any
    candidates: Sequence[Any]
    rows: NotRequired[Sequence[Rows]]


_METRICS = (
    ("psnr", "PSNR", "higher is closer to full precision", True),
    ("ssim", "SSIM", "1 is identical", True),
    ("mae", "Mean absolute error", "of pixels in [0, 1]; lower is closer", False),
    ("frechet_to_fp", "Fréchet distance to full precision", "lower is closer", False),
    ("frechet_to_data", "Fréchet distance to real data", "lower is closer", False),
    ("drift_final", "Drift after the last step", "RMS distance from the full-precision sample; lower is closer", False),
)
"""Key, name, how to read it, and whether more is better."""

_PLOTS = (
    ("Accumulated error", "RMS", (("accumulated", "-", ""),), True),
    ("Error made in each step alone", "RMS", (("one_step", "-", ""),), True),
    (
        "How the errors of single steps add up",
        "RMS",
        (
            ("accumulated", "-", "measured"),
            ("coherent", "--", "single steps added up, all one way"),
            ("incoherent", ":", "single steps added up, independent"),
        ),
        True,
    ),
    ("Cosine to the full-precision state", "cosine", (("cosine", "-", ""),), False),
    ("Cosine between the errors of neighbouring steps", "cosine", (("consecutive_cosine", "-", ""),), False),
)
"""Title, unit, curves (key, line style, what to add to the label), and whether the axis is logarithmic."""


def write_report(
    results: Sequence[Mapping[str, Any]],
    images: Images | Mapping[str, Any],
    inspection: Sequence[Mapping[str, Any]],
    path: str | Path,
) -> None:
    """Write the page about one or several checkpoints.

    results: evaluations of schema 1, one a checkpoint.
    images: see `Images`.
    inspection: what `inspect_checkpoint` says of each checkpoint.

    Raises EvaluationError: no results, another schema, or lists of different lengths.
    """
    Path(path).write_text(render_report(results, images, inspection), encoding="utf-8")


def render_report(
    results: Sequence[Mapping[str, Any]],
    images: Images | Mapping[str, Any],
    inspection: Sequence[Mapping[str, Any]],
) -> str:
    """The page as text. See `write_report`."""
    _check(results, images, inspection)
    names = _labels([str(result["candidate"]) for result in results])
    environment = Environment(
        loader=PackageLoader("stepquant.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = _number
    environment.filters["size"] = _size
    candidates = [
        {
            "name": name,
            "colour": COLOURS[number % len(COLOURS)],
            "result": result,
            "size": int(description["bytes"]),
            "layers": [_layer(layer) for layer in description.get("layers", [])],
            "facts": _facts(description),
        }
        for number, (name, result, description) in enumerate(zip(names, results, inspection, strict=True))
    ]
    return environment.get_template("report.html.j2").render(
        version=__version__,
        verdict=_verdict(names, results),
        candidates=candidates,
        metrics=_metric_rows(results),
        plots=[*_plots(names, results), *_row_plots(names, images.get("rows", ()))],
        columns=_image_columns(names, images),
        against=results[0]["against"],
        notes=sorted({str(note) for result in results for note in result.get("notes", [])}),
    )


def _check(results: Sequence[Any], images: Mapping[str, Any], inspection: Sequence[Any]) -> None:
    if not results:
        raise EvaluationError("A report needs the evaluation of at least one checkpoint.")
    for result in results:
        if result.get("schema") != 1:
            raise EvaluationError(f"The evaluation has schema {result.get('schema')!r}, this report reads schema 1.")
    if not len(results) == len(inspection) == len(images["candidates"]):
        raise EvaluationError(
            f"A report needs one inspection and one set of images for each of {len(results)} evaluations, found "
            f"{len(inspection)} and {len(images['candidates'])}."
        )


def _labels(candidates: Sequence[str]) -> list[str]:
    """The last part of each path, or the whole path where that is not enough to tell them apart."""
    short = [Path(candidate).name or candidate for candidate in candidates]
    return short if len(set(short)) == len(short) else list(candidates)


def _verdict(names: Sequence[str], results: Sequence[Mapping[str, Any]]) -> str:
    """What a person wants to know first, in one sentence."""
    values = [{key: entry["value"] for key, entry in result["metrics"].items()} for result in results]
    if len(names) > 1:
        for key, _name, _how, more in (_METRICS[0], *_METRICS[3:]):
            if all(key in value for value in values):
                order = sorted(range(len(names)), key=lambda n: values[n][key], reverse=more)
                if values[order[0]][key] == values[order[1]][key]:
                    break
                return _comparison([names[n] for n in order], [values[n] for n in order])
    return " ".join(f"{name}: {_distance(value)}." for name, value in zip(names, values, strict=True))


def _comparison(names: Sequence[str], values: Sequence[Mapping[str, float]]) -> str:
    """Of several checkpoints, the closest first."""
    others = "; ".join(f"{name}: {_distance(value)}" for name, value in zip(names[1:], values[1:], strict=True))
    return f"{names[0]} is closest to full precision: {_distance(values[0])} ({others})."


def _distance(values: Mapping[str, float]) -> str:
    parts = []
    if "psnr" in values:
        parts.append(f"{_number(values['psnr'])} dB PSNR at equal seeds")
    if "drift_final" in values:
        parts.append(f"drift {_number(values['drift_final'])} after the last step")
    if "frechet_to_fp" in values:
        parts.append(f"Fréchet distance {_number(values['frechet_to_fp'])}")
    return ", ".join(parts) or "nothing could be measured that says how close it is to full precision"


def _metric_rows(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row a metric that any result has; the best value is marked where there are several."""
    rows = []
    for key, name, how, more in _METRICS:
        cells = [result["metrics"].get(key) for result in results]
        present = [cell["value"] for cell in cells if cell is not None]
        if not present:
            continue
        best = max(present) if more else min(present)
        differ = len(set(present)) > 1
        marked = [cell is not None and differ and cell["value"] == best for cell in cells]
        rows.append({"name": name, "how": how, "cells": list(zip(cells, marked, strict=True))})
    return rows


def _plots(names: Sequence[str], results: Sequence[Mapping[str, Any]]) -> list[Markup]:
    """The drift curves; a plot for which no result has values is left out."""
    drawn = []
    for title, unit, keys, logarithmic in _PLOTS:
        curves: list[tuple[Curve, str, str]] = []
        for number, (name, result) in enumerate(zip(names, results, strict=True)):
            drift = result.get("drift") or {}
            for key, style, what in keys:
                # Some curves start one step later: there is no consecutive pair before the second step.
                values = drift.get(key) or []
                across = (drift.get("timesteps") or [])[-len(values) :] if values else []
                if values and len(across) == len(values):
                    label = f"{name}: {what}" if what else name
                    curves.append(((label, across, values), COLOURS[number % len(COLOURS)], style))
        if curves:
            # The text in the figure was escaped by matplotlib's SVG writer.
            drawn.append(Markup(curves_svg(title, unit, curves, logarithmic=logarithmic)))
    return drawn


def _row_plots(names: Sequence[str], rows: Sequence[Rows]) -> list[Markup]:
    """Which parameter set each layer uses at each timestep, of the candidates that have several."""
    return [
        Markup(groups_svg(f"Activation parameters over time: {name}", layers, table, timesteps))
        for name, (layers, table, timesteps) in zip(names, rows, strict=False)
        if bool((table > 0).any())
    ]


def _image_columns(names: Sequence[str], images: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One column a seed: the full-precision image, and each checkpoint's with its difference."""
    reference = levels(images["reference"])
    shown = [levels(found) for found in images["candidates"]]
    differences = [levels(difference(found, images["reference"])) for found in images["candidates"]]
    return [
        {
            "seed": seed,
            "reference": image_data_uri(reference[place]),
            "candidates": [
                {"name": name, "image": image_data_uri(found[place]), "difference": image_data_uri(delta[place])}
                for name, found, delta in zip(names, shown, differences, strict=True)
            ],
        }
        for place, seed in enumerate(images["seeds"])
    ]


def _layer(layer: Mapping[str, Any]) -> dict[str, Any]:
    bits = layer.get("bits")
    if isinstance(bits, Mapping):
        bits = ", ".join(f"{name} {value}" for name, value in bits.items() if value is not None) or "float"
    refusals = layer.get("refusals") or {}
    why = "; ".join(f"{engine}: {reason}" for engine, reason in refusals.items())
    return {**layer, "bits": bits, "engine": layer.get("engine") or "", "why": why}


def _facts(description: Mapping[str, Any]) -> dict[str, Any]:
    """What an inspection says in one line each: base model, versions, date, size against float32."""
    facts: dict[str, Any] = {key: value for key, value in description.items() if isinstance(value, str)}
    if "ratio" in description:
        facts["bytes of the float32 denoiser's"] = f"{description['ratio']:.3f}"
    hashed = (description.get("manifest") or {}).get("base_config_hash")
    return facts | ({"hash of the model's configuration": hashed} if hashed else {})


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _size(count: int) -> str:
    number = float(count)
    for unit in ("bytes", "kB", "MB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "bytes" else f"{number:.2f} {unit}"
        number /= 1000
    return f"{number:.2f} GB"
