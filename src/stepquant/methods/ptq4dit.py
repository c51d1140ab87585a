"""PTQ4DiT: channels balanced by salience, with the weight on timesteps where weights and activations disagree.

J. Wu, H. Wang, Y. Shang, M. Shah, Y. Yan, "PTQ4DiT: Post-training Quantization for Diffusion Transformers", NeurIPS
2024, arXiv:2405.16005.

    A_tc = max |x_c| at timestep t,   W_c = max |w_oc|                                          A [T, C], W [C]
    eta  = softmax over t of -Spearman(A_t, W)                                                  eta [T]
    s_c  = sqrt(sum_t eta_t A_tc / W_c)                                                         s [C]
    y    = Q(W diag(s)) Q(x / s) + b

Where the salient channels of activation and weight are different ones, either can take over from the other; timesteps
at which they are so count more.

Letters of the paper and our names: s is `InputTransform.scale`, eta is computed in `balance.salience_scale`.

Differs from the paper (from summaries of it and of its public code):
- s is applied to every linear layer and convolution (`layers` restricts it), and stays at the layer's input at run
  time; the paper folds it into the modulation and the linear layers before, where it costs nothing.
- Weights are rounded for the least error of the layer's output (`RoundLayers`), activation ranges by search. The public
  code reconstructs blocks with weights and activations together (20 000 iterations).
- First and last layer are at 8 bits unless `ends="same"`.
"""

from __future__ import annotations

from stepquant.calibrate.balance import BalanceChannels
from stepquant.calibrate.gram import RoundLayers
from stepquant.calibrate.ranges import RangeRule
from stepquant.calibrate.stages import FitInputRanges, LayerRule, Place, Select
from stepquant.methods.baseline import start
from stepquant.model.surgery import Ends
from stepquant.recipe import Recipe, Stage

__all__ = ["BIBTEX", "PRESETS", "ptq4dit"]

BIBTEX = """@inproceedings{wu2024ptq4dit,
  title     = {{PTQ4DiT}: Post-training Quantization for Diffusion Transformers},
  author    = {Wu, Junyi and Wang, Haoxuan and Shang, Yuzhang and Shah, Mubarak and Yan, Yan},
  booktitle = {NeurIPS},
  year      = {2024}
}"""

PRESETS: dict[str, dict[str, object]] = {
    "quick": {"samples": 32, "batch": 8, "samples_per_step": 8, "together": 4},
    "standard": {"samples": 64, "batch": 16, "samples_per_step": 16, "together": 4},
    "full": {"samples": 256},
}


def ptq4dit(
    *,
    weights: int | None = 4,
    activations: int | None = 8,
    samples: int = 256,
    batch: int = 32,
    every: int = 1,
    samples_per_step: int | None = None,
    layer_rounding: bool = True,
    together: int = 1,
    layers: tuple[str, ...] = ("*",),
    ends: Ends = "8bit",
    softmax_bits: int | None = 8,
    group_size: int | None = None,
    ranges: RangeRule = "mse",
    rules: tuple[LayerRule, ...] = (),
) -> Recipe:
    """Salience of channels balanced between weights and activations, then layer-wise rounding."""
    select = Select(every=every, samples_per_step=samples_per_step)
    place = Place(weights, activations, ends=ends, softmax_bits=softmax_bits, group_size=group_size, rules=rules)
    beginning = start(select, place, samples=samples, batch=batch, ranges=ranges)
    stages: list[Stage] = []
    if activations is not None:
        stages.append(BalanceChannels(rule="salience", layers=tuple(layers), batch=batch, ranges=ranges))
    if weights is not None and layer_rounding:
        stages.append(RoundLayers(batch=batch, together=together))
    return Recipe("ptq4dit", (*beginning, *stages, FitInputRanges(ranges)))
