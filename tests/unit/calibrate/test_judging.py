"""Judging by where sampling ends: what is better, and what a window stage keeps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import tiny
import tiny_pipelines
from stepquant.api import Quantized, quantize
from stepquant.calibrate import judging
from stepquant.calibrate.final_state import final_drifts, final_states
from stepquant.calibrate.judging import Judge, judged_images
from stepquant.calibrate.rounding import input_scales
from stepquant.calibrate.trajectory import record, seal
from stepquant.calibrate.window_fitting import FitWindows
from stepquant.errors import CalibrationError, SpecError
from stepquant.methods import METHODS
from stepquant.model.layer import QuantizedLayer
from stepquant.model.surgery import quantized_layers
from stepquant.recipe import Job, Recipe
from stepquant.run import Run

STEPS = 4


def judged_of(errors: dict[float, list[float]]) -> Judge:
    job: Any = None
    return Judge(job, [], {candidate: torch.tensor(values).double() for candidate, values in errors.items()})


@pytest.mark.parametrize(
    ("errors", "others", "better"),
    [
        ([1.0, 2.0, 3.0], [2.0, 3.0, 4.0], True),  # less by the same everywhere: no noise
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], False),  # the same
        ([1.0, 3.0], [2.0, 3.0], False),  # the mean is 0.5 less, the standard error of the difference is 0.5
        ([1.0, 3.0, 2.0], [2.0, 3.0, 3.0], True),  # 2/3 less, standard error 1/3
        ([3.0], [2.0], False),
        ([1.0], [2.0], True),
        ([1.0, 2.0], [math.nan, 1.0], True),
        ([1.0, math.inf], [math.nan, 1.0], False),
        ([math.nan, 0.0], [1.0, 1.0], False),
    ],
)
def test_better_is_less_by_more_than_the_noise(errors: list[float], others: list[float], better: bool) -> None:
    assert judged_of({1.0: errors, 0.0: others}).better(1.0, 0.0) == better


def test_the_report_names_candidates_and_has_null_for_what_diverged() -> None:
    found = judged_of({0.0: [1.0, 2.0], 1.0: [math.nan, 1.0]}).report("share")
    assert found == [{"share": 0.0, "final_error": 1.5}, {"share": 1.0, "final_error": None}]


@pytest.mark.parametrize(("asked", "images"), [(0, 0), (1, 8), (8, 8), (9, 16), (24, 20)])
def test_whole_mini_batches_are_sampled(asked: int, images: int) -> None:
    assert judged_images(asked, images=20, batch=8) == images


def test_an_image_that_the_pipeline_carries_twice_is_one_image() -> None:
    """DiT with guidance: the sample has the latents of every image twice."""
    pipe = tiny_pipelines.dit()
    arguments = {"guidance_scale": 1.5, "class_labels": [1, 2, 3]}
    quantized = quantize(
        pipe, METHODS["rtn"](weights=4, activations=8, samples=3, batch=3), steps=STEPS, arguments=arguments
    )
    recorded = [
        seal(one)
        for one in record(
            pipe, pipe.transformer, seeds=[5, 6, 7], steps=STEPS, batch_size=3, arguments=arguments, run=Run()
        )
    ]
    job: Any = SimpleNamespace(denoiser=quantized.pipe.transformer, handed={"trajectories": recorded}, run=Run())
    ticks: list[int] = []
    judge = Judge.of(job, 3)
    judge.sample(0.0, ticks.append)
    assert recorded[0].batch == 6
    assert judge.images == sum(ticks) == 3
    assert judge.evaluations == 6 * STEPS
    twice = final_drifts(final_states(job.denoiser, recorded), recorded)
    torch.testing.assert_close(judge.errors[0.0], twice[:3])
    torch.testing.assert_close(judge.errors[0.0], twice[3:])
    assert len(judge.errors[0.0].unique()) == 3


@dataclass(frozen=True)
class Clip:
    """Spoils activation ranges: everything above a share of them is clipped."""

    factor: float
    needs: ClassVar[frozenset[str]] = frozenset({"model"})
    gives: ClassVar[frozenset[str]] = frozenset({"model"})

    def run(self, job: Job) -> dict[str, Any]:
        for quantizer in input_scales(quantized_layers(job.denoiser)).values():
            quantizer.scale.mul_(self.factor)
        return {}


def fitted(*stages: Any) -> Quantized:
    beginning = METHODS["rtn"](weights=8, activations=8, samples=4, batch=2).stages
    return quantize(tiny.tiny_pipe()[0], Recipe("judged", (*beginning, *stages)), steps=STEPS)


def scales(quantized: Quantized) -> dict[str, Tensor]:
    found = input_scales(quantized_layers(quantized.pipe.unet))
    return {name: quantizer.scale.detach() for name, quantizer in found.items()}


def windows(**settings: Any) -> FitWindows:
    given = {"window": STEPS, "iterations": 10, "lr_scales": 8e-2, "learn_weights": False, "free_run": 1.0}
    return FitWindows(**{**given, **settings})


def test_windows_that_help_are_kept_whole() -> None:
    unseen, judged = (fitted(Clip(0.6), windows(judged=judged)) for judged in (0, 4))
    figures = judged.figures[-1]
    assert figures["share"] == 1.0
    before, after = (entry["final_error"] for entry in figures["candidates"])
    assert after < 0.9 * before
    assert figures["evaluations"] == unseen.figures[-1]["evaluations"] + 2 * 4 * STEPS
    learnt = scales(unseen)
    assert all(torch.equal(scale, learnt[name]) for name, scale in scales(judged).items())


def test_windows_that_do_harm_are_taken_back() -> None:
    """A rate at which every scale is thrown about."""
    judged, unseen = fitted(windows(lr_scales=0.9, judged=4)), fitted(windows(lr_scales=0.9))
    figures = judged.figures[-1]
    assert figures["share"] == 0.0
    assert [entry["share"] for entry in figures["candidates"]] == [0.0, 1.0, 0.5]
    before, learnt = scales(fitted()), scales(unseen)
    assert all(torch.equal(scale, before[name]) for name, scale in scales(judged).items())
    assert any(not torch.equal(scale, before[name]) for name, scale in learnt.items())


def test_half_of_what_was_learnt_is_the_geometric_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Judge, "better", lambda self, candidate, other: candidate == 0.5)
    half = scales(fitted(Clip(0.6), windows(judged=4)))
    before, after = scales(fitted(Clip(0.6))), scales(fitted(Clip(0.6), windows()))
    for name, scale in half.items():
        torch.testing.assert_close(scale, (before[name] * after[name]).sqrt())


def weights(quantized: Quantized) -> dict[str, Tensor]:
    layers = quantized_layers(quantized.pipe.unet)
    return {name: layer.weight.detach() for name, layer in layers.items() if isinstance(layer, QuantizedLayer)}


def test_where_weights_learn_they_are_taken_back_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Judge, "better", lambda self, candidate, other: False)
    learning = {"learn_weights": True, "keep_rounding": 0.0, "lr_weights": 0.3}
    unseen, judged = (fitted(windows(**learning, judged=judged)) for judged in (0, 4))
    before = weights(fitted())
    assert any(not torch.equal(weight, before[name]) for name, weight in weights(unseen).items())
    assert all(torch.equal(weight, before[name]) for name, weight in weights(judged).items())
    assert [entry["share"] for entry in judged.figures[-1]["candidates"]] == [0.0, 1.0]


def test_a_network_that_diverges_either_way_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        judging, "final_drifts", lambda ends, trajectories: torch.full((trajectories[0].batch,), math.nan)
    )
    with pytest.raises(CalibrationError, match="with what windows have learnt and without"):
        fitted(windows(judged=4))


def test_fewer_than_no_images_are_refused() -> None:
    with pytest.raises(SpecError, match="judged of FitWindows must be at least 0, found -1"):
        FitWindows(judged=-1)
