"""D2-DPM (2025): the quantization noise that is expected for the prediction at hand is taken back in every step.

Q. Zeng, J. Song, H. Zheng, H. Jiang, M. Song, "D2-DPM: Dual Denoising for Quantized Diffusion Probabilistic Models",
AAAI 2025, arXiv:2501.08180.

In every step t, eps^ (the quantized guided prediction) and Delta = eps^ - eps are taken as jointly Gaussian:

    eps~       = eps^ - E[Delta | eps^] = eps^ - mu_Delta - w (eps^ - mu_eps^),     w = Cov[Delta, eps^] / Var[eps^]
    sigma_t'^2 = max(0, sigma_t^2 - c_t^2 Var[Delta | eps^])

Means `[C]` are those of channels; c_t, what a step makes of its prediction, and the data of the regression are as in
PTQD. What is regressed on is known when the model samples, so that on these data the mean square error of eps~ is never
above that of eps^.

Underneath is block-wise AdaRound, then activation scales. `add_on()` puts the correction behind any method.

Letters of the paper and our names: 1 - w is `StepCorrection.gain`, w mu_eps^ - mu_Delta `offset`,
1 - sigma'^2 / sigma^2 is `variance`. See `calibrate.noise_correction`.

Differs from the paper (from a summary of it; where that is silent the choice is ours):
- The paper has a stochastic and a deterministic variant. This is one correction, whose variance part acts where the
  sampler draws noise.
- One slope w for all channels of a step, and a mean for each; `slopes="channel"` gives each a slope of its own.
- sigma' is that of the added noise alone; DDIM's mean keeps sigma.
- With eta = 0, deterministic solvers, and stochastic ones other than DDIM and DDPM, only the mean part acts; the
  figures say so.
- The recipe underneath is that of `ptqd` here, without step-aware bits.
- `layer_rounding` (off by default) first rounds every layer for its own output (`RoundLayers`); blocks start there. The
  presets quick and standard do, with far fewer iterations.
- `rows="step"` gives every timestep activation ranges of its own; the paper has one for all. The presets quick and
  standard do: at 4-bit activations one range for all steps loses the image (docs/results.md).
"""

from __future__ import annotations

from typing import Literal

from stepquant.calibrate.drawn import SelectDrawn
from stepquant.calibrate.noise_correction import CorrectNoise, Slopes
from stepquant.calibrate.ranges import RangeRule
from stepquant.calibrate.reconstruct import RoundBlocks, ScaleBlocks
from stepquant.calibrate.stages import FitInputRanges, LayerRule, Place
from stepquant.methods.baseline import BLOCKS, layers_first, rows_over_time, start
from stepquant.model.surgery import Ends
from stepquant.recipe import Recipe, Stage

__all__ = ["BIBTEX", "PRESETS", "add_on", "d2_dpm"]

BIBTEX = """@inproceedings{zeng2025d2dpm,
  title     = {{D2-DPM}: Dual Denoising for Quantized Diffusion Probabilistic Models},
  author    = {Zeng, Qian and Song, Jie and Zheng, Han and Jiang, Hao and Song, Mingli},
  booktitle = {AAAI},
  year      = {2025}
}"""

PRESETS: dict[str, dict[str, object]] = {
    "quick": {"samples": 32, "batch": 8, "draws": 160, "rows": "step", **BLOCKS["quick"]},
    "standard": {"samples": 64, "batch": 16, "draws": 320, "rows": "step", **BLOCKS["standard"]},
    "full": {"samples": 1024},
}


def add_on(*, slopes: Slopes = "step", variance: bool = True) -> tuple[Stage, ...]:
    """The stages to put behind another method's, on the same recorded trajectories."""
    return (CorrectNoise(regress_on="quantized", slopes=slopes, negative=True, variance=variance),)


def d2_dpm(
    *,
    weights: int | None = 4,
    activations: int | None = 8,
    samples: int = 256,
    batch: int = 16,
    draws: int = 1024,
    iterations_weights: int = 10_000,
    iterations_activations: int = 5_000,
    lr_weights: float = 1e-3,
    lr_activations: float = 4e-3,
    layer_rounding: bool = False,
    rows: Literal["shared", "step"] = "shared",
    together: int = 1,
    slopes: Slopes = "step",
    variance: bool = True,
    ends: Ends = "8bit",
    softmax_bits: int | None = 8,
    group_size: int | None = None,
    ranges: RangeRule = "mse",
    rules: tuple[LayerRule, ...] = (),
) -> Recipe:
    """Block-wise rounding and activation scales, then each step's expected quantization noise is taken back."""
    select = SelectDrawn(distribution="beta", alpha=1.0, beta=1.0, draws=draws)
    place = Place(weights, activations, ends=ends, softmax_bits=softmax_bits, group_size=group_size, rules=rules)
    beginning = start(select, place, samples=samples, batch=batch, ranges=ranges)
    layers, keep = layers_first(layer_rounding, weights=weights, batch=batch, together=together)
    stages: list[Stage] = [*layers]
    if iterations_weights and weights is not None:
        stages.append(
            RoundBlocks(
                iterations=iterations_weights, batch=batch, lr=lr_weights, together=together, keep_rounding=keep
            )
        )
    stages.append(FitInputRanges(ranges, windows=rows_over_time(rows)))
    if iterations_activations and activations is not None:
        stages.append(ScaleBlocks(iterations=iterations_activations, batch=batch, lr=lr_activations))
    return Recipe("d2_dpm", (*beginning, *stages, *add_on(slopes=slopes, variance=variance)))
