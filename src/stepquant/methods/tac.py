"""TAC-Diffusion (2024): a gain for every step's prediction and a bias for its input, fitted along the way.

Y. Yao, F. Tian, J. Chen, H. Lin, G. Dai, Y. Liu, J. Wang, "Timestep-Aware Correction for Quantized Diffusion Models",
ECCV 2024, arXiv:2407.03917.

With x^ and eps^ of the quantized run, x and eps of the full-precision run from the same noise:

    noise estimation reconstruction     eps~_t = K_t * eps^_t               K_t `[C]` minimises, in closed form,
        (1 - l1) sum (K eps^ - eps)^2 + l1 N sum ((K eps^ - eps) / eps)^2 + l2 N (K - 1)^2
    input bias correction               x^_t <- x^_t - B_t,                 B_t = mean of x^_t - x_t

Both are fitted from the first sampling step on, each with the corrections before it applied: one run of the
full-precision and one of the quantized model over the calibration images. Any quantized model may be underneath; here
it is round to nearest, and `add_on()` puts the correction behind another method.

Letters of the paper and our names: K is `StepCorrection.gain`, -B_{t+1} its `shift` at the step that leads to it;
lambda_1 is `relative`, lambda_2 `nearness`, tau `threshold`. `calibrate.walked_correction` has the closed form.

Differs from the paper (from summaries of it and a re-implementation; where these are silent the choice is ours):
- Constants are the re-implementation's: lambda_1 = 0.5, lambda_2 = 0.1, tau = 1 (for Stable Diffusion it has 0.8, 0.1
  and 4).
- The mask is |eps| > tau mean |eps| over an image, in the loss only, and K multiplies every element. The
  re-implementation takes and scales elements where eps^ itself is above tau mean |eps^|, which leaves negative ones out
  and makes the correction jump. Nothing is added to eps where it divides: the mask keeps it from 0.
- eps is that of the full-precision run, at its own samples, as the single run of each model asks for.
  `target="input"`, ours, takes the full-precision prediction for the quantized run's sample instead, at twice the cost.
- K is fitted to the guided prediction, in the re-implementation to the unconditional one before guidance.
- B is a mean by channel, not by element, and is taken off the sample that the step before returns: the solver goes on
  from it too, as in the re-implementation. Behind timesteps that the solver visits twice (PNDM, Heun) there is none.
- The bias of the finished image, which no step reads, stays.
"""

from __future__ import annotations

from stepquant.calibrate.ranges import RangeRule
from stepquant.calibrate.stages import FitInputRanges, LayerRule, Place, Select
from stepquant.calibrate.walked_correction import CorrectProgressively, GainTarget
from stepquant.methods.baseline import start
from stepquant.model.surgery import Ends
from stepquant.recipe import Recipe, Stage

__all__ = ["BIBTEX", "PRESETS", "add_on", "tac"]

BIBTEX = """@inproceedings{yao2024tac,
  title     = {Timestep-Aware Correction for Quantized Diffusion Models},
  author    = {Yao, Yuzhe and Tian, Feng and Chen, Jun and Lin, Haonan and Dai, Guang and Liu, Yong and Wang, Jingdong},
  booktitle = {ECCV},
  year      = {2024}
}"""

PRESETS: dict[str, dict[str, object]] = {
    "quick": {"samples": 32},
    "standard": {"samples": 64},
    "full": {"samples": 256},
}


def add_on(
    *,
    relative: float = 0.5,
    nearness: float = 0.1,
    threshold: float = 1.0,
    target: GainTarget = "trajectory",
    gain: bool = True,
    input_bias: bool = True,
) -> tuple[Stage, ...]:
    """The stages to put behind another method's, on the same recorded trajectories."""
    return (
        CorrectProgressively(
            relative=relative,
            nearness=nearness,
            threshold=threshold,
            target=target,
            gain=gain,
            input_bias=input_bias,
        ),
    )


def tac(
    *,
    weights: int | None = 4,
    activations: int | None = 8,
    samples: int = 64,
    batch: int = 16,
    every: int = 1,
    samples_per_step: int | None = None,
    relative: float = 0.5,
    nearness: float = 0.1,
    threshold: float = 1.0,
    target: GainTarget = "trajectory",
    gain: bool = True,
    input_bias: bool = True,
    ends: Ends = "8bit",
    softmax_bits: int | None = 8,
    group_size: int | None = None,
    ranges: RangeRule = "mse",
    rules: tuple[LayerRule, ...] = (),
) -> Recipe:
    """Round to nearest, then gains of the predictions and biases of the inputs, fitted step by step."""
    select = Select(every=every, samples_per_step=samples_per_step)
    place = Place(weights, activations, ends=ends, softmax_bits=softmax_bits, group_size=group_size, rules=rules)
    beginning = start(select, place, samples=samples, batch=batch, ranges=ranges)
    correction = add_on(
        relative=relative,
        nearness=nearness,
        threshold=threshold,
        target=target,
        gain=gain,
        input_bias=input_bias,
    )
    return Recipe("tac", (*beginning, FitInputRanges(ranges), *correction))
