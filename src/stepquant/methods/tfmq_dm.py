"""TFMQ-DM (2024): what depends on the timestep alone is fitted together, and every timestep has ranges of its own.

Y. Huang, R. Gong, J. Liu, T. Chen, X. Liu, "TFMQ-DM: Temporal Feature Maintenance Quantization for Diffusion Models",
CVPR 2024, arXiv:2311.16503.

Temporal features do not depend on the data, and there are only as many as timesteps. The temporal information block is
the time embedding h and the projections g_i of it in all residual blocks i. Its weights are rounded together,

    min over V of  sum_i || g_i^(h^(t)) - g_i(h(t)) ||_2^2 + 0.01 * sum(1 - |2 h(V) - 1|^beta)       over all t

and all other blocks after it as in Q-Diffusion, without the layers of the temporal block. Finite set calibration: at
each timestep t of the schedule, with m_j and M_j the least and largest value of an activation in mini-batch j,

    low_t <- 0.95 low_t + 0.05 m_j,   high_t <- 0.95 high_t + 0.05 M_j,   (scale_t, zero_point_t) from [low_t, high_t]

Letters of the paper and our names: V is `SoftRounding.alpha`; scale_t and zero_point_t are rows of `InputQuantizer`.

Differs from the paper (from a summary of it and its public code; where these are silent the choice is ours):
- The block is found by following one call of the network (`calibrate.temporal_block`), not by the names of modules. In
  transformers it has the modulations of the norms. All timesteps of the recorded schedule are fitted, for up to 16
  images each: the embedding may hold a label, or the size of the picture.
- The temporal block is rounded before the other blocks, and with the iterations, rate and regulariser of a block.
- `step_ranges="all"` gives every layer ranges of its own at each timestep, as the public code does and its authors
  confirm; "temporal" does so for the temporal block alone, and the other layers have one range by search.
- Mini-batches of the running range are those that were recorded, and the first one begins it; the code initialises on
  16 images by search.
- The layer that reads the sample covers all values seen, and a margin.
- First and last layer are at 8 bits unless `ends="same"`, and all layers are quantized. The code leaves the first
  layers, shortcuts and down-sampling convolutions in floating point.
- `layer_rounding` (off by default) first rounds every layer for its own output (`RoundLayers`); blocks start there. The
  presets quick and standard do, and they run far fewer iterations at a higher rate.
- `activation_ranges="mse"` searches each step's range; the presets quick and standard do: at 4 bits a range from least
  to largest value loses the image (docs/results.md).
"""

from __future__ import annotations

from typing import Literal

from stepquant.calibrate.ranges import RangeRule
from stepquant.calibrate.stages import FitInputRanges, LayerRule, Place, Select
from stepquant.calibrate.temporal_block import FitStepRanges, RoundOtherBlocks, RoundTemporalBlock, StepRangeRule
from stepquant.methods.baseline import LAYERS_FIRST, layers_first, start
from stepquant.model.surgery import Ends
from stepquant.recipe import Recipe, Stage

__all__ = ["BIBTEX", "PRESETS", "tfmq_dm"]

BIBTEX = """@inproceedings{huang2024tfmqdm,
  title     = {{TFMQ-DM}: Temporal Feature Maintenance Quantization for Diffusion Models},
  author    = {Huang, Yushi and Gong, Ruihao and Liu, Jing and Chen, Tianlong and Liu, Xianglong},
  booktitle = {CVPR},
  year      = {2024}
}"""

SHORT: dict[str, object] = {**LAYERS_FIRST, "activation_ranges": "mse"}

PRESETS: dict[str, dict[str, object]] = {
    "quick": {"samples": 32, "batch": 8, "samples_per_step": 8, "iterations": 100, **SHORT},
    "standard": {"samples": 64, "batch": 16, "samples_per_step": 16, "iterations": 800, **SHORT},
    "full": {"samples": 256, "samples_per_step": 256, "every": 5},
}


def tfmq_dm(
    *,
    weights: int | None = 4,
    activations: int | None = 8,
    samples: int = 256,
    batch: int = 32,
    every: int = 1,
    samples_per_step: int | None = None,
    iterations: int = 20_000,
    lr_weights: float = 1e-3,
    step_ranges: Literal["temporal", "all"] = "all",
    activation_ranges: StepRangeRule = "ema",
    layer_rounding: bool = False,
    together: int = 1,
    ends: Ends = "8bit",
    softmax_bits: int | None = 8,
    group_size: int | None = None,
    ranges: RangeRule = "mse",
    rules: tuple[LayerRule, ...] = (),
) -> Recipe:
    """The temporal block rounded together, then block-wise AdaRound for the rest, then ranges of every timestep."""
    select = Select(every=every, samples_per_step=samples_per_step)
    place = Place(weights, activations, ends=ends, softmax_bits=softmax_bits, group_size=group_size, rules=rules)
    beginning = start(select, place, samples=samples, batch=batch, ranges=ranges)
    layers, keep = layers_first(layer_rounding, weights=weights, batch=batch, together=together)
    stages: list[Stage] = [*layers]
    if weights is not None:
        stages += [
            RoundTemporalBlock(iterations=iterations, batch=batch, lr=lr_weights, keep_rounding=keep),
            RoundOtherBlocks(iterations=iterations, batch=batch, lr=lr_weights, together=together, keep_rounding=keep),
        ]
    if step_ranges == "temporal":
        stages.append(FitInputRanges(ranges))
    stages.append(FitStepRanges(layers=step_ranges, rule=activation_ranges, samples=samples))
    return Recipe("tfmq_dm", (*beginning, *stages))
