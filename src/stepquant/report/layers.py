"""Bits, bytes, engines and errors of layers, as the rows that the page shows; several checkpoints side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import repeat
from statistics import fmean
from typing import Any

from stepquant.engines.base import engines
from stepquant.report.groups import Rows
from stepquant.report.strips import log_places, scale_uri, strip_uri, ticks

__all__ = ["bits_text", "byte_kinds", "engine_table", "error_map", "layer_table", "row_map"]

_LABELS = 6
"""Timesteps that are written above a strip."""


def bits_text(bits: Any, row_bits: Mapping[str, Sequence[int]] | None = None) -> str:
    """`{"weight": 4, "input": 8}` -> "W4 A8"; the operands of a matmul are two A. row_bits: of operands whose
    bits change over time, as in "W4 A4-8".
    """
    if not isinstance(bits, Mapping):
        return str(bits)
    letters = {"weight": "W", "input": "A", "second": "A"}
    spans = {name: f"{min(each)}-{max(each)}" for name, each in (row_bits or {}).items()}
    parts = [
        f"{letters.get(name, name + ' ')}{spans.get(name, value)}" for name, value in bits.items() if value is not None
    ]
    return " ".join(parts) or "float"


def layer_table(inspections: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`rows`: every layer with bits and bytes in each checkpoint (None where it is not quantized), and the share of
    the largest; `sums`: of each checkpoint, (bits, number of layers, bytes) from the most bytes on.
    """
    layers = [{str(layer["name"]): layer for layer in found.get("layers", [])} for found in inspections]
    largest = max((int(layer["bytes"]) for known in layers for layer in known.values()), default=0) or 1
    rows = []
    for name in _names(layers):
        cells = [
            None
            if (layer := known.get(name)) is None
            else {
                "bits": bits_text(layer.get("bits"), layer.get("row_bits")),
                "bytes": int(layer["bytes"]),
                "percent": round(100 * layer["bytes"] / largest, 1),
            }
            for known in layers
        ]
        rows.append({"name": name, "cells": cells})
    return {"rows": rows, "sums": [_sums(known.values()) for known in layers]}


def _names(layers: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for known in layers for name in known))


def _sums(layers: Iterable[Mapping[str, Any]]) -> list[tuple[str, int, int]]:
    count: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for layer in layers:
        bits = bits_text(layer.get("bits"), layer.get("row_bits"))
        count[bits] += 1
        size[bits] += int(layer["bytes"])
    return [(bits, count[bits], total) for bits, total in size.most_common()]


def byte_kinds(inspections: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the files hold, kind by kind: bytes in each checkpoint, and percent of the largest number."""
    kinds = [found.get("bytes_by_kind") or {} for found in inspections]
    largest = max((size for found in kinds for size in found.values()), default=0) or 1
    return [
        {
            "kind": kind.replace("_", " "),
            "cells": [{"bytes": found.get(kind, 0), "percent": round(100 * found.get(kind, 0) / largest, 1)}
                      for found in kinds],
        }
        for kind in _names(kinds)
        if any(found.get(kind) for found in kinds)
    ]  # fmt: skip


def engine_table(
    inspections: Sequence[Mapping[str, Any]], speeds: Sequence[Mapping[str, Any] | None]
) -> list[dict[str, Any]]:
    """Of every engine: how many layers of each checkpoint it takes, whether it runs them by default, why it refuses the
    others (reason -> layers), and how fast it was. None for a checkpoint whose layers could not be asked.

    speeds: of each checkpoint, from `evaluate.speed.measure_speed`; None where nobody measured.
    """
    asked = [[layer for layer in found.get("layers", []) if layer.get("engine") is not None] for found in inspections]
    known = dict.fromkeys(engines())
    known |= dict.fromkeys(name for layers in asked for layer in layers for name in layer.get("refusals") or {})
    rows = []
    for name in known if any(asked) else ():
        rows.append({"engine": name, "cells": [*map(_taken, repeat(name), asked, speeds)]})
        short = f"{name}-bf16"  # the same layers on integers, the rest in another type
        if any(short in speed["engines"] for speed in speeds if speed is not None):
            rows.append({"engine": short, "cells": [_speed_of(short, speed) for speed in speeds]})
    return rows


def _speed_of(engine: str, speed: Mapping[str, Any] | None) -> dict[str, Any]:
    return {"speed": None if speed is None else speed["engines"].get(engine)}


def _taken(engine: str, layers: Sequence[Mapping[str, Any]], speed: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if not layers:
        return None
    refusals = Counter(str(layer["refusals"][engine]) for layer in layers if engine in (layer.get("refusals") or {}))
    return {
        "taken": len(layers) - sum(refusals.values()),
        "layers": len(layers),
        "default": sum(layer["engine"] == engine for layer in layers),
        "reasons": refusals.most_common(),
        **_speed_of(engine, speed),
    }


def error_map(errors: Sequence[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """Strips of `layer_errors` of each checkpoint: every layer's error alone and inside the network, over the steps.

    Colours are on one logarithmic scale for all, from the smallest but for a twentieth of the errors to the largest.
    `worst`: of each checkpoint, the layers with the largest mean error of their own. None if nothing was measured.
    """
    values = sorted(
        value
        for entry in errors
        if entry is not None
        for kind in ("made", "carried")
        for row in entry[kind].values()
        for value in row
        if value is not None and value > 0
    )
    if not values:
        return None
    low, high = values[len(values) // 20], values[-1]
    names = _names([entry["made"] for entry in errors if entry is not None])
    rows = [{"name": name, "cells": [_error_cell(entry, name, low, high) for entry in errors]} for name in names]
    timesteps = next(entry["timesteps"] for entry in errors if entry is not None)
    return {
        "rows": rows,
        "worst": [None if entry is None else _worst(entry["made"]) for entry in errors],
        "labels": _labels(timesteps),
        "scale": scale_uri(),
        "low": low,
        "high": high,
    }


def _worst(made: Mapping[str, Sequence[float | None]]) -> list[tuple[str, float | None]]:
    """Three layers and their mean error; those with values that are not finite first, with None."""
    means = {name: None if None in row else fmean(value or 0.0 for value in row) for name, row in made.items()}
    ranked = sorted(means.items(), key=lambda item: float("-inf") if item[1] is None else -item[1])
    return ranked[:3]


def _error_cell(entry: Mapping[str, Any] | None, name: str, low: float, high: float) -> dict[str, Any] | None:
    made = None if entry is None else entry["made"].get(name)
    if entry is None or not made:
        return None
    carried = entry["carried"][name]
    known = [value for value in made if value is not None]
    told = "not finite" if len(known) < len(made) else f"{min(known):.2g} to {max(known):.2g}"
    return {
        "made": strip_uri(log_places(made, low, high)),
        "carried": strip_uri(log_places(carried, low, high)),
        "mean": fmean(known) if len(known) == len(made) else None,
        "title": f"{name}: alone {told}",
    }


def row_map(rows: Sequence[Rows], inspections: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any] | None:
    """Strips of the rows of each checkpoint's activation quantizers over time, noise on the left; of those layers that
    have several in some checkpoint. A cell's colour is its row's place among the layer's. None if there are none.

    inspections: of the same checkpoints; where bits change over time a second strip shows them.
    """
    tables = [dict(zip(names, table.tolist(), strict=True)) for names, table, _ in rows]
    shown = [name for name in _names(tables) if any(max(known.get(name, [0]), default=0) > 0 for known in tables)]
    if not shown:
        return None
    bits: list[dict[str, Sequence[int]]] = [_bits_of_rows(found) for found in inspections] or [{} for _ in tables]
    return {
        "rows": [
            {
                "name": name,
                "cells": [_row_cell(known.get(name), own.get(name)) for known, own in zip(tables, bits, strict=True)],
            }
            for name in shown
        ],
        "bits": any(name in own for own in bits for name in shown),
        "labels": [_labels(list(reversed(list(timesteps)))) for _, _, timesteps in rows],
        "scale": scale_uri(),
    }


def _bits_of_rows(inspection: Mapping[str, Any]) -> dict[str, Sequence[int]]:
    """Name as in `Rows` -> bits of each row, of those activations whose bits change."""
    endings = {"input": "", "second": " (second)"}
    return {
        f"{layer['name']}{endings[operand]}": bits
        for layer in inspection.get("layers", [])
        for operand, bits in (layer.get("row_bits") or {}).items()
    }


def _row_cell(chosen: Sequence[int] | None, bits: Sequence[int] | None = None) -> dict[str, Any] | None:
    """bits: of each row, if they differ."""
    if not chosen:
        return None
    most = max(chosen)
    over_time = None
    if bits is not None:
        each = [bits[row] for row in reversed(chosen)]
        low, high = min(each), max(each)
        over_time = {
            "strip": strip_uri([(one - low) / max(1, high - low) for one in each]),
            "told": f"A{low}-{high}" if low < high else f"A{low}",
            "title": "bits " + " ".join(map(str, each)),
        }
    return {
        "bits": over_time,
        "strip": strip_uri([row / most if most else 0.0 for row in reversed(chosen)]),
        "rows": len(set(chosen)),
        "title": "rows " + " ".join(map(str, reversed(chosen))),
    }


def _labels(timesteps: Sequence[float]) -> list[str]:
    """A few timesteps from left to right."""
    return [f"{timesteps[place]:g}" for place in ticks(len(timesteps), _LABELS)]
