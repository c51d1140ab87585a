"""PTQD (2023): quantization noise taken apart into a correlated part, a bias and a rest, and corrected in the sampler.

Y. He, L. Liu, J. Liu, W. Wu, H. Zhou, B. Zhuang, "PTQD: Accurate Post-Training Quantization for Diffusion Models",
NeurIPS 2023, arXiv:2305.10657.

In every step t, over samples of the full-precision trajectory, with eps^ the quantized guided prediction:

    Delta = eps^ - eps = k_t eps + Delta'            k_t of linear regression, Delta' uncorrelated with eps
    mu_t  = mean of Delta' by channel `[C]`,   sigma_q,t = its standard deviation, a number
    eps~  = (eps^ - mu_t) / (1 + k_t)
    DDPM:       sigma_t'^2 = max(0, sigma_t^2 - beta_t^2 sigma_q^2 / (alpha_t (1 - alpha_bar_t) (1 + k_t)^2))
    DDIM, eta:  sigma_t'^2 = max(0, sigma_t^2 - c_t^2 sigma_q^2 / (1 + k_t)^2)
                c_t = sqrt(1 - alpha_bar' - sigma_t^2) - sqrt(alpha_bar' (1 - alpha_bar_t) / alpha_bar_t)

Step-aware bits: the fewest activation bits b of each step with SNR_Q(t, b) = |eps|^2 / |Delta_b|^2 above that of the
forward process, alpha_bar_t / (1 - alpha_bar_t), otherwise the most (`ChooseStepBits`).

Underneath is block-wise AdaRound, then activation scales. `add_on()` puts the correction behind any method.

Letters of the paper and our names: 1 / (1 + k) is `StepCorrection.gain`, -mu / (1 + k) `offset`, 1 - sigma'^2 / sigma^2
is `variance`; c_t and beta / sqrt(alpha (1 - alpha_bar)) are measured at the scheduler. See
`calibrate.noise_correction`.

Differs from the paper:
- mu is the mean of Delta', as in the paper; the code takes that of Delta (`bias_of="error"`). The regression has an
  intercept for each channel, because these are subtracted; the code's has one.
- sigma_q is the root mean square of Delta' - mu over all samples; the code averages each sample's standard deviation,
  which leaves out what differs between samples.
- sigma' is that of the added noise alone. In the code it also enters DDIM's sqrt(1 - alpha_bar' - sigma'^2): the
  prediction then gets as much variance back as the noise gives up, and the sample's is not brought down.
- With eta = 0, deterministic solvers, and stochastic ones other than DDIM and DDPM, only the mean part acts; the
  figures say so.
- The ratios of step-aware bits are both ratios of powers, ours where summaries of the paper leave that open. Networks
  that predict v, the image or a velocity are compared in the eps that their predictions mean. The stage is off unless
  `step_bits` is given, such as (4, 8) with `activations=4`; ends and softmax keep their own bits. No test of normality
  is made.
- Weights have a scale for each channel instead of each layer, rates and shares of iterations are those of
  `q_diffusion`; 1x1 shortcuts and resampling convolutions are quantized, matrix products of attention too; first and
  last layer have 8 bits, the first of the time embedding the bits of all.
- `draws` samples are drawn uniformly over steps, the images in turn; the paper records 4 images of each of 1000
  classes. All recorded images measure the noise.
- `layer_rounding` (off by default) first rounds every layer for its own output (`RoundLayers`); blocks start there. The
  presets quick and standard do, with far fewer iterations than the paper.
- `rows="step"` gives every timestep activation ranges of its own; the paper has one for all. The presets quick and
  standard do: at 4-bit activations one range for all steps loses the image (docs/results.md).
  With `step_bits`, steps of equal bits share a range.
"""

from __future__ import annotations

from typing import Literal

from stepquant.calibrate.drawn import SelectDrawn
from stepquant.calibrate.noise_correction import CorrectNoise, Slopes
from stepquant.calibrate.ranges import RangeRule
from stepquant.calibrate.reconstruct import RoundBlocks, ScaleBlocks
from stepquant.calibrate.stages import FitInputRanges, LayerRule, Place
from stepquant.calibrate.step_bits import ChooseStepBits
from stepquant.methods.baseline import BLOCKS, layers_first, rows_over_time, start
from stepquant.model.surgery import Ends
from stepquant.recipe import Recipe, Stage

__all__ = ["BIBTEX", "PRESETS", "add_on", "ptqd"]

BIBTEX = """@inproceedings{he2023ptqd,
  title     = {{PTQD}: Accurate Post-Training Quantization for Diffusion Models},
  author    = {He, Yefei and Liu, Luping and Liu, Jing and Wu, Weijia and Zhou, Hong and Zhuang, Bohan},
  booktitle = {NeurIPS},
  year      = {2023}
}"""

PRESETS: dict[str, dict[str, object]] = {
    "quick": {"samples": 32, "batch": 8, "draws": 160, "rows": "step", **BLOCKS["quick"]},
    "standard": {"samples": 64, "batch": 16, "draws": 320, "rows": "step", **BLOCKS["standard"]},
    "full": {"samples": 1024},
}


def add_on(
    *, slopes: Slopes = "step", bias_of: Literal["rest", "error"] = "rest", variance: bool = True
) -> tuple[Stage, ...]:
    """The stages to put behind another method's, on the same recorded trajectories."""
    return (CorrectNoise(regress_on="full_precision", slopes=slopes, bias_of=bias_of, variance=variance),)


def ptqd(
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
    step_bits: tuple[int, ...] | None = None,
    slopes: Slopes = "step",
    bias_of: Literal["rest", "error"] = "rest",
    variance: bool = True,
    ends: Ends = "8bit",
    softmax_bits: int | None = 8,
    group_size: int | None = None,
    ranges: RangeRule = "mse",
    rules: tuple[LayerRule, ...] = (),
) -> Recipe:
    """Block-wise rounding and activation scales, then a correction of each step's quantization noise.

    step_bits: activation bits that steps choose from, ascending, beginning with `activations`; None: all steps alike.
    """
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
    if step_bits is not None:
        stages.append(
            ChooseStepBits(tuple(step_bits), rule=ranges, images=samples, ends=ends, softmax_bits=softmax_bits)
        )
    if iterations_activations and activations is not None:
        stages.append(ScaleBlocks(iterations=iterations_activations, batch=batch, lr=lr_activations))
    correction = add_on(slopes=slopes, bias_of=bias_of, variance=variance)
    return Recipe("ptqd", (*beginning, *stages, *correction))
