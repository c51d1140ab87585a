"""The layer that reads the sample: its range must hold for images that calibration has not seen."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from tests.tiny import tiny_unet

from stepquant.api import quantize
from stepquant.calibrate.ranges import SAMPLE_MARGIN, Observer, observing
from stepquant.calibrate.stages import calibration_seeds
from stepquant.calibrate.trajectory import record
from stepquant.methods import METHODS
from stepquant.methods.baseline import rtn
from stepquant.model.clock import StepClock, attach_clock
from stepquant.model.quantizer import InputQuantizer
from stepquant.model.surgery import make_plan, quantizable, quantized_layers, standard_rules, swap_layers_
from stepquant.model.transform import InputTransform
from stepquant.numerics.spec import scheme_for
from stepquant.run import Run

STEPS = 4


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = DDIMPipeline(tiny_unet(), DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def input_quantizers(pipe: Any, **options: Any) -> dict[str, InputQuantizer]:
    made = quantize(pipe, rtn(samples=4, batch=4, **options), steps=STEPS, run=Run(seed=3))
    layers = quantized_layers(made.pipe.unet)
    return {name: layer.input_quantizer for name, layer in layers.items()}


def test_every_step_has_its_own_wide_range(pipe: Any) -> None:
    quantizer = input_quantizers(pipe)["conv_in"]
    seeds = calibration_seeds(3, 4)
    recorded = record(pipe, pipe.unet, seeds=seeds, steps=STEPS, batch_size=4, run=Run())[0]
    assert sorted(quantizer.row_of_bin.tolist()) == list(range(STEPS))
    for step in recorded.steps:
        quantizer.clock.set(step.timestep)
        params = quantizer.current(step.sample)
        lowest = (quantizer.spec.qmin - params.zero_point) * params.scale
        highest = (quantizer.spec.qmax - params.zero_point) * params.scale
        # The zero point is rounded: up to half a level to either side.
        slack = params.scale * 0.51
        assert abs(lowest - step.sample.min() * (1 + SAMPLE_MARGIN)) <= slack
        assert abs(highest - step.sample.max() * (1 + SAMPLE_MARGIN)) <= slack


def test_other_layers_share_one_range(pipe: Any) -> None:
    assert {len(q.scale) for name, q in input_quantizers(pipe).items() if name != "conv_in"} == {1}


def test_with_fewer_bits_the_range_is_searched(pipe: Any) -> None:
    quantizer = input_quantizers(pipe, activations=4, ends="same")["conv_in"]
    assert len(quantizer.scale) == 1
    assert quantizer.spec.bits == 4


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_only_the_sample_itself_counts(named: bool, scaled: bool) -> None:
    """Scaled by the layer that reads it, it is the sample still."""
    unet = copy.deepcopy(tiny_unet())
    plan = make_plan(unet, standard_rules(scheme_for(8, 8), list(quantizable(unet))))
    swap_layers_(unet, plan)
    clock = StepClock(torch.tensor([250.0, 500.0, 750.0]))
    attach_clock(unet, clock)
    if scaled:
        for name in ("conv_in", "conv_out"):
            layer: Any = unet.get_submodule(name)
            layer.input_transform = InputTransform(layer.in_features, -3, scale=torch.full((layer.in_features,), 2.0))
    sample = torch.randn(2, 1, 8, 8)
    with observing(unet, plan, clock, torch.Generator()) as observers, torch.no_grad():
        unet(sample=sample, timestep=100) if named else unet(sample, 100)
    assert [name for (name, _), observer in observers.items() if observer.reads_sample] == ["conv_in"]


def test_bins_that_were_not_seen_use_the_next_noisier() -> None:
    clock = StepClock(torch.arange(5).float())
    observer = Observer(clock, torch.Generator())
    for timestep in (1.5, 3.5):
        clock.set(timestep)
        observer(torch.zeros(3))
    seen = [int(clock_bin) for clock_bin in sorted(observer.seen)]
    assert seen == [2, 4]
    assert observer.own_rows().tolist() == [0, 0, 0, 1, 1, 1]


def test_ranges_of_the_sample_are_not_learnt(pipe: Any) -> None:
    common: dict[str, Any] = {"weights": 4, "activations": 8, "samples": 4, "batch": 4}
    made = {
        name: quantize(pipe, METHODS[name](**common, **options), steps=STEPS, run=Run(seed=3)).pipe.unet
        for name, options in {
            "rtn": {},
            "accuquant": {"iterations": 3, "window": 2, "block_iterations": 0, "scale_iterations": 0},
            "q_diffusion": {"iterations_weights": 1, "iterations_activations": 3},
        }.items()
    }
    rounded = made.pop("rtn")
    start, other = rounded.conv_in.input_quantizer, rounded.mid_block.resnets[0].conv1.input_quantizer.scale
    for name, unet in made.items():
        found = unet.conv_in.input_quantizer
        assert torch.equal(found.scale, start.scale), name
        assert torch.equal(found.row_of_bin, start.row_of_bin), name
        assert not torch.equal(unet.mid_block.resnets[0].conv1.input_quantizer.scale, other), name
