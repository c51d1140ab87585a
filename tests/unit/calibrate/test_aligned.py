"""Rounding again on the quantized model's own samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tiny_pipelines
from stepquant.api import quantize, sample
from stepquant.calibrate import aligned
from stepquant.calibrate.aligned import AlignLayers
from stepquant.calibrate.gram import RoundLayers
from stepquant.calibrate.stages import FitInputRanges, Place, Select
from stepquant.errors import SpecError
from stepquant.methods.baseline import start
from stepquant.recipe import Recipe
from tiny_dit import tiny_dit_pipe


def test_each_round_sees_samples_of_the_model_as_it_is_then(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[tuple[int, ...], torch.Tensor]] = []
    plain: Any = vars(aligned)["record"]

    def noting(pipe: Any, denoiser: Any, **options: Any) -> Any:
        found = plain(pipe, denoiser, **options)
        assert pipe.denoiser is denoiser
        assert pipe is not original
        seen.append((tuple(options["seeds"]), found[0].steps[-1].next_sample))
        # What the model samples at this moment, from the same noise.
        images = torch.as_tensor(sample(pipe, seeds=list(options["seeds"]), steps=3, batch_size=2))
        mine = (found[0].steps[-1].next_sample / 2 + 0.5).clamp(0, 1)
        assert torch.allclose(mine.flatten().sort().values, images.flatten().sort().values, atol=1e-5)
        return found

    monkeypatch.setattr(aligned, "record", noting)
    original = tiny_dit_pipe()
    before = str(original.denoiser)
    beginning = start(Select(), Place(4, 4, ends="same"), samples=2, batch=2, ranges="minmax")
    stages = (*beginning, RoundLayers(together=4), FitInputRanges("minmax"))
    align = AlignLayers(rounds=2, batch=2, together=4, ranges="minmax")
    quantized = quantize(original, Recipe("test", (*stages, align)), steps=3)
    (first, one), (second, other) = seen
    assert not set(first) & set(second)
    assert min(first) > quantized.figures[0]["seeds"][1]
    assert not torch.equal(one, other)
    rounds = quantized.figures[-1]["rounds"]
    assert len(rounds) == 2
    assert all(entry["after"] <= entry["before"] for entry in rounds)
    assert str(original.denoiser) == before
    plainly = quantize(tiny_dit_pipe(), Recipe("test", stages), steps=3)
    weights = [one.pipe.denoiser.state_dict() for one in (plainly, quantized)]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0] if name.endswith("weight"))


def test_a_round_costs_what_recording_rounding_and_ranges_cost_before_it() -> None:
    """Also with guidance, where each step of an image is two rows of the network's calls."""
    beginning = start(Select(), Place(4, 4), samples=2, batch=2, ranges="minmax")
    stages = (*beginning, RoundLayers(together=4, batch=2), FitInputRanges("minmax"))
    align = AlignLayers(rounds=1, batch=2, together=4, ranges="minmax")
    arguments = {"guidance_scale": 3.0, "class_labels": [1, 2]}
    made = quantize(tiny_pipelines.dit(), Recipe("test", (*stages, align)), steps=2, arguments=arguments)
    spent = {entry["stage"]: entry.get("evaluations", 0) for entry in made.figures}
    assert spent["Record"] == 2 * 2 * 2  # images, steps, halves
    assert spent["AlignLayers"] == spent["Record"] + spent["RoundLayers"] + spent["FitInputRanges"]


def test_settings_are_checked() -> None:
    with pytest.raises(SpecError, match="rounds must be at least 1"):
        AlignLayers(rounds=0)
    with pytest.raises(SpecError, match="together of Round"):
        AlignLayers(together=0)
    with pytest.raises(SpecError, match="windows must be lengths"):
        AlignLayers(windows="steps")  # type: ignore[arg-type]
