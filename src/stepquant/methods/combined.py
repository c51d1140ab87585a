"""The parts of the literature that go together, in one recipe. Each part can be left out.

0. Optionally, before anything is rounded: channels balanced between weights and activations (`balance`, SVDQuant's
   search, Li et al. 2025), activation ranges found at run time instead of fitted ones (`dynamic`), and a low-rank
   branch in 16 bits beside the weights (`low_rank`, its rank). Graphs run the first and the last around their integers,
   at some cost in time and bytes, and refuse ranges found at run time.
1. Weights: every layer rounded for its own output from the Gram matrix of its inputs (`layer_rounding`), then
   block-wise AdaRound (Li et al. 2021, Q-Diffusion) from there, on samples with learnt weights if `sample_weights`
   (GAC, Hoang et al. 2026).
2. Activation parameters over time (`rows`): one row for all timesteps ("shared"), one for each window of steps
   ("window"), one for each timestep ("step"), or groups of timesteps found by search ("groups", ADP-DM, Wang et al.
   2024).
3. Biases that restore the mean output of every channel, as far as that helps the final sample (`correct_biases`, Nagel
   et al. 2019).
4. Block-wise activation scales (`scale_iterations`, Q-Diffusion).
5. Windows of simulated steps for rounding or weights' scales, and activation scales, of the whole network (AccuQuant,
   Lee et al. 2025).
6. Correction of every step's prediction, fitted last, on the finished model (`compensation`, CEC, Liu et al. 2025).

The order follows from what each part leaves alone: rounding needs no activation ranges, ranges are observed behind
rounded weights, windows start from both, and a correction holds only for the model that it was fitted on.

Differs from the papers: see each part's own method (`q_diffusion`, `gac`, `adp_dm`, `accuquant`, `cec`, `svdquant`);
their combination is ours. The presets quick and standard have balance, rounded layers, a row for every step, biases,
and windows from the model's own state over scales of activations and weights; docs/results.md has what was measured of
each. Corrections are left out there, since only stepquant opens a checkpoint with one: `combined+cec` adds them.
"""

from __future__ import annotations

from typing import Literal

from stepquant.calibrate.balance import BalanceChannels
from stepquant.calibrate.compensation import Compensate, EstimatorChoice
from stepquant.calibrate.dynamic import DynamicInputs
from stepquant.calibrate.group_search import SearchGroups
from stepquant.calibrate.low_rank import AddLowRank
from stepquant.calibrate.ranges import RangeRule
from stepquant.calibrate.reconstruct import RoundBlocks, ScaleBlocks
from stepquant.calibrate.rounding import ScaleGradient
from stepquant.calibrate.stages import FitInputRanges, LayerRule, Place, Select
from stepquant.calibrate.weighting import SampleWeighting
from stepquant.calibrate.window_fitting import FitWindows
from stepquant.calibrate.windows import GradientMode
from stepquant.errors import SpecError
from stepquant.methods.baseline import corrected_biases, layers_first, rows_over_time, start
from stepquant.model.surgery import Ends
from stepquant.recipe import Recipe, Stage

__all__ = ["BIBTEX", "PRESETS", "combined"]

BIBTEX = ""
"""No paper of its own: cite those of the parts (`stepquant methods NAME`)."""

PRESETS: dict[str, dict[str, object]] = {
    "quick": {
        "samples": 32,
        "batch": 8,
        "samples_per_step": 8,
        "balance": True,
        "block_iterations": 0,
        "rows": "step",
        "scale_iterations": 0,
        "search_rounds": 8,
        "window_iterations": 36,
        "free_run": 1.0,
        "judged": 32,
        "learn_weights": False,
        "lr_weight_scales": 2e-3,
        "lr_scales": 1e-2,
        "compensation": False,
        "together": 4,
    },
    "standard": {
        "samples": 64,
        "samples_per_step": 16,
        "balance": True,
        "block_iterations": 0,
        "rows": "step",
        "scale_iterations": 0,
        "search_rounds": 24,
        "window_iterations": 400,
        "free_run": 1.0,
        "judged": 32,
        "learn_weights": False,
        "lr_weight_scales": 1e-3,
        "lr_scales": 5e-3,
        "compensation": False,
        "together": 4,
    },
    "full": {"samples": 256},
}

LOW_RANK_REFITS = 20
"""At most: as in SVDQuant's preset standard. They end where the layer's output no longer gains."""

ROWS = ("shared", "window", "step", "groups")


def combined(
    *,
    weights: int | None = 4,
    activations: int | None = 8,
    samples: int = 256,
    batch: int = 16,
    every: int = 1,
    samples_per_step: int | None = None,
    balance: bool = False,
    dynamic: bool = False,
    low_rank: int = 0,
    layer_rounding: bool = True,
    correct_biases: bool = True,
    sample_weights: bool = True,
    meta_iterations: int = 20,
    block_iterations: int = 2_000,
    block_lr: float = 1e-3,
    rows: Literal["shared", "window", "step", "groups"] = "shared",
    row_windows: tuple[int, ...] | None = None,
    search_rounds: int = 64,
    scale_iterations: int = 1_000,
    scale_lr: float = 4e-3,
    window: int = 5,
    gradient: GradientMode = "identity",
    window_iterations: int = 3_000,
    free_run: float = 0.0,
    judged: int = 0,
    learn_weights: bool = True,
    lr_weight_scales: float = 0.0,
    scale_gradient: ScaleGradient = "straight",
    lr_weights: float = 1e-3,
    lr_scales: float = 4e-3,
    compensation: bool = True,
    estimator: EstimatorChoice = "auto",
    together: int = 1,
    ends: Ends = "8bit",
    softmax_bits: int | None = 8,
    group_size: int | None = None,
    ranges: RangeRule = "mse",
    rules: tuple[LayerRule, ...] = (),
) -> Recipe:
    """Weighted block-wise rounding, activation parameters over time, windows of simulated steps, step corrections.

    row_windows: with rows="window", the lengths of the windows that get a row each, noise first; they must add up to
        the scheduler's steps.
    low_rank, block_iterations, scale_iterations, window_iterations: 0 leaves the part out. Parts that have nothing to
        learn (windows over scales alone where activations are in floating point) are left out, too.
    """
    windows = rows_over_time(rows, row_windows, ROWS)
    if (rows == "window") != (row_windows is not None):
        raise SpecError(
            'rows="window" and row_windows go together: pass both, such as row_windows=(5, 5, 5, 5), or neither; '
            f"found rows={rows!r} and row_windows={row_windows!r}."
        )
    select = Select(every=every, samples_per_step=samples_per_step)
    place = Place(weights, activations, ends=ends, softmax_bits=softmax_bits, group_size=group_size, rules=rules)
    beginning = start(select, place, samples=samples, batch=batch, ranges=ranges)
    layers, keep = layers_first(layer_rounding, weights=weights, batch=batch, together=together)
    stages: list[Stage] = [DynamicInputs()] if dynamic and activations is not None else []
    if balance and activations is not None:
        stages.append(BalanceChannels(rule="search", batch=batch, ranges=ranges))
    if low_rank and weights is not None:
        stages.append(AddLowRank(rank=low_rank, refits=LOW_RANK_REFITS, batch=batch, ranges=ranges))
    stages += layers
    if block_iterations and weights is not None:
        weighting = SampleWeighting(iterations=meta_iterations, batch=batch) if sample_weights else None
        stages.append(
            RoundBlocks(
                iterations=block_iterations,
                batch=batch,
                lr=block_lr,
                together=together,
                weighting=weighting,
                keep_rounding=keep,
            )
        )
    stages.append(FitInputRanges(ranges, windows=windows))
    if rows == "groups":
        # A short search: it begins at the range that was observed at each timestep and follows full precision.
        search = SearchGroups(rounds=search_rounds, ranges=ranges, target="full_precision", prior=2.0, lr_logits=0.2)
        stages.append(search)
    stages += corrected_biases(correct_biases, batch=batch)
    if scale_iterations and activations is not None:
        stages.append(ScaleBlocks(iterations=scale_iterations, batch=batch, lr=scale_lr, scale_gradient=scale_gradient))
    learnt = learn_weights or lr_weight_scales > 0
    if window_iterations and (activations is not None or (learnt and weights is not None)):
        stages.append(
            FitWindows(
                window=window,
                gradient=gradient,
                iterations=window_iterations,
                free_run=free_run,
                judged=judged,
                lr_weights=lr_weights,
                lr_scales=lr_scales,
                learn_weights=learn_weights,
                lr_weight_scales=lr_weight_scales,
                scale_gradient=scale_gradient,
            )
        )
    if compensation:
        stages.append(Compensate(estimator=estimator))
    return Recipe("combined", (*beginning, *stages))
