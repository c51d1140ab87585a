"""Searched ranges of activations, of which an observer keeps a random part."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from stepquant.calibrate import ranges
from stepquant.calibrate.ranges import Observer, fit_range
from stepquant.calibrate.stages import LEAST_IN_ROW, FitInputRanges
from stepquant.model.clock import StepClock
from stepquant.model.layer import QuantizedLayer, geometry_of
from stepquant.numerics.spec import QuantSpec

ONE_ROW = torch.zeros(1, dtype=torch.long)


def heavy_tailed(values: int = 800_000) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(6, values, generator=generator)
    return normal[0] / normal[1:].square().mean(0).sqrt()  # Student's t of 5 degrees of freedom


@pytest.mark.parametrize("keep", [1024, 4096])
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_a_range_searched_on_a_part_is_as_good_as_one_searched_on_all(bits: int, keep: int) -> None:
    """The extremes are those of all values, and must not count as often as one in a thousand."""
    x, spec = heavy_tailed(), QuantSpec(bits)
    observer = Observer(StepClock(torch.tensor([])), torch.Generator().manual_seed(1), keep)
    observer(x.reshape(16, -1))
    found = observer.params(spec, ONE_ROW, "mse", "x")
    ends = torch.stack([x.min(), x.max()])[None]
    whole = fit_range(x.reshape(1, -1), spec, "mse", ends)
    assert float(found.scale) == pytest.approx(float(whole.scale), rel=0.05)
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


def test_clipped_values_count_more_than_rounded_ones() -> None:
    x, spec = heavy_tailed(20_000).reshape(1, -1), QuantSpec(4)
    ends = torch.stack([x.min(), x.max()])[None]
    assert 1.2 * float(fit_range(x, spec, "mse").scale) < float(fit_range(x, spec, "mse", ends).scale)


def test_values_count_as_the_weights_that_they_meet() -> None:
    """A channel of large values and no weight may be clipped; one whose weights are large may not."""
    x = torch.randn(64, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    x[:, 1] *= 50
    scales = []
    for weight in ([1.0, 0.0], [1.0, 1.0]):
        conv = nn.Conv2d(2, 4, 1)
        conv.weight.data[:] = torch.tensor(weight)[None, :, None, None]
        layer = QuantizedLayer(geometry_of(conv), conv.weight.data, None)
        observer = Observer(StepClock(torch.tensor([])), torch.Generator().manual_seed(1))
        observer.weigh(layer, "input_quantizer")
        observer(x)
        scales.append(float(observer.params(QuantSpec(4), ONE_ROW, "mse", "x").scale))
    assert scales[0] * 15 < 15
    assert scales[1] * 15 > 150


def test_values_that_are_not_finite_do_not_stop_the_observer() -> None:
    """What to do about them is for those who look at the ranges."""
    x = torch.full((4, 5000), float("nan"))
    x[:, :100] = 1.0
    observer = Observer(StepClock(torch.tensor([])), torch.Generator().manual_seed(1))
    observer(x)
    assert list(observer.seen) == [0]
