"""PTQ4DM (2023): calibration samples at normally drawn timesteps, and block reconstruction with QDrop.

Y. Shang, Z. Yuan, B. Xie, B. Wu, Y. Yan, "Post-training Quantization on Diffusion Models", CVPR 2023, arXiv:2211.15736.

Every recorded image calibrates at one timestep, which is drawn with a bias towards the image:

    x_i ~ N(mu, sigma^2),   t_i = floor(T x_i), held to 0 .. T - 1,   i = 1 .. N        mu = sigma = 0.4, N = 1024

Then, unit by unit in order of execution, rounding and activation scales together:

    min over V, s of  || unit(x~; W~(V), s) - unit(x; W) ||_2^2 + 0.01 * sum(1 - |2 h(V) - 1|^beta)

x~ is x from the quantized prefix, of which half of the elements at random come from full precision; half of the
elements of every quantized activation likewise stay as they are (QDrop).

Letters of the paper and our names: t_i is what `SelectDrawn` draws, V is `SoftRounding.alpha`, s is
`InputQuantizer.scale`.

Differs from the paper:
- mu and sigma are those of the public scripts; the paper asks for mu <= T / 2 and gives sigma = T / 2 as well.
- Positions are steps of the sampling run, as in the public code, not shares of the training timesteps.
- `draws` may take several samples of an image. The paper takes one, and recording an image costs a whole sampling run
  for it; the presets quick and standard take five.
- Iterations, rates and the rounding regulariser are QDrop's defaults; the paper gives none. Activation scales learn at
  a rate relative to their size.
- Ranges are the best of 80 shrunk ones by mean |x - x_hat|^2.4, and activations have been observed before the
  reconstruction. The paper compares metrics and chooses the mean squared error; its code searches 100 candidates.
- Every floating input of a unit is mixed, the time embedding among them.
- First and last layer are at 8 bits unless `ends="same"`.
- `layer_rounding` (off by default) first rounds every layer for its own output (`RoundLayers`); blocks start there. The
  presets quick and standard do.
- `rows="step"` gives every timestep activation ranges of its own; the paper has one for all. The presets quick and
  standard do: at 4-bit activations one range for all steps loses the image (docs/results.md).
"""

from __future__ import annotations

from typing import Literal

from stepquant.calibrate.drawn import Distribution, SelectDrawn
from stepquant.calibrate.qdrop import QDrop
from stepquant.calibrate.ranges import RangeRule
from stepquant.calibrate.reconstruct import RoundBlocks
from stepquant.calibrate.stages import FitInputRanges, LayerRule, Place
from stepquant.methods.baseline import DRAWN_PRESETS, layers_first, rows_over_time, start
from stepquant.model.surgery import Ends
from stepquant.recipe import Recipe

__all__ = ["BIBTEX", "PRESETS", "ptq4dm"]

BIBTEX = """@inproceedings{shang2023ptq4dm,
  title     = {Post-training Quantization on Diffusion Models},
  author    = {Shang, Yuzhang and Yuan, Zhihang and Xie, Bin and Wu, Bingzhe and Yan, Yan},
  booktitle = {CVPR},
  year      = {2023}
}"""

PRESETS: dict[str, dict[str, object]] = {**DRAWN_PRESETS, "full": {"samples": 1024}}


def ptq4dm(
    *,
    weights: int | None = 4,
    activations: int | None = 8,
    samples: int = 1024,
    batch: int = 32,
    timesteps: Distribution = "normal",
    mean: float = 0.4,
    std: float = 0.4,
    draws: int | None = None,
    iterations: int = 20_000,
    lr_weights: float = 1e-3,
    lr_scales: float = 4e-3,
    drop: float = 0.5,
    drop_inputs: float = 0.5,
    layer_rounding: bool = False,
    rows: Literal["shared", "step"] = "shared",
    together: int = 1,
    ends: Ends = "8bit",
    softmax_bits: int | None = 8,
    group_size: int | None = None,
    ranges: RangeRule = "mse",
    rules: tuple[LayerRule, ...] = (),
) -> Recipe:
    """Calibrate at normally drawn timesteps, then block-wise rounding and activation scales together with QDrop."""
    select = SelectDrawn(distribution=timesteps, mean=mean, std=std, draws=draws)
    place = Place(weights, activations, ends=ends, softmax_bits=softmax_bits, group_size=group_size, rules=rules)
    beginning = start(select, place, samples=samples, batch=batch, ranges=ranges)
    layers, keep = layers_first(layer_rounding, weights=weights, batch=batch, together=together)
    blocks = RoundBlocks(
        iterations=iterations,
        batch=batch,
        lr=lr_weights,
        together=together,
        keep_rounding=keep,
        qdrop=QDrop(activations=drop, inputs=drop_inputs, lr_scales=lr_scales),
    )
    inputs = FitInputRanges(ranges, windows=rows_over_time(rows))
    return Recipe("ptq4dm", (*beginning, *layers, inputs, blocks))
