"""Results of evaluations -> one HTML page that needs nothing but itself."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from stepquant._version import __version__
from stepquant.errors import EvaluationError
from stepquant.report.comparable import differences, reference_words, refuse_other_references
from stepquant.report.figures import COLOURS, INK, Curve, curves_svg, difference, fitted, image_data_uri, levels
from stepquant.report.groups import Rows
from stepquant.report.layers import bits_text, byte_kinds, engine_table, error_map, layer_table, row_map
from stepquant.report.losses import loss_plots, stage_rows, weighting_rows
from stepquant.report.strips import film_uri
from stepquant.report.verdict import BORDERS, verdict

__all__ = ["Films", "Images", "Origin", "render_report", "write_report"]


class Films(TypedDict):
    """Clean predictions over the steps, floats `[S, N, C, H, W]` in [0, 1], arrays or tensors; noise end first.

    candidates: in the order of the results, running freely from the reference's noise.
    """

    seeds: Sequence[int]
    timesteps: Sequence[float]
    reference: Any
    candidates: Sequence[Any]


class Images(TypedDict):
    """What the page shows: the same seeds of every pipeline, floats `[N, C, H, W]` in [0, 1], arrays or tensors.

    candidates: in the order of the results.
    rows: of each candidate, what `rows_over_time` says.
    films, layer_errors (of each candidate, `LayerErrors.to_dict()` or None), notes: what `Walks.found` says.
    All but seeds and candidates may be left out; without `reference` there are no images, and a note says why.
    """

    seeds: Sequence[int]
    reference: NotRequired[Any]
    candidates: Sequence[Any]
    rows: NotRequired[Sequence[Rows]]
    films: NotRequired[Films]
    layer_errors: NotRequired[Sequence[Mapping[str, Any] | None]]
    notes: NotRequired[Sequence[str]]


class Origin(TypedDict, total=False):
    """What is kept beside a checkpoint about how it came about.

    figures: of every stage, in order, as `Quantized.figures`. settings, settings_file: text and path of `run.yaml`.
    speed: what `evaluate.speed.measure_speed` found.
    """

    figures: Sequence[Mapping[str, Any]]
    settings: str
    settings_file: str
    speed: Mapping[str, Any]


_LIKE_REFERENCE = "reference"

_METRICS: dict[str, tuple[str, str, bool | str | None]] = {
    "psnr": ("PSNR", "higher is closer to full precision", True),
    "ssim": ("SSIM", "1 is identical", True),
    "lpips": ("LPIPS", "lower is closer", False),
    "clip_score": ("CLIP score", "agreement with the prompt; that of full precision is best", _LIKE_REFERENCE),
    "mae": ("Mean absolute error", "of pixels in [0, 1]; lower is closer", False),
    "frechet_to_fp": ("Fréchet distance to full precision", "lower is closer", False),
    "frechet_to_data": ("Fréchet distance to real data", "lower is closer", False),
    "sfid_to_fp": ("sFID to full precision", "lower is closer", False),
    "kid_to_fp": ("KID to full precision", "lower is closer, 0 is equal", False),
    "inception_score": ("Inception score", "that of full precision is best", _LIKE_REFERENCE),
    "precision": ("Precision", "higher is better", True),
    "recall": ("Recall", "higher is better", True),
    "drift_final": ("Drift after the last step", "RMS distance from the full-precision sample; lower is closer", False),
    "cosine_final": ("Cosine after the last step", "to the full-precision sample; 1 is the same direction", True),
    "noise_level": (
        "Noise level after the last step",
        "of the sample; that of full precision is best",
        _LIKE_REFERENCE,
    ),
    "white_point_shift": (
        "White point after the last step",
        "largest shift of a channel's mean; lower is closer",
        False,
    ),
}
"""Name, how to read it, and whether more is better, or what is nearest to `reference_value`; of metrics that are not
listed nothing is known but their key.
"""

_SHOWN_APART = frozenset({"value", "low", "high", "unit", "reference_value"})
"""Entries of a metric that have a place of their own; all other numbers and words stand in small below the value."""

_RESULT_KEYS = frozenset(
    {
        "schema",
        "candidate",
        "against",
        "reference_kind",
        "n",
        "seeds",
        "steps",
        "scheduler",
        "features",
        "metrics",
        "drift",
        "images",
    }
    | {"notes", "command", "versions", "machine", "date"}
)
"""Entries of an evaluation that have a place of their own; numbers and words under others are listed as they are."""

_PLOTS = (
    ("Accumulated error", "RMS", (("accumulated", "-", ""),), True),
    ("Error made in each step alone", "RMS", (("one_step", "-", ""),), True),
    (
        "How the errors of single steps add up",
        "RMS",
        (
            ("accumulated", "-", "measured"),
            ("coherent", "--", "added up, all one way"),
            ("incoherent", ":", "added up, independent"),
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
    *,
    origins: Sequence[Origin] = (),
    command: str = "",
) -> None:
    """Write the page about one or several checkpoints.

    results: evaluations of schema 1, one a checkpoint.
    images: see `Images`.
    inspection: what `inspect_checkpoint` says of each checkpoint.
    origins: how each checkpoint came about; none, or one a checkpoint.
    command: the one that makes the page.

    A page that is there is replaced at once, or stays.
    Raises EvaluationError: no results, another schema, different references, or lists of different lengths. Evaluations
    that differ in anything else that their figures depend on are shown, but not ranked, and the page says so.
    """
    page = render_report(results, images, inspection, origins=origins, command=command)
    out = Path(path)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    try:
        partial.write_text(page, encoding="utf-8")
        partial.replace(out)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def render_report(
    results: Sequence[Mapping[str, Any]],
    images: Images | Mapping[str, Any],
    inspection: Sequence[Mapping[str, Any]],
    *,
    origins: Sequence[Origin] = (),
    command: str = "",
) -> str:
    """The page as text. See `write_report`."""
    origins = origins or [Origin() for _ in results]
    _check(results, images, inspection, origins)
    names = _labels([str(result["candidate"]) for result in results])
    exact, differ = reference_words(results[0]), differences(names, results)
    environment = Environment(
        loader=PackageLoader("stepquant.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "size": _size, "breakable": _breakable}
    candidates = [
        _candidate(name, COLOURS[number % len(COLOURS)], result, description, origin)
        for number, (name, result, description, origin) in enumerate(
            zip(names, results, inspection, origins, strict=True)
        )
    ]
    return environment.get_template("report.html.j2").render(
        version=__version__,
        verdict=verdict(names, [_entries(result) for result in results], exact=exact, differ=differ),
        ranked=not differ,
        exact=exact,
        borders=BORDERS if any("psnr" in _entries(result) for result in results) else "",
        candidates=candidates,
        metrics=_metric_rows(results, exact, ranked=not differ),
        columns=_image_columns(names, images),
        films=_films(images.get("films")),
        plots=_plots(names, results, exact),
        errors=error_map(images.get("layer_errors", ())),
        layers=layer_table(inspection),
        kinds=byte_kinds(inspection),
        rows=row_map(images.get("rows", ()), inspection if images.get("rows") else ()),
        engines=engine_table(inspection, [origin.get("speed") for origin in origins]),
        speeds=[
            {"name": name, **origin["speed"]} for name, origin in zip(names, origins, strict=True) if "speed" in origin
        ],
        against=results[0]["against"],
        notes=_notes(results, images, exact),
        command=command,
    )


def _check(
    results: Sequence[Any], images: Mapping[str, Any], inspection: Sequence[Any], origins: Sequence[Origin]
) -> None:
    if not results:
        raise EvaluationError("A report needs the evaluation of at least one checkpoint.")
    for result in results:
        if result.get("schema") != 1:
            raise EvaluationError(f"The evaluation has schema {result.get('schema')!r}, this report reads schema 1.")
    refuse_other_references(results)
    shown = len(images["candidates"]) if "reference" in images else len(results)  # there may be no images at all
    if not len(results) == len(inspection) == shown == len(origins):
        raise EvaluationError(
            f"A report needs one inspection, one set of images and one origin for each of {len(results)} evaluations, "
            f"found {len(inspection)}, {shown} and {len(origins)}."
        )
    per_candidate = {"rows": images.get("rows"), "layer_errors": images.get("layer_errors")}
    per_candidate["films"] = (images.get("films") or {}).get("candidates")
    for what, found in per_candidate.items():
        if found is not None and len(found) != len(results):
            raise EvaluationError(f"{what} of a report has {len(found)} entries for {len(results)} evaluations.")


def _labels(candidates: Sequence[str]) -> list[str]:
    """The last part of each path, or the whole path where that is not enough to tell them apart."""
    short = [Path(candidate).name or candidate for candidate in candidates]
    return short if len(set(short)) == len(short) else list(candidates)


def _candidate(
    name: str, colour: str, result: Mapping[str, Any], description: Mapping[str, Any], origin: Origin
) -> dict[str, Any]:
    manifest = description.get("manifest") or {}
    # A checkpoint keeps what its stages cost; their times and curves are beside it, if the run left them there.
    kept = origin.get("figures") or (manifest.get("run") or {}).get("stages") or []
    bits = [bits_text(layer.get("bits"), layer.get("row_bits")) for layer in description.get("layers", [])]
    return {
        "name": name,
        "colour": colour,
        "result": result,
        "size": int(description["bytes"]),
        "ratio": description.get("ratio"),
        "bits": max(set(bits), key=bits.count) if bits else "",
        "facts": _common(_entries(result)) | _others(result) | _facts(description),
        "stages": stage_rows(kept),
        # The text in the figure was escaped by matplotlib's SVG writer.
        "losses": [Markup(plot) for plot in loss_plots(name, origin.get("figures") or [], colour)],
        "weighting": weighting_rows(origin.get("figures") or []),
        "settings": origin.get("settings", ""),
        "settings_file": origin.get("settings_file", ""),
    }


def _entries(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The metrics that have a number, as mappings with "value"."""
    found = {}
    for key, entry in result["metrics"].items():
        whole = dict(entry) if isinstance(entry, Mapping) else {"value": entry}
        if _is_number(whole.get("value")) and math.isfinite(whole["value"]):
            found[key] = whole
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _named(text: str, exact: str) -> str:
    """A text of this page with its "full precision" under the name that the reference has here."""
    if exact == "full precision":
        return text
    return text.replace("full precision", exact).replace("full-precision", exact.removeprefix("the "))


def _metric_rows(results: Sequence[Mapping[str, Any]], exact: str, *, ranked: bool) -> list[dict[str, Any]]:
    """One row a metric that any result has, known ones first.

    ranked: whether the best value is marked, where more or less is better. exact: what the reference is called.
    """
    entries = [_entries(result) for result in results]
    commons = [set(_common(known)) for known in entries]
    present = list(dict.fromkeys(key for known in entries for key in known))
    order = [*(key for key in _METRICS if key in present), *(key for key in present if key not in _METRICS)]
    rows = []
    for key in order:
        name, how, more = _METRICS.get(key, (key.replace("_", " "), "", None))
        cells = [known.get(key) for known in entries]
        best = _best(cells, more) if ranked else None
        name, how = _named(name, exact), _named(how, exact)
        rows.append({"name": name, "how": how, "cells": [*map(_cell, cells, repeat(best), commons)]})
    return rows


def _best(cells: Sequence[Mapping[str, Any] | None], more: bool | str | None) -> Any:
    """The value to mark, None where nothing is best or all are alike."""
    measured = [cell for cell in cells if cell is not None]
    values = [cell["value"] for cell in measured]
    if more is None or len(set(values)) < 2:
        return None
    if isinstance(more, bool):
        return (max if more else min)(values)
    if not all(_is_number(cell.get("reference_value")) for cell in measured):
        return None
    away = [abs(cell["value"] - cell["reference_value"]) for cell in measured]
    return values[away.index(min(away))] if len(set(away)) > 1 else None


def _cell(entry: Mapping[str, Any] | None, best: Any, common: set[str]) -> dict[str, Any] | None:
    """common: keys of what is said once, of all metrics."""
    if entry is None:
        return None
    low, high = entry.get("low"), entry.get("high")
    details = {key: value for key, value in entry.items() if key not in _SHOWN_APART and key not in common}
    return {
        "value": entry["value"],
        "unit": entry.get("unit") or "",
        "best": best is not None and entry["value"] == best,
        "interval": (low, high) if _is_number(low) and _is_number(high) else None,
        "reference": entry.get("reference_value"),
        "details": " · ".join(
            f"{key.replace('_', ' ')}: {_short(_number(value))}"
            for key, value in details.items()
            if isinstance(value, int | float | str)
        ),
    }


def _common(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Words that stand beside every metric of an evaluation alike, such as the hash of the reference."""
    if len(entries) < 2:
        return {}
    first, *others = entries.values()
    return {
        key: value
        for key, value in first.items()
        if key not in _SHOWN_APART and isinstance(value, str) and all(entry.get(key) == value for entry in others)
    }


def _short(text: str) -> str:
    """The first twelve digits of a hash; anything else as it is."""
    return text[:12] if len(text) >= 40 and not set(text) - set("0123456789abcdef") else text


def _plots(names: Sequence[str], results: Sequence[Mapping[str, Any]], exact: str) -> list[Markup]:
    """The drift curves; a plot for which no result has values is left out. Then curves that are not listed above."""
    known = {key for _, _, keys, _ in _PLOTS for key, _, _ in keys}
    plots = [("drift", *plot) for plot in _PLOTS]
    for section, key in dict.fromkeys(found for result in results for found in _curve_keys(result)):
        if section != "drift" or key not in known:
            title = f"{section}: {key}".replace("_", " ").capitalize()
            plots.append((section, title, "", ((key, "-", ""),), False))
    drawn = []
    for section, title, unit, keys, logarithmic in plots:
        curves: list[tuple[Curve, str, str]] = []
        for number, (name, result) in enumerate(zip(names, results, strict=True)):
            measured = result.get(section) or {}
            for key, style, what in keys:
                # Some curves start one step later: there is no consecutive pair before the second step.
                values = measured.get(key) or []
                across = (measured.get("timesteps") or [])[-len(values) :] if values else []
                if values and len(across) == len(values):
                    label = f"{name}: {what}" if what else name
                    curves.append(((label, across, values), COLOURS[number % len(COLOURS)], style))
        if curves:
            # The text in the figure was escaped by matplotlib's SVG writer.
            drawn.append(Markup(curves_svg(_named(title, exact), unit, curves, logarithmic=logarithmic)))
    return [*drawn, *_flat_field_plots(names, results, exact)]


def _flat_field_plots(names: Sequence[str], results: Sequence[Mapping[str, Any]], exact: str) -> list[Markup]:
    """Noise level of the samples beside the reference's, and how far their white point is from the reference's."""
    noise: list[tuple[Curve, str, str]] = []
    white: list[tuple[Curve, str, str]] = []
    for number, (name, result) in enumerate(zip(names, results, strict=True)):
        drift = result.get("drift") or {}
        flat, across, colour = (
            drift.get("flat_field") or {},
            drift.get("timesteps") or [],
            COLOURS[number % len(COLOURS)],
        )
        if "noise_level" in flat:
            if not noise:
                noise.append(((exact, across, flat["noise_level"]["reference"]), INK, ":"))
            noise.append(((name, across, flat["noise_level"]["candidate"]), colour, "-"))
        if "white_point" in flat:
            pairs = zip(flat["white_point"]["candidate"], flat["white_point"]["reference"], strict=True)
            shifts = [_largest_shift(ours, theirs) for ours, theirs in pairs]
            white.append(((name, across, shifts), colour, "-"))
    plots = (("Flat field: noise level", "of the sample", noise), ("Flat field: shift of the white point", "", white))
    # The text in the figure was escaped by matplotlib's SVG writer.
    return [Markup(curves_svg(title, unit, curves)) for title, unit, curves in plots if curves]


def _largest_shift(ours: Sequence[float | None], theirs: Sequence[float | None]) -> float:
    """NaN where any channel is not finite, which is null in an evaluation."""
    known = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
    shifts = [abs(a - b) for a, b in known]
    return max(shifts) if len(known) == len(ours) and all(map(math.isfinite, shifts)) else math.nan


def _curve_keys(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(section, key) of every list of numbers that stands beside a list of timesteps."""
    return [
        (section, key)
        for section, measured in result.items()
        if isinstance(measured, Mapping) and isinstance(measured.get("timesteps"), list)
        for key, values in measured.items()
        if key != "timesteps" and isinstance(values, list) and values and all(map(_is_number, values))
    ]


def _image_columns(names: Sequence[str], images: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One column a seed: the full-precision image, and each checkpoint's with its difference."""
    if "reference" not in images:
        return []
    reference = levels(images["reference"])
    shown = [levels(found) for found in images["candidates"]]
    differences = [levels(difference(found, images["reference"])) for found in images["candidates"]]

    def address(image: Any) -> str:
        return image_data_uri(fitted(image))

    return [
        {
            "seed": seed,
            "reference": address(reference[place]),
            "candidates": [
                {"name": name, "image": address(found[place]), "difference": address(delta[place])}
                for name, found, delta in zip(names, shown, differences, strict=True)
            ],
        }
        for place, seed in enumerate(images["seeds"])
    ]


def _films(films: Films | None) -> dict[str, Any] | None:
    """One film a seed: strips of full precision, of each checkpoint and of its difference."""
    if films is None:
        return None
    exact = films["reference"]
    return {
        "timesteps": [f"{timestep:g}" for timestep in films["timesteps"]],
        "seeds": [
            {
                "seed": seed,
                "reference": film_uri(exact[:, place]),
                "candidates": [
                    {
                        "film": film_uri(found[:, place]),
                        "difference": film_uri(difference(found[:, place], exact[:, place])),
                    }
                    for found in films["candidates"]
                ],
            }
            for place, seed in enumerate(films["seeds"])
        ],
    }


def _notes(results: Sequence[Mapping[str, Any]], images: Mapping[str, Any], exact: str) -> list[str]:
    told = [str(note) for result in results for note in result.get("notes", [])]
    if getattr(images.get("reference"), "ndim", 4) == 5:
        told.append("Of videos, the first frames are shown.")
    return list(dict.fromkeys([*told, *(_named(str(note), exact) for note in images.get("notes", ()))]))


def _others(result: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers and words of an evaluation that this page knows nothing about, from up to one level below."""
    found: dict[str, Any] = {}
    for key, value in result.items():
        if key in _RESULT_KEYS:
            continue
        below = value.items() if isinstance(value, Mapping) else [("", value)]
        found |= {
            f"{key} {name}".strip().replace("_", " "): _number(each)
            for name, each in below
            if isinstance(each, int | float | str)
        }
    return found


def _facts(description: Mapping[str, Any]) -> dict[str, Any]:
    """What an inspection says in one line each: base model, versions, date, seed, hashes."""
    manifest = description.get("manifest") or {}
    facts: dict[str, Any] = {
        key.replace("_", " "): value for key, value in description.items() if isinstance(value, str)
    }
    if "seed" in (manifest.get("run") or {}):
        facts["seed of the calibration"] = manifest["run"]["seed"]
    if manifest.get("base_config_hash"):
        facts["hash of the model's configuration"] = manifest["base_config_hash"]
    if manifest.get("checksums"):
        listed = "".join(f"{name} {sum_}\n" for name, sum_ in sorted(manifest["checksums"].items()))
        facts["hash of all tensors' hashes"] = hashlib.sha256(listed.encode()).hexdigest()
    return facts


def _breakable(name: str) -> Markup:
    """A layer's name that may go on in another line behind each dot."""
    return Markup(".<wbr>").join(name.split("."))


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _size(count: int) -> str:
    number = float(count)
    for unit in ("bytes", "kB", "MB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "bytes" else f"{number:.2f} {unit}"
        number /= 1000
    return f"{number:.2f} GB"
