"""What a checkpoint keeps of what its stages measured."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from diffusers import DDIMPipeline, DDIMScheduler

import tiny
from stepquant.api import quantize
from stepquant.manifest import read_manifest
from stepquant.methods.baseline import rtn
from stepquant.recipe import Job


@dataclass(frozen=True)
class Measures:
    """A stage that only measures."""

    needs: ClassVar[frozenset[str]] = frozenset()
    gives: ClassVar[frozenset[str]] = frozenset()

    def run(self, job: Job) -> dict[str, Any]:
        return {
            "evaluations": 4,
            "drift": 0.1 + 0.2,
            "ratio": math.inf,
            "chosen": "bias",
            "left_out": None,
            "losses": [1.0, 0.5],
            "rows": {"conv": 2},
        }


def test_numbers_and_words_are_kept_and_times_and_curves_are_not(tmp_path: Path) -> None:
    pipe = DDIMPipeline(tiny.tiny_unet(), DDIMScheduler())
    made = quantize(pipe, rtn(samples=2, batch=2).then(Measures()), steps=2)
    made.save(tmp_path / "checkpoint")
    *_, kept = read_manifest(tmp_path / "checkpoint").run["stages"]
    assert kept == {"stage": "Measures", "evaluations": 4, "drift": 0.1 + 0.2, "ratio": "inf", "chosen": "bias"}
    assert made.figures[-1]["seconds"] >= 0
    assert made.figures[-1]["losses"] == [1.0, 0.5]


def test_an_allocation_says_its_bits(tmp_path: Path) -> None:
    from stepquant.calibrate.allocation import allocated

    pipe = DDIMPipeline(tiny.tiny_unet(), DDIMScheduler())
    recipe = allocated(rtn(samples=4, batch=2), weight_bits=5.0, samples=2, projections=1, refine=0)
    made = quantize(pipe, recipe, steps=2)
    made.save(tmp_path / "checkpoint")
    (kept,) = (one for one in read_manifest(tmp_path / "checkpoint").run["stages"] if one["stage"] == "Allocate")
    (found,) = (one for one in made.figures if one["stage"] == "Allocate")
    assert 2 <= kept["weight_bits"] <= 5
    assert kept["weight_bits"] == found["weight_bits"]
    assert kept["predicted_drift"] == pytest.approx(found["predicted_drift"], rel=0)
