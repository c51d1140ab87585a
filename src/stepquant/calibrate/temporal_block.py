"""The temporal block: everything in a denoiser that depends on the timestep and not on the sample.

In a U-Net that is the time embedding h and the projection g_i of it in every residual block, in a transformer the time
embedding and the modulations of the norms. Its inputs come from a finite set, the timesteps of the schedule, whatever
the data. Its weights are fitted together, so that what it hands to the rest of the network stays:

    min over V of  sum_i || g_i^(h^(t); V) - g_i(h(t)) ||_2^2 + lambda * sum(1 - |2 h(V) - 1|^beta)

over all timesteps t of the schedule, and every timestep gets activation ranges of its own.

Source: Huang et al. 2024 (TFMQ-DM, arXiv:2311.16503), temporal information block and finite set calibration.

How the block is found and run by itself is ours. One call of the full-precision denoiser is followed function by
function (`torch.overrides.TorchFunctionMode`): what is computed from the timestep, and from nothing that the sample had
a part in, belongs to the block. The operations between its layers are noted on the way, so that the block can be run
again with other weights at the cost of a few small products.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from stepquant.calibrate.ranges import Observer, observing
from stepquant.calibrate.reconstruct import (
    RoundBlocks,
    clocked,
    reconstruction_loss,
    rounding_targets,
    soft_roundings,
    without_input_quantizers,
)
from stepquant.calibrate.rounding import adam, annealed_beta, candidates_kept, harden_soft_, soften_
from stepquant.calibrate.select import at_steps, inputs
from stepquant.calibrate.trajectory import Trajectory
from stepquant.errors import CalibrationError, SpecError, nearest
from stepquant.model.layer import QuantizedLayer
from stepquant.model.quantizer import DynamicQuantizer, InputQuantizer
from stepquant.model.surgery import Plan, operand_specs, quantized_layers
from stepquant.numerics.affine import QParams, choose_qparams
from stepquant.numerics.spec import QuantSpec
from stepquant.recipe import Figures, Job

__all__ = [
    "FitStepRanges",
    "RoundOtherBlocks",
    "RoundTemporalBlock",
    "StepRangeRule",
    "TemporalBlock",
    "settled",
    "temporal_layers",
    "trace",
]

StepRangeRule = Literal["ema", "minmax", "mse"]
RULES = ("ema", "minmax", "mse")

MOMENTUM = 0.95
"""Of the running minimum and maximum over mini-batches (public code of TFMQ-DM)."""


@dataclass(frozen=True)
class _Slot:
    """A value that the block computes: its number on the tape."""

    number: int


@dataclass(frozen=True)
class _Noted:
    """One operation between layers, or one run of a layer (`layer` is its name and `args` its input).

    results: the slot of each tensor that it returns, in order.
    """

    call: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    results: tuple[int, ...]
    layer: str | None = None


_SAMPLE, _TIME = "sample", "time"
"""What a tensor was computed from: the sample, perhaps among others; the timestep alone, before any layer."""


class _Tape(TorchFunctionMode):
    """Follows a call of the full-precision denoiser. Enter it around the call.

    linear: id of the weight of a linear layer -> the layer's name.
    noted: operations in order. outputs: what each noted run of a layer returned.
    """

    def __init__(self, linear: Mapping[int, str]) -> None:
        super().__init__()
        self.linear = linear
        self.noted: list[_Noted] = []
        self.outputs: dict[int, Tensor] = {}
        # Weak: a strong reference would keep every activation of the network until the call has ended.
        self._origin: Any = WeakTensorKeyDictionary()
        self._count = 0

    def mark(self, value: Tensor, origin: str) -> None:
        self._origin[value] = origin

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        origins = [self._origin.get(leaf) for leaf in given]
        layer = self._layer_of(func, given)
        result = func(*args, **kwargs)
        if any(origin is not None for origin in origins):
            found = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            self._note(func, args, kwargs, origins, found, layer)
        return result

    def _layer_of(self, func: Any, given: Sequence[Tensor]) -> str | None:
        return self.linear.get(id(given[1])) if func is F.linear and len(given) > 1 else None

    def _note(
        self, func: Any, args: Any, kwargs: Any, origins: list[Any], found: list[Tensor], layer: str | None
    ) -> None:
        slots = any(isinstance(origin, _Slot) for origin in origins)
        if getattr(func, "__name__", "") == "__setitem__":
            # What is written into no longer is what the tape says.
            self._origin[args[0]] = _SAMPLE if _SAMPLE in origins or slots else _TIME
        elif _SAMPLE in origins or (layer is None and not slots):
            for value in found:
                self._origin[value] = _SAMPLE if _SAMPLE in origins else _TIME
        else:
            numbers = tuple(range(self._count, self._count + len(found)))
            self._count += len(found)
            if layer is not None:
                self.outputs[len(self.noted)] = found[0].detach()
                args, kwargs = args[:1], {}  # a layer in its place brings weight and bias itself
            own, named = tree_map(self._as_slot, (tuple(args), dict(kwargs)))
            self.noted.append(_Noted(func, own, named, numbers, layer))
            for value, number in zip(found, numbers, strict=True):
                self._origin[value] = _Slot(number)

    def _as_slot(self, value: Any) -> Any:
        """A tensor of the block by its slot; any other as it is, detached and kept."""
        if not isinstance(value, Tensor):
            return value
        origin = self._origin.get(value)
        return origin if isinstance(origin, _Slot) else value.detach()


@dataclass(frozen=True)
class TemporalBlock:
    """The block as one call of the denoiser has run it.

    layers: names, in order of execution.
    targets: (name, full-precision output) of the runs of layers that hand something to the rest of the network: those
        whose output no other layer of the block sees.
    """

    layers: tuple[str, ...]
    targets: tuple[tuple[str, Tensor], ...]
    _noted: tuple[_Noted, ...] = field(repr=False)
    _last: frozenset[int] = field(repr=False)

    def run(self, layers: Mapping[str, nn.Module]) -> list[Tensor]:
        """What these layers in the block's place make of the same timesteps, in the order of `targets`."""
        values: dict[int, Tensor] = {}
        found: list[Tensor] = []

        def fill(value: Any) -> Any:
            return values[value.number] if isinstance(value, _Slot) else value

        for number, noted in enumerate(self._noted):
            args = tree_map(fill, noted.args)
            if noted.layer is not None:
                result = layers[noted.layer](args[0])
            else:
                result = noted.call(*args, **tree_map(fill, dict(noted.kwargs)))
            if number in self._last:
                found.append(result)
            tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            values |= dict(zip(noted.results, tensors, strict=True))
        return found


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


@torch.no_grad()
def trace(
    denoiser: nn.Module, names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any], timestep: tuple[str, int]
) -> TemporalBlock:
    """The temporal block of a full-precision denoiser, from one call.

    names: layers that may belong to it; linear ones alone do. timestep: name and position of that argument.
    The first argument of the denoiser is the sample. Other arguments (prompts, labels) belong to neither side, so a
    layer that sees the timestep and a label belongs to the block.
    """
    modules = dict(denoiser.named_modules())
    tape = _Tape({id(modules[name].weight): name for name in names if _is_linear(modules[name])})
    args, kwargs = list(args), dict(kwargs)
    name, position = timestep
    value = kwargs[name] if name in kwargs else args[position]
    value = torch.as_tensor(value).clone()  # a copy: no other argument may be the same tensor
    if name in kwargs:
        kwargs[name] = value
    else:
        args[position] = value
    sample = args[0] if args else next(iter(kwargs.values()))
    tape.mark(value, _TIME)
    for leaf in tree_leaves(sample):
        if isinstance(leaf, Tensor):
            tape.mark(leaf, _SAMPLE)
    with tape:
        denoiser(*args, **kwargs)
    return _block_of(tape)


def _block_of(tape: _Tape) -> TemporalBlock:
    """Keep what leads to a layer, and find the layers that nothing of the block comes after."""
    wanted: set[int] = set()
    kept: list[int] = []
    last: set[int] = set()
    for number in reversed(range(len(tape.noted))):
        noted = tape.noted[number]
        needed = not wanted.isdisjoint(noted.results)
        if noted.layer is None and not needed:
            continue
        if noted.layer is not None and not needed:
            last.add(number)
        kept.append(number)
        wanted |= {leaf.number for leaf in tree_leaves((noted.args, noted.kwargs)) if isinstance(leaf, _Slot)}
    kept.reverse()
    used = tuple(tape.noted[number] for number in kept)
    layers = tuple(dict.fromkeys(noted.layer for noted in used if noted.layer is not None))
    targets = tuple((str(tape.noted[number].layer), tape.outputs[number]) for number in kept if number in last)
    return TemporalBlock(layers, targets, used, frozenset(place for place, n in enumerate(kept) if n in last))


def temporal_layers(job: Job) -> list[str]:
    """Quantized layers of the temporal block, in order of execution; found by one recorded call."""
    call = job.handed["trajectories"][0].steps[0].calls[0]
    clock = clocked(job.denoiser)
    return list(
        trace(job.full_precision, _linear_names(job), call.args, call.kwargs, (clock.argument, clock.position)).layers
    )


def _linear_names(job: Job) -> list[str]:
    """Quantized layers that are linear."""
    plan: Plan = job.handed["plan"]
    layers = quantized_layers(job.denoiser)
    found = []
    for name in plan:
        layer = layers[name]
        if isinstance(layer, QuantizedLayer) and layer.geometry.kind == "linear":
            found.append(name)
    return found


@contextmanager
def settled(denoiser: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Inside, the rounding of these layers' weights is final: stages that learn rounding find nothing to learn there.

    Raises CalibrationError for weights that are not hardened.
    """
    layers = quantized_layers(denoiser)
    before: dict[str, nn.Module | None] = {}
    for name in names:
        layer = layers[name]
        assert isinstance(layer, QuantizedLayer)
        if layer.weight_quantizer is not None and not layer.on_grid:
            raise CalibrationError(f"The weight of {name} is not on its grid: run the stage FitWeightRanges before.")
        before[name] = layer.weight_quantizer
    try:
        for name in names:
            layers[name].weight_quantizer = None
        yield
    finally:
        for name, quantizer in before.items():
            layers[name].weight_quantizer = quantizer


@dataclass(frozen=True)
class RoundTemporalBlock:
    """Learn the rounding of the temporal block's weights together, over all timesteps of the schedule.

    Activations are in full precision. Every mini-batch holds up to `batch` timesteps, spread over the schedule.

    images: recorded images whose calls are taken at every step; more than one only matters where labels, prompts or
        sizes enter the block beside the timestep. Both halves of guidance are taken.
    iterations, lr, round_weight, warmup, keep_rounding: as in `RoundBlocks`.
    """

    iterations: int = 20_000
    batch: int = 32
    images: int = 16
    lr: float = 1e-3
    round_weight: float = 0.01
    warmup: float = 0.2
    keep_rounding: float = 0.0

    needs: ClassVar[frozenset[str]] = frozenset({"trajectories", "plan", "model"})
    gives: ClassVar[frozenset[str]] = frozenset({"model"})

    def __post_init__(self) -> None:
        for name in ("iterations", "batch", "images"):
            if getattr(self, name) < 1:
                raise SpecError(f"{name} of RoundTemporalBlock must be at least 1, found {getattr(self, name)}.")
        if not 0 <= self.keep_rounding <= 1:
            raise SpecError(f"keep_rounding must be from 0 to 1, found {self.keep_rounding}.")

    def run(self, job: Job) -> Figures:
        blocks, evaluations = self._blocks(job)
        names = list(blocks[0].layers)
        own = {name: layer for name, layer in quantized_layers(job.denoiser).items() if name in names}
        rounded = [n for n in names if getattr(own[n], "weight_quantizer", None) is not None]
        if not rounded:
            return {"layers": names, "outputs": len(blocks[0].targets), "losses": {}, "evaluations": evaluations}
        weights = rounding_targets(job, rounded)
        with without_input_quantizers(job.denoiser):
            before = _mean_loss(blocks, own)  # as it was rounded; the relaxed start has next to no loss
        for name in rounded:
            layer = own[name]
            assert isinstance(layer, QuantizedLayer)
            soften_(layer, weights[name], self.keep_rounding)
        soft = list(soft_roundings(own).values())
        optimizer = adam([rounding.alpha for rounding in soft], self.lr)
        generator = job.run.generator("temporal")
        with (
            without_input_quantizers(job.denoiser),
            candidates_kept(soft),
            job.run.progress.track("Rounding the temporal block", self.iterations) as advance,
        ):
            for iteration in range(self.iterations):
                block = blocks[int(torch.randint(len(blocks), (1,), generator=generator))]
                loss = _loss(block, own)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                beta = annealed_beta(iteration / self.iterations, self.warmup) if self.round_weight else None
                if beta is not None:
                    for one in soft:
                        one.regularise_(beta, self.round_weight)
                optimizer.step()
                advance(1)
            for name in rounded:
                layer = own[name]
                assert isinstance(layer, QuantizedLayer)
                harden_soft_(layer)
            after = _mean_loss(blocks, own)
        losses = {"before": before, "after": after}
        return {"layers": names, "outputs": len(blocks[0].targets), "losses": losses, "evaluations": evaluations}

    def _blocks(self, job: Job) -> tuple[list[TemporalBlock], int]:
        """The block over the whole schedule, in mini-batches, and the evaluations of the network that it took."""
        trajectories: list[Trajectory] = job.handed["trajectories"]
        images = min(self.images, sum(trajectory.images for trajectory in trajectories))
        steps = range(len(trajectories[0].steps))
        chosen = at_steps(trajectories, [(step, image) for step in steps for image in range(images)])
        parts = -(-len(chosen) // self.batch)
        clock = clocked(job.denoiser)
        names = _linear_names(job)
        blocks = []
        for part in range(parts):
            # Every parts-th entry, so that each mini-batch has steps from all of the schedule.
            args, kwargs = inputs(trajectories, chosen, range(part, len(chosen), parts))
            blocks.append(trace(job.full_precision, names, args, kwargs, (clock.argument, clock.position)))
        return blocks, len(chosen)


def _loss(block: TemporalBlock, layers: Mapping[str, nn.Module]) -> Tensor:
    """The sum over the block's outputs of their reconstruction losses."""
    found = block.run(layers)
    losses = [reconstruction_loss(y, wanted) for y, (_, wanted) in zip(found, block.targets, strict=True)]
    return torch.stack(losses).sum()


@torch.no_grad()
def _mean_loss(blocks: Sequence[TemporalBlock], layers: Mapping[str, nn.Module]) -> float:
    return sum(float(_loss(block, layers)) for block in blocks) / len(blocks)


@dataclass(frozen=True)
class RoundOtherBlocks(RoundBlocks):
    """`RoundBlocks`, with the weights of the temporal block left as they are."""

    def run(self, job: Job) -> Figures:
        names = temporal_layers(job)
        with settled(job.denoiser, names):
            figures = super().run(job)
        return {**figures, "settled": names}


@dataclass(frozen=True)
class FitStepRanges:
    """Give every timestep activation ranges of its own, observed behind the quantized weights.

    layers: "temporal" for those of the temporal block, "all" for every layer.
    rule: "ema" for a running minimum and maximum over mini-batches, as recorded, of momentum 0.95; "minmax" and "mse"
        as for weights, over all samples of the step.
    samples: images to observe at every step, whole mini-batches of them.

    Ranges that are found at run time stay as they are. A layer that reads the sample itself covers all that it saw and
    a margin (`ranges.SAMPLE_MARGIN`), whatever the rule.
    """

    layers: Literal["temporal", "all"] = "all"
    rule: StepRangeRule = "ema"
    samples: int = 256

    needs: ClassVar[frozenset[str]] = frozenset({"trajectories", "plan", "model"})
    gives: ClassVar[frozenset[str]] = frozenset({"model"})
    replaces_input_quantizers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, value, allowed in (("layers", self.layers, ("temporal", "all")), ("rule", self.rule, RULES)):
            if value not in allowed:
                raise SpecError(
                    f"{name} must be one of {', '.join(allowed)}, found {value!r}.{nearest(str(value), allowed)}"
                )
        if self.samples < 1:
            raise SpecError(f"FitStepRanges needs at least one sample, found {self.samples}.")

    def run(self, job: Job) -> Figures:
        plan: Plan = job.handed["plan"]
        names = temporal_layers(job) if self.layers == "temporal" else list(plan)
        clock, layers = clocked(job.denoiser), quantized_layers(job.denoiser)
        chosen: list[Trajectory] = []
        for trajectory in job.handed["trajectories"]:
            if sum(one.images for one in chosen) < self.samples:
                chosen.append(trajectory)
        evaluations = 0
        steps = len(chosen[0].steps)
        with (
            observing(job.denoiser, plan, clock, job.run.generator("step ranges")) as observers,
            job.run.progress.track("Observing step by step", steps) as advance,
            torch.no_grad(),
        ):
            seen = {place: _Running() for place in observers if place[0] in names}
            for index in range(steps):
                for trajectory in chosen:
                    for call in trajectory.steps[index].calls:
                        job.denoiser(*call.args, **call.kwargs)
                        evaluations += call.prediction.shape[0]
                        for place, running in seen.items():
                            running.add(observers[place], keep=self.rule == "mse")
                advance(1)
        for name in names:
            for attribute, spec in operand_specs(plan[name]):
                if spec.dynamic:
                    if getattr(layers[name], attribute) is None:
                        setattr(layers[name], attribute, DynamicQuantizer(spec))
                    continue
                params = self._params(spec, observers[name, attribute], seen[name, attribute], clock.bins, name)
                quantizer = InputQuantizer(spec, clock, params, torch.arange(clock.bins))
                setattr(layers[name], attribute, quantizer.to(clock.edges.device))
        return {"layers": len(names), "rows": clock.bins, "evaluations": evaluations}

    def _params(self, spec: QuantSpec, observer: Observer, seen: _Running, bins: int, name: str) -> QParams:
        """Scale and zero point of every timestep bin, `[N]` each."""
        missing = [number for number in range(bins) if number not in seen.extremes]
        if missing:
            raise CalibrationError(f"Layer {name} saw no recorded call in the timestep bins {missing}.")
        if self.rule == "mse" and not observer.keeps_sample(spec):
            return observer.params(spec, torch.arange(bins), "mse", f"An activation of {name}")
        ends = seen.average if self.rule == "ema" and not observer.keeps_sample(spec) else seen.extremes
        if observer.keeps_sample(spec):
            fitted = [observer.fit(torch.tensor(ends[number]), spec, "minmax") for number in range(bins)]
            return QParams(*(torch.cat([values.reshape(-1) for values in one]) for one in zip(*fitted, strict=True)))
        low, high = torch.tensor([ends[number] for number in range(bins)]).unbind(1)
        return choose_qparams(low, high, spec)


@dataclass
class _Running:
    """What one quantizer's place has seen: (low, high) by timestep bin, over everything and as a running average."""

    extremes: dict[int, tuple[float, float]] = field(default_factory=dict)
    average: dict[int, tuple[float, float]] = field(default_factory=dict)

    def add(self, observer: Observer, *, keep: bool) -> None:
        """Take up the extremes of the call that has just been made, and let the observer begin anew.

        keep: leave it the values that it drew.
        """
        for number, (low, high) in observer.extremes.items():
            before = self.extremes.get(number, (low, high))
            self.extremes[number] = (min(low, before[0]), max(high, before[1]))
            old = self.average.get(number, (low, high))
            self.average[number] = (
                MOMENTUM * old[0] + (1 - MOMENTUM) * low,
                MOMENTUM * old[1] + (1 - MOMENTUM) * high,
            )
        if keep:
            return
        observer.forget()
