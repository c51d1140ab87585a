"""Activation bits that change over time: how they are written, which timesteps they hold for, and ranges for them.

Bits over time are a list from noise to image, each number of bits until some timestep, the last one for the rest:

    (BitsUntil(8, until=700), BitsUntil(4))       8 bits down to and with timestep 700, then 4 bits

Timesteps are those that the denoiser is given. They fall along most trajectories, and rise in a few families. Every
entry of the list has a range of its own, also where neighbours have the same bits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from stepquant.calibrate.ranges import SAMPLE_MARGIN_BITS, Observer, RangeRule
from stepquant.calibrate.trajectory import Trajectory
from stepquant.errors import SpecError
from stepquant.model.clock import StepClock
from stepquant.model.quantizer import InputQuantizer
from stepquant.numerics.affine import QParams
from stepquant.numerics.spec import LayerScheme, QuantSpec

__all__ = ["BitsUntil", "Schemes", "TimedScheme", "Timeline", "check_over_time", "joined", "timed", "timed_quantizer"]


@dataclass(frozen=True)
class BitsUntil:
    """Bits from where the entry before this one ends until timestep `until`, inclusive; None is the rest."""

    bits: int
    until: float | None = None

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    """A nested dataclass ignores unknown keys otherwise."""


def check_over_time(entries: Sequence[BitsUntil]) -> None:
    """Raise SpecError for bits out of range, an end that is missing or too many, and ends that go back and forth."""
    if not entries:
        raise SpecError("Bits over time are a list such as [{bits: 8, until: 700}, {bits: 4}], found an empty one.")
    for entry in entries:
        QuantSpec(entry.bits)  # checks them
    ends = [entry.until for entry in entries]
    if ends[-1] is not None or any(end is None or not math.isfinite(end) for end in ends[:-1]):
        raise SpecError(
            "Of bits over time every entry but the last says until which timestep it holds, and the last holds for the "
            f"rest, as in [{{bits: 8, until: 700}}, {{bits: 4}}]; found until {', '.join(map(_told, ends))}."
        )
    rises = {after > before for before, after in itertools.pairwise(end for end in ends if end is not None)}
    if len(rises) > 1 or len({*ends}) < len(ends):
        raise SpecError(
            "The timesteps until which bits over time hold must fall (or rise) from entry to entry, found "
            f"{', '.join(map(_told, ends[:-1]))}."
        )


def _told(end: float | None) -> str:
    return "nothing" if end is None else f"{end:g}"


@dataclass(frozen=True, kw_only=True)
class TimedScheme(LayerScheme):
    """How a layer is quantized whose activations have bits over time. The specs have the most of them.

    For plans only: in a saved model each quantizer has bits by row.
    """

    over_time: tuple[BitsUntil, ...]

    @property
    def until(self) -> tuple[float, ...]:
        """Where every entry but the last ends."""
        return tuple(entry.until for entry in self.over_time if entry.until is not None)


Schemes = dict[str, Annotated[TimedScheme | LayerScheme, Field(union_mode="left_to_right")]]
"""A plan as JSON: what has no bits over time is no `TimedScheme`."""


def timed(scheme: LayerScheme, over_time: tuple[BitsUntil, ...]) -> LayerScheme:
    """The scheme with bits over time for all its quantized activations; as it is if none is quantized."""
    if scheme.input is None:
        return scheme
    most = max(entry.bits for entry in over_time)
    second = None if scheme.second is None else replace(scheme.second, bits=most)
    return TimedScheme(weight=scheme.weight, input=replace(scheme.input, bits=most), second=second, over_time=over_time)


@dataclass(frozen=True)
class Timeline:
    """The timesteps of a recorded schedule.

    times: of each timestep bin of the clock, ascending. falling: whether sampling goes from the last to the first.
    visits: share of the steps that each bin has; a step's calls share it.
    """

    times: tuple[float, ...]
    falling: bool
    visits: tuple[float, ...]

    @classmethod
    def of(cls, clock: StepClock, trajectories: Sequence[Trajectory]) -> Timeline:
        """Of the steps that a clock was made from."""
        steps = trajectories[0].steps
        times: dict[int, float] = {}
        visits = [0.0] * clock.bins
        order: list[int] = []
        for step in steps:
            for call in step.calls:
                value = call.kwargs[clock.argument] if clock.argument in call.kwargs else call.args[clock.position]
                found = torch.as_tensor(value).detach().reshape(-1).double().cpu()
                clock.set(found)
                bins = clock.bin.tolist()
                times |= dict(zip(bins, found.tolist(), strict=True))
                for at in bins:
                    visits[at] += 1 / (len(bins) * len(step.calls) * len(steps))
                order += bins
        return cls(tuple(times[at] for at in range(clock.bins)), order[0] >= order[-1], tuple(visits))

    def groups_of(self, until: Sequence[float], where: str = "Bits over time") -> tuple[int, ...]:
        """The entry of bits over time that holds for each bin.

        Raises SpecError for ends in the other direction, and for an entry that no timestep belongs to.
        """
        falls = all(after < before for before, after in itertools.pairwise(until))
        rises = all(after > before for before, after in itertools.pairwise(until))
        if not (falls if self.falling else rises):
            way = "fall" if self.falling else "rise"
            raise SpecError(f"{where}: {self._course()}, so the ends must {way} too, found {_listed(until)}.")
        sign = 1 if self.falling else -1
        found = tuple(sum(sign * time < sign * end for end in until) for time in self.times)
        for group in range(len(until) + 1):
            if group not in found:
                begin = f"behind {until[group - 1]:g}" if group else "at the beginning"
                end = f"until {until[group]:g}" if group < len(until) else "until the end"
                raise SpecError(
                    f"{where}: entry {group + 1} of {len(until) + 1}, {begin} and {end}, has no timestep: "
                    f"{self._course()} in {len(self.times)} timesteps. Leave it out or move its end."
                )
        return found

    def _course(self) -> str:
        ends = (self.times[-1], self.times[0]) if self.falling else (self.times[0], self.times[-1])
        return f"the timesteps of this run go from {ends[0]:g} to {ends[1]:g}"

    def split(self, count: int) -> tuple[float, ...]:
        """Ends of `count` consecutive groups of timesteps, as equal as possible: halfway between two timesteps.

        Raises SpecError for more groups than timesteps.
        """
        if count > len(self.times):
            raise SpecError(
                f"{count} groups of timesteps are not possible: this run has {len(self.times)} timesteps. Lower "
                "step_groups."
            )
        ordered = self.times[::-1] if self.falling else self.times
        borders = [round(number * len(ordered) / count) for number in range(1, count)]
        return tuple((ordered[border - 1] + ordered[border]) / 2 for border in borders)

    def shares(self, until: Sequence[float]) -> tuple[float, ...]:
        """Share of the steps that each entry holds for."""
        found = self.groups_of(until)
        return tuple(
            sum(share for share, own in zip(self.visits, found, strict=True) if own == group)
            for group in range(len(until) + 1)
        )

    def mean_bits(self, scheme: LayerScheme) -> float:
        """Bits of a scheme's activations, mean over the steps."""
        assert scheme.input is not None
        if not isinstance(scheme, TimedScheme):
            return scheme.input.bits
        return sum(share * entry.bits for share, entry in zip(self.shares(scheme.until), scheme.over_time, strict=True))


def _listed(until: Sequence[float]) -> str:
    return ", ".join(f"{end:g}" for end in until)


def timed_quantizer(
    seen: Observer,
    scheme: TimedScheme,
    spec: QuantSpec,
    timeline: Timeline,
    row_of_bin: Tensor | None,
    rule: RangeRule,
    where: str,
) -> InputQuantizer:
    """A quantizer with bits over time, and ranges fitted to what was seen at the timesteps of each row.

    row_of_bin: rows that timesteps would have without bits over time, each divided where the bits change; None gives
        every timestep that was seen a row, and others that of the next noisier.
    """
    groups = timeline.groups_of(scheme.until, where)
    bits = [entry.bits for entry in scheme.over_time]
    own = seen.own_rows().tolist()
    base = own if row_of_bin is None else row_of_bin.tolist()
    margin = [seen.reads_sample and bits[group] >= SAMPLE_MARGIN_BITS for group in groups]
    keys = [(own[at] if margin[at] else base[at], margin[at], group) for at, group in enumerate(groups)]
    rows = {key: row for row, key in enumerate(dict.fromkeys(keys))}
    fitted = []
    for key in rows:
        bins = [at for at, found in enumerate(keys) if found == key]
        if (margin[bins[0]] or row_of_bin is None) and not any(at in seen.seen for at in bins):
            bins = [at for at, found in enumerate(own) if found == key[0]]  # those whose row they share
        chosen = torch.full((len(keys),), -1)
        chosen[bins] = 0
        fitted.append(seen.params(replace(spec, bits=bits[key[2]]), chosen, rule, f"{where}, entry {key[2] + 1},"))
    return InputQuantizer(
        spec,
        seen.clock,
        joined(fitted),
        torch.tensor([rows[key] for key in keys]),
        bits=[bits[group] for _, _, group in rows],
    ).to(seen.clock.edges.device)


def joined(params: Sequence[QParams]) -> QParams:
    """Rows one after the other."""
    return QParams(
        torch.cat([one.scale.reshape(-1) for one in params]), torch.cat([one.zero_point.reshape(-1) for one in params])
    )
