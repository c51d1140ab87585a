"""Seeds of calibration, by what a real checkpoint says about itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusers import DDIMPipeline, DDIMScheduler

import tiny
from stepquant.api import compensate, quantize
from stepquant.calibrate.stages import CALIBRATION_SEED, calibration_seeds
from stepquant.errors import EvaluationError
from stepquant.evaluate.seeds import calibrated_on, refuse_calibration_seeds
from stepquant.inspection import inspect_checkpoint
from stepquant.methods import METHODS
from stepquant.run import Run


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("seeds") / "checkpoint"
    pipe = DDIMPipeline(tiny.tiny_unet(), DDIMScheduler())
    quantize(pipe, METHODS["rtn"](samples=3, batch=2), steps=2, run=Run(seed=2)).save(folder)
    corrected = compensate(folder, pipe, steps=2, samples=4, batch=4, estimator="bias", run=Run(seed=5))
    corrected.save(folder.with_name("corrected"))
    return folder


def test_seeds_of_a_checkpoint(checkpoint: Path) -> None:
    manifest = inspect_checkpoint(checkpoint)["manifest"]
    assert calibrated_on(manifest) == set(calibration_seeds(2, 3))
    assert calibrated_on(inspect_checkpoint(checkpoint.with_name("corrected"))["manifest"]) == {
        *calibration_seeds(2, 3),
        *calibration_seeds(5, 4),
    }


def test_overlap_is_refused(checkpoint: Path) -> None:
    manifest = inspect_checkpoint(checkpoint)["manifest"]
    first = CALIBRATION_SEED + 20_000
    with pytest.raises(EvaluationError, match=rf"c was calibrated on 1 of these 2 seeds, the first of them {first}"):
        refuse_calibration_seeds([1000, first], manifest, name="c")
    refuse_calibration_seeds([1000, first + 3, CALIBRATION_SEED], manifest, name="c")


def test_seeds_below_a_million_never_meet_those_of_calibration() -> None:
    for seed in (0, 1, 1000):
        assert min(calibration_seeds(seed, 10_000)) >= CALIBRATION_SEED == 1_000_000


def test_a_manifest_that_says_nothing() -> None:
    assert calibrated_on({}) == set()
    assert calibrated_on({"run": {}, "recipe": {"stages": [{"stage": "Record", "samples": 4}]}}) == set()
