"""Rounding with feedback is GPTQ, and the descent over levels ends where no move of one weight helps."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from stepquant.calibrate.feedback import BLOCK, DAMPING, Grid, fed_back, settled


def problem(outputs: int, inputs: int, groups: int = 1) -> tuple[Tensor, Tensor, Grid]:
    """Correlated inputs whose sizes differ."""
    mixing = torch.randn(groups, inputs, inputs, dtype=torch.float64) + torch.eye(inputs, dtype=torch.float64)
    u = mixing @ torch.randn(groups, inputs, 5 * inputs, dtype=torch.float64)
    weight = torch.randn(outputs * groups, inputs, dtype=torch.float64)
    scale = torch.full_like(weight, 0.4)
    return u @ u.mT, weight, Grid(scale, torch.full_like(weight, 8), 0, 15)


def losses(gram: Tensor, error: Tensor) -> Tensor:
    parts = error.reshape(len(gram), -1, error.shape[1])
    return (parts @ gram * parts).sum(2).flatten()


def by_the_inverse(gram: Tensor, weight: Tensor, grid: Grid) -> Tensor:
    """GPTQ as its paper has it: after each weight, the others take over its error by the inverse of what is left."""
    size = len(gram)
    wide = gram + DAMPING * gram.diagonal().mean() * torch.eye(size, dtype=gram.dtype)
    left, now, found = list(torch.argsort(gram.diagonal(), descending=True)), weight.clone(), weight.clone()
    while left:
        here = torch.stack(left)
        inverse = torch.linalg.inv(wide[here][:, here])
        place = slice(int(left[0]), int(left[0]) + 1)
        found[:, place] = grid.columns(place).nearest(now[:, place])
        error = (now[:, place] - found[:, place]) / inverse[0, 0]
        now[:, here] -= error * inverse[0]
        left.pop(0)
    return found


@pytest.mark.parametrize("inputs", [7, BLOCK + 5])
def test_feedback_is_gptq(inputs: int) -> None:
    gram, weight, grid = problem(4, inputs)
    found = fed_back(gram, weight, grid)
    torch.testing.assert_close(found, by_the_inverse(gram[0], weight, grid), rtol=0, atol=1e-9)
    assert float(losses(gram, found - weight).sum()) < 0.8 * float(losses(gram, grid.nearest(weight) - weight).sum())


def test_groups_are_rounded_on_their_own() -> None:
    gram, weight, grid = problem(3, 9, groups=2)
    together = fed_back(gram, weight, grid), settled(gram, weight, grid.nearest(weight), grid)
    for group in range(2):
        rows = slice(3 * group, 3 * group + 3)
        own = Grid(grid.scale[rows], grid.zero_point[rows], grid.low, grid.high)
        one, near = gram[group : group + 1], own.nearest(weight[rows])
        assert torch.equal(together[0][rows], fed_back(one, weight[rows], own))
        assert torch.equal(together[1][rows], settled(one, weight[rows], near, own))


def test_feedback_makes_up_for_what_is_beside() -> None:
    """A slope moves the least loss away from the full-precision weight, and the rounding follows."""
    gram, weight, grid = problem(4, 7)
    wide = gram + DAMPING * gram[0].diagonal().mean() * torch.eye(7, dtype=gram.dtype)
    away = torch.randn(4, 7, dtype=torch.float64)
    found = fed_back(gram, weight, grid, away @ wide[0])
    torch.testing.assert_close(found, fed_back(gram, weight - away, grid), rtol=0, atol=1e-9)


def test_no_single_move_is_left() -> None:
    gram, weight, grid = problem(3, 6)
    slope = torch.randn(3, 6, dtype=torch.float64)
    near = grid.nearest(weight)

    def loss(values: Tensor) -> Tensor:
        error = values - weight
        return losses(gram, error) + 2 * (error * slope).sum(1)

    found = settled(gram, weight, near, grid, slope)
    assert bool((loss(found) <= loss(near)).all())
    assert float(loss(found).sum()) < float(loss(near).sum())
    for place, step in itertools.product(range(6), (-0.8, -0.4, 0.4, 0.8)):
        moved = found.clone()
        moved[:, place] += step
        moved = grid.nearest(moved)
        assert bool((loss(moved) >= loss(found) - 1e-4).all())


def test_inputs_that_are_all_zero_leave_the_nearest() -> None:
    _, weight, grid = problem(3, 6)
    gram = torch.zeros(1, 6, 6, dtype=torch.float64)
    assert torch.equal(fed_back(gram, weight, grid), grid.nearest(weight))
    assert torch.equal(settled(gram, weight, grid.nearest(weight), grid), grid.nearest(weight))


def test_values_stay_within_the_levels() -> None:
    gram, weight, grid = problem(3, 6)
    narrow = Grid(grid.scale, grid.zero_point, 7, 9)
    for found in (fed_back(gram, weight, narrow), settled(gram, weight, narrow.nearest(weight), narrow)):
        levels = found / narrow.scale + narrow.zero_point
        torch.testing.assert_close(levels, levels.round())
        assert float(levels.min()) >= 7 - 1e-9
        assert float(levels.max()) <= 9 + 1e-9
