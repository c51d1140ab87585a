"""ViDiT-Q: ranges of every token at run time, channels balanced by scaling and rotation.

T. Zhao, T. Fang, H. Huang, E. Liu, R. Wan, W. Soedarmadji, S. Li, Z. Lin, G. Dai, S. Yan, H. Yang, X. Ning, Y. Wang,
"ViDiT-Q: Efficient and Accurate Quantization of Diffusion Transformers for Image and Video Generation", ICLR 2025,
arXiv:2406.02540.

    x_t = R (x / s),   W_t = W diag(s) R^T             s_c = max|x_c|^a / max|w_c|^(1-a)        s [C], R Hadamard [C, C]
    y   = Q_channel(W_t) Q_token(x_t) + b              weights: a range per output; activations: one per token

The scaling is for the imbalance of channels that all timesteps share, the rotation for the part that changes with them.

Letters of the paper and our names: s is `InputTransform.scale`, a is `strength`, R the blocks of `numerics.hadamard`.

Differs from the paper (from summaries of it; where these are silent the choice is ours):
- a is 0.5 for every layer; we do not know the paper's.
- Widths that are no power of two are rotated in blocks of the largest power of two that divides them.
- The metric-decoupled mixed precision is not here: all layers have the same bits, exceptions by `rules`.
- Parameters of their own for timesteps and for the halves of guidance are in summaries of its first version; ranges of
  tokens follow both by themselves, and s is one for all.
- Linear layers alone are balanced and ranged per token in the paper's transformers. Convolutions, if there are any, get
  a range per sample, and are balanced too unless `layers` says otherwise; operands of matmuls keep static ranges.
- First and last layer are at 8 bits unless `ends="same"`.
- `layer_rounding` (in the presets) rounds weights for the least error of the layer's output in place of rounding to
  nearest; off, it is the paper.
"""

from __future__ import annotations

from stepquant.calibrate.balance import BalanceChannels, RotateChannels
from stepquant.calibrate.dynamic import DynamicInputs
from stepquant.calibrate.gram import RoundLayers
from stepquant.calibrate.ranges import RangeRule
from stepquant.calibrate.stages import FitInputRanges, LayerRule, Place, Select
from stepquant.methods.baseline import start
from stepquant.model.surgery import Ends
from stepquant.recipe import Recipe, Stage

__all__ = ["BIBTEX", "PRESETS", "vidit_q"]

BIBTEX = """@inproceedings{zhao2025viditq,
  title     = {{ViDiT-Q}: Efficient and Accurate Quantization of Diffusion Transformers for Image and Video Generation},
  author    = {Zhao, Tianchen and Fang, Tongcheng and Huang, Haofeng and Liu, Enshu and Wan, Rui and Soedarmadji,
               Widyadewi and Li, Shiyao and Lin, Zinan and Dai, Guohao and Yan, Shengen and Yang, Huazhong and
               Ning, Xuefei and Wang, Yu},
  booktitle = {ICLR},
  year      = {2025}
}"""

PRESETS: dict[str, dict[str, object]] = {
    "quick": {"samples": 32, "batch": 8, "samples_per_step": 8, "layer_rounding": True, "together": 4},
    "standard": {"samples": 64, "batch": 16, "samples_per_step": 16, "layer_rounding": True, "together": 4},
    "full": {"samples": 256},
}


def vidit_q(
    *,
    weights: int | None = 4,
    activations: int | None = 8,
    samples: int = 256,
    batch: int = 32,
    every: int = 1,
    samples_per_step: int | None = None,
    strength: float = 0.5,
    largest_block: int = 1024,
    dynamic: bool = True,
    layer_rounding: bool = False,
    together: int = 1,
    layers: tuple[str, ...] = ("*",),
    ends: Ends = "8bit",
    softmax_bits: int | None = 8,
    group_size: int | None = None,
    ranges: RangeRule = "mse",
    rules: tuple[LayerRule, ...] = (),
) -> Recipe:
    """Scaling and rotation of channels, activations ranged per token at run time."""
    select = Select(every=every, samples_per_step=samples_per_step)
    place = Place(weights, activations, ends=ends, softmax_bits=softmax_bits, group_size=group_size, rules=rules)
    beginning = start(select, place, samples=samples, batch=batch, ranges=ranges)
    stages: list[Stage] = []
    if activations is not None:
        stages += [DynamicInputs()] if dynamic else []
        stages.append(
            BalanceChannels(rule="smooth", strength=strength, layers=tuple(layers), batch=batch, ranges=ranges)
        )
        stages.append(RotateChannels(layers=tuple(layers), largest=largest_block, ranges=ranges))
    if weights is not None and layer_rounding:
        stages.append(RoundLayers(batch=batch, together=together))
    return Recipe("vidit_q", (*beginning, *stages, FitInputRanges(ranges)))
