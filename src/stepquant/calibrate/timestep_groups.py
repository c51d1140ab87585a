"""Activation quantizers that choose, for every timestep, one of several parameter sets.

Source: Wang et al. 2023 (APQ-DM, arXiv:2305.18723). While searching, a layer owns G branches and, at timestep t, shares

    x_hat = sum_g sigma^t_g Q_g(x),   sigma^t = softmax(alpha^t)                      alpha [N, G] or [N, G, C]
    Q_g(x) = s_g clamp(round(x / s_g), low_g, high_g)                                 s, low, high [G]

and minimises || target - prediction ||^2 + lambda * sum_g -sigma_g log sigma_g, which pushes the shares towards one
branch. Afterwards every timestep keeps one parameter set in an ordinary `InputQuantizer`.

Two kinds of branches stand in a quantizer's place:

- `TimestepGroups` (the paper): G triples for all timesteps, per tensor and learnt with the shares.
- `ChannelBuckets` (the public code): at each timestep G ranges that come from buckets of the channels' ranges; shares
  `[N, G, C]` are learnt for every channel.

Gradients are straight-through: round counts as identity, for x / s and for the bounds.

    dQ/dx = 1,  dQ/ds = round(x/s) - x/s                   inside the bounds
    dQ/dx = 0,  dQ/ds = low or high,  dQ/dlow or high = s  outside
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stepquant.errors import SpecError, nearest
from stepquant.model.clock import StepClock
from stepquant.model.quantizer import InputQuantizer
from stepquant.numerics.affine import QParams, choose_qparams
from stepquant.numerics.spec import QuantSpec

__all__ = [
    "ChannelBuckets",
    "ChannelObserver",
    "Harden",
    "Searching",
    "Shares",
    "TimestepGroups",
    "buckets",
    "check_harden",
    "entropy_of",
    "mixture",
    "spread",
    "straight_through",
]

Harden = Literal["argmax", "average"]


def check_harden(harden: str) -> None:
    """Raise SpecError for anything but argmax and average."""
    if harden not in ("argmax", "average"):
        raise SpecError(
            f"harden must be argmax or average, found {harden!r}.{nearest(str(harden), ('argmax', 'average'))}"
        )


def straight_through(value: Tensor, of: Tensor) -> Tensor:
    """`value` with the gradient of `of`, from which it differs by at most a half: then the sum below is exact."""
    return of + (value - of).detach()


def entropy_of(logits: Tensor, dim: int = 0) -> Tensor:
    """sum over `dim` of -sigma log sigma with sigma = softmax(logits), in nats; that axis is gone."""
    log_shares = logits.log_softmax(dim)
    return -(log_shares.exp() * log_shares).sum(dim)


def mixture(
    x: Tensor, shares: Tensor, scale: Tensor, low: Tensor, high: Tensor, *, channel_axis: int | None = None
) -> Tensor:
    """sum_g shares_g scale_g clamp(round(x / scale_g), low_g, high_g), in x's shape and dtype.

    shares: `[K, G, C]`, K = 1 or a divisor of x's first axis (each row holds for as many consecutive samples); C = 1
        without a channel axis.
    scale, low, high: `[1, G]` or `[K, G]`; bounds are whole numbers.
    Keeps x in memory and none of the G branches: they are added up in place and computed again for the gradient.
    """
    samples = shares.shape[0]
    view = x.reshape(samples, 1, 1, -1)
    if channel_axis is not None:
        axis = channel_axis % x.ndim
        behind = math.prod(x.shape[axis + 1 :])
        view = x.reshape(samples, -1, x.shape[axis], behind)
    wide = view.float() if x.dtype in (torch.float16, torch.bfloat16) else view
    apply: Any = _Mixture.apply
    result: Tensor = apply(wide, shares, scale, low, high)
    return result.reshape(x.shape).to(x.dtype)


class _Mixture(torch.autograd.Function):
    """x `[K, P, C, Q]`, shares `[K, G, C]`, the others `[1, G]` or `[K, G]`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shares: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
        ctx.save_for_backward(x, shares, scale, low, high)
        total = torch.zeros_like(x)
        for share, size, least, most in _branches(shares, scale, low, high):
            total.addcmul_(torch.div(x, size).round_().clamp_(least, most), size * share)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, shares, scale, low, high = ctx.saved_tensors
        grad_x, mask = torch.zeros_like(x), torch.empty_like(x)
        found: list[list[Tensor]] = []
        for share, size, least, most in _branches(shares, scale, low, high):
            position = x / size
            levels = position.round()
            bounded = levels.clamp(least, most)
            # Masks as numbers: products with bool tensors are slow on a CPU.
            inside = grad * torch.eq(bounded, levels, out=mask)
            grad_x.addcmul_(inside, share)
            # Per channel; the shares do not depend on the axes that are summed first.
            by_levels = (grad * bounded).sum((1, 3), keepdim=True)
            by_position = inside.mul_(position).sum((1, 3), keepdim=True)
            parts = [by_levels * size, share * (by_levels - by_position)]
            if ctx.needs_input_grad[3]:
                for outside, bound in ((torch.lt, least), (torch.gt, most)):
                    parts.append(share * size * (grad * outside(levels, bound, out=mask)).sum((1, 3), keepdim=True))
            found.append(parts)
        of_shares, *others = (torch.stack(parts, 1)[:, :, 0, :, 0] for parts in zip(*found, strict=True))
        of_scale, of_low, of_high = [
            (part.sum(2).sum_to_size(like.shape) if part is not None else None)
            for part, like in zip([*others, None, None], (scale, low, high), strict=False)
        ]
        return grad_x, of_shares, of_scale, of_low, of_high


def _branches(shares: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Share, scale and bounds of one branch after the other, as they stand beside `[K, P, C, Q]`."""
    columns = [shares[:, None, :, :, None].unbind(2)]
    columns += [values[:, :, None, None, None].unbind(1) for values in (scale, low, high)]
    return zip(*columns, strict=True)


class Shares(nn.Module):
    """alpha^t of one layer, and what follows from it.

    logits: N parameters `[G, C]`, all 0 at first; C = 1 if all channels choose together. One parameter for each bin, so
        that an optimizer leaves those alone that a mini-batch has not used.
    """

    def __init__(self, bins: int, groups: int, channels: int = 1) -> None:
        super().__init__()
        self.logits = nn.ParameterList(nn.Parameter(torch.zeros(groups, channels)) for _ in range(bins))

    def favour_(self, winner: Tensor, prior: float) -> None:
        """Start with logit `prior` for one branch of each bin (and channel), 0 for others. winner `[N]` or `[N, C]`."""
        with torch.no_grad():
            for row, chosen in zip(self.logits, winner, strict=True):
                row.zero_().scatter_(0, chosen.reshape(1, -1), prior)

    def at(self, bins: list[int]) -> Tensor:
        """sigma `[K, G, C]` of K samples; K = 1 if all are in the same bin."""
        distinct = sorted(set(bins))
        shares = torch.stack([self.logits[number] for number in distinct]).softmax(1)
        if len(distinct) == 1:
            return shares
        return shares[[distinct.index(number) for number in bins]]

    def table(self) -> Tensor:
        """sigma of all bins, `[N, G, C]`, without gradient."""
        return torch.stack([row.detach() for row in self.logits]).softmax(1)

    def entropy(self) -> Tensor:
        """H_t in nats, averaged over channels, `[N]`, without gradient; from 0 to log G."""
        return torch.stack([entropy_of(row.detach()).mean() for row in self.logits])

    def penalty(self, bins: list[int]) -> Tensor:
        """The same with gradient, averaged over the distinct bins: a scalar."""
        return torch.stack([entropy_of(self.logits[number]).mean() for number in sorted(set(bins))]).mean()


def spread(low: Tensor, high: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """G ranges that stand for the N observed ones: quantiles over timesteps, ordered by the larger absolute end.

    low, high `[N]` -> `[G]` each. Branch g has the range at quantile g / (G - 1), so the narrowest and the widest
    timestep have one; ranges between two timesteps are interpolated.
    """
    order = torch.maximum(low.abs(), high.abs()).argsort()
    place = (
        torch.linspace(0, len(order) - 1, groups, device=low.device)
        if groups > 1
        else torch.zeros(1, device=low.device)
    )
    before = place.floor().long()
    after = (before + 1).clamp(max=len(order) - 1)
    weight = place - before
    ends = [end[order][before].lerp(end[order][after], weight.to(end)) for end in (low, high)]
    return ends[0], ends[1]


class TimestepGroups(nn.Module):
    """G quantization functions for all timesteps and, for each timestep, a share of each.

    scale, low, high `[G]`: real value of a level, and the bounds in levels, which are rounded. After every update
    `project_` makes a branch span exactly 2^bits levels again, from low <= 0 to high >= 0, so that a branch is at all
    times a quantizer that can be saved: its zero point is qmin - round(low).
    """

    def __init__(
        self, spec: QuantSpec, clock: StepClock, low: Tensor, high: Tensor, groups: int, *, prior: float = 0.0
    ) -> None:
        """low, high `[N]`: observed range of every bin. prior: first logit of the branch nearest to it."""
        super().__init__()
        self.spec = spec
        object.__setattr__(self, "clock", clock)  # the clock is the denoiser's submodule
        self.shares = Shares(clock.bins, groups)
        self.scale = nn.Parameter(torch.ones(groups))
        self.low = nn.Parameter(torch.zeros(groups))
        self.high = nn.Parameter(torch.zeros(groups))
        self.register_buffer("least", torch.zeros(groups), persistent=False)
        least, most = spread(low.float(), high.float(), groups)
        self._span_(least, most)
        self.least = self.scale.detach() / 10
        apart = (low[:, None] - least).abs() + (high[:, None] - most).abs()
        self.shares.favour_(apart.argmin(1), prior)

    clock: StepClock
    least: Tensor

    def _span_(self, low: Tensor, high: Tensor) -> None:
        """Take these ranges, in units of x."""
        scale, zero_point = choose_qparams(low, high, self.spec)
        levels = self.spec.qmax - self.spec.qmin
        with torch.no_grad():
            self.scale.copy_(torch.maximum(scale, self.least))
            if self.spec.symmetric or self.spec.nonnegative:
                self.low.copy_(self.spec.qmin - zero_point)
            else:
                # Not yet rounded: what an update moves by less than a level must not be lost.
                self.low.copy_((low / self.scale).clamp(-levels, 0))
            self.high.copy_(self.low + levels)

    def project_(self) -> None:
        """Keep the learnt range and span it with 2^bits levels; scales stay above a tenth of their start."""
        self._span_(self.scale.detach() * self.low.detach(), self.scale.detach() * self.high.detach())

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Whole-numbered bounds `[G]`, low to high exactly 2^bits levels, with straight-through gradients."""
        low = straight_through(torch.round(self.low), self.low)
        # The number of levels is fixed, so the high bound follows the rounding of the low one.
        return low, straight_through(torch.round(self.low) + self.spec.qmax - self.spec.qmin, self.high)

    def forward(self, x: Tensor) -> Tensor:
        low, high = self.bounds()
        shares = self.shares.at(self.clock.bin.tolist())
        return mixture(x, shares, self.scale[None], low[None], high[None])

    def penalty(self, bins: list[int]) -> Tensor:
        """The paper's sum_g -sigma_g log sigma_g, averaged over the distinct bins of a mini-batch."""
        return self.shares.penalty(bins)

    @torch.no_grad()
    def hardened(self, harden: Harden) -> InputQuantizer:
        """The plain quantizer that is saved.

        argmax: every timestep uses the branch with the largest share; rows are the used branches, narrow to wide.
        average: every timestep has a row of its own, with the shares' average of the branches' range ends.
        """
        low, high = self.bounds()
        if harden == "argmax":
            winner = self.shares.table()[:, :, 0].argmax(1)
            used = torch.unique(winner)
            used = used[self.scale[used].argsort(stable=True)]
            row_of_bin = (winner[:, None] == used).int().argmax(1)
            params = QParams(self.scale[used], self.spec.qmin - low[used])
        else:
            table = self.shares.table()[:, :, 0]
            params = choose_qparams(table @ (self.scale * low), table @ (self.scale * high), self.spec)
            row_of_bin = torch.arange(len(table))
        return InputQuantizer(self.spec, self.clock, params, row_of_bin).to(self.scale.device)


def buckets(low: Tensor, high: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Ranges that stand for those of C channels, one timestep a row: `[N, C]` -> `[N, G]`, from narrow to wide.

    The channels' upper ends are cut into G buckets of equal width, and each is represented by the largest end in it, or
    by its outer border if it is empty; lower ends likewise, mirrored.
    """
    return -_upper_buckets(-low, groups), _upper_buckets(high, groups)


def _upper_buckets(ends: Tensor, groups: int) -> Tensor:
    first, last = ends.amin(1, keepdim=True), ends.amax(1, keepdim=True)
    width = (last - first) / groups
    number = ((ends - first) / width.clamp(min=torch.finfo(ends.dtype).tiny)).floor().clamp(0, groups - 1).long()
    borders = first + width * torch.arange(1, groups + 1, device=ends.device)
    largest = torch.full_like(borders, -torch.inf).scatter_reduce(1, number, ends, "amax")
    return torch.where(largest.isinf(), borders, largest)


class ChannelBuckets(nn.Module):
    """G ranges at each timestep and, for each timestep and channel, a share of each.

    low, high `[N, G]`: the ranges, observed and not learnt. channel_axis: of the activation.
    """

    low: Tensor
    high: Tensor

    def __init__(
        self,
        spec: QuantSpec,
        clock: StepClock,
        low: Tensor,
        high: Tensor,
        groups: int,
        *,
        channel_axis: int,
        prior: float = 0.0,
    ) -> None:
        """low, high `[N, C]`: observed range of every bin and channel. prior: first logit of the nearest bucket."""
        super().__init__()
        self.spec, self.channel_axis = spec, channel_axis
        object.__setattr__(self, "clock", clock)
        self.shares = Shares(clock.bins, groups, low.shape[1])
        least, most = buckets(low.float(), high.float(), groups)
        self.register_buffer("low", least.clamp(max=0))
        self.register_buffer("high", most.clamp(min=0))
        apart = (low[:, None] - least[:, :, None]).abs() + (high[:, None] - most[:, :, None]).abs()
        self.shares.favour_(apart.argmin(1), prior)

    clock: StepClock

    def forward(self, x: Tensor) -> Tensor:
        bins = self.clock.bin
        shares = self.shares.at(bins.tolist())
        at = bins[: len(shares)]
        scale, zero_point = choose_qparams(self.low[at], self.high[at], self.spec)
        low, high = self.spec.qmin - zero_point, self.spec.qmax - zero_point
        return mixture(x, shares, scale, low, high, channel_axis=self.channel_axis)

    def project_(self) -> None:
        """Nothing: only shares are learnt."""

    def penalty(self, bins: list[int]) -> Tensor:
        """The public code's mean of -sigma log sigma over groups and channels, averaged over the distinct bins."""
        return self.shares.penalty(bins) / len(self.shares.logits[0])

    @torch.no_grad()
    def hardened(self, harden: Harden) -> InputQuantizer:
        """The plain quantizer per channel that is saved, a row for every timestep.

        average (the public code): the shares' average of the range ends. argmax: the range with the largest share.
        """
        table = self.shares.table()  # [N, G, C]
        if harden == "argmax":
            winner = table.argmax(1)
            low, high = self.low.gather(1, winner), self.high.gather(1, winner)
        else:
            low, high = ((table * end[:, :, None]).sum(1) for end in (self.low, self.high))
        params = choose_qparams(low, high, self.spec)
        return InputQuantizer(
            replace(self.spec, granularity="channel"),
            self.clock,
            params,
            torch.arange(len(table)),
            channel_axis=self.channel_axis,
        ).to(self.low.device)


Searching = TimestepGroups | ChannelBuckets
"""What sits in an activation quantizer's place while its timesteps choose."""


class ChannelObserver(nn.Module):
    """Sits in an activation quantizer's place, passes values through and keeps each bin's and channel's range."""

    def __init__(self, clock: StepClock, channel_axis: int) -> None:
        super().__init__()
        object.__setattr__(self, "clock", clock)
        self.channel_axis = channel_axis
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}

    clock: StepClock

    def forward(self, x: Tensor) -> Tensor:
        bins = self.clock.bin.tolist()
        for number, part in zip(bins, x.detach().chunk(len(bins)), strict=True):
            flat = part.movedim(self.channel_axis, -1).reshape(-1, part.shape[self.channel_axis]).float()
            low, high = flat.amin(0), flat.amax(0)
            if number in self.seen:
                low, high = torch.minimum(low, self.seen[number][0]), torch.maximum(high, self.seen[number][1])
            self.seen[number] = low, high
        return x

    def ranges(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest value, `[N, C]` each. All N bins must have been seen."""
        found = [self.seen[number] for number in range(self.clock.bins)]
        return torch.stack([low for low, _ in found]), torch.stack([high for _, high in found])
