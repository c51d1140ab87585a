"""Q-Diffusion (2023): block reconstruction on strided timesteps.

X. Li, Y. Liu, L. Lian, H. Yang, Z. Dong, D. Kang, S. Zhang, K. Keutzer, "Q-Diffusion: Quantizing Diffusion Models",
ICCV 2023, arXiv:2302.04304.

Calibration samples are the first n images at every (T // S)-th of the T steps of the full-precision sampling run, with
both the conditional and the unconditional input where there is guidance. S = 20, n = 256 for CIFAR-10 and LSUN; S = 25,
n = 128 for Stable Diffusion. Then, unit by unit in order of execution (BRECQ):

    weights:      min over V of  || unit(x; W~(V)) - unit(x; W) ||_2^2 + 0.01 * sum(1 - |2 h(V) - 1|^beta)
                  activations in full precision, x from the rounded prefix, beta 20 -> 2
    activations:  min over s of  || unit(x; s) - unit(x) ||_2.4^2.4,  x from full precision, after all units' weights

With `split_shortcuts`, a shortcut that reads a hidden state and a skip connection side by side has a quantizer for each
(`SplitShortcuts`).

Letters of the paper and our names: S is `calibration_steps`, n `samples_per_step`, V is
`SoftRounding.alpha`, s is `InputQuantizer.scale`, W~ the soft weight.

Differs from the paper:
- Activation scales learn at a rate relative to their size (`relative_groups`) instead of 4e-4 for all, and by what the
  result changes when a scale moves by one per cent, instead of LSQ's gradient (`scale_gradient="straight"`). That takes
  values as evenly spread between levels, while much of what SiLU gives lies at its least value: at 8 and 6 bits, with
  one range for all steps, LSQ's gradient ended above rounding to nearest (docs/results.md).
- First and last layer are at 8 bits unless `ends="same"`; the paper quantizes every layer at the nominal bits.
- `layer_rounding` (off by default) first rounds every layer for its own output from the Gram matrix of its inputs
  (`RoundLayers`), and blocks start from there instead of the full-precision fraction. The presets quick and standard
  do, with a row for every step: with a few hundred iterations that ends nearer to full precision (docs/results.md).
- `softmax_bits=16`, the code's setting for Stable Diffusion, leaves the softmax output in floating point: levels have 8
  bits at most here.
- Weights of 8 bits with a scale per channel are symmetric but for the first and last layer: int8 kernels have no ninth
  bit for a zero point.
- Activations are asymmetric; the code has symmetric ones for CIFAR-10 and LSUN-Bedroom.
- Without `calibration_steps` every recorded step calibrates (every `every`-th one). The preset full sets S and n.
- Where a shortcut is split, the two quantizers of its weight are scales for groups of as many channels as divide both
  parts. Only the preset full splits: such layers do not run on integers. The paper splits for CIFAR-10 and Stable
  Diffusion and not for LSUN.
- `rows="step"` gives every timestep an activation range of its own; the paper has one for all. The presets quick and
  standard do: at 4-bit activations one range for all steps loses the image, whatever the weights (docs/results.md).
- Activation ranges are fitted after the weights are rounded, by range search on all observed samples; the code
  initialises on 64 samples and may overwrite the result by a running mean.
- The presets run far fewer iterations than the paper (20 000 and 5000 a unit) at a higher rate.
"""

from __future__ import annotations

from typing import Literal

from stepquant.calibrate.ranges import RangeRule
from stepquant.calibrate.reconstruct import RoundBlocks, ScaleBlocks
from stepquant.calibrate.rounding import ScaleGradient
from stepquant.calibrate.split_shortcuts import SplitShortcuts
from stepquant.calibrate.stages import FitInputRanges, LayerRule, Place, Select
from stepquant.methods.baseline import BLOCKS, layers_first, rows_over_time, start
from stepquant.model.surgery import Ends
from stepquant.recipe import Recipe

__all__ = ["BIBTEX", "PRESETS", "q_diffusion"]

BIBTEX = """@inproceedings{li2023qdiffusion,
  title     = {Q-Diffusion: Quantizing Diffusion Models},
  author    = {Li, Xiuyu and Liu, Yijiang and Lian, Long and Yang, Huanrui and Dong, Zhen and Kang, Daniel and
               Zhang, Shanghang and Keutzer, Kurt},
  booktitle = {ICCV},
  year      = {2023}
}"""

PRESETS: dict[str, dict[str, object]] = {
    "quick": {"samples": 32, "batch": 8, "samples_per_step": 8, "rows": "step", **BLOCKS["quick"]},
    "standard": {"samples": 64, "batch": 16, "samples_per_step": 16, "rows": "step", **BLOCKS["standard"]},
    "full": {"samples": 256, "samples_per_step": 256, "calibration_steps": 20, "split_shortcuts": True},
}


def q_diffusion(
    *,
    weights: int | None = 4,
    activations: int | None = 8,
    samples: int = 256,
    batch: int = 32,
    every: int = 1,
    samples_per_step: int | None = None,
    calibration_steps: int | None = None,
    iterations_weights: int = 20_000,
    iterations_activations: int = 5_000,
    lr_weights: float = 1e-3,
    lr_activations: float = 4e-3,
    scale_gradient: ScaleGradient = "difference",
    quantized_prefix: bool = True,
    split_shortcuts: bool = False,
    layer_rounding: bool = False,
    rows: Literal["shared", "step"] = "shared",
    together: int = 1,
    ends: Ends = "8bit",
    softmax_bits: int | None = 8,
    group_size: int | None = None,
    ranges: RangeRule = "mse",
    rules: tuple[LayerRule, ...] = (),
) -> Recipe:
    """Block-wise AdaRound for weights, then block-wise learned activation scales."""
    select = Select(every=every, samples_per_step=samples_per_step, steps=calibration_steps)
    place = Place(weights, activations, ends=ends, softmax_bits=softmax_bits, group_size=group_size, rules=rules)
    split = (SplitShortcuts(),) if split_shortcuts else ()
    beginning = start(select, place, *split, samples=samples, batch=batch, ranges=ranges)
    layers, keep = layers_first(layer_rounding, weights=weights, batch=batch, together=together)
    blocks = RoundBlocks(
        iterations=iterations_weights,
        batch=batch,
        lr=lr_weights,
        quantized_prefix=quantized_prefix,
        together=together,
        keep_rounding=keep,
    )
    inputs = FitInputRanges(ranges, windows=rows_over_time(rows))
    scales: tuple[ScaleBlocks, ...] = ()
    if iterations_activations:
        scales = (
            ScaleBlocks(
                iterations=iterations_activations, batch=batch, lr=lr_activations, scale_gradient=scale_gradient
            ),
        )
    return Recipe("q_diffusion", (*beginning, *layers, blocks, inputs, *scales))
