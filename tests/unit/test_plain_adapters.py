"""Adapters on a denoiser that is no diffusers model: a checkpoint has no place for them."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusers import DDIMScheduler

import tiny
from stepquant.api import quantize
from stepquant.errors import CheckpointError
from stepquant.methods import METHODS
from stepquant.model.pipeline import DenoiserPipeline


def test_adapters_on_a_plain_denoiser_are_not_saved(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="adapters are peft's")
    pipe = DenoiserPipeline(tiny.TinyNet(), DDIMScheduler(), (2, 4, 4))
    quantized = quantize(pipe, METHODS["rtn"](weights=4, activations=8, samples=2, batch=2), steps=2)
    first = next(name for name, part in pipe.denoiser.named_modules() if type(part).__name__ in ("Linear", "Conv2d"))
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=[first]), quantized.pipe.denoiser)
    with pytest.raises(CheckpointError, match=rf"1 layers have adapters, the first is {first}\b"):
        quantized.save(tmp_path / "q")
    assert not (tmp_path / "q").exists()
