"""GAC, gradient-aligned calibration: block reconstruction with sample weights that are learnt before each block.

D. A. Hoang, C. Pham, T. Le, J. Cai, T.-T. Do, "Gradient-Aligned Calibration for Post-Training Quantization of Diffusion
Models", ICLR 2026, arXiv:2602.01289.

One rounding has to serve all timesteps, and what lowers the error of one may raise that of another. Calibration samples
x_1 .. x_N are therefore weighted so that a fitting step on them lowers the error of every timestep group of a small
validation set X_1 .. X_T, and so that the groups' gradients agree:

    omega_i = exp(s_i / tau) / sum_j exp(s_j / tau)                          s_i starts at 1/32: uniform weights
    theta*(omega) = theta - eta * sum_i omega_i dL(theta, x_i)/dtheta        one step, L the block's reconstruction loss
    G_t = dL(theta*, X_t)/domega                                             `[N]`
    min over omega of   1/T sum_t L(theta*, X_t) - 2 / (T (T-1)) * sum_{t < k} G_t . G_k

For every block in order of execution: some steps on s, then AdaRound of the block on  N sum_i omega_i L(theta, x_i)
plus the rounding regulariser. s goes on from block to block. G_t is one forward-mode derivative of the vector of sample
losses, in the direction of dL(theta*, X_t)/dtheta* (`calibrate.weighting` has the derivation).

Letters of the paper and our names: theta_Q are the rounding variables `SoftRounding.alpha` of a block, omega is
`WeightLearner.weights` / N, s `WeightLearner.logits`, tau `temperature`, X^(T) and X^(V) `HeldOut.training` and
`HeldOut.groups`.

Differs from the paper (which has no public code and does not publish eta, the outer optimizer and its rate, the number
of outer iterations, the validation batch, or its Algorithm 2):
- `variant="explicit"` minimises the objective above, the second derivative included, but for a coefficient that we
  give to the alignment term: `matching_weight` / (validation loss of the block * size of the mini-batch). Unscaled it
  outweighs the loss in blocks with large outputs, and descends by making gradients larger, not alike: its inner
  products have no bound. `matching="cosine"` has one. The sum runs over pairs once; the paper writes t != k with the
  same factor.
- `variant="first_order"` is a Reptile-like sweep over the groups that aligns gradients implicitly, possibly what the
  paper's algorithm does. `sweep_lr` is its rate, and so the weight of the alignment.
- eta is set by the length of the inner step (`inner_step`, the mean change of a rounding variable) and counts as a
  constant in derivatives.
- theta, where the inner step starts, is the rounding to nearest, with `layer_rounding` that of `RoundLayers`; the paper
  says only theta_Q. AdaRound's own start is the full-precision weight, at which the block itself makes no error.
  `hardness` moves theta between the two: 1 is rounded, 0 is AdaRound's start.
- s is learnt by Adam, `lr_samples`, `meta_iterations` times a block, with moments that start anew at every block. Each
  time omega is the softmax over a mini-batch that has its share of every timestep.
- The validation set is made of images of their own. They are recorded but not calibrated on; where every recorded
  image calibrates, the last ones are taken out.
- Activations have one row of parameters for all timesteps, by range search over all of them. The paper follows TFMQ-DM:
  a running mean of minimum and maximum at every timestep, which `activation_ranges="ema"` is. `activations_over_time`
  gives each window of steps a row by search, `rows="step"` each step, as the presets quick and standard do.
- Activation scales are then learnt block by block as in our Q-Diffusion, on unweighted samples; the paper learns none.
  `iterations_activations=0` leaves that out.
- TFMQ-DM's reconstruction of the time embedding as one unit with all its projections is off by default;
  `temporal_block=True` has it (`methods.tfmq_dm`), without sample weights: no image enters that block. No layer but
  the first and last is kept from the nominal bits. The paper's base is thus `activation_ranges="ema",
  temporal_block=True, iterations_activations=0`.
- `layer_rounding` (off by default) first rounds every layer for its own output (`RoundLayers`); blocks start there.
  The presets quick and standard do.
- The presets run far fewer iterations than the 20 000 a block of the public code that the paper builds on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from stepquant.calibrate.ranges import RangeRule
from stepquant.calibrate.reconstruct import RoundBlocks, ScaleBlocks
from stepquant.calibrate.stages import FitInputRanges, LayerRule, Place, Select
from stepquant.calibrate.temporal_block import FitStepRanges, RoundOtherBlocks, RoundTemporalBlock, StepRangeRule
from stepquant.calibrate.weighting import Derivative, Matching, SampleWeighting, Variant
from stepquant.errors import SpecError
from stepquant.methods.baseline import BLOCKS, layers_first, rows_over_time, start
from stepquant.model.surgery import Ends
from stepquant.recipe import Recipe, Stage

__all__ = ["BIBTEX", "PRESETS", "gac"]

BIBTEX = """@inproceedings{hoang2026gac,
  title     = {Gradient-Aligned Calibration for Post-Training Quantization of Diffusion Models},
  author    = {Hoang, D. A. and Pham, C. and Le, T. and Cai, J. and Do, T.-T.},
  booktitle = {ICLR},
  year      = {2026}
}"""

PRESETS: dict[str, dict[str, object]] = {
    "quick": {
        "samples": 32,
        "batch": 8,
        "samples_per_step": 8,
        "meta_iterations": 5,
        "lr_samples": 5e-2,
        "rows": "step",
        **BLOCKS["quick"],
    },
    "standard": {
        "samples": 64,
        "batch": 16,
        "samples_per_step": 16,
        "meta_iterations": 10,
        "lr_samples": 3e-2,
        "rows": "step",
        **BLOCKS["standard"],
    },
    "full": {"samples": 256},
}


def gac(
    *,
    weights: int | None = 4,
    activations: int | None = 8,
    samples: int = 256,
    batch: int = 32,
    every: int = 1,
    samples_per_step: int | None = None,
    iterations_weights: int = 20_000,
    iterations_activations: int = 5_000,
    lr_weights: float = 1e-3,
    lr_activations: float = 4e-3,
    variant: Variant = "explicit",
    meta_iterations: int = 50,
    lr_samples: float = 1e-2,
    temperature: float = 1.0,
    inner_step: float = 0.03,
    sweep_lr: float = 1.0,
    hardness: float = 1.0,
    matching: Matching = "product",
    matching_weight: float = 1.0,
    normalise_groups: bool = False,
    groups: int = 5,
    validation: float = 0.05,
    derivative: Derivative = "forward",
    activations_over_time: Sequence[int] | None = None,
    rows: Literal["shared", "step"] = "shared",
    activation_ranges: StepRangeRule | None = None,
    temporal_block: bool = False,
    quantized_prefix: bool = True,
    layer_rounding: bool = False,
    together: int = 1,
    ends: Ends = "8bit",
    softmax_bits: int | None = 8,
    group_size: int | None = None,
    ranges: RangeRule = "mse",
    rules: tuple[LayerRule, ...] = (),
) -> Recipe:
    """Block-wise AdaRound on samples with learnt weights, then activation ranges and scales.

    activations_over_time: lengths of consecutive windows of steps, noise first, that get activation parameters of
        their own; they must add up to the scheduler's steps. Where it is None, `rows` says: one for all, or one for
        each step.
    activation_ranges: how each timestep gets a range of its own: "ema" (the paper's), "minmax" or "mse", see
        `FitStepRanges`. None searches ranges (`ranges`) for the rows that the two options above ask for.
    temporal_block: round the weights of the time embedding and of all its projections together, before the blocks.
    The options from `variant` to `derivative` are those of `SampleWeighting`.
    """
    if activation_ranges is not None and activations_over_time is not None:
        raise SpecError(
            f"activation_ranges={activation_ranges!r} gives every timestep a range of its own, and "
            f"activations_over_time={list(activations_over_time)} gives windows of steps one: leave out one of them."
        )
    select = Select(every=every, samples_per_step=samples_per_step)
    place = Place(weights, activations, ends=ends, softmax_bits=softmax_bits, group_size=group_size, rules=rules)
    beginning = start(select, place, samples=samples, batch=batch, ranges=ranges)
    weighting = SampleWeighting(
        variant=variant,
        iterations=meta_iterations,
        batch=batch,
        lr=lr_samples,
        temperature=temperature,
        inner_step=inner_step,
        sweep_lr=sweep_lr,
        hardness=hardness,
        matching=matching,
        matching_weight=matching_weight,
        normalise_groups=normalise_groups,
        groups=groups,
        validation=validation,
        derivative=derivative,
    )
    layers, keep = layers_first(layer_rounding, weights=weights, batch=batch, together=together)
    temporal: tuple[RoundTemporalBlock, ...] = ()
    if temporal_block and weights is not None:
        temporal = (RoundTemporalBlock(iterations=iterations_weights, batch=batch, lr=lr_weights, keep_rounding=keep),)
    rounding = RoundOtherBlocks if temporal else RoundBlocks
    blocks = rounding(
        iterations=iterations_weights,
        batch=batch,
        lr=lr_weights,
        quantized_prefix=quantized_prefix,
        together=together,
        weighting=weighting,
        keep_rounding=keep,
    )
    # The lengths go first: whoever gives them to a preset should not have to take back its rows.
    windows = rows_over_time(rows) if activations_over_time is None else tuple(activations_over_time)
    fitted: Stage = FitInputRanges(ranges, windows=windows)
    if activation_ranges is not None:
        fitted = FitStepRanges(rule=activation_ranges, samples=samples)
    scales: tuple[ScaleBlocks, ...] = ()
    if iterations_activations:
        scales = (ScaleBlocks(iterations=iterations_activations, batch=batch, lr=lr_activations),)
    return Recipe("gac", (*beginning, *layers, *temporal, blocks, fitted, *scales))
