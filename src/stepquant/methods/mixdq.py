"""MixDQ (2024): the token that all prompts begin with left out, and bits by what they do to content and to quality.

T. Zhao, X. Ning, T. Fang, E. Liu, G. Huang, Z. Lin, S. Yan, G. Dai, Y. Wang, "MixDQ: Memory-Efficient Few-Step
Text-to-Image Diffusion Models with Metric-Decoupled Mixed Precision Quantization", ECCV 2024, arXiv:2405.17873.

Text embeddings begin with the same, very large token in every prompt. Keys and values of cross attention have its
output computed once in full precision, and quantize the others:

    y_0 = W x_bos + b,   y_i = Q(W) Q(x_i) + b   for i >= 1

Bits b of each layer's weight i by an integer program,

    minimise sum_ib s_ib c_ib   subject to   sum_b c_ib = 1,   sum_ib b size_i c_ib <= budget,   c_ib in {0, 1}

where s_ib is the loss of SSIM for layers that decide on content (cross attention, feed-forward) and the inverse of the
SQNR for those that decide on quality (convolutions, self attention), each with this layer alone quantized.

Letters of the paper and our names: x_bos is `FirstToken.token`, s_ib the score "decoupled" of `Allocate`.

Differs from the paper (from a summary of it; where that is silent the choice is ours):
- Content and quality are one program, whose sum adds both scores as they are. The paper solves one program for each
  group and tries shares of the budget between them.
- The sums are of 1 - SSIM and of noise over signal, which are 0 in full precision; the paper adds up SSIM and SQNR.
- Both are measured on the final state of sampling (the latent where there is one), with SSIM's windows unweighted.
- The budget is the average over all layers that `weights` bits everywhere would have, first and last layer at 8 bits
  included (unless `ends="same"`): the program takes no more than rounding to nearest at the same `weights` does.
  `weight_bits` is an average over all layers, too.
- The network with the program's bits and the one with equal bits in all free layers (as many as the budget has room
  for) are sampled on recorded images that the sensitivities have not seen, where there are such, and equal bits are
  taken unless the program's are better by more than a standard error (`Allocate.beside_uniform`): a sum over layers
  does not see how errors of different layers add up or cancel, and the program's bits can end above rounding to
  nearest. The paper chooses among several solutions by their images.
- Activations have the bits that `activations` says in every layer. The paper leaves the most sensitive 1 % in floating
  point; `activation_bits` gives an average for the same program instead, and `rules` name layers.
- Rows whose prompt begins with another token (the zeros of an empty prompt) compute that token with its input in
  floating point. Models without prompts, or whose prompts do not begin alike, have no such token; the stage says so.
- Weights are rounded to nearest on searched ranges; calibration images are those that were recorded.
- The cost grows with layers times candidates times steps: the method is made for models of few steps. For others,
  `Allocate` with the score "final" (docs/bits.md) needs a fraction of it.
"""

from __future__ import annotations

from typing import Literal

from stepquant.calibrate.allocation import Allocate
from stepquant.calibrate.outlier_token import KeepFirstToken
from stepquant.calibrate.ranges import RangeRule
from stepquant.calibrate.stages import FitInputRanges, LayerRule, Place, Select
from stepquant.methods.baseline import start
from stepquant.model.surgery import Ends
from stepquant.recipe import Recipe

__all__ = ["BIBTEX", "PRESETS", "mixdq"]

BIBTEX = """@inproceedings{zhao2024mixdq,
  title     = {{MixDQ}: Memory-Efficient Few-Step Text-to-Image Diffusion Models with Metric-Decoupled Mixed Precision
               Quantization},
  author    = {Zhao, Tianchen and Ning, Xuefei and Fang, Tongcheng and Liu, Enshu and Huang, Guyue and Lin, Zinan and
               Yan, Shengen and Dai, Guohao and Wang, Yu},
  booktitle = {ECCV},
  year      = {2024}
}"""

PRESETS: dict[str, dict[str, object]] = {
    "quick": {"samples": 16, "batch": 4, "sensitivity_samples": 4},
    "standard": {"samples": 64, "batch": 8, "sensitivity_samples": 8},
    "full": {"samples": 1024},
}


def mixdq(
    *,
    weights: int | None = 4,
    activations: int | None = 8,
    samples: int = 1024,
    batch: int = 16,
    every: int = 1,
    samples_per_step: int | None = None,
    bits: tuple[int, ...] = (2, 4, 8),
    weight_bits: float | None = None,
    activation_bits: float | None = None,
    sensitivity_samples: int = 16,
    first_token: bool = True,
    ends: Ends = "8bit",
    softmax_bits: int | None = 8,
    group_size: int | None = None,
    ranges: RangeRule = "mse",
    rules: tuple[LayerRule, ...] = (),
) -> Recipe:
    """Bits by content and quality, the first token kept out of quantizers, everything else rounded to nearest.

    weight_bits: average bits of all weights, where it is not to be that of `weights` in every layer that is free.
    """
    select = Select(every=every, samples_per_step=samples_per_step)
    place = Place(weights, activations, ends=ends, softmax_bits=softmax_bits, group_size=group_size, rules=rules)
    keep = KeepFirstToken()
    average: float | Literal["place"] | None = weight_bits
    if weight_bits is None and weights is not None:
        average = "place"
    placed: Place | Allocate = place
    if average is not None or activation_bits is not None:
        placed = Allocate(
            place=place,
            weight_bits=average,
            activation_bits=activation_bits,
            bits=tuple(bits),
            score="decoupled",
            samples=sensitivity_samples,
            refine=0,
            ranges=ranges,
            first_token=keep if first_token else None,
            beside_uniform=True,
        )
    kept = (keep,) if first_token else ()
    beginning = start(select, placed, *kept, samples=samples, batch=batch, ranges=ranges)
    return Recipe("mixdq", (*beginning, FitInputRanges(ranges)))
