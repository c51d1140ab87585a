"""What `benchmarks/paper_estimate.py` counts, against runs of a small network."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from stepquant.api import quantize
from stepquant.calibrate import offload
from stepquant.calibrate.estimate import Costs, largest_inputs
from stepquant.calibrate.offload import blocks_in_turn
from stepquant.methods import METHODS
from stepquant.model.pipeline import DenoiserPipeline
from stepquant.recipe import Recipe
from stepquant.run import Run
from tiny_dit import tiny_dit_pipe

STEPS = 4
FILE = Path(__file__).parents[3] / "benchmarks" / "paper_estimate.py"


@pytest.fixture(scope="module")
def paper() -> Any:
    spec = importlib.util.spec_from_file_location("paper_estimate", FILE)
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    sys.modules["paper_estimate"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


class Step(nn.Sequential):
    """A block."""


class Chain(nn.Module):
    """Twelve blocks one after the other between two other layers, for samples [B, 2, 4, 4]."""

    stepquant_blocks = ("Step",)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(2, 8), *(Step(nn.Linear(8, 8)) for _ in range(12)), nn.Linear(8, 2))

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        found: Tensor = self.layers(sample.movedim(1, -1)).movedim(-1, 1)
        return found


def recipe_of(name: str, **more: Any) -> Recipe:
    options: dict[str, Any] = {"samples": 4, "batch": 2}
    if name == "layerwise":
        return METHODS[name](**options)
    options |= {"window": 2, "iterations": 2, "block_iterations": 2, "layer_rounding": True, "together": 2, **more}
    return METHODS["accuquant"](**options)


def weights_of(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_flops_of_a_linear_layer(paper: Any) -> None:
    with torch.device("meta"):
        assert paper.flops_of(nn.Linear(3, 5), {"input": torch.empty(7, 3)}) == 2 * 7 * 3 * 5


@pytest.mark.parametrize("name", ["layerwise", "accuquant"])
def test_evaluations_are_those_that_stages_report(name: str) -> None:
    pipe, recipe = tiny_dit_pipe(), recipe_of(name)
    figures = quantize(pipe, recipe, steps=STEPS).figures
    costs = Costs.of(recipe, steps=STEPS, rows=1, inputs=largest_inputs(pipe.denoiser))
    assert costs is not None
    counted = 0
    for stage, found in zip(recipe.stages, figures, strict=True):
        if "evaluations" in found:
            assert found["evaluations"] == pytest.approx(costs.evaluations(stage), abs=1), found["stage"]
            counted += 1
    assert counted == {"layerwise": 4, "accuquant": 5}[name]
    assert Costs.of(Recipe("empty", ()), steps=STEPS, rows=1, inputs=()) is None


@pytest.mark.parametrize("name", ["layerwise", "windows"])
def test_what_moves_is_at_most_what_is_said(name: str, paper: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    moved, copied, put = [0], offload._copied, offload._put_

    def counting(tensor: Tensor, device: torch.device) -> Tensor:
        moved[0] += tensor.numel()
        return copied(tensor, device)

    def putting(tensor: Tensor, device: torch.device) -> None:
        before = moved[0]
        put(tensor, device)
        moved[0] = before  # what is fitted comes once for all

    monkeypatch.setattr(offload, "_copied", counting)
    monkeypatch.setattr(offload, "_put_", putting)
    pipe = DenoiserPipeline(Chain().eval(), DDIMScheduler(), (2, 4, 4))
    recipe = recipe_of(name, block_iterations=0) if name == "windows" else recipe_of(name)
    network = paper.Network("tiny", 1, 0, weights_of(pipe.denoiser), 0, 0, largest_inputs(pipe.denoiser))
    said = paper.Budget.of(recipe, network, STEPS).moved
    quantize(pipe, recipe, steps=STEPS, run=Run(offload=torch.device("cpu")))
    passes = moved[0] / sum(map(weights_of, blocks_in_turn(pipe.denoiser).values()))
    # Scales of activations move too, which are a few numbers a layer; one call looks for the readers of the sample.
    assert said / 2 < passes < 1.15 * said + 1
