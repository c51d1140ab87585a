"""Every layer rounded for its own output, activation ranges for every step, and biases: no gradient at all.

1. Weights: each layer's levels by greedy descent on the error of its own output, d G d^T, from the Gram matrix G of its
   inputs behind the layers rounded before (`stepquant.calibrate.gram`).
2. Activations: a row of scale and zero point for every timestep of the schedule (`rows="step"`), each by the best of 80
   shrunk ranges over what the layer saw at that timestep. Ranges of a denoiser's activations change along the
   trajectory; one range for all steps is too wide for most of them.
3. Biases: what the mean output of each channel has lost is added back, as many times over as sampling ends nearest to
   full precision with, or not at all (`correct_biases`, `CorrectBiases`).

It costs the recording and passes without gradients: the calibration to begin with, and the start of the methods that
learn.

Differs from the papers: the objective is AdaRound's (Nagel et al. 2020, eq. 13) and the descent CDQuant's (Nair and
Suggala 2024); a range for every timestep is in PTQD, PCR and TFMQ-DM; biases are corrected as in Nagel et al. 2019.
Their combination is ours.
"""

from __future__ import annotations

from typing import Literal

from stepquant.calibrate.ranges import RangeRule
from stepquant.calibrate.stages import FitInputRanges, LayerRule, Place, Select
from stepquant.methods.baseline import corrected_biases, layers_first, rows_over_time, start
from stepquant.model.surgery import Ends
from stepquant.recipe import Recipe

__all__ = ["BIBTEX", "PRESETS", "layerwise"]

BIBTEX = """@inproceedings{nagel2020adaround,
  title     = {Up or Down? Adaptive Rounding for Post-Training Quantization},
  author    = {Nagel, Markus and Amjad, Rana Ali and van Baalen, Mart and Louizos, Christos and Blankevoort, Tijmen},
  booktitle = {International Conference on Machine Learning},
  year      = {2020}
}
@article{nair2024cdquant,
  title   = {{CDQuant}: Greedy Coordinate Descent for Accurate {LLM} Quantization},
  author  = {Nair, Pranav Ajit and Suggala, Arun Sai},
  journal = {arXiv preprint arXiv:2406.17542},
  year    = {2024}
}
@inproceedings{nagel2019dfq,
  title     = {Data-Free Quantization Through Weight Equalization and Bias Correction},
  author    = {Nagel, Markus and van Baalen, Mart and Blankevoort, Tijmen and Welling, Max},
  booktitle = {International Conference on Computer Vision},
  year      = {2019}
}"""

PRESETS: dict[str, dict[str, object]] = {
    "quick": {"samples": 32, "batch": 8, "samples_per_step": 8, "together": 4},
    "standard": {"samples": 64, "samples_per_step": 16, "together": 4},
    "full": {"samples": 256},
}


def layerwise(
    *,
    weights: int | None = 4,
    activations: int | None = 8,
    samples: int = 64,
    batch: int = 16,
    every: int = 1,
    samples_per_step: int | None = None,
    rows: Literal["shared", "step"] = "step",
    together: int = 1,
    correct_biases: bool = True,
    ends: Ends = "8bit",
    softmax_bits: int | None = 8,
    group_size: int | None = None,
    ranges: RangeRule = "mse",
    rules: tuple[LayerRule, ...] = (),
) -> Recipe:
    """Weights rounded layer by layer from Gram matrices; activation ranges for every step; biases corrected."""
    select = Select(every=every, samples_per_step=samples_per_step)
    place = Place(weights, activations, ends=ends, softmax_bits=softmax_bits, group_size=group_size, rules=rules)
    beginning = start(select, place, samples=samples, batch=batch, ranges=ranges)
    layers, _ = layers_first(True, weights=weights, batch=batch, together=together)
    ranges_of_inputs = FitInputRanges(ranges, windows=rows_over_time(rows))
    biases = corrected_biases(correct_biases, batch=batch)
    return Recipe("layerwise", (*beginning, *layers, ranges_of_inputs, *biases))
