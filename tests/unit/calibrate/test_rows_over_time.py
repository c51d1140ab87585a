"""A row of activation parameters for every timestep: which rows there are, each fitted on its own values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from torch import Tensor

import tiny
from stepquant.api import Quantized, quantize
from stepquant.calibrate.ranges import fit_range
from stepquant.calibrate.stages import FitInputRanges
from stepquant.errors import SpecError
from stepquant.methods import METHODS
from stepquant.model.clock import clock_of
from stepquant.model.layer import QuantizedLayer
from stepquant.model.quantizer import InputQuantizer
from stepquant.run import Run

STEPS = 4


def ran(method: str = "rtn", **options: Any) -> Quantized:
    pipe = DDIMPipeline(tiny.tiny_unet(), DDIMScheduler())
    recipe = METHODS[method](weights=None, activations=4, samples=2, batch=2, **options)
    return quantize(pipe, recipe, steps=STEPS, run=Run(seed=0))


def quantizers(quantized: Quantized) -> dict[str, InputQuantizer]:
    layers = quantized.pipe.unet.named_modules()
    found = {name: layer.input_quantizer for name, layer in layers if isinstance(layer, QuantizedLayer)}
    return {name: one for name, one in found.items() if isinstance(one, InputQuantizer)}


def test_every_timestep_has_a_row_of_its_own() -> None:
    shared, stepwise = quantizers(ran()), quantizers(ran(rows="step"))
    assert shared.keys() == stepwise.keys()
    four_bits = [name for name, one in shared.items() if one.spec.bits == 4]
    assert four_bits
    for name in four_bits:
        assert shared[name].rows == 1
        assert stepwise[name].rows == STEPS
        assert stepwise[name].row_of_bin.tolist() == list(range(STEPS))


def test_a_row_holds_the_range_of_what_the_layer_saw_at_its_timestep() -> None:
    """Nothing is quantized before the first layer that a hook sees, so its inputs can be seen by sampling again."""
    quantized = ran(rows="step", ranges="minmax", ends="same", softmax_bits=None)
    unet = quantized.pipe.unet
    name = "time_embedding.linear_1"  # its input depends on the timestep alone
    layer = unet.get_submodule(name)
    seen: dict[int, Tensor] = {}
    clock = clock_of(unet)

    def look(_: Any, inputs: tuple[Tensor, ...]) -> None:
        seen[int(clock.bin[0])] = inputs[0].detach()

    hook = layer.register_forward_pre_hook(look)
    quantized.pipe(batch_size=2, num_inference_steps=STEPS, output_type="np")
    hook.remove()
    assert sorted(seen) == list(range(STEPS))
    quantizer = layer.input_quantizer
    for at, values in seen.items():
        expected = fit_range(values.reshape(1, -1), quantizer.spec, "minmax")
        row = int(quantizer.row_of_bin[at])
        torch.testing.assert_close(quantizer.scale[row], expected.scale.reshape(()))
        torch.testing.assert_close(quantizer.zero_point[row], expected.zero_point.reshape(()))
    assert len({float(scale) for scale in quantizer.scale}) > 1


def test_timesteps_that_calibration_left_out_use_the_row_of_the_next_noisier() -> None:
    """Bins run from image to noise: of four, the steps 0 and 2 of sampling are bins 3 and 1."""
    stepwise = quantizers(ran(rows="step", every=2))
    four_bits = [one for one in stepwise.values() if one.spec.bits == 4]
    assert four_bits
    for one in four_bits:
        assert one.rows == 2
        assert one.row_of_bin.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("method", ["rtn", "layerwise", "accuquant", "combined"])
def test_an_unknown_choice_of_rows_is_refused(method: str) -> None:
    with pytest.raises(SpecError, match=r"rows must be one of .*step.*'stepp'.*step"):
        METHODS[method](rows="stepp")


def test_an_unknown_word_for_windows_is_refused() -> None:
    with pytest.raises(SpecError, match=r"windows must be .*\"step\".*'steps'"):
        FitInputRanges(windows="steps")  # type: ignore[arg-type]
