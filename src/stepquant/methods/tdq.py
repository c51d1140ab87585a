"""TDQ (2023): activation step sizes that a small network of the timestep gives.

J. So, J. Lee, D. Ahn, H. Kim, E. Park, "Temporal Dynamic Quantization for Diffusion Models", NeurIPS 2023,
arXiv:2306.02316.

Activation ranges change from step to step, and the timestep says how. Each quantizer has a network f of four layers on
sines and cosines e(t) of the timestep at geometric frequencies,

    s(t) = s_0 softplus(f(e(t))),   x_hat = s(t) (clamp(round(x / s(t)) + z, qmin, qmax) - z)

that starts at a calibrated step size s_0 for all t and is learnt by straight-through gradients. Afterwards s(t) is
computed for every timestep of the schedule and stored as a table, so that sampling costs nothing more.

Letters of the paper and our names: f is `TimestepScale.net`, e(t) `TimestepScale.features`, s(t) a row of
`InputQuantizer.scale`.

Differs from the paper (from a summary of it; where that is silent the choice is ours):
- What the networks are learnt for: the full-precision prediction on recorded samples of all timesteps (mean squared
  error), all networks of a model together, weights already rounded. The paper learns them in quantization-aware
  training, or behind post-training quantization.
- softplus keeps step sizes positive, and s_0 in front makes one rate fit all layers. The last layer starts at weight 0
  so that s(t) = s_0 exactly; hidden layers are drawn as He et al. propose. Zero points stay where they were calibrated.
- `rows="step"` takes s_0 and the zero point from a range of every step, and the network learns what to multiply it by.
  The presets all do: with the zero point of one range for all steps, 4-bit activations make one-step errors that add up
  along the trajectory, and samples run away (docs/methods/tdq.md). The default is the paper's one range.
- 64 hidden units, 32 frequencies, Adam at 1e-3 with cosine decay, 5000 iterations.
- Weights are rounded for the least error of each layer's output (`RoundLayers`, `layer_rounding=False` rounds to
  nearest).
- The layer that reads the sample keeps its wide range. First and last layer are at 8 bits unless `ends="same"`.
"""

from __future__ import annotations

from typing import Literal

from stepquant.calibrate.gram import RoundLayers
from stepquant.calibrate.ranges import RangeRule
from stepquant.calibrate.stages import FitInputRanges, LayerRule, Place, Select
from stepquant.calibrate.timestep_net import LearnStepSizes
from stepquant.methods.baseline import rows_over_time, start
from stepquant.model.surgery import Ends
from stepquant.recipe import Recipe, Stage

__all__ = ["BIBTEX", "PRESETS", "tdq"]

BIBTEX = """@inproceedings{so2023tdq,
  title     = {Temporal Dynamic Quantization for Diffusion Models},
  author    = {So, Junhyuk and Lee, Jungwon and Ahn, Daehyun and Kim, Hyungjun and Park, Eunhyeok},
  booktitle = {NeurIPS},
  year      = {2023}
}"""

PRESETS: dict[str, dict[str, object]] = {
    "quick": {
        "samples": 32,
        "batch": 8,
        "samples_per_step": 8,
        "rows": "step",
        "iterations": 100,
        "lr": 3e-3,
        "together": 4,
    },
    "standard": {
        "samples": 64,
        "batch": 16,
        "samples_per_step": 16,
        "rows": "step",
        "iterations": 600,
        "lr": 3e-3,
        "together": 4,
    },
    "full": {"samples": 256, "rows": "step"},
}


def tdq(
    *,
    weights: int | None = 4,
    activations: int | None = 8,
    samples: int = 256,
    batch: int = 32,
    every: int = 1,
    samples_per_step: int | None = None,
    layers: tuple[str, ...] = ("*",),
    iterations: int = 5_000,
    lr: float = 1e-3,
    depth: int = 4,
    rows: Literal["shared", "step"] = "shared",
    layer_rounding: bool = True,
    together: int = 1,
    ends: Ends = "8bit",
    softmax_bits: int | None = 8,
    group_size: int | None = None,
    ranges: RangeRule = "mse",
    rules: tuple[LayerRule, ...] = (),
) -> Recipe:
    """Weights rounded layer by layer, then activation step sizes learnt as functions of the timestep."""
    select = Select(every=every, samples_per_step=samples_per_step)
    place = Place(weights, activations, ends=ends, softmax_bits=softmax_bits, group_size=group_size, rules=rules)
    beginning = start(select, place, samples=samples, batch=batch, ranges=ranges)
    stages: list[Stage] = []
    if layer_rounding and weights is not None:
        stages.append(RoundLayers(batch=batch, together=together))
    stages.append(FitInputRanges(ranges, windows=rows_over_time(rows)))
    if activations is not None:
        stages.append(LearnStepSizes(layers=tuple(layers), iterations=iterations, batch=batch, lr=lr, depth=depth))
    return Recipe("tdq", (*beginning, *stages))
