"""Looking at every layer while a pipeline samples. Memory is a few numbers a layer, however many images there are."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.doctor.findings import FLOAT16_MAX, Finding, Sightings, Thresholds
from stepquant.doctor.layers import axis_of_channels, parts_of_layers, tensors_in
from stepquant.doctor.weights import clipping_losses
from stepquant.model.quantizer import DynamicQuantizer, InputQuantizer
from stepquant.model.surgery import quantized_layers
from stepquant.numerics.affine import QParams

__all__ = ["MOST_NAMED", "ChannelSpread", "Health", "watching"]

MOST_NAMED = 8
"""Channels named in a sentence; of more only the number is given."""

LEAST_CHANNELS = 4
"""A median of fewer channels says nothing about outliers."""


class ChannelSpread:
    """Smallest and largest value of every channel so far. axis: of the channels, from the end."""

    def __init__(self, axis: int) -> None:
        self.axis = axis
        self._low: Tensor | None = None
        self._high: Tensor | None = None

    def see(self, x: Tensor) -> None:
        """x `[..., C, ...]`; a tensor that is not finite is passed over."""
        axis = self.axis % x.ndim
        others = [which for which in range(x.ndim) if which != axis]
        x = x.detach()
        low, high = (x.amin(others), x.amax(others)) if others else (x, x)
        if not bool(torch.isfinite(low).all() & torch.isfinite(high).all()):
            return
        self._low = low if self._low is None else torch.minimum(self._low, low)
        self._high = high if self._high is None else torch.maximum(self._high, high)

    def spread(self) -> Tensor | None:
        """Largest less smallest value by channel, float64 `[C]`; None if nothing was seen."""
        if self._low is None or self._high is None:
            return None
        return self._high.double() - self._low.double()

    def dead(self, least: float) -> list[int]:
        """Channels that varied less than `least` times the median of those that varied."""
        spread = self.spread()
        if spread is None:
            return []
        varied = spread[spread > 0]
        limit = least * float(varied.median()) if len(varied) else 0.0
        return (spread <= limit).nonzero().flatten().tolist()


class Health:
    """What was seen so far. step: the sampling step that is under way; set it to 0 before each batch.

    Use it through `watching`.
    """

    def __init__(self, denoiser: nn.Module, limits: Thresholds) -> None:
        self.step = 0
        self.not_finite: Finding | None = None
        self.outputs: dict[str, ChannelSpread] = {}
        self._inputs: dict[str, ChannelSpread] = {}
        self._limits = limits
        self._seen = Sightings()
        self._outliers = Sightings()
        self._batch = 0
        self._broken_at = 0
        self._broken: set[str] = set()
        self._quantized = bool(quantized_layers(denoiser))

    def findings(self) -> list[Finding]:
        """Faults of layers so far, without dead channels (`dead_channels`)."""
        first = [] if self.not_finite is None else [self.not_finite]
        return [*first, *self._seen.findings()]

    def dead_channels(self) -> dict[str, list[int]]:
        """Layer -> channels whose output never varied although the layer's input did."""
        found = {}
        for name, outputs in self.outputs.items():
            inputs = self._inputs[name].spread()
            dead = outputs.dead(self._limits.dead_spread)
            if dead and inputs is not None and bool((inputs > 0).any()):
                found[name] = dead
        return found

    def outliers(self) -> list[Finding]:
        """Outlier channels of a model that is not quantized: no fault of it, but what quantizing will meet."""
        return self._outliers.findings()

    @property
    def broken(self) -> int:
        """Number of layers that gave values that are not finite."""
        return len(self._broken)

    def see_call(self, given: Any) -> None:
        """Before the denoiser runs: how many images are in the batch."""
        sample = next(tensors_in(given), None)
        self._batch = 0 if sample is None or not sample.ndim else len(sample)

    def see_output(self, name: str, module: nn.Module, given: Any, output: Any) -> None:
        """After a module has run: NaN and infinity, numbers too large for float16, and the channels of layers."""
        found = list(tensors_in(output))
        if not found:
            return
        if not all(bool(torch.isfinite(tensor).all()) for tensor in found):
            self._note_not_finite(name, module, given, found)
            return
        largest = _largest(found)
        if largest > FLOAT16_MAX and _largest(given) <= FLOAT16_MAX:
            inner = any(("float16_overflow", other) in self._seen for other in _names_inside(name, module))
            if not inner:
                what = f"The output reaches {largest:.4g}, which float16 cannot hold, from inputs that it can."
                self._seen.see("float16_overflow", name, self.step, largest, FLOAT16_MAX, what)

    def see_other(self, name: str, module: nn.Module, given: Any, output: Any) -> None:
        """After a module beside the denoiser has run: NaN and infinity in its first tensor; others may be masks.

        No numbers too large for float16: text encoders give these to themselves, and nobody asked to sample in it.
        """
        found = next(tensors_in(output), None)
        if found is not None and not bool(torch.isfinite(found).all()):
            self._note_not_finite(name, module, given, [found], beside=True)

    def see_channels(self, name: str, axis: int, given: Any, output: Tensor) -> None:
        """After a linear layer or convolution has run."""
        x = next(tensors_in(given), None)
        if x is None:
            return
        self._inputs.setdefault(name, ChannelSpread(axis)).see(x)
        self.outputs.setdefault(name, ChannelSpread(axis)).see(output)
        if not self._quantized:
            self.see_outliers(name, axis, x)

    def see_outliers(self, name: str, axis: int, x: Tensor, levels: int | None = None) -> None:
        """Channels of a tensor whose values are far larger than those of the others.

        levels: of the quantizer, if there is one: what a range that holds the outliers costs the other channels decides
            then whether they are a fault.

        Passed over: few channels, and tensors of one row an image, such as embeddings of the timestep, in which the
        size of a channel is that of a single value.
        """
        axis %= x.ndim
        if x.shape[axis] < LEAST_CHANNELS or x.numel() // x.shape[axis] <= self._batch:
            return
        largest = x.detach().abs().amax([which for which in range(x.ndim) if which != axis]).float()
        alive = largest[largest > 0]  # most channels may be zero, behind a ReLU or where pruned
        if not len(alive):
            return
        ratios = largest / alive.median()
        worst = float(ratios.max())
        if not worst > self._limits.outlier_ratio or worst == float("inf"):
            return
        apart = ratios > self._limits.outlier_ratio
        loss = None if levels is None else _loss_beside(x, axis, apart, levels)
        if loss is not None and loss <= self._limits.outlier_loss:
            return
        channels = apart.nonzero().flatten().tolist()
        what = (
            f"Of the input's {x.shape[axis]} channels, {_listed(channels)} reach{'' if len(channels) > 1 else 'es'} up "
            f"to {worst:.3g} times the median channel."
        )
        if loss is not None:
            what += f" In a range that holds them, rounding costs the others {100 * loss:.0f} % of their norm."
        seen = self._seen if self._quantized else self._outliers
        seen.see("outlier_channels", name, self.step, worst, self._limits.outlier_ratio, what)

    def see_quantizer(self, name: str, operand: str, quantizer: InputQuantizer, x: Tensor) -> None:
        """Before an activation is quantized: how much of it lies in the range, and how much of the range is used."""
        params, limits, spec = quantizer.current(x), self._limits, quantizer.levels(x)
        if not bool(torch.isfinite(x).all()):
            return
        share, lost, rounded = clipping_losses(x, params, spec)
        if lost > max(limits.clipped_loss, rounded):
            what = (
                f"{100 * share:.3g} % of the {operand}'s values lie outside of the quantizer's range, which costs "
                f"{100 * lost:.0f} % of its norm; rounding inside the range costs {100 * rounded:.2g} %."
            )
            if share > limits.saturated_share:
                self._seen.see("saturation", name, self.step, share, limits.saturated_share, what)
            else:
                self._seen.see("clipping", name, self.step, lost, limits.clipped_loss, what)
        self._see_levels(name, operand, params, quantizer, x)

    def _see_levels(self, name: str, operand: str, params: QParams, quantizer: InputQuantizer, x: Tensor) -> None:
        low, high = x.detach().aminmax()
        if float(high - low) <= 1e-6 * float(torch.maximum(high.abs(), low.abs())):
            return  # it does not vary
        shifted = torch.round(x.detach().double() / params.scale.double())
        reach = float(shifted.amax() - shifted.amin()) + 1
        spec = quantizer.levels(x)
        levels = int(torch.as_tensor(spec.qmax - spec.qmin).min()) + 1
        least = min(self._limits.used_levels, levels // 2)
        if reach < least:
            what = f"The {operand} varies, but reaches over {reach:.0f} of the quantizer's {levels} levels."
            self._seen.see("unused_levels", name, self.step, reach, least, what)

    def _note_not_finite(
        self, name: str, module: nn.Module, given: Any, output: list[Tensor], *, beside: bool = False
    ) -> None:
        """beside: the denoiser, so that the finding is of no step."""
        self._broken.add(name)
        if self.not_finite is not None and self._broken_at <= self.step:
            return
        self._broken_at = self.step
        bad = sum(int((~torch.isfinite(tensor)).sum()) for tensor in output)
        whole = sum(tensor.numel() for tensor in output)
        inputs = list(tensors_in(given))
        origin = ""
        if inputs and all(bool(torch.isfinite(tensor).all()) for tensor in inputs):
            origin = f" Its inputs are finite, up to {_largest(given):.4g}."
        if any(not bool(torch.isfinite(own).all()) for own in module.parameters()):
            origin += " Its own weights are not finite."
        what = f"{bad} of {whole} values of the output are NaN or infinite.{origin}"
        step, steps = (None, 0) if beside else (self.step, 1)
        self.not_finite = Finding.of(
            "not_finite", what, layer=name, step=step, value=bad / whole, threshold=0, steps=steps
        )


def _largest(value: Any) -> float:
    return max((float(tensor.detach().abs().amax()) for tensor in tensors_in(value)), default=0.0)


def _loss_beside(x: Tensor, axis: int, apart: Tensor, levels: int) -> float:
    """|x - x_hat| / |x| over the channels that are not set apart, x_hat at so many levels over the range of all."""
    low, high = (float(end) for end in x.detach().aminmax())
    scale = (high - low) / (levels - 1)
    others = x.detach().movedim(axis, 0)[~apart].float()
    norm = float(others.norm())
    return float((others - torch.round(others / scale) * scale).norm()) / norm if norm > 0 else 0.0


def _names_inside(name: str, module: nn.Module) -> Iterator[str]:
    for inner, _ in module.named_modules():
        if inner:
            yield f"{name}.{inner}" if name else inner


def _listed(channels: list[int]) -> str:
    if len(channels) > MOST_NAMED:
        return f"{len(channels)} channels"
    return f"channel{'' if len(channels) == 1 else 's'} {', '.join(map(str, channels))}"


@contextmanager
def watching(
    denoiser: nn.Module, scheduler: Any, limits: Thresholds, others: Mapping[str, nn.Module] | None = None
) -> Iterator[Health]:
    """Look at the denoiser inside, and count the scheduler's steps; all is as before afterwards.

    others: networks beside it, by name, whose outputs are looked at too.
    """
    health = Health(denoiser, limits)
    with ExitStack() as stack:
        first = denoiser.register_forward_pre_hook(
            lambda _module, args, kwargs: health.see_call((args, kwargs)), with_kwargs=True
        )
        stack.callback(first.remove)
        for module, hook in [*_hooks(denoiser, health), *_hooks_beside(others or {}, health)]:
            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        for name, layer in quantized_layers(denoiser).items():
            for attribute, operand in (("input_quantizer", "input"), ("second_quantizer", "second operand")):
                quantizer = getattr(layer, attribute, None)
                if isinstance(quantizer, nn.Module):
                    hook = _quantizer_hook(health, name, operand, axis_of_channels(layer))
                    stack.callback(quantizer.register_forward_pre_hook(hook).remove)
        stack.enter_context(_counting(scheduler, health))
        yield health


def _hooks(denoiser: nn.Module, health: Health) -> Iterator[tuple[nn.Module, Callable[..., None]]]:
    inside = parts_of_layers(denoiser)
    for name, module in denoiser.named_modules():
        if id(module) in inside:
            continue
        yield module, _output_hook(health, name)
        axis = axis_of_channels(module)
        if axis is not None:
            yield module, _channel_hook(health, name, axis)


def _hooks_beside(others: Mapping[str, nn.Module], health: Health) -> Iterator[tuple[nn.Module, Callable[..., None]]]:
    for part, network in others.items():
        inside = parts_of_layers(network)
        for name, module in network.named_modules(prefix=part):
            if id(module) not in inside:
                yield module, _beside_hook(health, name)


def _beside_hook(health: Health, name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        health.see_other(name, module, (args, kwargs), output)

    return hook


def _output_hook(health: Health, name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        health.see_output(name, module, (args, kwargs), output)

    return hook


def _channel_hook(health: Health, name: str, axis: int) -> Callable[..., None]:
    def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            health.see_channels(name, axis, (args, kwargs), output)

    return hook


def _quantizer_hook(health: Health, name: str, operand: str, axis: int | None) -> Callable[..., None]:
    def hook(quantizer: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0]
        if isinstance(quantizer, InputQuantizer):
            health.see_quantizer(name, operand, quantizer, x)
        if axis is None or not isinstance(quantizer, InputQuantizer | DynamicQuantizer):
            return
        if quantizer.spec.granularity not in ("channel", "channel_token"):
            spec = quantizer.levels(x)
            health.see_outliers(name, axis, x, int(torch.as_tensor(spec.qmax - spec.qmin).min()) + 1)

    return hook


@contextmanager
def _counting(scheduler: Any, health: Health) -> Iterator[None]:
    """Count calls of the scheduler's `step` in `health.step`."""
    # What is set on a stand-in for a scheduler reaches the one inside anyway, and could not be taken away again.
    inner = getattr(scheduler, "uncorrected", scheduler)
    before = dict(vars(inner))
    step = inner.step

    @functools.wraps(step)
    def counted(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        health.step += 1
        return result

    inner.step = counted
    try:
        yield
    finally:
        if "step" in before:
            inner.step = before["step"]
        else:
            del inner.step
