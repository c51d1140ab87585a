"""Rounding weights one after the other, each for the error of those before it: GPTQ, and a descent over all levels.

With d the error of one output's weights and G the sum of products of their inputs, as in `stepquant.calibrate.gram`,
the loss is the squared length of R d for a triangular R with G = R^T R:

    d G d^T + 2 d r^T = |R (d + c)|^2 + constant,    c = r G^-1    (r, c = 0 unless the inputs are beside others)
                      = sum_i R_ii^2 (d_i + c_i + sum_(j > i) R_ij / R_ii (d_j + c_j))^2

so from the last weight to the first, each goes to the level nearest to what makes its own term zero, beyond the two
neighbours of its full-precision value where that takes it. The weight with the largest inputs comes first.

Source: GPTQ (Frantar et al. 2023, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"),
in the form of LDLQ (Chee et al. 2023, "QuIP"), which needs one factorisation and no inverse. The descent over levels
is CDQuant's (Nair and Suggala 2024).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["DAMPING", "LEAST_GAIN", "MOST_ROUNDS", "Grid", "fed_back", "settled"]

DAMPING = 0.01
"""Share of the mean of G's diagonal that is added to all of it, as in GPTQ's public code."""

BLOCK = 64
"""Weights between two updates of all that are left."""

LEAST_GAIN = 1e-6
"""A move must lower an output's error by this share of it; what is below is rounding of float32."""

MOST_ROUNDS = 4
"""Descents, each from v computed anew: the last of many moves are decided on a v with their rounding errors."""


@dataclass(frozen=True)
class Grid:
    """The levels of weights `[O, K]`: value = (level - zero_point) * scale, level from low to high.

    scale, zero_point: `[O, K]`, or shapes that broadcast to it.
    """

    scale: Tensor
    zero_point: Tensor
    low: int
    high: int

    def columns(self, places: Tensor | slice) -> Grid:
        """Of some of the K weights; scale and zero_point must be `[O, K]`."""
        return Grid(self.scale[:, places], self.zero_point[:, places], self.low, self.high)

    def nearest(self, values: Tensor) -> Tensor:
        """The values on the grid that are nearest."""
        levels = torch.round(values / self.scale).add_(self.zero_point).clamp_(self.low, self.high)
        return levels.sub_(self.zero_point).mul_(self.scale)


def fed_back(gram: Tensor, weight: Tensor, grid: Grid, slope: Tensor | None = None) -> Tensor:
    """Every output's weights on the grid, `[O, K]`.

    gram: `[groups, K, K]`. weight: full precision. slope: r of every output, `[O, K]`, if there is one.
    """
    outputs = len(weight) // len(gram)
    found = torch.empty_like(weight)
    for number, matrix in enumerate(gram):
        rows = slice(number * outputs, (number + 1) * outputs)
        order = torch.argsort(matrix.diagonal())
        own = Grid(grid.scale[rows], grid.zero_point[rows], grid.low, grid.high).columns(order)
        given = None if slope is None else slope[rows][:, order]
        found[rows, order] = _of_group(matrix[order][:, order], weight[rows][:, order], own, given)
    return found


def _of_group(gram: Tensor, weight: Tensor, grid: Grid, slope: Tensor | None) -> Tensor:
    wide = gram.to(torch.float64 if gram.device.type != "mps" else gram.dtype)
    damping = DAMPING * wide.diagonal().mean()
    if not bool(damping > 0):
        return grid.nearest(weight)  # no input was other than 0
    wide = wide + damping * torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
    root = torch.linalg.cholesky(wide, upper=True)
    centre = weight
    if slope is not None:
        centre = weight - torch.cholesky_solve(slope.mT.to(wide), root, upper=True).mT.to(weight)
    unit = (root / root.diagonal()[:, None]).to(weight)
    error = torch.zeros_like(weight)
    found = torch.empty_like(weight)
    owed = torch.zeros_like(weight)
    for last in range(len(gram), 0, -BLOCK):
        first = max(0, last - BLOCK)
        for i in range(last - 1, first - 1, -1):
            here = owed[:, i] + (error[:, i + 1 : last] @ unit[i, i + 1 : last])
            column = grid.columns(slice(i, i + 1))
            found[:, i] = column.nearest((centre[:, i] - here)[:, None])[:, 0]
            error[:, i] = found[:, i] - centre[:, i]
        owed[:, :first] += error[:, first:last] @ unit[:first, first:last].mT
    return found


def settled(gram: Tensor, weight: Tensor, now: Tensor, grid: Grid, slope: Tensor | None = None) -> Tensor:
    """`now` after moves of single weights to their best level, until no move lowers an output's loss, `[O, K]`.

    Arguments as in `fed_back`. No output's loss is above that of `now`.
    """
    outputs = len(weight) // len(gram)
    groups = torch.arange(len(gram), device=gram.device).repeat_interleave(outputs)
    diagonal = gram.diagonal(dim1=1, dim2=2).clamp(min=torch.finfo(gram.dtype).tiny)[groups]
    found = now.clone()
    best = _losses(gram, found - weight, slope)
    for _ in range(MOST_ROUNDS):
        trial = found.clone()
        error = trial - weight
        v = torch.bmm(error.reshape(len(gram), outputs, -1), gram).reshape(error.shape)
        quadratic = (v * error).sum(1)  # what a share of is worth a move
        if slope is not None:
            v += slope
        active = torch.arange(len(now), device=now.device)
        for _ in range(2 * now.shape[1]):
            own = Grid(grid.scale[active], grid.zero_point[active], grid.low, grid.high)
            here, squares = trial[active], diagonal[active]
            step = own.nearest(here - v[active] / squares) - here
            gain, place = (step * (2 * v[active] + step * squares)).min(1)
            moves = gain < -LEAST_GAIN * quadratic[active].clamp(min=0)
            active, place, gain = active[moves], place[moves], gain[moves]
            if not len(active):
                break
            taken = step[moves].gather(1, place[:, None])[:, 0]
            quadratic[active] += gain
            v[active] += taken[:, None] * gram[groups[active], place]
            trial[active, place] += taken
        trial = grid.nearest(trial)
        losses = _losses(gram, trial - weight, slope)
        better = losses < best
        if not bool(better.any()):
            break
        found[better], best[better] = trial[better], losses[better]
    return found


def _losses(gram: Tensor, error: Tensor, slope: Tensor | None) -> Tensor:
    parts = error.reshape(len(gram), -1, error.shape[1])
    own = (torch.bmm(parts, gram) * parts).sum(2).flatten()
    return own if slope is None else own + 2 * (error * slope).sum(1)
