"""SVDQuant: outliers move from activations to weights, and from there into a low-rank branch of 16 bits.

M. Li, Y. Lin, Z. Zhang, T. Cai, X. Li, J. Guo, E. Xie, C. Meng, J.-Y. Zhu, S. Han, "SVDQuant: Absorbing Outliers by
Low-Rank Components for 4-Bit Diffusion Models", ICLR 2025, arXiv:2411.05007.

    x_t = x / s,   W_t = W diag(s)                     s_c = max|x_c|^a / max|w_c|^(1-a), a by search      s [C]
    W_t = L2 L1 + R                                    L1 [r, C], L2 [O, r], 16 bits, r = 32
    y   = L2 (L1 x_t) + Q(R) Q(x_t) + b

    L2 L1 = SVD_r(W_t - Q(R)) and R = W_t - L2 L1 in turn, as long as the layer's output gains, at most 100 times

Letters of the paper and our names: s is `InputTransform.scale`, a the `strength` that `BalanceChannels` finds, L1 and
L2 are `LowRankBranch.down` and `.up`, R the layer's weight, r is `rank`.

Differs from the paper (from its public code where that is known to us; the rest is ours):
- Weights have a scale per output channel, or per group with `group_size` (the paper: symmetric, groups of 64);
  activations are asymmetric, dynamic per token of linear layers and per sample of convolutions (the paper: dynamic in
  groups of 64). `dynamic=False` takes static ranges. NVFP4 is not there.
- Every layer is quantized; the public code leaves embeddings, residual blocks, projections in and out and the sampler's
  norms in 16 bits. `rules` leaves layers out. First and last layer are at 8 bits unless `ends="same"`.
- The strength is searched on the layer's output without the branch, from 0 to 1 in steps of 0.05, and no scaling at all
  is a candidate too: it costs nothing at run time. What the layer sees is that of the full-precision model.
- A branch has at most a quarter of the rank that its layer can have; layers too small for any are left without.
- Behind the paper's round-to-nearest, `layer_rounding` rounds R for the least error of the layer's output
  (`RoundLayers`); `layer_rounding=False` is the paper.
- 1/s stays at the layer's input; it is not folded into what comes before. The fused kernels of the paper are not there:
  engines run the branch in floating point beside the integer operator, and graphs only with `dynamic=False`.
- Softmax outputs keep static ranges, queries, keys and values too.
"""

from __future__ import annotations

from stepquant.calibrate.balance import BalanceChannels
from stepquant.calibrate.dynamic import DynamicInputs
from stepquant.calibrate.gram import RoundLayers
from stepquant.calibrate.low_rank import AddLowRank
from stepquant.calibrate.ranges import RangeRule
from stepquant.calibrate.stages import FitInputRanges, LayerRule, Place, Select
from stepquant.methods.baseline import start
from stepquant.model.surgery import Ends
from stepquant.recipe import Recipe, Stage

__all__ = ["BIBTEX", "PRESETS", "svdquant"]

BIBTEX = """@inproceedings{li2025svdquant,
  title     = {{SVDQuant}: Absorbing Outliers by Low-Rank Components for 4-Bit Diffusion Models},
  author    = {Li, Muyang and Lin, Yujun and Zhang, Zhekai and Cai, Tianle and Li, Xiuyu and Guo, Junxian and
               Xie, Enze and Meng, Chenlin and Zhu, Jun-Yan and Han, Song},
  booktitle = {ICLR},
  year      = {2025}
}"""

PRESETS: dict[str, dict[str, object]] = {
    "quick": {"samples": 32, "batch": 8, "samples_per_step": 8, "refits": 5, "together": 4},
    "standard": {"samples": 64, "batch": 16, "samples_per_step": 16, "refits": 20, "together": 4},
    "full": {"samples": 256},
}


def svdquant(
    *,
    weights: int | None = 4,
    activations: int | None = 8,
    samples: int = 256,
    batch: int = 32,
    every: int = 1,
    samples_per_step: int | None = None,
    points: int = 20,
    rank: int = 32,
    refits: int = 100,
    dynamic: bool = True,
    layer_rounding: bool = True,
    together: int = 1,
    layers: tuple[str, ...] = ("*",),
    ends: Ends = "8bit",
    softmax_bits: int | None = 8,
    group_size: int | None = None,
    ranges: RangeRule = "mse",
    rules: tuple[LayerRule, ...] = (),
) -> Recipe:
    """Smoothing and a low-rank branch beside 4-bit weights, activations ranged at run time."""
    select = Select(every=every, samples_per_step=samples_per_step)
    place = Place(weights, activations, ends=ends, softmax_bits=softmax_bits, group_size=group_size, rules=rules)
    beginning = start(select, place, samples=samples, batch=batch, ranges=ranges)
    stages: list[Stage] = []
    if activations is not None:
        stages += [DynamicInputs()] if dynamic else []
        stages.append(BalanceChannels(rule="search", points=points, layers=tuple(layers), batch=batch, ranges=ranges))
    if weights is not None:
        stages.append(AddLowRank(rank=rank, refits=refits, layers=tuple(layers), batch=batch, ranges=ranges))
        stages += [RoundLayers(batch=batch, together=together)] if layer_rounding else []
    return Recipe("svdquant", (*beginning, *stages, FitInputRanges(ranges)))
