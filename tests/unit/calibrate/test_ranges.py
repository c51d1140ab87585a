"""Searched ranges of activations, of which an observer keeps a random part."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stepquant.calibrate import ranges
from stepquant.calibrate.ranges import Observer, fit_range
from stepquant.calibrate.stages import LEAST_IN_ROW, FitInputRanges
from stepquant.model.clock import StepClock
from stepquant.numerics.affine import fake_quantize
from stepquant.numerics.spec import QuantSpec

ONE_ROW = torch.zeros(1, dtype=torch.long)


def heavy_tailed(values: int = 800_000) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(6, values, generator=generator)
    return normal[0] / normal[1:].square().mean(0).sqrt()  # Student's t of 5 degrees of freedom


def error(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> float:
    found = fake_quantize(x.reshape(1, -1), ranges.QParams(scale.reshape(1, 1), zero_point.reshape(1, 1)), spec)
    return float((x - found[0]).abs().pow(ranges.SHRINK_NORM).mean())


@pytest.mark.parametrize("keep", [1024, 4096])
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_a_range_searched_on_a_part_is_as_good_as_one_searched_on_all(bits: int, keep: int) -> None:
    """The extremes are those of all values, and must not count as often as one in a thousand."""
    x, spec = heavy_tailed(), QuantSpec(bits)
    observer = Observer(StepClock(torch.tensor([])), torch.Generator().manual_seed(1), keep)
    observer(x.reshape(16, -1))
    found = observer.params(spec, ONE_ROW, "mse", "x")
    whole = fit_range(x.reshape(1, -1), spec, "mse")
    assert error(x, found.scale, found.zero_point, spec) < 1.1 * error(x, whole.scale, whole.zero_point, spec)
    covering = observer.params(spec, ONE_ROW, "minmax", "x")
    exact = fit_range(x.reshape(1, -1), spec, "minmax")
    assert float(covering.scale) == pytest.approx(float(exact.scale))


def test_every_step_of_a_mixed_batch_keeps_enough_values() -> None:
    clock = StepClock(torch.arange(1, 32) * 10.0)
    observer = Observer(clock, torch.Generator().manual_seed(1))
    clock.set(torch.arange(32) * 10.0 + 5)
    observer(torch.randn(32, 5000))
    assert {len(part) for parts in observer.seen.values() for part in parts} == {ranges.LEAST_KEPT}
    assert len(observer.seen) == 32


def test_long_schedules_have_samples_behind_every_row() -> None:
    assert FitInputRanges(windows="step").observed(10_000, 20) == 256
    assert FitInputRanges(windows="step").observed(10_000, 250) == 250 * LEAST_IN_ROW
    assert FitInputRanges(windows="step").observed(500, 250) == 500
    assert FitInputRanges().observed(10_000, 250) == 256
