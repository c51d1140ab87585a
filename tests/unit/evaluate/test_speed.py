"""Times of engines beside full precision: what is called, what is compared, and what is said where there is none."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn

from stepquant.api import sample
from stepquant.engines.base import place
from stepquant.engines.openvino import has_bf16, has_vnni
from stepquant.errors import EngineError, EvaluationError
from stepquant.evaluate import speed
from stepquant.evaluate.speed import first_call, measure_speed
from stepquant.model.pipeline import DenoiserPipeline
from tiny import TinyNet, quantize_


def a_pipe(network: nn.Module | None = None) -> Any:
    return DenoiserPipeline(network or TinyNet(), DDIMScheduler(clip_sample=False), (2, 4, 4))


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_the_first_call_is_that_of_the_first_step() -> None:
    pipe, seen = a_pipe(), []
    args, kwargs = first_call(pipe, steps=4, arguments={})
    pipe.denoiser.register_forward_pre_hook(lambda _m, a, k: seen.append((a, k)), with_kwargs=True)

    sample(pipe, seeds=[0], steps=4)
    assert len(seen) == 4
    values = [*args, *kwargs.values()], [*seen[0][0], *seen[0][1].values()]
    assert len(values[0]) == len(values[1])
    for ours, theirs in zip(*values, strict=True):
        assert torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs))
    assert kwargs.keys() == seen[0][1].keys()


def test_a_pipeline_that_calls_no_denoiser_is_refused() -> None:
    class Idle(DenoiserPipeline):
        def __call__(self, **_: Any) -> Any:
            return SimpleNamespace(images=np.zeros((1, 4, 4, 2)))

    with pytest.raises(EvaluationError, match="Idle did not call its denoiser"):
        first_call(Idle(TinyNet(), DDIMScheduler(clip_sample=False), (2, 4, 4)), steps=2, arguments={})


def test_every_engine_that_takes_a_layer_is_timed_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    quantized = quantize_(TinyNet(), ends="same")
    asked: list[str] = []

    def load(engine: str) -> Any:
        asked.append(engine)
        return a_pipe(place(copy.deepcopy(quantized), engine)[0])

    found = measure_speed(a_pipe(), load, steps=4, rounds=3)
    names = [*found["engines"]]
    assert names[0] == "simulated"
    assert asked == ["simulated", *names]
    assert {"reference", "int_mm"} <= set(names)
    assert ("openvino" in names) == has_vnni()
    assert "weight_only" not in names  # inputs are quantized, which it refuses
    assert ("openvino-bf16" in names) == (has_vnni() and has_bf16())
    for entry in found["engines"].values():
        assert 0 < entry["low"] <= entry["ratio"] <= entry["high"]
        assert min(entry["milliseconds"], entry["reference_milliseconds"]) > 0
    assert (found["schema"], found["rounds"], found["device"]) == (1, 3, "cpu")


def test_ratios_are_of_calls_in_the_same_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that gets slower and slower: full precision takes twice as long in every round."""
    clock = iter([value for round_ in (1, 2, 4) for value in (0, 8 * round_, 0, 4 * round_)])
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(speed, "_timed", lambda *_: ["simulated"])
    found = measure_speed(a_pipe(), lambda _: a_pipe(quantize_(TinyNet())), steps=4, rounds=3)["engines"]["simulated"]
    assert (found["low"], found["ratio"], found["high"]) == (2, 2, 2)
    assert (found["milliseconds"], found["reference_milliseconds"]) == (8000, 16000)


def test_an_engine_that_fails_costs_only_its_own_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(nn.Module):
        def forward(self, *_: Any) -> Any:
            raise EngineError("No graph of this.")

    monkeypatch.setattr(speed, "_timed", lambda *_: ["simulated", "openvino"])

    def load(engine: str) -> Any:
        return a_pipe(quantize_(TinyNet()) if engine == "simulated" else Broken())

    found = measure_speed(a_pipe(), load, steps=4, rounds=1)["engines"]
    assert found["openvino"] == {"failed": "No graph of this."}
    assert found["simulated"]["ratio"] > 0


def test_pipelines_that_switch_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "several_denoisers", lambda _: ["transformer", "transformer_2"])
    with pytest.raises(EvaluationError, match="switches between several denoisers"):
        measure_speed(a_pipe(), lambda _: None, steps=2)
