"""Corrected biases restore the mean output of every channel, behind the layers that are corrected before."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from torch import Tensor, nn

import tiny
from stepquant.api import Quantized, quantize
from stepquant.calibrate import bias_correction, judging
from stepquant.calibrate.bias_correction import CorrectBiases
from stepquant.calibrate.select import CalibrationSet, at_steps, inputs
from stepquant.calibrate.stages import FitInputRanges, Place, Select
from stepquant.calibrate.trajectory import Trajectory, replay, state_at
from stepquant.errors import CalibrationError, SpecError
from stepquant.methods.baseline import start
from stepquant.model.layer import QuantizedLayer
from stepquant.model.surgery import quantized_layers
from stepquant.recipe import Job, Recipe, Stage

STEPS = 4

mean_of = bias_correction._Shifts._mean


class Means:
    """The mean outputs of all layers with a bias in both networks, over the calibration set, in one forward call."""

    needs: ClassVar[frozenset[str]] = frozenset({"model"})
    gives: ClassVar[frozenset[str]] = frozenset()

    def __init__(self) -> None:
        self.found: list[dict[str, Tensor]] = []

    def run(self, job: Job) -> dict[str, Any]:
        chosen = job.handed["calibration"]
        args, kwargs = inputs(job.handed["trajectories"], chosen, range(len(chosen)))
        names = [
            name
            for name, layer in quantized_layers(job.denoiser).items()
            if isinstance(layer, QuantizedLayer) and layer.bias is not None
        ]
        for network in (job.full_precision, job.denoiser):
            outputs: dict[str, Tensor] = {}
            handles = [network.get_submodule(name).register_forward_hook(noting(outputs, name)) for name in names]
            with torch.no_grad():
                network(*args, **kwargs)
            for handle in handles:
                handle.remove()
            self.found.append(outputs)
        return {}


def noting(outputs: dict[str, Tensor], name: str) -> Any:
    def hook(_module: nn.Module, _args: Any, y: Tensor) -> None:
        rows = y.movedim(1, -1) if y.ndim == 4 else y
        outputs[name] = rows.flatten(0, -2).mean(0)

    return hook


def corrected(*last: Any, select: Select | None = None) -> Quantized:
    place = Place(3, 4, ends="same")
    beginning = start(select or Select(), place, samples=4, batch=2, ranges="minmax")
    stages: tuple[Stage, ...] = (*beginning, FitInputRanges("minmax"), *last)
    return quantize(DDIMPipeline(tiny.tiny_unet(), DDIMScheduler()), Recipe("biases", stages), steps=STEPS)


def furthest(means: Means) -> float:
    full_precision, found = means.found
    assert len(found) > 20
    return max(float((found[name] - full_precision[name]).abs().max()) for name in found)


def state(quantized: Quantized) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in quantized.pipe.unet.state_dict().items()}


def test_the_mean_output_of_every_channel_is_that_of_full_precision() -> None:
    """Exactly where all samples are one mini-batch, and most of it where they are several."""
    before, after, several = Means(), Means(), Means()
    made = corrected(before, CorrectBiases(strength=1), after)
    corrected(CorrectBiases(batch=4, rounds=2, strength=1), several)
    assert furthest(before) > 0.05
    assert furthest(after) < 1e-5
    assert furthest(several) < 0.5 * furthest(before)
    figures = made.figures[-2]
    assert figures["shifts"].keys() == after.found[0].keys()
    assert figures["evaluations"] == 2 * 4 * STEPS


def test_nothing_but_biases_changes() -> None:
    pipe = DDIMPipeline(tiny.tiny_unet(), DDIMScheduler())
    before, after = state(corrected()), state(corrected(CorrectBiases(strength=1)))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    biased = {
        f"{name}.bias"
        for name, layer in quantized_layers(corrected().pipe.unet).items()
        if isinstance(layer, QuantizedLayer) and layer.bias is not None
    }
    assert changed
    assert changed <= biased
    assert before.keys() == after.keys()
    untouched = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    recipe = Recipe(
        "biases",
        (
            *start(Select(), Place(3, 4), samples=2, batch=2, ranges="minmax"),
            FitInputRanges("minmax"),
            CorrectBiases(),
        ),
    )
    quantize(pipe, recipe, steps=STEPS)
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in pipe.unet.state_dict().items())


def test_means_are_taken_over_all_recorded_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not over those alone that calibrate: each step draws as many of all images, and not the same at every step."""
    one, every = (corrected(CorrectBiases(strength=1), select=Select(samples_per_step=number)) for number in (1, None))
    assert one.figures[-1]["evaluations"] == every.figures[-1]["evaluations"] == 2 * 4 * STEPS
    drawn: list[tuple[int, int]] = []

    def noted(trajectories: Sequence[Trajectory], picks: Sequence[tuple[int, int]]) -> CalibrationSet:
        drawn.extend(picks)
        return at_steps(trajectories, picks)

    monkeypatch.setattr(bias_correction, "at_steps", noted)
    fewer = corrected(CorrectBiases(strength=1, samples=2 * STEPS), select=Select(samples_per_step=1))
    assert fewer.figures[-1]["evaluations"] == 2 * 2 * STEPS
    assert [step for step, _ in drawn] == [step for step in range(STEPS) for _ in range(2)]
    of_step = [{image for at, image in drawn if at == step} for step in range(STEPS)]
    assert all(len(images) == 2 for images in of_step)
    assert set.union(*of_step) == {0, 1, 2, 3}


class Shift:
    """Moves the biases of one layer: a planted error of the mean, and the largest by far."""

    needs: ClassVar[frozenset[str]] = frozenset({"model"})
    gives: ClassVar[frozenset[str]] = frozenset({"model"})

    def run(self, job: Job) -> dict[str, Any]:
        layer = job.denoiser.get_submodule("conv_out")
        assert isinstance(layer, QuantizedLayer)
        assert layer.bias is not None
        layer.bias.data += 0.5
        return {}


class FinalError:
    """The mean over all recorded images of the final error's root mean square, in the free run."""

    needs: ClassVar[frozenset[str]] = frozenset({"model"})
    gives: ClassVar[frozenset[str]] = frozenset()

    def __init__(self) -> None:
        self.found = 0.0

    def run(self, job: Job) -> dict[str, Any]:
        with torch.no_grad():
            errors = [
                list(replay(job.denoiser, trajectory, 0, STEPS))[-1].sample - state_at(trajectory, STEPS).sample
                for trajectory in job.handed["trajectories"]
            ]
        self.found = float(torch.cat(errors).double().flatten(1).square().mean(1).sqrt().mean())
        return {}


def test_the_strength_is_chosen_by_the_final_error() -> None:
    """Every strength that was tried has the error of a run with that strength given, and the best is applied."""
    chosen = FinalError()
    made = corrected(Shift(), CorrectBiases(judged=4), chosen)
    figures = made.figures[-2]
    tried = {entry["strength"]: entry["final_error"] for entry in figures["candidates"]}
    assert list(tried) in ([0, 1, 0.5], [0, 1, 2], [0, 1, 2, 3])
    assert figures["strength"] >= 1
    assert tried[figures["strength"]] < tried[0]
    assert chosen.found == pytest.approx(tried[figures["strength"]])
    for strength, expected in tried.items():
        given = FinalError()
        corrected(Shift(), CorrectBiases(strength=strength), given)
        assert given.found == pytest.approx(expected)
    assert figures["evaluations"] == 2 * 4 * STEPS + len(tried) * 4 * STEPS


def test_means_that_mislead_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shifts of the wrong sign do harm: strength 0 wins, and biases end as they were."""
    monkeypatch.setattr(bias_correction._Shifts, "_mean", lambda self, name, y: -mean_of(self, name, y))
    made = corrected(Shift(), CorrectBiases(judged=4))
    figures = made.figures[-1]
    assert [entry["strength"] for entry in figures["candidates"]] == [0.0, 1.0, 0.5]
    assert figures["strength"] == 0.0
    before, after = state(corrected(Shift())), state(made)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize(("judged", "images"), [(1, 2), (2, 2), (3, 4), (16, 4)])
def test_whole_mini_batches_are_judged_as_many_as_there_are(judged: int, images: int) -> None:
    figures = corrected(CorrectBiases(judged=judged)).figures[-1]
    assert figures["evaluations"] == 2 * 4 * STEPS + len(figures["candidates"]) * images * STEPS


def test_a_network_that_diverges_whatever_its_biases_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        judging, "final_drifts", lambda ends, trajectories: torch.full((trajectories[0].batch,), math.nan)
    )
    with pytest.raises(CalibrationError, match="leaves the finite numbers along the recorded trajectories"):
        corrected(CorrectBiases())


@pytest.mark.parametrize("strength", [math.nan, math.inf, "full"])
def test_a_strength_that_is_no_number_is_refused(strength: Any) -> None:
    with pytest.raises(SpecError, match='strength of CorrectBiases must be "auto" or a finite number, found'):
        CorrectBiases(strength=strength)


@pytest.mark.parametrize("name", ["samples", "batch", "rounds", "judged"])
def test_settings_below_one_are_refused(name: str) -> None:
    with pytest.raises(SpecError, match=f"{name} of CorrectBiases must be at least 1, found 0"):
        CorrectBiases(**{name: 0})
