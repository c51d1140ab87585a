"""Shared branches against plain autograd in float64, and hardening without loss."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from stepquant.calibrate.timestep_groups import (
    ChannelBuckets,
    ChannelObserver,
    Shares,
    TimestepGroups,
    buckets,
    check_harden,
    entropy_of,
    mixture,
    spread,
)
from stepquant.errors import SpecError
from stepquant.model.clock import StepClock
from stepquant.numerics.affine import choose_qparams, fake_quantize
from stepquant.numerics.spec import QuantSpec

SPECS = [QuantSpec(4), QuantSpec(8), QuantSpec(4, symmetric=True), QuantSpec(3, nonnegative=True)]
CLOCK_EDGES = torch.tensor([250.0, 500.0, 750.0])


def clock_at(timestep: Any) -> StepClock:
    clock = StepClock(CLOCK_EDGES)
    clock.set(timestep)
    return clock


def rounded(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


def plain_mixture(x: Tensor, shares: Tensor, scale: Tensor, low: Tensor, high: Tensor, axis: int | None) -> Tensor:
    """The formula with one loop over samples and branches, every branch stored by autograd."""
    parts = []
    for number, part in enumerate(x.chunk(len(shares))):
        total = torch.zeros_like(part)
        row = min(number, len(scale) - 1)
        for group in range(shares.shape[1]):
            levels = rounded(part / scale[row, group])
            levels = torch.where(levels < low[row, group], low[row, group], levels)
            levels = torch.where(levels > high[row, group], high[row, group], levels)
            share = shares[number, group]
            if axis is not None:
                share = share.reshape([-1 if place == axis % x.ndim else 1 for place in range(x.ndim)])
            total = total + share * levels * scale[row, group]
        parts.append(total)
    return torch.cat(parts)


@pytest.mark.parametrize(
    ("shape", "samples", "axis"),
    [
        ((3, 5), 1, None),
        ((4, 2, 3, 3), 4, None),
        ((6, 5, 2), 3, None),  # two heads folded into the batch of each sample
        ((4, 5, 3, 2), 1, -3),
        ((4, 5, 3, 2), 4, -3),
        ((2, 3, 5), 2, -1),
        ((4, 5, 3), 2, -2),
    ],
)
@pytest.mark.parametrize("shared_branches", [True, False])
def test_the_mixture_and_its_gradients_are_those_of_autograd(
    shape: tuple[int, ...], samples: int, axis: int | None, shared_branches: bool
) -> None:
    generator = torch.Generator().manual_seed(1)
    groups, rows = 3, 1 if shared_branches else samples
    channels = 1 if axis is None else shape[axis]

    def leaf(value: Tensor) -> Tensor:
        return value.double().requires_grad_(True)

    x = leaf(3 * torch.randn(shape, generator=generator))
    shares = leaf(torch.rand(samples, groups, channels, generator=generator))
    scale = leaf(0.2 + torch.rand(rows, groups, generator=generator))
    low = leaf(-torch.randint(1, 4, (rows, groups), generator=generator))
    high = leaf(torch.randint(1, 5, (rows, groups), generator=generator))
    variables = (x, shares, scale, low, high)
    weight = torch.randn(shape, generator=generator).double()

    found = mixture(*variables, channel_axis=axis)
    expected = plain_mixture(*variables, axis)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for one, other in zip(
        torch.autograd.grad((found * weight).sum(), variables),
        torch.autograd.grad((expected * weight).sum(), variables),
        strict=True,
    ):
        assert bool(other.any())  # values on both sides of every bound
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_the_mixture_keeps_its_input_and_no_branch() -> None:
    kept: list[Tensor] = []
    x = torch.randn(2, 1000, requires_grad=True)
    groups = 8
    shares = torch.full((1, groups, 1), 1 / groups, requires_grad=True)
    scale, low, high = torch.ones(1, groups), torch.full((1, groups), -7.0), torch.full((1, groups), 8.0)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        mixture(x, shares, scale, low, high)
    assert sum(tensor.numel() for tensor in kept) == x.numel() + 4 * groups


def test_half_precision_is_computed_in_float32() -> None:
    x = torch.tensor([0.3, 2.7], dtype=torch.float16)
    found = mixture(x, torch.ones(1, 1, 1), torch.full((1, 1), 0.1), torch.zeros(1, 1), torch.full((1, 1), 15.0))
    assert found.dtype == torch.float16
    assert torch.equal(found, torch.tensor([0.3, 1.5]).half())


def groups_of(spec: QuantSpec, timestep: Any = 0, groups: int = 3) -> TimestepGroups:
    low, high = torch.tensor([-0.5, -1.0, -1.5, -3.0]), torch.tensor([1.0, 2.0, 4.0, 8.0])
    return TimestepGroups(spec, clock_at(timestep), low, high, groups)


def moved(module: TimestepGroups, seed: int = 0) -> TimestepGroups:
    """After a few updates in random directions, as Adam would make them."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(5):
        with torch.no_grad():
            for parameter, size in ((module.scale, 0.02), (module.low, 0.8), (module.high, 0.8)):
                parameter += size * torch.randn(parameter.shape, generator=generator)
            for row in module.shares.logits:
                row += torch.randn(row.shape, generator=generator)
        module.project_()
    return module


def make_certain_(shares: Shares, winners: list[int]) -> None:
    """Give one branch of each bin all of the share."""
    for row, winner in zip(shares.logits, winners, strict=True):
        row.data.fill_(-200.0)
        row.data[winner] = 200.0


@pytest.mark.parametrize("spec", SPECS)
def test_a_certain_search_hardens_to_the_same_bits(spec: QuantSpec) -> None:
    module = moved(groups_of(spec))
    make_certain_(module.shares, [2, 0, 0, 2])
    hard = module.hardened("argmax")
    assert hard.rows == 2  # branch 1 is not used
    assert bool((hard.scale[1:] >= hard.scale[:-1]).all())
    assert torch.equal(hard.zero_point, hard.zero_point.round())
    x = 6 * torch.randn(4, 50)
    for timestep in (0, 300, 600, 900, torch.tensor([900, 0, 300, 600])):
        module.clock.set(timestep)
        assert torch.equal(module(x), hard(x))
    # The learnt range is the saved one: its ends are the lowest and the highest level.
    low, high = module.bounds()
    for number, winner in enumerate([2, 0, 0, 2]):
        row = hard.row_of_bin[number]
        ends = (torch.tensor([spec.qmin, spec.qmax]) - hard.zero_point[row]) * hard.scale[row]
        assert torch.equal(ends, torch.stack([low[winner], high[winner]]) * module.scale[winner])


@pytest.mark.parametrize("spec", SPECS)
def test_a_projected_branch_has_as_many_levels_as_its_bits(spec: QuantSpec) -> None:
    module = moved(groups_of(spec), seed=3)
    low, high = module.bounds()
    assert torch.equal(high - low, torch.full_like(low, spec.qmax - spec.qmin))
    assert bool((low <= 0).all())
    assert bool((high >= 0).all())
    assert bool((spec.qmin - low >= spec.qmin).all())
    assert bool((spec.qmin - low <= spec.qmax).all())


def test_projecting_keeps_the_learnt_range_and_refines_its_levels() -> None:
    module = groups_of(QuantSpec(8), groups=1)
    with torch.no_grad():
        module.scale.fill_(0.1)
        module.low.fill_(-10.2)  # 61 levels only
        module.high.fill_(50.8)
    module.project_()
    torch.testing.assert_close(module.scale.data, torch.tensor([6.1 / 255]))
    torch.testing.assert_close((module.low * module.scale).data, torch.tensor([-1.02]))
    torch.testing.assert_close((module.high * module.scale).data, torch.tensor([5.08]))
    # A bound that crosses 0 stays there, so that 0 is a level, and a scale cannot vanish.
    start = module.least.clone()
    with torch.no_grad():
        module.low.fill_(5.0)
        module.scale.fill_(1e-9)
    module.project_()
    assert module.low.tolist() == [0.0]
    assert torch.equal(module.scale.data, start)


def test_gradients_pass_through_rounded_bounds() -> None:
    module = groups_of(QuantSpec(2), groups=1)
    with torch.no_grad():
        module.scale.fill_(0.5)
        module.low.fill_(-1.3)
        module.high.fill_(1.7)
    x = torch.tensor([-9.0, -8.0, 0.6, 7.0], requires_grad=True)
    found = module(x)
    assert found.tolist() == [-0.5, -0.5, 0.5, 1.0]  # levels -1 .. 2
    found.sum().backward()
    assert x.grad.tolist() == [0, 0, 1, 0]
    assert module.low.grad.tolist() == [1.0]  # two values below, each 0.5
    assert module.high.grad.tolist() == [0.5]
    torch.testing.assert_close(module.scale.grad, torch.tensor([-1 - 1 + (1 - 1.2) + 2.0]))


@pytest.mark.parametrize("kind", ["groups", "buckets"])
def test_a_batch_of_mixed_timesteps_equals_one_by_one(kind: str) -> None:
    module: Any = moved(groups_of(QuantSpec(4)))
    if kind == "buckets":
        module = buckets_of(QuantSpec(4))
    timesteps, x = torch.tensor([900, 0, 300, 0]), torch.randn(4, 5, 2, 2)
    module.clock.set(timesteps)
    together = module(x)
    for number, timestep in enumerate(timesteps):
        module.clock.set(timestep)
        assert torch.equal(module(x[number : number + 1])[0], together[number])


def test_only_the_shares_of_the_present_bins_get_a_gradient() -> None:
    module = groups_of(QuantSpec(4), timestep=torch.tensor([900, 300]))
    module(torch.randn(2, 10)).square().sum().backward()
    assert [row.grad is not None for row in module.shares.logits] == [False, True, False, True]


def test_averaging_takes_the_mean_of_the_range_ends() -> None:
    module = moved(groups_of(QuantSpec(4)))
    hard = module.hardened("average")
    low, high = module.bounds()
    assert hard.row_of_bin.tolist() == [0, 1, 2, 3]
    for number, row in enumerate(module.shares.logits):
        share = row[:, 0].exp() / row[:, 0].exp().sum()
        ends = [float((share * module.scale * end).sum().detach()) for end in (low, high)]
        assert float(hard.scale[number]) == pytest.approx((ends[1] - ends[0]) / 15, rel=1e-5)
        assert float(hard.zero_point[number]) == pytest.approx(-ends[0] / float(hard.scale[number]), abs=0.5001)


def test_spread_takes_quantiles_of_whole_ranges() -> None:
    low, high = torch.tensor([-4.0, 0.0, -1.0, -2.0, -0.5]), torch.tensor([1.0, 0.5, 2.0, 3.0, 8.0])
    # Ordered by the larger end: (0, 0.5), (-1, 2), (-2, 3), (-4, 1), (-0.5, 8).
    found = spread(low, high, 3)
    assert found[0].tolist() == [0, -2, -0.5]
    assert found[1].tolist() == [0.5, 3, 8]
    assert spread(low, high, 9)[1].tolist() == [0.5, 1.25, 2, 2.5, 3, 2, 1, 4.5, 8]
    assert spread(low[:1], high[:1], 4)[0].tolist() == [-4.0] * 4
    assert spread(low, high, 1)[1].tolist() == [0.5]
    assert len(set(groups_of(QuantSpec(8), groups=8).scale.tolist())) == 8


def test_a_prior_favours_the_nearest_range_of_each_bin_and_channel() -> None:
    low, high = torch.tensor([-0.5, -1.0, -1.5, -3.0]), torch.tensor([1.0, 2.0, 4.0, 8.0])
    groups = TimestepGroups(QuantSpec(8), clock_at(0), low, high, 4, prior=2.0)
    # Branches are ordered by width, as these bins happen to be.
    assert torch.equal(torch.stack([row.data[:, 0] for row in groups.shares.logits]), 2 * torch.eye(4))
    channels = ChannelBuckets(QuantSpec(8), clock_at(0), *RANGES, 3, channel_axis=-3, prior=2.0)
    # Buckets (-0.4, 1), (-1, 4), (-3, 6) and channels (-0.1, 0.2), (-1, 1), (-0.4, 5.9), (-3, 6), (0, 0).
    assert channels.shares.logits[0].argmax(0).tolist() == [0, 0, 1, 2, 0]
    assert channels.shares.logits[0].sum(0).tolist() == [2.0] * 5


def test_entropy_of_equal_and_of_certain_shares() -> None:
    shares = Shares(3, 8, 2)
    torch.testing.assert_close(shares.entropy(), torch.full((3,), math.log(8)))
    shares.logits[1].data[4] = 300.0
    torch.testing.assert_close(shares.entropy(), torch.tensor([math.log(8), 0.0, math.log(8)]))
    torch.testing.assert_close(shares.penalty([0, 1, 1]), torch.tensor(math.log(8) / 2))
    share = torch.tensor([0.2, 0.3, 0.5])
    torch.testing.assert_close(entropy_of(share.log() + 7), -(share * share.log()).sum())


def test_the_penalty_is_the_papers_sum_or_the_public_codes_mean() -> None:
    uniform = math.log(3)
    assert float(groups_of(QuantSpec(4)).penalty([0]).detach()) == pytest.approx(uniform)
    assert float(buckets_of(QuantSpec(4)).penalty([0]).detach()) == pytest.approx(uniform / 3)


def test_descending_the_entropy_makes_shares_certain() -> None:
    shares = Shares(1, 4)
    shares.logits[0].data[:, 0] = torch.tensor([0.0, 0.1, 0.0, -0.1])
    optimizer = torch.optim.Adam(shares.parameters(), lr=0.2)
    for _ in range(150):
        optimizer.zero_grad()
        shares.penalty([0]).backward()
        optimizer.step()
    assert float(shares.table()[0, 1, 0]) > 0.95


RANGES = (
    torch.tensor([[-0.1, -1.0, -0.4, -3.0, 0.0], [-1.0, -1.0, -1.0, -1.0, -1.0]]).repeat(2, 1),
    torch.tensor([[0.2, 1.0, 5.9, 6.0, 0.0], [0.5, 0.5, 0.5, 0.5, 0.5]]).repeat(2, 1),
)


def buckets_of(spec: QuantSpec, groups: int = 3) -> ChannelBuckets:
    module = ChannelBuckets(spec, clock_at(0), *RANGES, groups, channel_axis=-3)
    generator = torch.Generator().manual_seed(5)
    for row in module.shares.logits:
        row.data.copy_(torch.randn(row.shape, generator=generator))
    module.shares.logits[0].data.zero_()
    return module


def test_buckets_by_hand() -> None:
    low, high = buckets(*RANGES, 3)
    # Upper ends 0, 0.2, 1, 5.9, 6 in buckets of width 2; the middle one is empty and takes its border.
    torch.testing.assert_close(high[0], torch.tensor([1.0, 4.0, 6.0]))
    # Lower ends 0, -0.1, -0.4, -1 | (none) | -3 in buckets of width 1: -1 is in the second one.
    torch.testing.assert_close(low[0], torch.tensor([-0.4, -1.0, -3.0]))
    torch.testing.assert_close(high[1], torch.tensor([0.5, 0.5, 0.5]))
    torch.testing.assert_close(low[1], torch.tensor([-1.0, -1.0, -1.0]))


def test_buckets_cover_every_channel() -> None:
    low, high = -torch.rand(6, 40), torch.rand(6, 40)
    least, most = buckets(low, high, 8)
    assert torch.equal(least[:, -1], low.amin(1))
    assert torch.equal(most[:, -1], high.amax(1))
    assert bool((most.diff() >= 0).all())
    assert bool((least.diff() <= 0).all())


@pytest.mark.parametrize("spec", SPECS)
def test_channel_buckets_share_quantizers_channel_by_channel(spec: QuantSpec) -> None:
    module = buckets_of(spec)
    module.clock.set(300)
    x = 4 * torch.randn(2, 5, 3, 3)
    expected = torch.zeros_like(x)
    shares = module.shares.logits[1].softmax(0)
    for group in range(3):
        params = choose_qparams(module.low[1, group], module.high[1, group], spec)
        expected += shares[group].reshape(1, 5, 1, 1) * fake_quantize(x, params, spec)
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize("spec", SPECS)
def test_channel_buckets_harden_to_a_row_for_each_timestep_and_channel(spec: QuantSpec) -> None:
    module = buckets_of(spec)
    hard = module.hardened("average")
    assert hard.scale.shape == hard.zero_point.shape == (4, 5)
    assert hard.spec.granularity == "channel"
    x = 4 * torch.randn(2, 5, 3, 3)
    for number, timestep in enumerate((0, 300, 600, 900)):
        hard.clock.set(timestep)
        found, shares = hard(x), module.shares.logits[number].softmax(0)
        for channel in range(5):
            ends = [(shares[:, channel] * end[number]).sum() for end in (module.low, module.high)]
            expected = fake_quantize(x[:, channel], choose_qparams(ends[0], ends[1], spec), spec)
            torch.testing.assert_close(found[:, channel], expected)
    for row in module.shares.logits:
        row.data.mul_(1000)
    certain = module.hardened("argmax")
    for timestep in (300, torch.tensor([900, 600])):  # bin 0 is undecided
        module.clock.set(timestep)
        torch.testing.assert_close(certain(x), module(x))


def test_the_channel_observer_keeps_the_range_of_each_bin_and_channel() -> None:
    clock = StepClock(torch.tensor([500.0]))
    observer = ChannelObserver(clock, -3)
    x = torch.randn(4, 3, 2, 2)
    clock.set(torch.tensor([0, 900, 900, 0]))
    assert observer(x) is x
    clock.set(100)
    observer(2 * x)
    low, high = observer.ranges()
    first = torch.cat([x[[0, 3]], 2 * x])
    assert torch.equal(low[0], first.amin((0, 2, 3)))
    assert torch.equal(high[0], first.amax((0, 2, 3)))
    assert torch.equal(high[1], x[1:3].amax((0, 2, 3)))


def test_harden_is_checked() -> None:
    with pytest.raises(SpecError, match="argmax or average, found 'argmin'"):
        check_harden("argmin")
