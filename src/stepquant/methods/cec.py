"""CEC: closed-form compensation of cumulative errors, step by step in the sampler.

S. Liu, C. Zeng, C. Yan, X. Peng, X. Wang, F. Chen, X. Mei, "Error Propagation Mechanisms and Compensation Strategies
for Quantized Diffusion Models", 2025, arXiv:2508.12094. A gain per timestep and channel is also in TAC, Yao et al.,
ECCV 2024, arXiv:2407.03917.

With x^ the quantized and x the full-precision trajectory from the same noise, delta = x^ - x, e_k the step's own error:

    delta_{k+1} = (a_k I + b_k J_k) delta_k + b_k e_k                          x_{k+1} = a_k x_k + b_k eps(x_k)
    e_k  ~  K_k * eps_q(x^_k)           K_k `[C]`, per timestep and channel, closed form, no back-propagation
    x_{k+1} = a_k x^_k + b_k eps_q,k - [ b_k K_k eps_q,k + gamma a_k b_{k-1} K_{k-1} eps_q,k-1 ]

The last line is the paper's window of m = 1 step with J = 0, for gamma = 1. Any quantized model may be underneath; here
it is round to nearest, and `add_on()` puts the compensation behind another method.

Letters of the paper and our names: K is 1 - `StepCorrection.gain`, eps_q,k-1 enters through `StepCorrection.previous`,
a_k and b_k are `calibrate.propagation.step_coefficients`; the estimators are in `calibrate.correction_fit`.

Differs from the paper:
- The exact forms of its equations 10, 13 and 18 are not public to us. What stands above is derived, and gamma = 1 is
  our best guess of what was published. When every step is corrected, the error of the step before has been removed
  already, so gamma = 0 is the consistent rule and the default; gamma = 1 acts like a larger gain.
- The default estimator is "auto", which is ours: it tries the paper's form (`scale` with gamma 0 and 1) beside fits in
  closed loop, with several regressors and ridges, and takes the best on held-out images, or no correction at all. For
  the paper's form alone: `estimator="scale", gamma=1, ridge=0`.
- The step's error is taken at the same input for both models, as in the paper, for "bias" and "scale" only.
- Its lambda_1 is not defined in what we have; `ridge` may or may not be its role. Default and unit are ours.
- The correction acts on the guided prediction before the scheduler, so that multistep solvers keep corrected
  predictions. With a one-step solver that is the same as correcting x_{k+1}. gamma = 1 is refused with multistep
  solvers: it needs the pair a_k, b_k.
- A row of coefficients belongs to a timestep. Solvers that call the denoiser twice at one use it twice; closed-loop
  estimators fit it at the first call.
- There is one K for the guided prediction, none for each branch of guidance; and no window of more than one step, for
  which J = 0 is further off than for one (`calibrate.propagation`): closed-loop fits see all steps before.
- Fewer images than the paper's 1000 or so.
"""

from __future__ import annotations

from typing import Literal

from stepquant.calibrate.compensation import Compensate, EstimatorChoice, Regressor
from stepquant.calibrate.ranges import RangeRule
from stepquant.calibrate.stages import FitInputRanges, LayerRule, Place, Select
from stepquant.methods.baseline import start
from stepquant.model.surgery import Ends
from stepquant.recipe import Recipe, Stage

__all__ = ["BIBTEX", "PRESETS", "add_on", "cec"]

BIBTEX = """@article{liu2025cec,
  title   = {Error Propagation Mechanisms and Compensation Strategies for Quantized Diffusion Models},
  author  = {Liu, S. and Zeng, C. and Yan, C. and Peng, X. and Wang, X. and Chen, F. and Mei, X.},
  journal = {arXiv preprint arXiv:2508.12094},
  year    = {2025}
}"""

PRESETS: dict[str, dict[str, object]] = {
    "quick": {"samples": 32},
    "standard": {"samples": 64},
    "full": {"samples": 256},
}


def add_on(
    *,
    estimator: EstimatorChoice = "auto",
    regressors: tuple[Regressor, ...] | None = None,
    gamma: Literal[0, 1] = 0,
    ridge: float | None = None,
    shared: bool = False,
    held_out: int = 4,
) -> tuple[Stage, ...]:
    """The stages to put behind another method's, on the same recorded trajectories."""
    return (
        Compensate(
            estimator=estimator, regressors=regressors, gamma=gamma, ridge=ridge, shared=shared, held_out=held_out
        ),
    )


def cec(
    *,
    weights: int | None = 4,
    activations: int | None = 8,
    samples: int = 64,
    batch: int = 16,
    every: int = 1,
    samples_per_step: int | None = None,
    estimator: EstimatorChoice = "auto",
    regressors: tuple[Regressor, ...] | None = None,
    gamma: Literal[0, 1] = 0,
    ridge: float | None = None,
    shared: bool = False,
    held_out: int = 4,
    ends: Ends = "8bit",
    softmax_bits: int | None = 8,
    group_size: int | None = None,
    ranges: RangeRule = "mse",
    rules: tuple[LayerRule, ...] = (),
) -> Recipe:
    """Round to nearest, then correct every step's prediction by coefficients fitted in closed form."""
    select = Select(every=every, samples_per_step=samples_per_step)
    place = Place(weights, activations, ends=ends, softmax_bits=softmax_bits, group_size=group_size, rules=rules)
    beginning = start(select, place, samples=samples, batch=batch, ranges=ranges)
    compensation = add_on(
        estimator=estimator, regressors=regressors, gamma=gamma, ridge=ridge, shared=shared, held_out=held_out
    )
    return Recipe("cec", (*beginning, FitInputRanges(ranges), *compensation))
