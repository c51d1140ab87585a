"""LSGQuant (2026): rotated inputs, ranges of channels and tokens, and a branch refined where inputs change.

T. Wu, Z. Chen, C. Xu, B. Chai, Y. Guo, Y. Liu, L. Kong, Y. Zhang, "LSGQuant: Layer-Sensitivity Guided Quantization for
One-Step Diffusion Real-World Video Super-Resolution", ICML 2026, arXiv:2602.03182. Written for a transformer (WAN 2.1).

    y = Q_x(H x) Q(W_t - L2 L1)^T + (L2 L1) (H x) + b          W_t = W H^T, H a fixed Hadamard rotation

    Q_x (DRAQ)   s_c = max over tokens |x_c|;   d_n = max_c |x_nc / s_c|;   q = round(qmax x_nc / (s_c d_n))
                 x^ = q / qmax * d_n * s_c,     qmax = 2^(b-1) - 1,   all of it at run time
    VOLTS        mu_i = mean of the layer's input over tokens, of sample i;   sensitivity = mean_c Var_i mu_ic
                 frozen <= 0.001 < light <= 0.075 < free: 1 iteration, 30, or until it converges
    QAO          L2 L1 = SVD_32(W_t), then in turn R = Q(W_t - L2 L1), L2 L1 = SVD_32(W_t - R), the best pair kept;
                 then R, L1 and L2 by gradient on the layer's output, as long as the tier says

Letters of the paper and our names: H is `InputTransform`, Q_x a `DynamicQuantizer` of granularity "channel_token", L1
and L2 are `LowRankBranch.down` and `.up`, R the layer's weight.

Differs from the paper:
- DRAQ multiplies s onto the result before the matrix product: arithmetic is simulated, and no integer engine runs it.
  Its maxima are of one image, so that images of a batch do not depend on one another. Where an image is a single token
  (embeddings of time and class), s would be the token itself, and is left out.
- With `activations=None` there is no Q_x, and H is left out with it: the branch is then of W itself.
- Convolutions, which the paper's model does not have, take a range from each sample, and are rotated over channels.
- Time and prompt embeddings are quantized unless `rules` leave them out; the paper leaves them in floating point. First
  and last layer, and layers whose precision diffusers keeps, are at 8 bits.
- Widths that are no power of two are rotated in blocks of the largest power of two that divides them.
- Samples of the sensitivity are calibration samples: images at all calibrated steps. The paper has one step, and 50
  videos. The bounds are the paper's, in squared units of the layer's input.
- How the gradient works is ours (`RefineLowRank`): straight-through on the weight, Adam, a quarter of the patches held
  out to choose the state that is kept. The alternation runs to its best state in every tier.
- In multi-step sampling the branch is fitted to what all steps show together.
- Softmax outputs keep static ranges, queries, keys and values too.
"""

from __future__ import annotations

from stepquant.calibrate.balance import RotateChannels
from stepquant.calibrate.dynamic import DynamicInputs
from stepquant.calibrate.low_rank import AddLowRank
from stepquant.calibrate.ranges import RangeRule
from stepquant.calibrate.refine_low_rank import RefineLowRank
from stepquant.calibrate.stages import FitInputRanges, LayerRule, Place, Select
from stepquant.methods.baseline import start
from stepquant.model.surgery import Ends
from stepquant.recipe import Recipe, Stage

__all__ = ["BIBTEX", "PRESETS", "lsgquant"]

BIBTEX = """@inproceedings{wu2026lsgquant,
  title     = {{LSGQuant}: Layer-Sensitivity Guided Quantization for One-Step Diffusion Real-World Video
               Super-Resolution},
  author    = {Wu, Tianxing and Chen, Zheng and Xu, Cirou and Chai, Bowen and Guo, Yong and Liu, Yutong and
               Kong, Linghe and Zhang, Yulun},
  booktitle = {ICML},
  year      = {2026}
}"""

PRESETS: dict[str, dict[str, object]] = {
    "quick": {"samples": 32, "batch": 8, "samples_per_step": 8, "refits": 5, "most": 200},
    "standard": {"samples": 64, "batch": 16, "samples_per_step": 16, "refits": 20, "most": 1_000},
    "full": {"samples": 256},
}


def lsgquant(
    *,
    weights: int | None = 4,
    activations: int | None = 8,
    samples: int = 256,
    batch: int = 32,
    every: int = 1,
    samples_per_step: int | None = None,
    rank: int = 32,
    refits: int = 100,
    light: int = 30,
    most: int = 2_000,
    patches: int = 2_048,
    layers: tuple[str, ...] = ("*",),
    ends: Ends = "8bit",
    softmax_bits: int | None = 8,
    group_size: int | None = None,
    ranges: RangeRule = "mse",
    rules: tuple[LayerRule, ...] = (),
) -> Recipe:
    """Rotation, ranges of channels and tokens at run time, and a low-rank branch refined by sensitivity."""
    select = Select(every=every, samples_per_step=samples_per_step)
    place = Place(weights, activations, ends=ends, softmax_bits=softmax_bits, group_size=group_size, rules=rules)
    beginning = start(select, place, samples=samples, batch=batch, ranges=ranges)
    chosen = tuple(layers)
    stages: list[Stage] = []
    if activations is not None:
        stages += [DynamicInputs(channels=True), RotateChannels(layers=chosen, ranges=ranges)]
    if weights is not None:
        stages.append(AddLowRank(rank=rank, refits=refits, layers=chosen, batch=batch, ranges=ranges))
        stages.append(RefineLowRank(light=light, most=most, layers=chosen, batch=batch, patches=patches))
    return Recipe("lsgquant", (*beginning, *stages, FitInputRanges(ranges)))
