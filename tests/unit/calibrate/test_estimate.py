"""The estimate before a run, against the bytes and the calls of the run."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler, PNDMScheduler
from safetensors.torch import save_file
from torch import Tensor

from stepquant.api import estimate, quantize
from stepquant.calibrate import reconstruct, spilled
from stepquant.calibrate.captured import RowsOnDisk
from stepquant.calibrate.estimate import Estimate
from stepquant.calibrate.qdrop import QDrop
from stepquant.calibrate.reconstruct import RoundBlocks, ScaleBlocks
from stepquant.calibrate.stages import FitInputRanges, FitWeightRanges, Place, Record, Select
from stepquant.calibrate.window_fitting import FitWindows
from stepquant.errors import ModelError
from stepquant.model.pipeline import DenoiserPipeline
from stepquant.recipe import Recipe, Stage
from stepquant.run import Run
from tiny import TinyNet

SAMPLES, BATCH, STEPS = 12, 4, 20


def tiny_pipe(scheduler: Any = None) -> DenoiserPipeline:
    torch.manual_seed(0)
    return DenoiserPipeline(TinyNet().eval(), copy.deepcopy(scheduler or DDIMScheduler()), (2, 4, 4))


def recipe_of(*stages: Stage, select: Select | None = None) -> Recipe:
    begin = (Record(SAMPLES, BATCH), select or Select(), Place(4, 8), FitWeightRanges("minmax"))
    return Recipe("test", (*begin, FitInputRanges("minmax"), *stages))


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(),
        DPMSolverMultistepScheduler(),
        HeunDiscreteScheduler(),
        PNDMScheduler(skip_prk_steps=True),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_the_recording_has_the_estimated_bytes(scheduler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def measured(tensors: dict[str, Tensor], path: Path) -> None:
        save_file(tensors, path)
        sizes.append(sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))

    monkeypatch.setattr(spilled, "save_file", measured)
    pipe, recipe = tiny_pipe(scheduler), recipe_of()
    found = estimate(pipe, recipe, steps=STEPS)
    assert found is not None
    quantize(pipe, recipe, steps=STEPS, run=Run(max_memory=0))
    assert found.recording == pytest.approx(sum(sizes), rel=0.08)
    assert found.batch == pytest.approx(max(sizes), rel=0.08)
    parameters = sum(parameter.numel() for parameter in pipe.denoiser.parameters())
    assert found.network == 4 * parameters


BLOCKS: dict[str, RoundBlocks | ScaleBlocks] = {
    "round": RoundBlocks(iterations=1, batch=4),
    "together": RoundBlocks(iterations=1, batch=4, together=2),
    "both inputs": RoundBlocks(iterations=1, batch=4, qdrop=QDrop()),
    "scale": ScaleBlocks(iterations=1, batch=4, together=1),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_caches_have_the_estimated_bytes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    caches = reconstruct._caches

    def bytes_of(values: Iterable[Any]) -> int:
        return sum(value.bytes for value in values if isinstance(value, RowsOnDisk))

    def measured(*args: Any, **kwargs: Any) -> Any:
        kept, given = [], []
        for unit, cache in caches(*args, **kwargs):
            plain = cache.float_inputs or ((), {})
            inputs = bytes_of((*cache.args, *cache.kwargs.values()))
            behind_quantized = isinstance(BLOCKS[name], RoundBlocks)
            kept.append(bytes_of((*cache.outputs, *plain[0], *plain[1].values())) + (0 if behind_quantized else inputs))
            given.append(inputs if behind_quantized else 0)
            yield unit, cache
        sizes.extend(sum(kept[number:]) + given[number] for number in range(len(kept)))

    monkeypatch.setattr(reconstruct, "_caches", measured)
    pipe, recipe = tiny_pipe(), recipe_of(BLOCKS[name], select=Select(every=2, samples_per_step=8))
    found = estimate(pipe, recipe, steps=STEPS)
    assert found is not None
    quantize(pipe, recipe, steps=STEPS, run=Run(max_memory=0))
    assert found.caches == max(sizes)


def test_evaluations_are_those_that_stages_report() -> None:
    windows = FitWindows(4, iterations=40, judged=BATCH + 1, learn_weights=False)
    stages = (RoundBlocks(iterations=3, batch=4), ScaleBlocks(iterations=2, batch=4), windows)
    pipe, recipe = tiny_pipe(), recipe_of(*stages)
    found = estimate(pipe, recipe, steps=STEPS)
    assert found is not None
    assert found.uncounted == ()
    figures = {entry["stage"]: entry for entry in quantize(pipe, recipe, steps=STEPS).figures}
    for stage in stages[:2]:
        assert stage.evaluations_for(SAMPLES * STEPS) == figures[type(stage).__name__]["evaluations"]
    # With one candidate besides nothing at all, as is expected; a second one is tried where that does not help.
    more = (len(figures["FitWindows"]["candidates"]) - 2) * 2 * BATCH * STEPS
    expected = windows.evaluations_for(images=SAMPLES, batch=BATCH, steps=STEPS)
    assert expected == figures["FitWindows"]["evaluations"] - more


def test_sums() -> None:
    made = Estimate(network=100, recording=5000, batch=700, caches=900, seconds=1.0, uncounted=())
    assert made.memory(None) == 2 * 100 + 5000 + 900
    assert made.memory(0) == 2 * 100 + 700
    assert made.memory(800) == 2 * 100 + 800
    assert made.disk(None) == made.disk(900) == 5000 + 2 * 100
    assert made.disk(899) == 5000 + 2 * 100 + 900


def test_what_cannot_be_estimated() -> None:
    assert estimate(tiny_pipe(), Recipe("nothing", ()), steps=3) is None
    pipe = tiny_pipe()
    broken: Any = pipe.denoiser
    broken.conv.weight.data[0] = torch.nan
    with pytest.raises(ModelError, match="NaN"):
        estimate(pipe, recipe_of(), steps=3)
