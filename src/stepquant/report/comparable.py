"""Which evaluations may be set side by side: figures are ranked only where they were measured in the same way."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stepquant.errors import EvaluationError
from stepquant.manifest import MANIFEST_NAME

__all__ = ["differences", "reference_words", "refuse_other_references"]

Result = Mapping[str, Any]

_SAME = ("n", "seeds", "steps", "scheduler", "arguments", "features", "protocol")
"""Entries of an evaluation that must be equal for its figures to be ranked beside others."""

_LONGEST = 60
"""Letters of a value in a sentence; of arguments there may be pages."""


def refuse_other_references(results: Sequence[Result]) -> None:
    """Raise EvaluationError if evaluations were made against different models: their figures answer other questions.

    The same model under two names is found by the hash that stands beside every figure, and so are two models under
    one name.
    """
    for other in results[1:]:
        first = results[0]
        hashes = _reference_hash(first), _reference_hash(other)
        names = str(first["against"]), str(other["against"])
        known = None not in hashes
        if hashes[0] == hashes[1] if known else Path(names[0]) == Path(names[1]):
            continue
        found = f"{other['candidate']} was evaluated against {names[1]}, and {first['candidate']} against {names[0]}"
        if names[0] == names[1]:
            found += " when that had other weights, another scheduler or another engine"
        raise EvaluationError(
            f"{found}: a report needs one reference for all. Evaluate again with the same one: {_command(first, other)}"
        )


def _reference_hash(result: Result) -> str | None:
    """Of what the reference was made of; None if the evaluation has no figure that says it."""
    found = {entry.get("reference") for entry in result["metrics"].values() if isinstance(entry, Mapping)} - {None}
    return str(found.pop()) if len(found) == 1 else None


def _command(first: Result, other: Result) -> str:
    words = ["stepquant", "evaluate", str(other["candidate"]), "--against", str(first["against"])]
    words += ["--seeds", _seeds_text(first)]
    if other.get("steps") is not None:  # its own: a checkpoint refuses steps that it was not calibrated for
        words += ["--steps", str(other["steps"])]
    behind = " (and the arguments of the other evaluation)" if first.get("arguments") else ""
    return shlex.join(words) + behind


def _seeds_text(result: Result) -> str:
    """As `--seeds` takes them; an evaluation has first and last of consecutive seeds, otherwise all of them."""
    seeds = [int(seed) for seed in result["seeds"]]
    ends = len(seeds) == 2 and seeds[1] - seeds[0] + 1 == int(result["n"])
    return f"{seeds[0]}-{seeds[1]}" if ends else ",".join(map(str, seeds))


def differences(names: Sequence[str], results: Sequence[Result]) -> list[str]:
    """What was measured in different ways, a phrase each: "steps (20 for a, 10 for b)". Empty if all may be ranked.

    What an older evaluation does not say is taken for equal.
    """
    found = []
    for key in _SAME:
        values = {name: result[key] for name, result in zip(names, results, strict=True) if key in result}
        if key == "seeds":
            values = {name: _seeds_text(result) for name, result in zip(names, results, strict=True)}
        if _several(values.values()):
            found.append(f"{key} ({', '.join(f'{_short(value)} for {name}' for name, value in values.items())})")
    said = {"features", "protocol"} if any(phrase.startswith(("features", "protocol")) for phrase in found) else set()
    metrics = list(dict.fromkeys(metric for result in results for metric in result["metrics"]))
    for metric in [] if said else metrics:
        entries = [result["metrics"].get(metric) for result in results]
        beside = [
            [entry.get("feature_identity"), entry.get("protocol")] for entry in entries if isinstance(entry, Mapping)
        ]
        if _several(beside):
            found.append(f"features or protocol of {metric}")
    return found


def _several(values: Any) -> bool:
    return len({json.dumps(value, sort_keys=True, default=str) for value in values}) > 1


def _short(value: Any) -> str:
    text = "none" if value is None else value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def reference_words(result: Result) -> str:
    """What the reference is called: "full precision", or "the reference" where it is a checkpoint or somebody's images.

    An evaluation without `reference_kind` is older than that entry: then the folder is asked.
    """
    kind = result.get("reference_kind")
    if kind is None and (Path(str(result["against"])) / MANIFEST_NAME).is_file():
        kind = "checkpoint"
    return "full precision" if kind in (None, "model") else "the reference"
