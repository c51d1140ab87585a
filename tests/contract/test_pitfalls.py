"""What goes wrong in public code of these methods, and the test that guards each against it here.

1.  Which prefix a stage learns behind: the quantized one for weights, full precision for activation scales, and of both
    with QDrop.
        unit/calibrate/test_fast_fitting.py::test_a_unit_is_fitted_as_by_the_straightforward_implementation
        unit/calibrate/test_qdrop.py::test_the_prefix_of_later_units_is_quantized_in_weights_and_activations
        unit/calibrate/test_qdrop.py::test_each_element_is_one_or_the_other
2.  Solvers that call the network more often than they have steps (PNDM, Heun): tables belong to timesteps, whose second
    visit has the row of the first.
        unit/calibrate/test_walked_ranges.py::test_pndm_and_heun_repeat_timesteps_here
        unit/calibrate/test_walked_correction.py::test_the_sampler_ends_where_the_fit_ended
        unit/calibrate/test_step_bits.py::test_a_timestep_that_comes_twice_has_the_bits_of_its_first_time
        unit/calibrate/test_trajectory.py::test_repeated_timesteps_are_allowed
3.  Corrections belong to the guided prediction, not to one branch of the guidance.
        unit/calibrate/test_compensation.py::test_the_guided_prediction_is_what_is_corrected
        contract/test_pitfalls.py::test_noise_is_regressed_on_the_guided_prediction
        contract/test_pitfalls.py::test_gains_are_those_of_the_guided_prediction
4.  Running ranges that replace searched ones unasked: the last stage's rule wins, for the layers that it names.
        contract/test_pitfalls.py::test_the_rule_of_the_last_stage_makes_the_ranges
        contract/test_pitfalls.py::test_searched_ranges_stay_where_running_ones_are_for_others
        unit/calibrate/test_temporal_block.py::test_ranges_of_every_step_by_hand
5.  "First and last layer" by order of registration: here by name and order of execution.
        unit/model/test_quantized_model.py::test_standard_rules_keep_the_ends_at_eight_bits
        unit/model/test_quantized_model.py::test_standard_rules_say_what_they_know
        unit/model/test_quantized_model.py::test_order_and_units_follow_execution
6.  A split weight whose rounding is regularised in one half only.
        contract/test_pitfalls.py::test_both_halves_of_a_split_weight_are_regularised
        unit/calibrate/test_split_shortcuts.py::test_ranges_rounding_and_scales_are_of_each_part
7.  The softmax output has zero point 0 and bits of its own, 16 or logarithmic ones among them.
        unit/numerics/test_numerics.py::test_nonnegative_by_hand
        unit/calibrate/test_place.py::test_the_softmax_output_has_bits_of_its_own
        unit/calibrate/test_place.py::test_sixteen_bits_leave_only_the_softmax_output_in_floating_point
        unit/calibrate/test_balance_and_low_rank.py::test_softmax_levels_are_chosen_by_group
8.  Frechet distances to data do not fall with quality: the distance to full precision, and other features, stand
    beside them.
        unit/evaluate/test_compare.py::test_figures_are_those_of_all_images_at_once
        unit/evaluate/test_distributions.py::test_inception_score_is_that_of_torchmetrics
        unit/evaluate/test_distributions.py::test_kernel_distance_of_pairs_prefers_nothing_to_the_reference
9.  Rounding on a path that carries a gradient.
        unit/numerics/test_numerics.py::test_gradients_follow_the_formula_and_torch
        unit/calibrate/test_timestep_groups.py::test_gradients_pass_through_rounded_bounds
        unit/calibrate/test_refine_low_rank.py::test_gradients_pass_straight_through
10. Figures of full precision differ between papers: ours are measured at the same seeds, and differences paired.
        unit/evaluate/test_compare.py::test_drift_is_that_of_all_trajectories_at_once
        unit/evaluate/test_compare.py::test_every_figure_says_where_it_comes_from
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from torch import Tensor

import tiny
import tiny_pipelines
from stepquant.api import Quantized, quantize
from stepquant.calibrate.noise_correction import CorrectNoise
from stepquant.calibrate.reconstruct import RoundBlocks
from stepquant.calibrate.rounding import SoftRounding, soften_
from stepquant.calibrate.split_shortcuts import SplitShortcuts
from stepquant.calibrate.stages import FitInputRanges, FitWeightRanges, Place, Record, Select
from stepquant.calibrate.temporal_block import FitStepRanges
from stepquant.calibrate.trajectory import record, seal
from stepquant.calibrate.walked_correction import CorrectProgressively
from stepquant.methods.baseline import start
from stepquant.model.layer import QuantizedLayer
from stepquant.model.surgery import quantized_layers
from stepquant.recipe import Job, Recipe
from stepquant.run import Run

STEPS = 3
TESTS = Path(__file__).parents[1]


def test_every_pitfall_has_a_test() -> None:
    named = re.findall(r"^ +(\S+\.py)::(\w+)$", __doc__ or "", flags=re.MULTILINE)
    assert len(named) > 25
    lost = [f"{file}::{name}" for file, name in named if f"def {name}(" not in (TESTS / file).read_text()]
    assert lost == []


# ---- 3


SCALE, ERROR = 3.0, 0.1


@pytest.fixture(scope="module")
def guided() -> Job:
    """The error of a doubled batch lies in one half, and is a multiple of the guided prediction and of nothing else."""
    pytest.importorskip("transformers", reason="diffusers defines this pipeline only beside transformers")
    pipe = tiny_pipelines.sd15()
    pipe.scheduler = DDIMScheduler(clip_sample=False)
    arguments = {**tiny_pipelines.FAMILIES["sd15"].arguments(), "guidance_scale": SCALE}
    quantized = copy.deepcopy(pipe.unet)
    plain = quantized.forward

    def wrong(*args: Any, **kwargs: Any) -> Any:
        (found,) = plain(*args, **{**kwargs, "return_dict": False})
        without, told = found.chunk(2)
        guided = without + SCALE * (told - without)
        return (torch.cat([without, told + ERROR * guided]),)

    quantized.forward = wrong
    found = record(pipe, pipe.unet, seeds=range(2), steps=STEPS, batch_size=2, run=Run(), arguments=arguments)
    job = Job(pipe, pipe.unet, quantized, Run(), STEPS, arguments)
    job.handed["trajectories"] = [seal(one) for one in found]
    return job


def test_noise_is_regressed_on_the_guided_prediction(guided: Job) -> None:
    figures = CorrectNoise().run(guided)
    assert figures["slope"] == pytest.approx([SCALE * ERROR] * STEPS, rel=1e-3)
    assert max(figures["error_left"]) < 1e-3 * min(figures["error"])
    gain = guided.handed["correction"].gain
    torch.testing.assert_close(gain, torch.full_like(gain, 1 / (1 + SCALE * ERROR)), rtol=1e-3, atol=0)


@pytest.mark.parametrize("target", ["trajectory", "input"])
def test_gains_are_those_of_the_guided_prediction(guided: Job, target: Any) -> None:
    figures = CorrectProgressively(nearness=0.0, target=target).run(guided)
    assert figures["gain"] == pytest.approx([1 / (1 + SCALE * ERROR)] * STEPS, rel=1e-2)


# ---- 4


def ranged(*stages: Any) -> Quantized:
    beginning = start(Select(), Place(4, 4), samples=4, batch=2, ranges="minmax")
    pipe = DDIMPipeline(tiny.tiny_unet(), DDIMScheduler())
    return quantize(pipe, Recipe("test", (*beginning, *stages)), steps=STEPS)


def scales(quantized: Quantized) -> dict[str, Tensor]:
    layers = quantized_layers(quantized.pipe.unet)
    return {name: layer.input_quantizer.scale for name, layer in layers.items() if layer.input_quantizer is not None}  # type: ignore[union-attr, misc]


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert [name for name, scale in found.items() if not torch.equal(scale, expected[name])] == []


SEARCHED, RUNNING = FitInputRanges("mse", windows="step"), FitStepRanges("all", "ema")


def test_the_rule_of_the_last_stage_makes_the_ranges() -> None:
    searched, running = scales(ranged(SEARCHED)), scales(ranged(RUNNING))
    assert sum(not torch.equal(scale, running[name]) for name, scale in searched.items()) > 20
    assert_equal(scales(ranged(SEARCHED, RUNNING)), running)
    assert_equal(scales(ranged(RUNNING, SEARCHED)), searched)


def test_searched_ranges_stay_where_running_ones_are_for_others() -> None:
    searched, running = scales(ranged(FitInputRanges("mse"))), scales(ranged(RUNNING))
    found = scales(ranged(FitInputRanges("mse"), FitStepRanges("temporal", "ema")))
    temporal = {name for name in found if "time_emb" in name}
    assert len(temporal) > 5
    assert_equal({name: found[name] for name in temporal}, running)
    assert_equal({name: scale for name, scale in found.items() if name not in temporal}, searched)


# ---- 6


def test_both_halves_of_a_split_weight_are_regularised(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = tiny.tiny_unet()
    pipe = DDIMPipeline(unet, DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    job = Job(pipe, unet, copy.deepcopy(unet).requires_grad_(False), Run(), STEPS)
    for stage in (Record(samples=2, batch=2), Select(), Place(4, 8), SplitShortcuts(), FitWeightRanges("minmax")):
        stage.run(job)
    layers = quantized_layers(job.denoiser)
    split = {name: one for name, one in layers.items() if isinstance(one, QuantizedLayer) and one.split is not None}
    assert len(split) == 4
    for name, layer in split.items():
        one = copy.deepcopy(layer)
        rounding = soften_(one, unet.get_submodule(name).weight, 0.0)
        rounding.regularise_(2.0, 1.0)
        gradient = rounding.alpha.grad.reshape(layer.weight.shape)  # type: ignore[union-attr]
        whole = (1 - (2 * rounding.h() - 1).abs().square()).reshape(layer.weight.shape)
        for half in (slice(None, layer.split), slice(layer.split, None)):
            assert float((gradient[:, half] != 0).float().mean()) > 0.9
        halves = whole[:, : layer.split].sum() + whole[:, layer.split :].sum()
        torch.testing.assert_close(rounding.regulariser(2.0), halves)
    # And the stage regularises these very variables.
    seen: set[str] = set()
    plain = SoftRounding.regularise_

    def noting(self: SoftRounding, beta: float, factor: float) -> None:
        seen.update(name for name, layer in split.items() if layer.weight_quantizer is self)
        plain(self, beta, factor)

    monkeypatch.setattr(SoftRounding, "regularise_", noting)
    RoundBlocks(iterations=2, batch=2, warmup=0.0).run(job)
    assert seen == set(split)
