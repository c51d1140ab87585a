"""The shipped transformer: opens with no network, draws the digits that it is told, and survives quantizing."""

from __future__ import annotations

import importlib.resources
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stepquant.api import Quantized, load, open_model, quantize, sample
from stepquant.evaluate.features import DigitFeatures
from stepquant.methods import METHODS
from stepquant.model.quantizer import InputQuantizer
from stepquant.model.surgery import quantized_layers

FOLDER = importlib.resources.files("stepquant") / "assets" / "digits-dit"

pytestmark = pytest.mark.skipif(
    not (FOLDER / "model_index.json").is_file(),
    reason="the shipped model is not in src/stepquant/assets/digits-dit: train it with training/digits_dit.py",
)

STEPS = 8
ARGUMENTS: dict[str, Any] = {"guidance_scale": 1.5}


def read(images: Tensor) -> list[int]:
    return DigitFeatures().logits(images).argmax(1).tolist()


@pytest.fixture(scope="module")
def quantized() -> Quantized:
    torch.set_num_threads(1)
    recipe = METHODS["layerwise"](weights=4, activations=8, samples=4, batch=4, together=8)
    return quantize(open_model("digits-dit"), recipe, steps=STEPS, arguments=ARGUMENTS, base_model="digits-dit")


def test_the_class_is_the_seed_modulo_ten_unless_it_is_given() -> None:
    pipe = open_model("digits-dit")
    told = sample(pipe, seeds=range(10), steps=STEPS, arguments={**ARGUMENTS, "class_labels": list(range(10))})
    assert told.shape == (10, 1, 32, 32)
    assert torch.equal(sample(pipe, seeds=range(10), steps=STEPS, arguments=ARGUMENTS), told)
    assert sum(found == wanted for wanted, found in enumerate(read(told))) >= 9


def test_four_bits_still_draw_the_digits(quantized: Quantized) -> None:
    images = sample(quantized.pipe, seeds=range(10), steps=STEPS, arguments=ARGUMENTS)
    assert sum(found == wanted for wanted, found in enumerate(read(images))) >= 9


def test_every_step_has_a_row_and_the_checkpoint_keeps_them(quantized: Quantized, tmp_path: Path) -> None:
    quantized.save(tmp_path / "w4a8")
    loaded = load(tmp_path / "w4a8", engine="simulated")
    rows = {
        layer.input_quantizer.rows
        for layer in quantized_layers(loaded.transformer).values()
        if isinstance(layer.input_quantizer, InputQuantizer)
    }
    assert rows == {STEPS}
    seeds = [3, 4]
    found, wanted = (sample(pipe, seeds=seeds, steps=STEPS, arguments=ARGUMENTS) for pipe in (loaded, quantized.pipe))
    assert torch.equal(found, wanted)
