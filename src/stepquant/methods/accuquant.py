"""AccuQuant: calibrate on several simulated denoising steps.

S. Lee, J. Choi, B. Son, J. Moon, J. Jeon, B. Ham, "AccuQuant: Simulating Multiple Denoising Steps for Quantizing
Diffusion Models", NeurIPS 2025, arXiv:2510.20348.

Earlier methods match every step on its own, as in training; errors of sampling add up instead. AccuQuant runs a window
of M consecutive steps from the full-precision state at its start, in full precision and quantized, and matches the
states at the window's end:

    x~_0 = x_0,   x~_{j+1} = F_j(x~_j; theta) = a_j x~_j + b_j eps_q(x~_j, t_j; theta)
    L(theta) = || x~_M - x_M ||^2

The gradient at every intermediate state is taken to be the gradient at the last one (the paper's approximation, the
dashed arrows of its method figure), so one network graph is in memory whatever M is:

    dL/dtheta ~ sum_j (dF_j(x~_j; theta) / dtheta)^T lambda_M,   lambda_M = dL/dx~_M

Letters of the paper and our names: M is `window`, theta the rounding variables `SoftRounding.alpha` and the activation
scales `InputQuantizer.scale`, F_j is `advance`, lambda_M the adjoint of `window_gradient`.

Differs from the paper (which does not publish M per model, learning rates, iterations, batch or what is learnable):
- `gradient="exact"` and `"per_step"` are further modes: the true gradient by recomputation, at the same cost and
  memory, and a truncated one that pulls every step to its full-precision state.
- No coefficient on the dashed arrows: the figure shows none (c = 1).
- `layer_rounding` (off by default) rounds every layer for its own output before anything else. The presets quick and
  standard do that instead of rounding blocks, and spend on windows what blocks would take (docs/results.md has both).
- `lr_weight_scales` (0 by default) learns the scales of weights whose rounding stays, one for each output channel, by
  the gradient that `learn_weights` would give to rounding. The presets quick and standard do that: a few dozen windows
  turn few roundings, and scales are what they can move.
- `correct_biases` (off by default, on in those presets) adds to every bias what the channel's mean has lost, as far as
  that helps the final sample, before the windows (`CorrectBiases`).
- Blocks are rounded first as in Q-Diffusion; the window stage then reopens all roundings from a point between the
  full-precision fraction and the present rounding (`FitWindows.keep_rounding`, which the recipe leaves at its default),
  and learns weights and scales together.
- For the last fifth of the iterations (`FitWindows.settle`) weights are rounded for good and only scales go on
  learning, so that scales fit the weights that are saved.
- Activation scales learn by LSQ's gradient, as in the public code of Q-Diffusion, or with
  `scale_gradient="difference"` by what results change when a scale moves by one per cent (see there).
- Scales learn at a rate relative to their size, with cosine decay. With several rows it is relative to the mean over a
  quantizer's rows, and Adam's moments also move rows whose steps the mini-batch did not have.
- Windows may have different lengths (`windows`), the one near the image is best kept short: there the remaining steps
  erase part of earlier errors, and the identity approximation is least true.
- `rows="window"` gives every window activation parameters of its own, `rows="step"` every timestep.
- `free_run` starts that share of the windows from the quantized model's own state instead of the full-precision one.
  The presets quick and standard do so always, leave the rounding, and give every timestep a row: with a few dozen
  windows at 4-bit activations, full-precision starts raised the final drift (docs/results.md at commit 0324925).
- `judged` (0 by default, 32 in those presets) samples so many recorded images before and after the windows and takes
  back what does not help: a few dozen windows of small mini-batches are noisy, and raised the final drift by a third
  at W6A6 (docs/results.md). Half of it may stay (the geometric mean of old and new scales). Windows are drawn from
  these images, too.
- A scale does not fall below a tenth of where it started.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from stepquant.calibrate.ranges import RangeRule
from stepquant.calibrate.reconstruct import RoundBlocks, ScaleBlocks
from stepquant.calibrate.rounding import ScaleGradient
from stepquant.calibrate.stages import FitInputRanges, LayerRule, Place, Select
from stepquant.calibrate.window_fitting import FitWindows
from stepquant.calibrate.windows import GradientMode
from stepquant.errors import SpecError
from stepquant.methods.baseline import corrected_biases, layers_first, rows_over_time, start
from stepquant.model.surgery import Ends
from stepquant.recipe import Recipe

__all__ = ["BIBTEX", "PRESETS", "accuquant"]

BIBTEX = """@inproceedings{lee2025accuquant,
  title     = {AccuQuant: Simulating Multiple Denoising Steps for Quantizing Diffusion Models},
  author    = {Lee, S. and Choi, J. and Son, B. and Moon, J. and Jeon, J. and Ham, B.},
  booktitle = {NeurIPS},
  year      = {2025}
}"""

PRESETS: dict[str, dict[str, object]] = {
    "quick": {
        "samples": 32,
        "batch": 8,
        "samples_per_step": 8,
        "rows": "step",
        "iterations": 36,
        "lr_scales": 1e-2,
        "learn_weights": False,
        "lr_weight_scales": 2e-3,
        "free_run": 1.0,
        "layer_rounding": True,
        "correct_biases": True,
        "judged": 32,
        "block_iterations": 0,
        "together": 4,
    },
    "standard": {
        "samples": 64,
        "samples_per_step": 16,
        "rows": "step",
        "iterations": 400,
        "lr_scales": 5e-3,
        "learn_weights": False,
        "lr_weight_scales": 1e-3,
        "free_run": 1.0,
        "layer_rounding": True,
        "correct_biases": True,
        "judged": 32,
        "block_iterations": 0,
        "together": 4,
    },
    "full": {"samples": 256},
}


ROWS = ("shared", "window", "step")


def accuquant(
    *,
    weights: int | None = 4,
    activations: int | None = 8,
    samples: int = 256,
    batch: int = 16,
    every: int = 1,
    samples_per_step: int | None = None,
    window: int = 5,
    windows: Sequence[int] | None = None,
    gradient: GradientMode = "identity",
    rows: Literal["shared", "window", "step"] = "shared",
    iterations: int = 3_000,
    lr_weights: float = 1e-3,
    lr_scales: float = 4e-3,
    learn_weights: bool = True,
    lr_weight_scales: float = 0.0,
    scale_gradient: ScaleGradient = "straight",
    free_run: float = 0.0,
    judged: int = 0,
    layer_rounding: bool = False,
    correct_biases: bool = False,
    block_iterations: int = 2_000,
    block_lr: float = 1e-3,
    scale_iterations: int = 0,
    together: int = 1,
    ends: Ends = "8bit",
    softmax_bits: int | None = 8,
    group_size: int | None = None,
    ranges: RangeRule = "mse",
    rules: tuple[LayerRule, ...] = (),
) -> Recipe:
    """Block-wise AdaRound as a start, then windows of simulated steps for rounding and activation scales."""
    select = Select(every=every, samples_per_step=samples_per_step)
    place = Place(weights, activations, ends=ends, softmax_bits=softmax_bits, group_size=group_size, rules=rules)
    beginning = start(select, place, samples=samples, batch=batch, ranges=ranges)
    lengths = None if windows is None else tuple(windows)
    if rows == "window" and lengths is None:
        raise SpecError('rows="window" needs the window lengths: pass windows=(5, 5, 5, 5), or whatever adds up.')
    layers, keep = layers_first(layer_rounding, weights=weights, batch=batch, together=together)
    blocks: tuple[RoundBlocks, ...] = ()
    if block_iterations:
        blocks = (
            RoundBlocks(iterations=block_iterations, batch=batch, lr=block_lr, together=together, keep_rounding=keep),
        )
    biases = corrected_biases(correct_biases, batch=batch)
    scales: tuple[ScaleBlocks, ...] = ()
    if scale_iterations:
        scales = (ScaleBlocks(iterations=scale_iterations, batch=batch, scale_gradient=scale_gradient),)
    ranges_of_inputs = FitInputRanges(ranges, windows=rows_over_time(rows, lengths, ROWS))
    fit: tuple[FitWindows, ...] = ()
    if activations is not None or ((learn_weights or lr_weight_scales) and weights is not None):
        fit = (
            FitWindows(
                window=window,
                windows=lengths,
                gradient=gradient,
                iterations=iterations,
                lr_weights=lr_weights,
                lr_scales=lr_scales,
                learn_weights=learn_weights,
                lr_weight_scales=lr_weight_scales,
                scale_gradient=scale_gradient,
                free_run=free_run,
                judged=judged,
            ),
        )
    return Recipe("accuquant", (*beginning, *layers, *blocks, ranges_of_inputs, *biases, *scales, *fit))
