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
from stepquant.numerics.affine import QParams, choose_qparams, dequantize, grouped, quantize, range_of
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


def one_by_one(x: Tensor, spec: QuantSpec, ends: Tensor | None, counts: Tensor | None) -> QParams:
    """`fit_range` as it reads: every candidate after the other, the first of equal ones kept."""
    low, high = range_of(x, spec)
    factors = [1 - 0.01 * i for i in range(80)]
    if ends is not None:
        lowest, highest = range_of(ends, spec)
        low, high = torch.minimum(low, lowest), torch.maximum(high, highest)
        factors += [factors[-1] * 0.9 ** (i + 1) for i in range(20)]
    view, best, least = grouped(x, spec), None, torch.tensor(torch.inf)
    for factor in factors:
        params = choose_qparams(low * factor, high * factor, spec)
        found = (view - dequantize(quantize(view, params, spec), params)).abs().pow(2.4)
        if ends is not None:
            below, above = ((end - params.zero_point) * params.scale for end in (spec.qmin - 0.5, spec.qmax + 0.5))
            found = torch.where((view < below) | (view > above), ranges.CLIPPED * found, found)
        error = found.mean(-1, keepdim=True) if counts is None else (found * counts).sum(-1, keepdim=True)
        if best is None:
            best = params
        better = error < least
        best = QParams(
            torch.where(better, params.scale, best.scale), torch.where(better, params.zero_point, best.zero_point)
        )
        least = torch.where(better, error, least)
    assert best is not None
    return best


@pytest.mark.parametrize("at_once", [1, 2**12, 2**30])
@pytest.mark.parametrize(
    ("shape", "spec", "counted"),
    [
        ((3000,), QuantSpec(4, symmetric=False), True),
        ((3000,), QuantSpec(8), False),
        ((6, 5, 3, 3), QuantSpec(3, symmetric=True, granularity="channel"), False),
        ((4, 64), QuantSpec(4, symmetric=False, granularity="group", group_size=16), False),
    ],
)
def test_candidates_at_once_are_those_one_by_one(
    shape: tuple[int, ...], spec: QuantSpec, counted: bool, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) ** 3
    x.view(-1)[:40] = 0  # a tie between groups that hold nothing else
    counts = torch.rand(shape, generator=generator) * 100 if counted else None
    ends = torch.tensor([float(x.min()) * 2, float(x.max()) * 1.5]) if counted else None
    found, expected = fit_range(x, spec, "mse", ends, counts), one_by_one(x, spec, ends, counts)
    assert torch.equal(found.scale, expected.scale)
    assert torch.equal(found.zero_point, expected.zero_point)
