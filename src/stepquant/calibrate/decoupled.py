"""Sensitivity by two measures: what changes the content of the final state, and what changes its quality.

For every layer's weight (or activations) i and number of bits b, the network with this one thing quantized samples
freely from the recorded noise, and its final state x^ is compared with the full-precision one x:

    quality_ib = mean over images of  |x^ - x|^2 / |x|^2           the inverse of the SQNR
    content_ib = mean over images of  1 - SSIM(x^, x)

Layers that decide on what is drawn (cross attention and feed-forward layers) are judged by content, all others
(convolutions, self attention) by quality.

Source: Zhao et al. 2024 (MixDQ, arXiv:2405.17873), metric-decoupled sensitivity analysis. The paper solves an integer
program for each of the two groups. Ours is one program for both, because the measures can be added: of small errors e,
1 - SSIM is to leading order a squared error relative to the signal too, window by window, |e|^2 / (2 |x - mean|^2).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepquant.calibrate.sensitivity import Item, Probe, Scores
from stepquant.calibrate.trajectory import Trajectory, advance, state_at
from stepquant.model.surgery import Plan
from stepquant.numerics.spec import LayerScheme
from stepquant.recipe import Keeper
from stepquant.run import Run

__all__ = ["CONTENT_LAYERS", "decoupled_scores", "dissimilarity", "noise_to_signal"]

CONTENT_LAYERS = ("*.attn2.*", "*.ff.*", "*.ff_context.*", "*.ffn.*")
"""Cross attention and feed-forward layers, by diffusers' names."""

WINDOW = 11
"""Largest side of SSIM's windows (Wang et al. 2004); smaller where the state is. Ours are without weights."""

K1, K2 = 0.01, 0.03
"""SSIM's constants (Wang et al. 2004, sec. III-B)."""


def noise_to_signal(found: Tensor, wanted: Tensor) -> Tensor:
    """|found - wanted|^2 / |wanted|^2 of each image, `[B]` float64."""
    wide = wanted.double().flatten(1)
    return (found.double().flatten(1) - wide).square().sum(1) / wide.square().sum(1).clamp(min=1e-300)


def dissimilarity(found: Tensor, wanted: Tensor) -> Tensor:
    """1 - SSIM of each image, mean over channels and windows, `[B]` float64.

    found, wanted: `[B, C, *space]`; the last two axes are the picture, others count as channels. Tokens `[B, T, C]` are
    a picture one token wide. The range of values that SSIM needs is that of `wanted`, image by image.
    """
    x, y = (_pictures(value) for value in (found, wanted))
    span = (y.flatten(1).amax(1) - y.flatten(1).amin(1)).clamp(min=1e-12).reshape(-1, 1, 1, 1)
    size = [min(WINDOW, side) for side in y.shape[-2:]]

    def mean(value: Tensor) -> Tensor:
        return F.avg_pool2d(value, size, stride=1)

    of_x, of_y = mean(x), mean(y)
    variance_x, variance_y = mean(x * x) - of_x**2, mean(y * y) - of_y**2
    covariance = mean(x * y) - of_x * of_y
    c1, c2 = (K1 * span) ** 2, (K2 * span) ** 2
    luminance = (2 * of_x * of_y + c1) / (of_x**2 + of_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return 1 - (luminance * structure).flatten(1).mean(1)


def _pictures(value: Tensor) -> Tensor:
    wide = value.double()
    if wide.ndim == 3:
        wide = wide.mT[..., None]
    return wide.reshape(len(wide), -1, *wide.shape[-2:])


@torch.no_grad()
def decoupled_scores(
    probe: Probe, trajectories: Sequence[Trajectory], items: Sequence[Item], *, run: Run, keeper: Keeper | None = None
) -> tuple[Scores, int]:
    """Score "decoupled" of every candidate, and the network evaluations spent, in images.

    keeper: what is known is kept there after every item.
    """
    content = {item for item in items if any(fnmatch.fnmatchcase(item.layer, one) for one in CONTENT_LAYERS)}
    rows = sum(call.prediction.shape[0] for one in trajectories for step in one.steps for call in step.calls)
    kept = None if keeper is None else keeper.load("decoupled")
    known: list[float] = [] if kept is None else list(kept[1]["known"])
    scores: Scores = {}
    total = sum(len(item.bits) for item in items)
    with run.progress.track("Sensitivity of content and quality", total) as done:
        for item in items:
            start = sum(map(len, scores.values()))
            for bits in item.bits[max(0, len(known) - start) :]:
                probe.install(_alone(probe, item, bits))
                known.append(_measured(probe.denoiser, trajectories, content=item in content))
                done(1)
            scores[item] = dict(zip(item.bits, known[start:], strict=False))
            if keeper is not None:
                keeper.save("decoupled", {"none": torch.zeros(1)}, {"known": known})
    probe.install({})
    return scores, rows * total


def _alone(probe: Probe, item: Item, bits: int) -> Plan:
    """Nothing but the item quantized."""
    own = probe.plan[item.layer]
    if item.operand == "weights":
        assert own.weight is not None
        return {item.layer: LayerScheme(weight=replace(own.weight, bits=bits))}
    first, second = (None if spec is None else replace(spec, bits=bits) for spec in (own.input, own.second))
    return {item.layer: LayerScheme(input=first, second=second)}


def _measured(denoiser: nn.Module, trajectories: Sequence[Trajectory], *, content: bool) -> float:
    """Mean over the images of a free run."""
    found = []
    for trajectory in trajectories:
        state = state_at(trajectory, 0)
        for index in range(len(trajectory.steps)):
            state = advance(denoiser, trajectory, index, state)
        measure = dissimilarity if content else noise_to_signal
        found.append(measure(state.sample, trajectory.steps[-1].next_sample))
    return float(torch.cat(found).mean())
