"""TCAQ-DM: channels balanced over all timesteps, softmax levels by distribution, rounding on the model's own samples.

H. Huang, J. Chen, J. Guo, R. Zhan, Y. Wang, "TCAQ-DM: Timestep-Channel Adaptive Quantization for Diffusion Models",
AAAI 2025, arXiv:2412.16700.

Timestep-channel re-parameterisation, with m_tc = max |x_c| at timestep t:

    r_tc = m_tc / min_c' m_tc',   r_c = clamp(sum_t m_tc r_tc / sum_t m_tc, 1, R_trunc)         m [T, C], r [C]
    y    = Q(W diag(r)) Q(x / r) + b

Softmax outputs, for every layer and group of timesteps, by the ratio of likelihoods of two distributions:

    power law likelier:  q = clamp(round(-log2(x / s)), 0, 2^b - 1),   x_hat = s 2^-q;   otherwise evenly spaced levels

Progressively aligned reconstruction: sample with the quantized model, reconstruct again on these samples, and repeat.

Letters of the paper and our names: r is `InputTransform.scale`, R_trunc is `most`; the kind of levels is
`LogQuantizer.logarithmic`, with a row for each group.

Differs from the paper (from summaries of it and a re-implementation; where these are silent the choice is ours):
- m_t is that of every recorded step; the paper takes groups of steps.
- R_trunc = 10 is the re-implementation's. r stays at the layer's input at run time: the SiLU behind the norms of
  residual blocks does not let it through, and elsewhere it is not folded either.
- The distribution that the power law is compared with is the exponential, over the values above the 1st percentile;
  `softmax_choice="error"`, as in the presets quick and standard, takes the levels with less error instead: at 8 bits
  evenly spaced levels are finer almost everywhere, whatever the distribution. The last level of log2 means 0.
- The number of groups (`groups`, 4), of aligned rounds (`rounds`, 2). A softmax output whose groups all choose evenly
  spaced levels keeps the ranges of every step that `rows="step"` gave it.
- What is reconstructed: layers are rounded for the least error of their output (`RoundLayers`), in round 0 and in the
  aligned rounds, and activation ranges are searched. The paper reconstructs blocks by gradient and learns scales.
- The aligned rounds do not change the softmax's levels, which are chosen after them.
- First and last layer are at 8 bits unless `ends="same"`.
- `rows="step"` gives every timestep activation ranges of its own; the paper has one for all. The presets quick and
  standard do: at 4-bit activations one range for all steps loses the image (docs/results.md).
"""

from __future__ import annotations

from typing import Literal

from stepquant.calibrate.aligned import AlignLayers
from stepquant.calibrate.balance import BalanceChannels
from stepquant.calibrate.gram import RoundLayers
from stepquant.calibrate.ranges import RangeRule
from stepquant.calibrate.softmax_levels import ChooseSoftmaxLevels, LevelChoice
from stepquant.calibrate.stages import FitInputRanges, LayerRule, Place, Select
from stepquant.methods.baseline import rows_over_time, start
from stepquant.model.surgery import Ends
from stepquant.recipe import Recipe, Stage

__all__ = ["BIBTEX", "PRESETS", "tcaq_dm"]

BIBTEX = """@inproceedings{huang2025tcaqdm,
  title     = {{TCAQ-DM}: Timestep-Channel Adaptive Quantization for Diffusion Models},
  author    = {Huang, Haocheng and Chen, Jiaxin and Guo, Jinyang and Zhan, Ruiyi and Wang, Yunhong},
  booktitle = {AAAI},
  year      = {2025}
}"""

PRESETS: dict[str, dict[str, object]] = {
    "quick": {
        "samples": 32,
        "batch": 8,
        "samples_per_step": 8,
        "softmax_choice": "error",
        "rounds": 1,
        "rows": "step",
        "together": 4,
    },
    "standard": {
        "samples": 64,
        "batch": 16,
        "samples_per_step": 16,
        "softmax_choice": "error",
        "rows": "step",
        "together": 4,
    },
    "full": {"samples": 256},
}


def tcaq_dm(
    *,
    weights: int | None = 4,
    activations: int | None = 8,
    samples: int = 256,
    batch: int = 32,
    every: int = 1,
    samples_per_step: int | None = None,
    most: float = 10.0,
    groups: int = 4,
    softmax_choice: LevelChoice = "likelihood",
    rounds: int = 2,
    rows: Literal["shared", "step"] = "shared",
    together: int = 1,
    layers: tuple[str, ...] = ("*",),
    ends: Ends = "8bit",
    softmax_bits: int | None = 8,
    group_size: int | None = None,
    ranges: RangeRule = "mse",
    rules: tuple[LayerRule, ...] = (),
) -> Recipe:
    """Balanced channels, rounding on the quantized model's own samples, softmax levels by distribution."""
    select = Select(every=every, samples_per_step=samples_per_step)
    place = Place(weights, activations, ends=ends, softmax_bits=softmax_bits, group_size=group_size, rules=rules)
    beginning = start(select, place, samples=samples, batch=batch, ranges=ranges)
    stages: list[Stage] = []
    if activations is not None:
        stages.append(BalanceChannels(rule="timesteps", most=most, layers=tuple(layers), batch=batch, ranges=ranges))
    if weights is not None:
        stages.append(RoundLayers(batch=batch, together=together))
    windows = rows_over_time(rows)
    stages.append(FitInputRanges(ranges, windows=windows))
    if weights is not None and rounds:
        stages.append(AlignLayers(rounds=rounds, batch=batch, together=together, ranges=ranges, windows=windows))
    if activations is not None:
        stages.append(ChooseSoftmaxLevels(groups=groups, choose=softmax_choice, batch=batch, rule=ranges))
    return Recipe("tcaq_dm", (*beginning, *stages))
