"""Every error that stepquant raises on purpose.

    StepquantError
    ├── SpecError            a bit width, scheme, rule, recipe or option that makes no sense (also a ValueError)
    ├── ModelError           a model that cannot be quantized, or not in the way that was asked for
    │   └── UnsupportedPipeline   a pipeline whose sampling cannot be replayed
    ├── CalibrationError     calibration data or an optimisation that went wrong
    ├── CheckpointError      a checkpoint that is damaged, of an unknown version, or not what the caller expects
    ├── EngineError          an engine that cannot run a layer
    │   └── UnknownEngine  an engine that there is not (also a SpecError)
    └── EvaluationError      a measurement that cannot be made

A message names the thing (layer, step, file, key), what was found, what was expected, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "CalibrationError",
    "CheckpointError",
    "EngineError",
    "EvaluationError",
    "ModelError",
    "SpecError",
    "StepquantError",
    "UnknownEngine",
    "UnsupportedPipeline",
    "nearest",
]


class StepquantError(Exception):
    """Root of everything that stepquant raises on purpose."""


class SpecError(StepquantError, ValueError):
    """A bit width, scheme, rule, recipe or option that makes no sense."""


class ModelError(StepquantError):
    """A model that cannot be quantized, or not in the way that was asked for."""


class UnsupportedPipeline(ModelError):  # noqa: N818 - reads as a sentence where it is raised
    """A pipeline whose sampling cannot be replayed."""


class CalibrationError(StepquantError):
    """Calibration data or an optimisation that went wrong."""


class CheckpointError(StepquantError):
    """A checkpoint that is damaged, of an unknown version, or not what the caller expects."""


class EngineError(StepquantError):
    """An engine that cannot run a layer."""


class UnknownEngine(EngineError, SpecError):  # noqa: N818 - reads as a sentence where it is raised
    """An engine that there is not."""


class EvaluationError(StepquantError):
    """A measurement that cannot be made."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the closest known word, or an empty string: for the end of a message."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def no_layer_matches(pattern: str, layers: Iterable[str], *, option: str = "", kind: str = "layers") -> str:
    """The message for a pattern that matches no layer's name: the nearest name or an example, and what lists them.

    option: the setting that holds it; kind: what the names are of.
    """
    known = list(layers)
    where = f" of {option}" if option else ""
    example = f" The first is {known[0]!r}." if known else ""
    return (
        f"The pattern {pattern!r}{where} matches none of the {len(known)} {kind}."
        f"{nearest(pattern.strip('*.'), known) or example} `stepquant quantize --dry-run` without it lists them."
    )
