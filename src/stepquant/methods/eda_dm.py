"""EDA-DM (2024): samples by density and variety of features, blocks fitted by their layers' outputs too.

X. Liu, Z. Li, J. Xiao, M. Chen, J. Li, Q. Gu, "EDA-DM: Enhanced Distribution Alignment for Post-Training Quantization
of Diffusion Models", arXiv:2401.04585.

How many images calibrate at step t follows how many steps have features like F_t (density D) and how unlike the others
F_t is (variety V); `calibrate.density_variety` has the formulas:

    n_t = N w_t / sum w,   w_t = D_t + lambda V_t,   both scaled to [0, 1]

Then, unit by unit in order of execution, rounding and activation scales together, each with an Adam of its own whose
rate falls to 0 by a cosine:

    min over V, s of  || unit(x~) - unit(x) ||_2^2 + gamma * sum over layers l of  || o_l(x~) - o_l(x) ||_2^2

o_l is the output of layer l; the sum leaves the unit's last layer out. x~ comes from the quantized prefix, half of its
elements at random from full precision; half of the elements of every quantized activation likewise stay as they are
(QDrop, twice). There is no rounding regulariser: a weight is rounded up where its variable ends at or above 0.

Letters of the paper and our names: TDAC is `SelectDensityVariety`, lambda its `variety_weight`, r its `radius`; FBR is
`RoundBlocks.layer_weight` = gamma; V is `SoftRounding.alpha`, s `InputQuantizer.scale`.

Differs from the paper:
- `radius=None` takes the median distance between two steps' features, because their scale is each network's own. The
  paper's 3.0 (CIFAR-10, ImageNet) and 0.3 (LSUN, Stable Diffusion) go with its networks.
- Networks without an attention in their middle block have their features taken in front of that block, transformers
  in front of the block in the middle of the execution. Of guided pipelines both halves count as a batch.
- `draws` may take several samples of an image; the paper takes one. The presets quick and standard take five.
- Defaults are those of CIFAR-10 at 4-bit weights: gamma = 0.8, lambda = 1.2, 5000 iterations, rate 0.5 for rounding.
  The paper has other rates at other bits: 0.05 for 8-bit weights on CIFAR-10, 0.03 for 4 bits on Stable Diffusion.
- Activation scales learn at a rate relative to their size; the paper's are 5e-4 and 1e-4 for all.
- The last layer of a unit, whose own output is left out, is the last in order of execution (a shortcut, where the block
  has one). Matrix products of attention are no layers here.
- Layers' targets are computed anew in every iteration instead of being kept in memory.
- Every floating input of a unit is mixed, the time embedding among them.
- Ranges are the best of 80 shrunk ones over all observed samples; the code searches 100 candidates in each batch and
  takes a running mean.
- First and last layer are named, and at 8 bits. The code finds them by order of registration, which hits the first
  layer of the time embedding.
- Shortcuts are split only with `split_shortcuts`, and not in the presets: they do not run on integers then. The two
  quantizers of a split weight are scales for groups of as many channels as divide both parts.
- `layer_rounding` (off by default) first rounds every layer for its own output (`RoundLayers`); blocks start there. The
  presets quick and standard do, at a lower rate.
- `rows="step"` gives every timestep activation ranges of its own; the paper has one for all. The presets quick and
  standard do: at 4-bit activations one range for all steps loses the image (docs/results.md).
"""

from __future__ import annotations

from typing import Literal

from stepquant.calibrate.density_variety import SelectDensityVariety
from stepquant.calibrate.qdrop import QDrop
from stepquant.calibrate.ranges import RangeRule
from stepquant.calibrate.reconstruct import RoundBlocks
from stepquant.calibrate.split_shortcuts import SplitShortcuts
from stepquant.calibrate.stages import FitInputRanges, LayerRule, Place
from stepquant.methods.baseline import DRAWN_PRESETS, layers_first, rows_over_time, start
from stepquant.model.surgery import Ends
from stepquant.recipe import Recipe

__all__ = ["BIBTEX", "PRESETS", "eda_dm"]

BIBTEX = """@article{liu2024edadm,
  title   = {EDA-DM: Enhanced Distribution Alignment for Post-Training Quantization of Diffusion Models},
  author  = {Liu, Xuewen and Li, Zhikai and Xiao, Junrui and Chen, Mengjuan and Li, Jianquan and Gu, Qingyi},
  journal = {arXiv preprint arXiv:2401.04585},
  year    = {2024}
}"""

PRESETS: dict[str, dict[str, object]] = {**DRAWN_PRESETS, "full": {"samples": 1024}}


def eda_dm(
    *,
    weights: int | None = 4,
    activations: int | None = 8,
    samples: int = 1024,
    batch: int = 32,
    radius: float | None = None,
    variety_weight: float = 1.2,
    draws: int | None = None,
    layer_weight: float = 0.8,
    iterations: int = 5_000,
    lr_weights: float = 0.5,
    lr_scales: float = 4e-3,
    drop: float = 0.5,
    drop_inputs: float = 0.5,
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
    """Calibrate by density and variety of features, then rounding and scales together with a loss of layers."""
    select = SelectDensityVariety(radius=radius, variety_weight=variety_weight, draws=draws)
    place = Place(weights, activations, ends=ends, softmax_bits=softmax_bits, group_size=group_size, rules=rules)
    split = (SplitShortcuts(),) if split_shortcuts else ()
    beginning = start(select, place, *split, samples=samples, batch=batch, ranges=ranges)
    layers, keep = layers_first(layer_rounding, weights=weights, batch=batch, together=together)
    blocks = RoundBlocks(
        iterations=iterations,
        batch=batch,
        lr=lr_weights,
        round_weight=0.0,
        together=together,
        keep_rounding=keep,
        qdrop=QDrop(activations=drop, inputs=drop_inputs, lr_scales=lr_scales, decay_rounding=True),
        layer_weight=layer_weight,
    )
    inputs = FitInputRanges(ranges, windows=rows_over_time(rows))
    return Recipe("eda_dm", (*beginning, *layers, inputs, blocks))
