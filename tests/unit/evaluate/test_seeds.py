"""Seeds of calibration, by what a real checkpoint says about itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusers import DDIMPipeline, DDIMScheduler

import tiny
from stepquant.api import calibrations_of, compensate, load, quantize
from stepquant.calibrate.stages import CALIBRATION_SEED, calibration_seeds
from stepquant.errors import EvaluationError
from stepquant.evaluate.compare import evaluate
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


def test_rounds_that_sample_from_noise_of_their_own_count(tmp_path: Path) -> None:
    pipe = DDIMPipeline(tiny.tiny_unet(), DDIMScheduler())
    recipe = METHODS["tcaq_dm"](samples=2, batch=2, rounds=2)
    made = quantize(pipe, recipe, steps=2, run=Run(seed=1))
    made.save(tmp_path / "aligned")
    wanted = set(calibration_seeds(1, 6))
    assert calibrated_on(inspect_checkpoint(tmp_path / "aligned")["manifest"]) == wanted
    (calibration,) = calibrations_of(made.pipe)
    assert calibrated_on(calibration) == wanted


def test_pipelines_know_what_they_were_calibrated_on(checkpoint: Path) -> None:
    """However they were had: just quantized, loaded, compensated, or loaded and compensated."""
    pipe = DDIMPipeline(tiny.tiny_unet(), DDIMScheduler())
    made = quantize(pipe, METHODS["rtn"](samples=3, batch=2), steps=2, run=Run(seed=2))
    corrected = compensate(made.pipe, pipe, steps=2, samples=4, batch=4, estimator="bias", run=Run(seed=5))
    loaded = load(checkpoint.with_name("corrected"), engine="simulated")
    for candidate, seed in ((made.pipe, 1_020_002), (corrected.pipe, 1_020_002), (corrected.pipe, 1_050_003)):
        with pytest.raises(EvaluationError, match=f"calibrated on 1 of these 2 seeds, the first of them {seed}"):
            evaluate(candidate, pipe, seeds=[7, seed], steps=2)
    for seed in (1_020_002, 1_050_003):
        with pytest.raises(EvaluationError, match="allow_calibration_seeds=True"):
            evaluate(pipe, loaded, seeds=[seed], steps=2)
    results = evaluate(loaded, pipe, seeds=[7, 1_050_003], steps=2, allow_calibration_seeds=True)
    assert results["n"] == 2
    assert calibrations_of(pipe) == ()


def test_seeds_below_a_million_never_meet_those_of_calibration() -> None:
    for seed in (0, 1, 1000):
        assert min(calibration_seeds(seed, 10_000)) >= CALIBRATION_SEED == 1_000_000


def test_a_manifest_that_says_nothing() -> None:
    assert calibrated_on({}) == set()
    assert calibrated_on({"run": {}, "recipe": {"stages": [{"stage": "Record", "samples": 4}]}}) == set()
