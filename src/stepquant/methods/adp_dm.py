"""ADP-DM (also APQ-DM): every timestep chooses its activation quantizers.

C. Wang, Z. Wang, X. Xu, Y. Tang, J. Zhou, J. Lu, "Towards Accurate Post-training Quantization for Diffusion Models",
CVPR 2024, arXiv:2305.18723.

Activation ranges change along the way from noise to image. Each layer owns G quantization functions, and timestep t
shares them while searching:

    Q_g(x) = s_g clamp(round(x / s_g), z_g^min, z_g^max),   g = 1 .. G                            s, z [G]
    x_hat  = sum_g sigma^t_g Q_g(x),   sigma^t = softmax(alpha^t)                                 alpha [timesteps, G]
    J      = || eps - eps_q(x_t, t) ||^2 + lambda sum_g -sigma^t_g log sigma^t_g,   lambda = 0.8
    x_t    = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps

x_0 are images of the full-precision model, so no data are needed. Each round takes its images for the timestep that is
most informative, where the search is undecided and that was rarely chosen; in the end each timestep keeps the function
with the largest share:

    t* = argmax_t  sum_g -sigma^t_g log sigma^t_g + eta / (N_t + 1),   eta = 1.5
    g(t) = argmax_g sigma^t_g

Letters of the paper and our names: G is `groups`, (s, z^min, z^max) `TimestepGroups.scale, low, high`, alpha
`Shares.logits`, lambda `entropy`, eta `informative.UCB_BONUS`, N_t `counts`, g(t) `InputQuantizer.row_of_bin`.

The public code differs from the paper, and its choices are options here: `granularity="timestep+channel"`,
`harden="average"`, `choose="count"`, `entropy=1.0`, `rounding="nearest"`,
`layers=("*resnets.*.conv1", "*resnets.*.conv2")`. It leaves all other layers in floating point:
`rules=(LayerRule("*", None, None), LayerRule("*resnets.*.conv?", bits, bits))`.

Differs from the paper (from summaries of it and the public code; where both are silent the choice is ours):
- Weights: blocks are rounded as in Q-Diffusion first (`rounding="reconstruct"`), or layers from their Gram matrices
  (`"layers"`, in the short presets), which 4-bit weights need; the public code rounds to nearest. During the search
  weights are hard; the public code keeps them in floating point.
- "Images generated at the chosen timestep": an update needs a clean image with a known noise, which the sampler has
  only at its end. A round's images are the recorded final samples, made noisy at every step in turn ("along all
  timesteps"), and `focus` further updates with new noise are made at t*. The public code instead feeds the sampler's
  state at t* in the image's place, and walks on with the quantized model's own predictions.
- A branch always spans 2^bits levels: after an update, the scale is fitted anew to the learnt range. The paper learns
  three numbers, which may name more levels than the bits have, or fewer.
- First triples: quantiles over timesteps of the observed ranges. Adam with a rate relative to the scale for triples;
  its state lasts over all rounds. The public code makes a new AdamW each round and decays weights.
- Shares start equal, or, with `prior`, in favour of the range that was observed at the timestep.
- The entropy is summed over layers, and in "timestep+channel" averaged over groups and channels as in the public code.
  The score of a timestep takes the mean over layers, so that the bonus keeps its weight.
- The public code's buckets: both range ends are numbered from narrow to wide, without its first-round search of
  a least range. Its range ends are recomputed in every pass; here they are observed once, before the search.
- Rounding in the search has a straight-through gradient; in the public code it has none, so that layers behind another
  quantized layer learn from the entropy alone.
- First and last layer are at 8 bits unless `ends="same"`. The layer that reads the sample is not searched: it has a
  range in every step that covers what was seen, and a margin (`ranges.SAMPLE_MARGIN`).
- Ranges to begin with, and the features of `choose="mmd"`, are those of the first recorded mini-batch.
- `target="full_precision"` matches the full-precision model's prediction in place of the drawn noise, of which the
  model's own error is a part that no quantizer can take away.
- Left out of the public code: its calibration modes "real", "range" and "random" (all images, one sample a step, and
  timesteps drawn from N(0.4T, 0.4T), for which there is `ptq4dm`), the noisiest 30 of 100 timesteps that its score
  skips, and weight scales from positive values alone.
- The presets quick and standard run fewer rounds at a higher rate, with a `prior` and the full-precision target.
"""

from __future__ import annotations

from typing import Literal

from stepquant.calibrate.gram import RoundLayers
from stepquant.calibrate.group_search import Granularity, SearchGroups, Target
from stepquant.calibrate.informative import Choose
from stepquant.calibrate.ranges import RangeRule
from stepquant.calibrate.reconstruct import RoundBlocks
from stepquant.calibrate.stages import FitInputRanges, LayerRule, Place, Select
from stepquant.calibrate.timestep_groups import Harden
from stepquant.errors import SpecError, nearest
from stepquant.methods.baseline import start
from stepquant.model.surgery import Ends
from stepquant.recipe import Recipe

__all__ = ["BIBTEX", "PRESETS", "adp_dm"]

BIBTEX = """@inproceedings{wang2024adpdm,
  title     = {Towards Accurate Post-training Quantization for Diffusion Models},
  author    = {Wang, Changyuan and Wang, Ziwei and Xu, Xiuwei and Tang, Yansong and Zhou, Jie and Lu, Jiwen},
  booktitle = {CVPR},
  year      = {2024}
}"""

PRESETS: dict[str, dict[str, object]] = {
    "quick": {
        "samples": 32,
        "batch": 8,
        "samples_per_step": 8,
        "rounds": 8,
        "lr_logits": 0.2,
        "prior": 2.0,
        "target": "full_precision",
        "rounding": "layers",
        "together": 4,
    },
    "standard": {
        "samples": 64,
        "batch": 16,
        "samples_per_step": 16,
        "rounds": 24,
        "lr_logits": 0.1,
        "prior": 2.0,
        "target": "full_precision",
        "rounding": "layers",
        "together": 4,
    },
    "full": {"samples": 1024},
}


ROUNDINGS = ("nearest", "layers", "reconstruct")


def adp_dm(
    *,
    weights: int | None = 4,
    activations: int | None = 8,
    samples: int = 1024,
    batch: int = 16,
    every: int = 1,
    samples_per_step: int | None = 256,
    groups: int = 8,
    granularity: Granularity = "timestep",
    layers: tuple[str, ...] = ("*",),
    rounds: int = 64,
    focus: int = 4,
    entropy: float = 0.8,
    target: Target = "noise",
    harden: Harden = "argmax",
    choose: Choose = "ucb",
    lr: float = 1e-3,
    lr_logits: float = 5e-2,
    prior: float = 0.0,
    rounding: Literal["nearest", "layers", "reconstruct"] = "reconstruct",
    block_iterations: int = 20_000,
    block_lr: float = 1e-3,
    together: int = 1,
    ends: Ends = "8bit",
    softmax_bits: int | None = 8,
    group_size: int | None = None,
    ranges: RangeRule = "mse",
    rules: tuple[LayerRule, ...] = (),
) -> Recipe:
    """Block-wise AdaRound for weights, then a search of the activation quantizers of every timestep."""
    if rounding not in ROUNDINGS:
        raise SpecError(
            f"rounding must be one of {', '.join(ROUNDINGS)}, found {rounding!r}.{nearest(str(rounding), ROUNDINGS)}"
        )
    select = Select(every=every, samples_per_step=samples_per_step)
    place = Place(weights, activations, ends=ends, softmax_bits=softmax_bits, group_size=group_size, rules=rules)
    beginning = start(select, place, samples=samples, batch=batch, ranges=ranges)
    blocks: tuple[RoundBlocks | RoundLayers, ...] = ()
    if rounding == "layers" and weights is not None:
        blocks = (RoundLayers(batch=batch, together=together),)
    if rounding == "reconstruct" and weights is not None:
        blocks = (RoundBlocks(iterations=block_iterations, batch=batch, lr=block_lr, together=together),)
    search = SearchGroups(
        groups=groups,
        granularity=granularity,
        layers=tuple(layers),
        rounds=rounds,
        focus=focus,
        entropy=entropy,
        target=target,
        harden=harden,
        choose=choose,
        lr=lr,
        lr_logits=lr_logits,
        ranges=ranges,
        prior=prior,
    )
    return Recipe("adp_dm", (*beginning, *blocks, FitInputRanges(ranges), search))
