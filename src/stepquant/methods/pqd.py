"""PQD (2025): PTQ4DM's drawn timesteps and QDrop for latent and text-conditioned models.

J. Ye, Z. Wang, L. Jiang, "PQD: Post-training Quantization for Efficient Diffusion Models", WACV Workshops 2025,
arXiv:2501.00124.

    x_i ~ N(mu, sigma^2),   t_i = floor(T x_i), held to 0 .. T - 1,   i = 1 .. N

Sample i is what the full-precision denoiser is given at t_i with prompt i, both halves of its guidance included. Units
are then reconstructed one after the other, rounding V and activation scales s together, half of the elements of the
inputs and of every activation in full precision (QDrop):

    min over V, s of  || unit(x~; W~(V), s) - unit(x; W) ||_2^2 + 0.01 * sum(1 - |2 h(V) - 1|^beta)

Letters of the paper and our names: t_i is what `SelectDrawn` draws, V is `SoftRounding.alpha`, s is
`InputQuantizer.scale`.

Differs from the paper, which has no public code and publishes none of its constants:
- mu = sigma = 0.4, N = 1024 and both shares of 0.5 are those of PTQ4DM's public scripts, which it builds on;
  iterations, rates and the rounding regulariser are QDrop's defaults.
- What it changes against PTQ4DM lies in the models (latents, prompts), so the recipe has PTQ4DM's stages, and the same
  settings give the same model. For text-to-image models `softmax_bits=16` leaves the softmax output in floating point,
  as Q-Diffusion's 16 bits for Stable Diffusion come close to.
- Prompts come from the caller, one for each recorded image (`arguments={"prompt": [...]}`).
- Activation scales learn at a rate relative to their size; ranges are the best of 80 shrunk ones.
- First and last layer are at 8 bits unless `ends="same"`.
- `draws` and `layer_rounding` as in PTQ4DM: several samples of an image, and layers rounded first. The presets quick
  and standard do both.
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

__all__ = ["BIBTEX", "PRESETS", "pqd"]

BIBTEX = """@inproceedings{ye2025pqd,
  title     = {PQD: Post-training Quantization for Efficient Diffusion Models},
  author    = {Ye, Jiaojiao and Wang, Zhen and Jiang, Linnan},
  booktitle = {WACV Workshops},
  year      = {2025}
}"""

PRESETS: dict[str, dict[str, object]] = {**DRAWN_PRESETS, "full": {"samples": 1024}}


def pqd(
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
    """PTQ4DM's drawn timesteps and QDrop, with both halves of the guidance of every draw."""
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
    return Recipe("pqd", (*beginning, *layers, inputs, blocks))
