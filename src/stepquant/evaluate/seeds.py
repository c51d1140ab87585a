"""Which seeds a checkpoint was calibrated on: images of those say nothing about new ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stepquant.calibrate.stages import calibration_seeds
from stepquant.errors import EvaluationError

__all__ = ["calibrated_on", "refuse_calibration_seeds"]


def calibrated_on(manifest: Mapping[str, Any]) -> set[int]:
    """Noise seeds of the trajectories that a checkpoint was calibrated and corrected on.

    manifest: as JSON values; `recipe` and `run` of it are enough. Seeds follow from the seed of the run and the number
    of samples, see `calibrate.stages.calibration_seeds`; a checkpoint that does not say these (made by hand) has none.
    Each round of `AlignLayers` has as many images as were recorded, from the seeds behind those.
    """
    run = manifest.get("run") or {}
    recipe = manifest.get("recipe") or {}
    seeds: set[int] = set()
    stages = recipe.get("stages") or []
    rounds = max((int(stage["rounds"]) for stage in stages if stage.get("stage") == "AlignLayers"), default=0)
    for stage in stages:
        if stage.get("stage") == "Record" and "seed" in run:
            seeds |= set(calibration_seeds(int(run["seed"]), int(stage["samples"]) * (1 + rounds)))
    for part in ("compensation", "judged"):  # a correction fitted, or kept, by what these images said
        corrected = run.get(part) or {}
        if "seed" in corrected:
            seeds |= set(calibration_seeds(int(corrected["seed"]), _recorded(corrected)))
    return seeds


def _recorded(compensation: Mapping[str, Any]) -> int:
    """Images that `compensate` recorded; older checkpoints say only its evaluations and steps."""
    records = [stage for stage in compensation.get("stages") or [] if stage.get("stage") == "Record"]
    images = (stage.get("samples", int(stage["evaluations"]) // int(stage["steps"])) for stage in records)
    return max((int(count) for count in images), default=0)


def refuse_calibration_seeds(seeds: Sequence[int], manifest: Mapping[str, Any], *, name: str) -> None:
    """Raise EvaluationError if any of the seeds is one that the checkpoint was calibrated on."""
    shared = sorted(set(seeds) & calibrated_on(manifest))
    if shared:
        raise EvaluationError(
            f"{name} was calibrated on {len(shared)} of these {len(seeds)} seeds, the first of them {shared[0]}, so "
            "its images of them would look better than others. Take other seeds, or give --allow-calibration-seeds "
            "(in Python allow_calibration_seeds=True)."
        )
