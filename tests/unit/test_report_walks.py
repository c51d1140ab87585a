"""What is measured for the page, and what is kept beside a checkpoint."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from stepquant.api import with_denoiser
from stepquant.cli.outputs import read_origin, write_figures
from stepquant.errors import EvaluationError
from stepquant.model.correction import CorrectedScheduler, StepCorrection
from stepquant.model.pipeline import DenoiserPipeline
from stepquant.report.walks import SEEDS, Walks
from stepquant.run import Run
from tiny import TinyNet, tiny_pipe
from tiny_pipelines import FAMILIES


def test_films_begin_alike_and_part_where_the_candidate_differs() -> None:
    pipe, quantized = tiny_pipe()
    walks = Walks(pipe, seeds=range(5), steps=4, run=Run())
    for denoiser in (pipe.unet, quantized):
        walks.add(with_denoiser(pipe, "unet", denoiser))
    found = walks.found()
    films = found["films"]
    assert found["notes"] == []
    assert films["seeds"] == [0, 1, 2] == list(range(SEEDS))
    assert len(films["timesteps"]) == 4
    assert films["reference"].shape == (4, 3, 1, 8, 8)
    same, other = films["candidates"]
    assert torch.equal(same, films["reference"])
    assert not torch.equal(other, films["reference"])
    assert 0 <= float(other.min()) <= float(other.max()) <= 1
    exact, errors = found["layer_errors"]
    assert all(value == 0 for row in exact["made"].values() for value in row)
    assert any(value > 0 for row in errors["made"].values() for value in row)


def test_latents_are_shown_by_channels_and_the_page_says_so() -> None:
    denoiser = TinyNet()
    pipe = DenoiserPipeline(denoiser, DDIMScheduler(clip_sample=False), (2, 4, 4))
    walks = Walks(pipe, seeds=[0, 1], steps=3, run=Run())
    walks.add(pipe)
    found = walks.found()
    assert found["films"]["reference"].shape == (3, 2, 1, 4, 4)
    assert float(found["films"]["reference"].amin()) == 0.0
    assert float(found["films"]["reference"].amax()) == 1.0
    assert "their first 1 channels" in found["notes"][0]


class Another(nn.Module):
    """Has no layer of TinyNet."""

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return sample / 2


class NoGenerator:
    """A pipeline whose images cannot be tied to seeds."""

    def __init__(self) -> None:
        self.unet = TinyNet()
        self.scheduler = DDIMScheduler()

    def __call__(self) -> None: ...


def test_what_cannot_be_measured_is_said() -> None:
    scheduler = DDIMScheduler(clip_sample=False)
    pipe = DenoiserPipeline(TinyNet(), scheduler, (2, 4, 4))
    walks = Walks(pipe, seeds=[0], steps=2, run=Run())
    walks.add(DenoiserPipeline(Another(), scheduler, (2, 4, 4)))
    found = walks.found()
    assert found["layer_errors"] == [None]
    assert "No errors of layers: Another has none of the layers" in found["notes"][0]
    assert len(found["films"]["candidates"]) == 1
    pipe.scheduler = CorrectedScheduler(scheduler, StepCorrection.identity(torch.tensor([500.0, 0.0]), 1))
    assert Walks(pipe, seeds=[0], steps=2, run=Run()).found() == {
        "notes": ["No films and no errors of layers: the reference corrects its own predictions."]
    }
    replayed = Walks(NoGenerator(), seeds=[0], steps=2, run=Run())
    replayed.add(pipe)
    assert list(replayed.found()) == ["notes"]
    assert "No films and no errors of layers: NoGenerator takes no `generator`" in replayed.found()["notes"][0]


def test_figures_of_the_stages_come_back(tmp_path: Path) -> None:
    assert read_origin(tmp_path / "out") == {}
    figures: list[dict[str, Any]] = [{"stage": "Fit", "losses": [[0, 1.5]], "seconds": 0.25}, {"stage": "Ünd\n"}]
    write_figures(figures, tmp_path / "out")
    (tmp_path / "out.run.yaml").write_text("model: digits-unet\n")
    (tmp_path / "out.speed.json").write_text('{"schema": 1}')
    assert read_origin(tmp_path / "out") == {
        "figures": figures,
        "settings": "model: digits-unet\n",
        "settings_file": str(tmp_path / "out.run.yaml"),
        "speed": {"schema": 1},
    }
    (tmp_path / "out.speed.json").write_text('{"results": []}')
    with pytest.raises(EvaluationError, match=r"out\.speed\.json is damaged \(it has no schema 1\)"):
        read_origin(tmp_path / "out")
    (tmp_path / "out.figures.jsonl").write_text("{\n")
    with pytest.raises(EvaluationError, match=r"out\.figures\.jsonl is damaged"):
        read_origin(tmp_path / "out")


def test_arguments_are_for_all_seeds_and_those_of_the_first_are_taken() -> None:
    pipe = FAMILIES["dit"].build()
    walks = Walks(pipe, seeds=range(5), steps=2, run=Run(), arguments={"class_labels": [1, 2, 3, 4, 5]})
    walks.add(pipe)
    assert walks.found()["films"]["reference"].shape[:2] == (2, SEEDS)


class Refusing(NoGenerator):
    def __call__(self, *, generator: Any) -> None:  # type: ignore[override]
        raise ValueError("`height` must be divisible by 8.")


def test_what_a_pipeline_refuses_is_said() -> None:
    found = Walks(Refusing(), seeds=[0], steps=2, run=Run()).found()
    assert found == {"notes": ["No films and no errors of layers: `height` must be divisible by 8."]}


def test_a_candidate_in_another_dtype_has_films() -> None:
    pipe = DenoiserPipeline(TinyNet(), DDIMScheduler(clip_sample=False), (1, 4, 4))
    pipe.denoiser.conv, pipe.denoiser.out = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, 1)
    walks = Walks(pipe, seeds=[0], steps=2, run=Run())
    walks.add(DenoiserPipeline(copy.deepcopy(pipe.denoiser).double(), pipe.scheduler, (1, 4, 4)))
    found = walks.found()
    assert torch.allclose(found["films"]["candidates"][0], found["films"]["reference"], atol=1e-5)
    assert found["layer_errors"] == [None]
    assert "No errors of layers: the layers compute in another dtype" in found["notes"][0]


def test_a_candidate_that_cannot_walk_costs_the_films(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, quantized = tiny_pipe()
    walks = Walks(pipe, seeds=[0], steps=2, run=Run())

    def failing(*_arguments: Any) -> Any:
        raise EvaluationError("It does not walk.")

    monkeypatch.setattr("stepquant.report.walks.clean_samples", failing)
    walks.add(with_denoiser(pipe, "unet", quantized))
    found = walks.found()
    assert found["notes"] == ["No films: It does not walk."]
    assert "films" not in found
    assert found["layer_errors"][0] is not None
