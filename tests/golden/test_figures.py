"""Figures of small runs. If one fails, a release would give other results than the last: was that meant?

If it was not, undo the change. If it was, put the new figures in and say under "Numbers changed" in CHANGELOG.md which
methods give other results and why. `python tests/golden/test_figures.py` prints the figures.

Tolerances: scales and levels are found by a search in float32, where another machine adds in another order; a scale may
then be the next candidate, and a level may flip. So means of levels, of 16, are compared to a hundredth of a level, and
errors of the network and of sampled images to the hundredth parts below. Another order of summation, with oneDNN
switched off, must stay within a fifth of that; another method lies far outside.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

from stepquant.api import quantize, sample
from stepquant.methods import METHODS
from stepquant.model.layer import QuantizedLayer
from stepquant.model.surgery import quantized_layers
from stepquant.recipe import Recipe
from stepquant.run import Run

GOLDEN = {
    "rtn": {
        "levels": 0.04588735818476499,
        "range": 4.938107779578607,
        "scale": -4.010793824046135,
        "prediction": 0.04946647742728684,
        "final_drift": 0.2145336928795999,
    },
    "q_diffusion": {
        "levels": 0.04527957860615883,
        "range": 4.938918152350081,
        "scale": -4.010793824046135,
        "prediction": 0.043147904055482814,
        "final_drift": 0.1878575642251528,
    },
}

ABSOLUTE = {"levels": 0.01, "range": 0.01, "scale": 0.002}
RELATIVE = {"prediction": 0.01, "final_drift": 0.03}
STEPS, IMAGES = 4, 32


def recipes() -> dict[str, Recipe]:
    """Round to nearest, and one short reconstruction that learns rounding of blocks and ranges of activations."""
    common: dict[str, Any] = {"weights": 4, "activations": 8, "samples": 4, "batch": 4}
    return {
        "rtn": METHODS["rtn"](**common),
        "q_diffusion": METHODS["q_diffusion"](**common, iterations_weights=30, iterations_activations=10),
    }


def model() -> UNet2DModel:
    """A UNet of a dozen layers. Its last convolution begins at zero in diffusers; here it is random."""
    generator = torch.Generator().manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        add_attention=False,
        norm_num_groups=4,
    )
    with torch.no_grad():
        for parameter in unet.parameters():
            spread = 1.0 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
            drawn = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(spread * (2 * drawn - 1) + (1.0 if parameter.ndim < 2 else 0.0))
    return unet.eval()


def measured(recipe: Recipe) -> dict[str, float]:
    """levels: mean level of all weights. range: mean distance of levels from zero. scale: mean logarithm of scales.
    prediction: error of one call of the network, on noise. final_drift: error of sampled images.
    Both relative to full precision.
    """
    pipe = DDIMPipeline(model(), DDIMScheduler())
    full = copy.deepcopy(pipe)
    quantized = quantize(pipe, recipe, steps=STEPS, run=Run(seed=1))
    layers = [layer for layer in quantized_layers(quantized.pipe.unet).values() if isinstance(layer, QuantizedLayer)]
    levels, scales = [], []
    for layer in layers:
        quantizer: Any = layer.weight_quantizer
        scales.append(quantizer.scale.double().log().flatten())
        levels.append((layer.weight.double().flatten(1) / quantizer.scale.double()).round().flatten())
    noise = torch.randn(IMAGES, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        calls = [one.unet(noise, full.scheduler.timesteps[0]).sample for one in (full, quantized.pipe)]
    images = [sample(one, seeds=range(IMAGES), steps=STEPS, batch_size=IMAGES) for one in (full, quantized.pipe)]
    return {
        "levels": float(torch.cat(levels).mean()),
        "range": float(torch.cat(levels).abs().mean()),
        "scale": float(torch.cat(scales).mean()),
        "prediction": relative_error(*calls),
        "final_drift": relative_error(*images),
    }


def relative_error(expected: torch.Tensor, found: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def outside(found: dict[str, float], golden: dict[str, float], part: float = 1.0) -> dict[str, tuple[float, float]]:
    """What is farther from the golden figures than that part of the tolerance: found and expected."""
    allowed = ABSOLUTE | {key: RELATIVE[key] * golden[key] for key in RELATIVE}
    return {
        key: (found[key], golden[key]) for key in golden if not abs(found[key] - golden[key]) <= part * allowed[key]
    }


@pytest.mark.parametrize("name", list(GOLDEN))
def test_results_stay(name: str) -> None:
    assert outside(measured(recipes()[name]), GOLDEN[name]) == {}


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_another_order_of_summation_stays_well_within_the_tolerance() -> None:
    with torch.backends.mkldnn.flags(enabled=False):
        assert outside(measured(recipes()["rtn"]), GOLDEN["rtn"], part=0.2) == {}


def test_the_tolerance_is_less_than_what_matters() -> None:
    """Methods differ by several times the tolerance, so that a mix-up would not go unnoticed."""
    assert set(outside(GOLDEN["rtn"], GOLDEN["q_diffusion"], part=4)) >= {"prediction", "final_drift"}


if __name__ == "__main__":
    torch.set_num_threads(1)
    with torch.backends.mkldnn.flags(enabled=False):
        print("# without oneDNN:", {name: measured(recipe) for name, recipe in recipes().items()})
    print("GOLDEN =", json.dumps({name: measured(recipe) for name, recipe in recipes().items()}, indent=4))
