"""PCR (2024): activation ranges of every step, calibrated behind the steps that are quantized already.

S. Tang, X. Wang, H. Chen, C. Guan, Z. Wu, Y. Tang, W. Zhu, "Post-training Quantization with Progressive Calibration and
Activation Relaxing for Text-to-Image Diffusion Models", ECCV 2024, arXiv:2311.06322.

Weights first, unit by unit with activations in full precision (AdaRound, as in Q-Diffusion). Then, for steps t = 1 .. S
from the noise, with x^_t what the quantized model itself has made of the noise so far:

    (scale_t, zero_point_t) of every layer from the range of its input at (x^_t, t),   frozen,   then x^_{t+1}

The final error is bounded by a linear combination of the steps' errors; each step is calibrated on the inputs that it
will have, with the error that the steps before it have accumulated.

Activation relaxing: a share tau of the steps has activations of 10 bits instead of 8, the last ones next to the image
for Stable Diffusion (whose details suffer most) and the first ones next to the noise for SDXL (whose match with the
text does). Average bits are 8 + 2 tau; tau is 0.05 to 0.2.

Letters of the paper and our names: x^_t is the state that `FitRangesProgressively` walks with, scale_t and zero_point_t
are rows of `InputQuantizer`, tau is `relaxed`.

Differs from the paper:
- Relaxing is off unless it is asked for: `relaxed=0.2` is the paper's largest share, `relaxed_bits` its 10 bits,
  `relaxed_end` "image" or "noise". No preset has it, so that methods are compared at the bits that they are named by.
  The paper finds the end by leaving one part of the steps in full precision at a time and looking at the images; that
  is left to the user. Levels of more than 8 bits run as simulated arithmetic only; with `relaxed_bits=8` and fewer bits
  elsewhere integer engines run them.
- Quantized states are kept from step to step, so calibration takes 2 S - 1 calls for each batch; the paper runs the
  pipeline anew for every step. The ranges are the same.
- A step's ranges are minimum and maximum over all images; the code takes a moving average over batches.
- A timestep that comes several times (PNDM's first steps) has one row.
- The rounding regulariser is 0.01 for all units; the code has 0.001 for single layers. Inputs of a unit come from the
  rounded prefix; which one the code takes is not known to us.
- Attention's matrix products are quantized, and first and last layer are at 8 bits; the paper leaves both out
  (`ends="full"` does, and a rule `*.processor.*` with null bits).
- Calibration images are those that were recorded, with the prompts that the caller gives.
- `layer_rounding` (off by default) first rounds every layer for its own output (`RoundLayers`); blocks start there. The
  presets quick and standard do.
- `activation_ranges="mse"` searches each step's range; the presets quick and standard do: at 4 bits a range from least
  to largest value loses the image (docs/results.md).
"""

from __future__ import annotations

from stepquant.calibrate.ranges import RangeRule
from stepquant.calibrate.reconstruct import RoundBlocks
from stepquant.calibrate.stages import LayerRule, Place, Select
from stepquant.calibrate.walked_ranges import FitRangesProgressively, RelaxedEnd
from stepquant.methods.baseline import LAYERS_FIRST, layers_first, start
from stepquant.model.surgery import Ends
from stepquant.recipe import Recipe

__all__ = ["BIBTEX", "PRESETS", "pcr"]

BIBTEX = """@inproceedings{tang2024pcr,
  title     = {Post-training Quantization with Progressive Calibration and Activation Relaxing for Text-to-Image
               Diffusion Models},
  author    = {Tang, Siao and Wang, Xin and Chen, Hong and Guan, Chaoyu and Wu, Zewen and Tang, Yansong and
               Zhu, Wenwu},
  booktitle = {ECCV},
  year      = {2024}
}"""

SHORT: dict[str, object] = {**LAYERS_FIRST, "activation_ranges": "mse"}

PRESETS: dict[str, dict[str, object]] = {
    "quick": {"samples": 32, "batch": 8, "samples_per_step": 8, "iterations": 100, **SHORT},
    "standard": {"samples": 64, "batch": 16, "samples_per_step": 16, "iterations": 800, **SHORT},
    "full": {"samples": 200},
}


def pcr(
    *,
    weights: int | None = 4,
    activations: int | None = 8,
    samples: int = 200,
    batch: int = 32,
    every: int = 1,
    samples_per_step: int | None = 10,
    iterations: int = 2_000,
    lr_weights: float = 1e-3,
    activation_ranges: RangeRule = "minmax",
    relaxed: float = 0.0,
    relaxed_bits: int = 10,
    relaxed_end: RelaxedEnd = "image",
    layer_rounding: bool = False,
    together: int = 1,
    ends: Ends = "8bit",
    softmax_bits: int | None = 8,
    group_size: int | None = None,
    ranges: RangeRule = "mse",
    rules: tuple[LayerRule, ...] = (),
) -> Recipe:
    """Block-wise AdaRound for weights, then activation ranges of every step along the quantized trajectory."""
    select = Select(every=every, samples_per_step=samples_per_step)
    place = Place(weights, activations, ends=ends, softmax_bits=softmax_bits, group_size=group_size, rules=rules)
    beginning = start(select, place, samples=samples, batch=batch, ranges=ranges)
    layers, keep = layers_first(layer_rounding, weights=weights, batch=batch, together=together)
    blocks = RoundBlocks(
        iterations=iterations, batch=batch, lr=lr_weights, warmup=0.0, together=together, keep_rounding=keep
    )
    progressive = FitRangesProgressively(
        rule=activation_ranges,
        samples=samples,
        relaxed=relaxed,
        relaxed_bits=relaxed_bits,
        relaxed_end=relaxed_end,
    )
    return Recipe("pcr", (*beginning, *layers, blocks, progressive))
