"""First scales and zero points of weights and activations."""

from __future__ import annotations

import inspect
import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stepquant.errors import CalibrationError
from stepquant.model.clock import StepClock
from stepquant.model.layer import QuantizedLayer, QuantizedMatmul
from stepquant.model.surgery import operand_specs, quantized_layers
from stepquant.numerics.affine import QParams, choose_qparams, dequantize, grouped, quantize, range_of
from stepquant.numerics.spec import LayerScheme, QuantSpec

__all__ = [
    "SAMPLE_MARGIN",
    "SAMPLE_MARGIN_BITS",
    "Observer",
    "RangeRule",
    "fit_range",
    "observing",
    "sample_readers",
    "weight_params",
]

RangeRule = Literal["minmax", "mse"]
"""minmax: cover everything. mse: the best of 80 ranges shrunk towards zero, by mean |x - x_hat|^2.4."""

SHRINK_CANDIDATES = 80
SHRINK_STEP = 0.01
SHRINK_NORM = 2.4
"""Q-Diffusion's and TFMQ-DM's public code: (min, max) * (1 - 0.01 i), i = 0..79, p = 2.4."""

FURTHER_CANDIDATES = 20
FURTHER_FACTOR = 0.9
"""Of activations, whose extremes are those of millions of values, narrower ranges are tried too: down to 0.2 * 0.9^20,
2.4 % of the whole. Ours."""

CLIPPED = 8.0
"""How much more a value of an activation that is clipped counts than one that is rounded.

A rounding error is another one in every step, and many of them add up as their square root. What is clipped in one step
is mostly clipped in the next one too, and such errors add up as they are: over S steps up to sqrt(S) times as much.
With 1, ranges of balanced channels cut off so much of the residual path that the drift at W4A4 doubled; with 20,
rounding to nearest lost half of what it gains by searching (docs/results.md has the command). Ours, from no paper.
"""

SAMPLE_MARGIN = 0.25
"""How far beyond the values seen the range of the sample reaches, where a layer reads the sample itself at 8 bits.

A value of the sample outside that range is not only rounded badly: the network does not see it grow, so it never
brings it back, and a single pixel can run away. The extremes of a few images are exceeded by others: the largest of n
Gaussian values grows as sqrt(2 ln n), by a quarter from 64 to 50 000 images of 32x32. Ours; no paper treats it.
"""

SAMPLE_MARGIN_BITS = 8
"""With fewer bits a step of the wide range would cost more than what it saves."""


def fit_range(
    x: Tensor, spec: QuantSpec, rule: RangeRule, ends: Tensor | None = None, counts: Tensor | None = None
) -> QParams:
    """Scale and zero point for the values x, one per group of elements sharing a scale (`grouped` of x).

    With "mse", every group picks its own shrink factor; both ends shrink by the same factor.

    ends: what the range must reach before it is shrunk, grouped as x is, where x is a part of an activation's values.
        What is clipped counts `CLIPPED` times then.
    counts: how many values each element of x stands for, in the shape of x; None: as many each.
    """
    low, high = range_of(x, spec)
    factors = [1 - SHRINK_STEP * i for i in range(SHRINK_CANDIDATES)]
    if ends is not None:
        lowest, highest = range_of(ends, spec)
        low, high = torch.minimum(low, lowest), torch.maximum(high, highest)
        factors += [factors[-1] * FURTHER_FACTOR ** (i + 1) for i in range(FURTHER_CANDIDATES)]
    best = choose_qparams(low, high, spec)
    if rule == "minmax":
        return best
    view = grouped(x, spec).float()
    weights = None if counts is None else grouped(counts, spec)

    def error(params: QParams) -> Tensor:
        found = (view - dequantize(quantize(view, params, spec), params)).abs_().pow_(SHRINK_NORM)
        if ends is not None:
            lowest, highest = ((end - params.zero_point) * params.scale for end in (spec.qmin - 0.5, spec.qmax + 0.5))
            found = torch.where((view < lowest) | (view > highest), CLIPPED * found, found)
        if weights is None:
            return found.mean(-1, keepdim=True)
        return (found * weights).sum(-1, keepdim=True)

    least = error(best)
    scale, zero_point = best.scale.clone(), best.zero_point.clone()
    # Many candidates at once where a range has few values: of rows over time there are thousands of ranges.
    at_once = max(1, AT_ONCE // max(1, view.numel()))
    for start in range(1, len(factors), at_once):
        some = factors[start : start + at_once]
        lower, upper = (torch.stack([end * factor for factor in some]) for end in (low, high))
        params = choose_qparams(lower, upper, spec)
        found, first = _first_least(error(params))
        better = found < least
        least = torch.where(better, found, least)
        scale = torch.where(better, params.scale.gather(0, first)[0], scale)
        zero_point = torch.where(better, params.zero_point.gather(0, first)[0], zero_point)
    return QParams(scale, zero_point)


AT_ONCE = 2**18
"""Elements of what a search of ranges computes at once: a megabyte, which stays in the cache."""


def _first_least(errors: Tensor) -> tuple[Tensor, Tensor]:
    """Of candidates `[N, ...]` the least error `[...]`, and the first that has it `[1, ...]`. NaN is infinite."""
    errors = errors.nan_to_num(nan=math.inf, posinf=math.inf)
    found = errors.amin(0)
    numbers = torch.arange(len(errors), device=errors.device).reshape(-1, *[1] * found.ndim)
    return found, torch.where(errors == found, numbers, len(errors)).amin(0, keepdim=True)


def weight_params(weight: Tensor, spec: QuantSpec, rule: RangeRule) -> QParams:
    """Scale and zero point of a weight `[O, ...]`, shaped for `WeightQuantizer`."""
    return fit_range(weight.detach(), spec, rule)


LEAST_KEPT = 1024
"""Values of a timestep bin that an observer draws from one call: fewer make a searched range a matter of chance."""

TAIL = 0.01
TAIL_KEPT = 512
"""Of this share of a call's values, the largest, an observer keeps so many exactly, and as many drawn from the rest; no
more than it draws in all."""


class Observer(nn.Module):
    """Sits in an activation quantizer's place, passes values through and keeps a part of them per timestep bin.

    Kept of a call are values drawn at random (`keep`, or `LEAST_KEPT` per bin if that is more), and a part of its
    largest ones (`TAIL`), so memory does not grow with the activation's size. What clipping costs lies in a few values
    of many thousands, and p = 2.4 weighs them: a range searched on drawn values alone would be a matter of chance. The
    smallest and largest value of all calls are kept exactly.

    A value counts as much as the weights that it meets: |w_c|^2.4 of its input channel c, so that the search follows
    the layer's output. It decides where channels have been balanced: there a small input meets large weights.

    sample: where `observing` puts the sample that the denoiser is being called with.
    reads_sample: whether what was seen is that sample, or what the layer's own transform has made of it.
    seen: drawn values by bin, one tensor for each call. extremes: smallest and largest value by bin.
    """

    def __init__(self, clock: StepClock, generator: torch.Generator, keep: int = 4096) -> None:
        super().__init__()
        self.sample: list[Tensor] = []
        self.reads_sample = False
        object.__setattr__(self, "clock", clock)
        self.generator = generator
        self.keep = keep
        self.seen: dict[int, list[Tensor]] = {}
        self.extremes: dict[int, tuple[float, float]] = {}
        self._parts: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._importance: Tensor | None = None
        self._axis = 1

    clock: StepClock

    def weigh(self, layer: QuantizedLayer, attribute: str) -> None:
        """Let values count as the weights that they meet in this layer. Layers with groups count all alike.

        attribute: the quantizer's place in the layer, of which there are two where the input is split.
        """
        if layer.geometry.groups == 1:
            sizes = layer.weight.detach().float().transpose(0, 1).flatten(1).norm(dim=1).cpu()
            if layer.split is not None:
                sizes = sizes[: layer.split] if attribute == "input_quantizer" else sizes[layer.split :]
            self._importance = (sizes / sizes.mean().clamp_min(1e-30)).pow(SHRINK_NORM)
            self._axis = layer.geometry.channel_axis

    def forward(self, x: Tensor) -> Tensor:
        self.reads_sample = any(x is sample for sample in self.sample)
        bins = self.clock.bin
        stride = math.prod(x.shape[self._axis % x.ndim + 1 :])
        if len(bins) == 1:
            self._note(int(bins), x, self.keep, stride)
            return x
        parts = x.reshape(len(bins), -1)
        present = sorted(set(bins.tolist()))
        for value in present:
            self._note(int(value), parts[bins == value], max(LEAST_KEPT, self.keep // len(present)), stride)
        return x

    def _note(self, at: int, x: Tensor, keep: int, stride: int) -> None:
        """stride: between channels, so that value i is of channel (i // stride) modulo their number."""
        flat = x.detach().reshape(-1)
        low, high = float(flat.min()), float(flat.max())
        before = self.extremes.get(at, (low, high))
        self.extremes[at] = (min(low, before[0]), max(high, before[1]))
        if flat.numel() > keep:
            chosen = torch.randint(flat.numel(), (keep,), generator=self.generator)
        else:
            chosen = torch.arange(flat.numel())
        drawn = flat[chosen.to(flat.device)].float().cpu()
        self.seen.setdefault(at, []).append(drawn)
        self._parts.setdefault(at, []).append(self._with_tail(flat, drawn, chosen, stride))

    def _with_tail(self, flat: Tensor, drawn: Tensor, chosen: Tensor, stride: int) -> tuple[Tensor, Tensor]:
        """Values of a call and how much each counts: the drawn ones, and of the largest more than chance would take."""
        size, rank = flat.numel(), int(len(drawn) * (1 - TAIL))
        if size == len(drawn) or rank < 1:
            return drawn, self._counts(chosen, stride, size / len(drawn))
        border = drawn.abs().kthvalue(rank).values
        beyond = (flat.abs() > border.to(flat)).nonzero().flatten()
        tail, beyond = flat[beyond].float().cpu(), beyond.cpu()
        inside = drawn.abs() <= border
        order, most = tail.abs().argsort(descending=True), min(TAIL_KEPT, len(drawn))
        top, others = order[:most], order[most:]
        share = 1.0
        if len(others) > most:
            share = len(others) / most
            others = others[torch.randint(len(others), (most,), generator=self.generator)]
        counts = [
            self._counts(chosen[inside], stride, (size - len(tail)) / max(1, int(inside.sum()))),
            self._counts(beyond[top], stride, 1.0),
            self._counts(beyond[others], stride, share),
        ]
        return torch.cat([drawn[inside], tail[top], tail[others]]), torch.cat(counts)

    def _counts(self, places: Tensor, stride: int, each: float) -> Tensor:
        """How much values at these places of a call count, each of which stands for so many."""
        if self._importance is None:
            return torch.full((len(places),), each)
        return each * self._importance[places // stride % len(self._importance)]

    def params(self, spec: QuantSpec, row_of_bin: Tensor, rule: RangeRule, where: str) -> QParams:
        """One scale and zero point per row, from the values seen in its bins. A row that saw nothing is an error."""
        found = []
        for row in range(int(row_of_bin.max()) + 1):
            bins = [b for b in (row_of_bin == row).nonzero().flatten().tolist() if b in self.seen]
            if not bins:
                raise CalibrationError(
                    f"{where} saw no calibration sample in row {row}: choose calibration steps in every window or "
                    "fewer rows."
                )
            ends = torch.tensor([end for b in bins for end in self.extremes[b]])
            values, counts = (torch.cat(part) for part in zip(*(p for b in bins for p in self._parts[b]), strict=True))
            found.append(self.fit(values, spec, rule, ends, counts))
        return QParams(
            torch.cat([params.scale.reshape(-1) for params in found]),
            torch.cat([params.zero_point.reshape(-1) for params in found]),
        )

    def forget(self) -> None:
        """Begin anew."""
        self.extremes.clear()
        self.seen.clear()
        self._parts.clear()

    def keeps_sample(self, spec: QuantSpec) -> bool:
        """Whether this is the denoiser's own sample, at enough bits for `SAMPLE_MARGIN`."""
        return self.reads_sample and spec.bits >= SAMPLE_MARGIN_BITS

    def own_rows(self) -> Tensor:
        """A row for every timestep bin that was seen, `[N]` int64; bins that were not use that of the next noisier."""
        seen = sorted(self.seen)
        return torch.tensor([min(bisect_left(seen, at), len(seen) - 1) for at in range(self.clock.bins)])

    def fit(
        self,
        values: Tensor,
        spec: QuantSpec,
        rule: RangeRule,
        ends: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> QParams:
        """`fit_range` of values seen here; with `SAMPLE_MARGIN` around all of them if they are the sample's."""
        if self.keeps_sample(spec):
            margin = 1 + SAMPLE_MARGIN
            return fit_range(values * margin, spec, "minmax", None if ends is None else ends * margin)
        return fit_range(values, spec, rule, ends, counts)


@contextmanager
def noting_sample(denoiser: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, the list holds the sample that the denoiser is being called with: its first argument.

    What a layer's own transform makes of it comes behind: such a layer reads the sample, too.
    """
    sample: list[Tensor] = []
    first = next(iter(inspect.signature(denoiser.forward).parameters))

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sample[:] = [args[0]] if args else [kwargs[first]] if first in kwargs else []

    def transformed(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if any(args[0] is one for one in sample):
            sample.append(output)

    hooks = [denoiser.register_forward_pre_hook(note, with_kwargs=True)]
    for layer in quantized_layers(denoiser).values():
        transform = getattr(layer, "input_transform", None)
        if transform is not None:
            hooks.append(transform.register_forward_hook(transformed))
    try:
        yield sample
    finally:
        for hook in hooks:
            hook.remove()
        sample.clear()


@torch.no_grad()
def sample_readers(denoiser: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> frozenset[str]:
    """Layers that read the denoiser's own sample at `SAMPLE_MARGIN_BITS` or more; found by one call.

    Their ranges are not for learning: a narrower one lowers the mean error on the samples of calibration, and clips
    others.
    """
    found: set[str] = set()
    hooks = []
    with noting_sample(denoiser) as sample:
        for name, layer in quantized_layers(denoiser).items():
            spec: QuantSpec | None = getattr(layer.input_quantizer, "spec", None)
            if spec is None or spec.bits < SAMPLE_MARGIN_BITS:
                continue

            def look(_: nn.Module, inputs: tuple[Any, ...], name: str = name) -> None:
                if any(inputs[0] is one for one in sample):
                    found.add(name)

            hooks.append(layer.register_forward_pre_hook(look))
        try:
            denoiser(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
    return frozenset(found)


@contextmanager
def observing(
    denoiser: nn.Module, schemes: dict[str, LayerScheme], clock: StepClock, generator: torch.Generator
) -> Iterator[dict[tuple[str, str], Observer]]:
    """Put an observer in the place of every static activation quantizer; afterwards the old ones are back."""
    observers: dict[tuple[str, str], Observer] = {}
    before: list[tuple[QuantizedLayer | QuantizedMatmul, str, nn.Module | None]] = []
    for name, layer in quantized_layers(denoiser).items():
        for attribute, spec in operand_specs(schemes[name]):
            before.append((layer, attribute, getattr(layer, attribute)))
            if spec.dynamic:
                continue
            observers[name, attribute] = Observer(clock, generator)
            if isinstance(layer, QuantizedLayer):
                observers[name, attribute].weigh(layer, attribute)
            setattr(layer, attribute, observers[name, attribute])
    try:
        with noting_sample(denoiser) as sample:
            for observer in observers.values():
                observer.sample = sample
            yield observers
    finally:
        for layer, attribute, quantizer in before:
            setattr(layer, attribute, quantizer)
