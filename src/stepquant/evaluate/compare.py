"""A quantized pipeline beside its full-precision one: paired metrics, Frechet distances, drift."""

from __future__ import annotations

import datetime
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from stepquant._version import __version__
from stepquant.api import sampled
from stepquant.calibrate.trajectory import record, seal
from stepquant.errors import EvaluationError
from stepquant.evaluate.drift import measure_drift
from stepquant.evaluate.features import DigitFeatures, Features
from stepquant.evaluate.frechet import FeatureStatistics, frechet_distance
from stepquant.evaluate.paired import PairedMetrics
from stepquant.model.correction import correction_of
from stepquant.model.families import find_denoiser
from stepquant.run import Run

__all__ = ["SCHEMA", "evaluate", "features_for"]

SCHEMA = 1
DRIFT_SEEDS = 64
"""Drift is measured on at most this many of the seeds: it keeps whole trajectories in memory."""


def features_for(images: Tensor) -> Features | None:
    """The shipped features that fit these images: digits for 32x32 single-channel ones, otherwise none."""
    return DigitFeatures() if tuple(images.shape[1:]) == (1, 32, 32) else None


def evaluate(
    candidate: Any,
    against: Any,
    *,
    seeds: Sequence[int],
    steps: int,
    batch_size: int = 16,
    features: Features | None = None,
    arguments: Mapping[str, Any] | None = None,
    run: Run | None = None,
) -> dict[str, Any]:
    """Compare two pipelines on equal seeds; JSON values of schema 1.

    features: for the Frechet distances; None takes the shipped ones where they fit the images.
    Figures that cannot be measured are left out, and `notes` says why.
    """
    seeds, run = list(seeds), run or Run()
    paired, notes = PairedMetrics(), []
    statistics: dict[str, FeatureStatistics] = {}
    common: dict[str, Any] = {"seeds": seeds, "steps": steps, "batch_size": batch_size, "arguments": arguments}
    references = sampled(against, progress=run.progress, **common)
    for candidates in sampled(candidate, **common):
        reference = next(references)
        if candidates.shape != reference.shape:
            raise EvaluationError(
                f"The two pipelines give images of different shapes: {list(candidates.shape[1:])} and "
                f"{list(reference.shape[1:])}."
            )
        paired.update(candidates, reference)
        features = features or features_for(reference)
        if features is not None:
            for name, images in (("candidate", candidates), ("reference", reference)):
                statistics.setdefault(name, FeatureStatistics(features.dim)).update(features(images))
    result = paired.result()
    metrics: dict[str, Any] = {
        name: {"value": interval.mean, "low": interval.low, "high": interval.high}
        for name, interval in (("psnr", result.psnr), ("ssim", result.ssim), ("mae", result.mae))
    }
    metrics["psnr"]["unit"] = "dB"
    if features is None:
        notes.append("No Frechet distances: no shipped features fit these images; pass features=ModuleFeatures(...).")
    elif len(seeds) < 2:
        notes.append("No Frechet distances: they need at least two images.")
    else:
        metrics |= _frechet(statistics, features, notes)
    drift, timesteps = _drift(candidate, against, seeds[:DRIFT_SEEDS], steps, batch_size, arguments, run)
    metrics["drift_final"] = {
        "value": drift["accumulated"][-1],
        "unit": "RMS of the sample",
        "n": len(seeds[:DRIFT_SEEDS]),
    }
    return {
        "schema": SCHEMA,
        "candidate": "",
        "against": "",
        "n": len(seeds),
        "seeds": _seeds(seeds),
        "steps": steps,
        "scheduler": type(against.scheduler).__name__,
        "features": None if features is None else f"{features.name} ({features.identity[:12]})",
        "metrics": metrics,
        "drift": {"timesteps": timesteps, **drift},
        "images": {"seeds": seeds[:8]},
        "notes": notes,
        "command": " ".join(sys.argv),
        "versions": {"stepquant": __version__, **{name: version(name) for name in ("torch", "diffusers")}},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _seeds(seeds: Sequence[int]) -> list[int]:
    """[first, last] of consecutive seeds, otherwise all of them."""
    consecutive = list(seeds) == list(range(seeds[0], seeds[0] + len(seeds)))
    return [seeds[0], seeds[-1]] if consecutive and len(seeds) > 1 else list(seeds)


def _frechet(
    statistics: Mapping[str, FeatureStatistics], features: Features, notes: list[str]
) -> dict[str, dict[str, Any]]:
    candidate, reference = statistics["candidate"], statistics["reference"]
    found = {"frechet_to_fp": {"value": frechet_distance(candidate, reference), "features": features.name}}
    if candidate.rank_deficient:
        notes.append(
            f"Frechet distances of {candidate.n} images over {features.dim} features are badly biased: use more seeds."
        )
    if isinstance(features, DigitFeatures):
        data = FeatureStatistics.from_moments(*features.data_statistics())
        found["frechet_to_data"] = {
            "value": frechet_distance(candidate, data),
            "reference_value": frechet_distance(reference, data),
            "features": features.name,
        }
    else:
        notes.append(f"No Frechet distance to data: {features.name} has no data statistics.")
    return found


def _drift(
    candidate: Any,
    against: Any,
    seeds: Sequence[int],
    steps: int,
    batch_size: int,
    arguments: Mapping[str, Any] | None,
    run: Run,
) -> tuple[dict[str, list[float]], list[float]]:
    _, quantized = find_denoiser(candidate)
    _, full_precision = find_denoiser(against)
    cut = {key: value[: len(seeds)] if isinstance(value, list) else value for key, value in (arguments or {}).items()}
    trajectories = record(
        against, full_precision, seeds=seeds, steps=steps, batch_size=batch_size, arguments=cut, run=run
    )
    timesteps = [float(step.timestep) for step in trajectories[0].steps]
    sealed = [seal(trajectory) for trajectory in trajectories]
    drift = measure_drift(quantized, sealed, correction_of(candidate.scheduler))
    return drift.to_dict(), timesteps
