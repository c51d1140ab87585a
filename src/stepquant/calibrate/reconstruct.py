"""Fitting units of the network: block-wise reconstruction, and the parts that every optimising stage shares.

Source of the loop: BRECQ (Li et al. 2021) as in the public code of Q-Diffusion.

Differs from the papers: they know units with one output. A joint block (SD3, Flux) returns two, the text's states and
the image's; all of them are fitted, and each loss L_k is divided by the power P_k of what it should be:

    L = mean_k(P) * mean_k(L_k / P_k)        P_k: L_k of an output that is zero, over all calibration samples

so that no output counts for more because it is longer or larger, and L has the size of a single output's loss beside
the rounding's regulariser. Of a single output, L is L_1.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from stepquant.calibrate.captured import Column, Rows, RowsOnDisk, taken
from stepquant.calibrate.offload import brought
from stepquant.calibrate.prefix import IN_MEMORY, Prefix
from stepquant.calibrate.qdrop import QDrop, dropping, mixed
from stepquant.calibrate.ranges import sample_readers
from stepquant.calibrate.rounding import (
    ScaleGradient,
    SoftRounding,
    adam,
    annealed_beta,
    candidates_kept,
    check_scale_gradient,
    cosine,
    fix_scales_,
    harden_soft_,
    input_scales,
    relative_groups,
    soften_,
)
from stepquant.calibrate.select import CalibrationSet, HeldOut, hold_out, inputs
from stepquant.calibrate.weighting import GroupLoss, SampleWeighting, Theta, UnitLosses, WeightLearner
from stepquant.errors import CalibrationError, SpecError
from stepquant.model.clock import clock_of
from stepquant.model.layer import QuantizedLayer, QuantizedMatmul
from stepquant.model.quantizer import InputQuantizer
from stepquant.model.surgery import Unit, operand_specs, quantized_layers, units_of
from stepquant.numerics.spec import LayerScheme
from stepquant.processes import ALONE, Processes, on_device
from stepquant.recipe import Figures, Job
from stepquant.run import Spill

__all__ = [
    "Fit",
    "RoundBlocks",
    "ScaleBlocks",
    "adam_state",
    "clamp_scales_",
    "clocked",
    "fit_unit",
    "float_layers",
    "load_adam_state_",
    "output_tensors",
    "readers_of_sample",
    "reconstruction_loss",
    "rounding_targets",
    "sample_losses",
    "soft_roundings",
    "soften_all_",
    "without_input_quantizers",
]

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of one forward call of the denoiser."""

Compute = Literal["float32", "bfloat16"]

Captured = tuple[tuple[Any, ...], dict[str, Any], tuple[Tensor, ...], int]
"""Arguments and outputs of one call of a unit, and of how many samples it is."""


def reconstruction_loss(found: Tensor, wanted: Tensor, norm: float = 2.0, weights: Tensor | None = None) -> Tensor:
    """|found - wanted|^norm summed over axis 1, averaged over everything else (BRECQ, Q-Diffusion).

    weights: `[B]`, of each sample in the average; with mean 1 over the calibration set they keep the loss's scale.
    """
    if norm == 2 and weights is None:
        return F.mse_loss(found, wanted) * found.shape[1]  # the same in fewer passes
    difference = found - wanted
    distance = (difference.square() if norm == 2 else difference.abs().pow(norm)).sum(1)
    if weights is not None:
        distance = distance * weights.to(distance).reshape(-1, *(1,) * (distance.ndim - 1))
    return distance.mean()


def sample_losses(found: Tensor, wanted: Tensor, norm: float = 2.0) -> Tensor:
    """The reconstruction loss of each sample, `[B]`; its mean is `reconstruction_loss`."""
    return (found - wanted).abs().pow(norm).sum(1).reshape(len(found), -1).mean(1)


def balanced(losses: Sequence[Tensor], powers: Sequence[float]) -> Tensor:
    """One loss from those of a unit's outputs, of any shape; see the formula at the top.

    powers: P_k. An output that should be zero has none, and counts as it is.
    """
    if len(losses) == 1:
        return losses[0]
    mean = sum(powers) / len(powers)
    return torch.stack(
        [loss * (mean / power if power else 1.0) for loss, power in zip(losses, powers, strict=True)]
    ).mean(0)


def clocked(denoiser: nn.Module) -> Any:
    """The clock of a placed denoiser."""
    clock = clock_of(denoiser)
    if clock is None:
        raise CalibrationError("The model has no step clock yet: run the stage Place before this one.")
    return clock


def float_layers(full_precision: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """Full-precision weights of layers, by name."""
    modules = dict(full_precision.named_modules())
    return {name: modules[name].weight.detach() for name in names}


def rounding_targets(job: Job, names: Sequence[str]) -> dict[str, Tensor]:
    """What the weights of layers stand for in full precision, by name: transforms and branches folded in."""
    layers = quantized_layers(job.denoiser)
    found = {}
    for name, weight in float_layers(job.full_precision, names).items():
        layer = layers[name]
        assert isinstance(layer, QuantizedLayer)
        found[name] = layer.folded(weight.to(layer.weight.device))
    return found


@contextmanager
def without_input_quantizers(denoiser: nn.Module) -> Iterator[None]:
    """Inside, activations stay in floating point."""
    before = []
    for layer in quantized_layers(denoiser).values():
        for attribute in ("input_quantizer", "second_quantizer"):
            if getattr(layer, attribute, None) is not None:
                before.append((layer, attribute, getattr(layer, attribute)))
                setattr(layer, attribute, None)
    try:
        yield
    finally:
        for layer, attribute, quantizer in before:
            setattr(layer, attribute, quantizer)


def clamp_scales_(quantizers: Mapping[str, InputQuantizer], least: Mapping[str, Tensor]) -> None:
    """Keep learnt scales positive: an Adam step may not take one below a tenth of where it started."""
    with torch.no_grad():
        for name, quantizer in quantizers.items():
            quantizer.scale.clamp_(min=least[name])


def adam_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An Adam optimizer's state as flat tensors."""
    return {
        f"adam.{number}.{key}": value.detach().clone()
        for number, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }


def load_adam_state_(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Undo `adam_state` on an optimizer over the same parameters in the same order."""
    packed = optimizer.state_dict()
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("adam."):
            _, number, key = name.split(".")
            state.setdefault(int(number), {})[key] = value
    packed["state"] = state
    optimizer.load_state_dict(packed)


MOST_BITS_SHORT = 4
"""Weights of more bits are not fitted in bfloat16, whose eight bits are too near to theirs."""


class _Reached(Exception):  # noqa: N818 - control flow: leaves a forward call once the unit's values are known
    pass


@dataclass
class _Cache:
    """A unit's calls over the calibration set: arguments with samples concatenated, outputs `[N, ...]`, bins `[N]`.

    Large ones lie on disk, and give minibatches like those in memory.

    float_inputs: the arguments behind the full-precision prefix, where they are needed beside the quantized ones.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Rows, ...]
    bins: Tensor
    float_inputs: Call | None = None

    def expect(self, chosen: Tensor) -> None:
        """Have read from disk what a minibatch will want."""
        calls = [(self.args, self.kwargs), *([self.float_inputs] if self.float_inputs else [])]
        for value in (*self.outputs, *(value for args, kwargs in calls for value in (*args, *kwargs.values()))):
            if isinstance(value, RowsOnDisk):
                value.expect(chosen)

    def batch(self, chosen: Tensor) -> tuple[tuple[Any, ...], dict[str, Any], tuple[Tensor, ...], Tensor]:
        args, kwargs = self._taken((self.args, self.kwargs), chosen)
        return args, kwargs, tuple(taken(output, chosen) for output in self.outputs), self.bins[chosen]

    def powers(self, norm: float, size: int) -> list[float]:
        """What the reconstruction loss of each output would be if it were zero; `size` samples are read at a time."""
        if len(self.outputs) == 1:
            return [1.0]  # a single output is balanced with nothing

        def power(output: Rows) -> float:
            count = len(self.bins)
            parts = (output[torch.arange(first, min(first + size, count))] for first in range(0, count, size))
            sums = (sample_losses(torch.zeros_like(part), part, norm).double().sum() for part in parts)
            return float(sum(sums)) / count

        return [power(output) for output in self.outputs]

    def float_batch(self, chosen: Tensor) -> Call:
        """The arguments of the same samples behind the full-precision prefix."""
        assert self.float_inputs is not None
        return self._taken(self.float_inputs, chosen)

    def _taken(self, call: Call, chosen: Tensor) -> Call:
        count = len(self.bins)

        def take(value: Any) -> Any:
            if isinstance(value, Rows) and len(value.shape) and value.shape[0] == count:
                return taken(value, chosen)
            return value

        return tuple(take(value) for value in call[0]), {key: take(value) for key, value in call[1].items()}


def output_tensors(value: Any) -> tuple[Tensor, ...]:
    """The floating tensors of a unit's output that have a row for each sample, as the first one has.

    The last block of a joint transformer (SD3) returns None where the text's states were.
    Raises CalibrationError if there is none.
    """
    found = [tensor for tensor in _tensors_in(value) if tensor.is_floating_point() and tensor.ndim]
    if not found:
        raise CalibrationError(
            f"A unit to be fitted returned {type(value).__name__} without a floating-point tensor, so there is nothing "
            "to match."
        )
    return tuple(tensor for tensor in found if tensor.shape[0] == found[0].shape[0])


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list | Mapping):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors_in(part)


def _captured(
    denoiser: nn.Module,
    units: Sequence[str],
    batches: Iterable[tuple[int, Call]],
    with_inputs: bool,
    prefix: Prefix | None = None,
    sizes: Sequence[int] | None = None,
) -> Iterator[list[Captured]]:
    """What units are called with and return, batch after batch. A forward call ends as soon as all units have run.

    batches: by number. prefix: of the denoiser over all batches; None runs everything before the units.
    sizes: samples of a unit's call, by batch, if outputs are not wanted: then units themselves do not run.
    """
    seen: dict[str, Captured] = {}

    def note(unit: str, call: Captured) -> None:
        seen.setdefault(unit, call)  # a module that runs twice is fitted on its first call
        if len(seen) == len(units):
            raise _Reached

    def after(unit: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            found = output_tensors(output)
            note(unit, (args if with_inputs else (), kwargs if with_inputs else {}, found, int(found[0].shape[0])))

        return denoiser.get_submodule(unit).register_forward_hook(hook, with_kwargs=True)

    def before(unit: str, size: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            note(unit, (args, kwargs, (), size))

        return denoiser.get_submodule(unit).register_forward_pre_hook(hook, with_kwargs=True)

    for number, (args, kwargs) in batches:
        with nullcontext() if prefix is None else prefix.ready(number, units, args, kwargs):
            # After the hooks of the prefix, which keep what the last unit returns.
            handles = [after(unit) if sizes is None else before(unit, sizes[number]) for unit in units]
            try:
                with torch.no_grad(), suppress(_Reached):
                    denoiser(*args, **kwargs)
            finally:
                for handle in handles:
                    handle.remove()
        missing = [unit for unit in units if unit not in seen]
        if missing:
            raise CalibrationError(f"{', '.join(missing)} did not run in a forward call of the denoiser.")
        found = [seen[unit] for unit in units]
        seen.clear()
        yield found


@dataclass
class _Filling:
    """A unit's calls on their way into a cache."""

    args: list[Column]
    kwargs: dict[str, Column]
    outputs: list[Column]

    @classmethod
    def like(cls, call: Captured, folder: Path | None) -> _Filling:
        args, kwargs, found, _ = call
        return cls(
            [Column(folder) for _ in args], {key: Column(folder) for key in kwargs}, [Column(folder) for _ in found]
        )

    def add(self, call: Captured) -> None:
        args, kwargs, outputs, rows = call
        for column, value in zip(self.args, args, strict=True):
            column.add(value, rows)
        for key, column in self.kwargs.items():
            column.add(kwargs[key], rows)
        for column, value in zip(self.outputs, outputs, strict=True):
            column.add(value, rows)

    def call(self) -> Call:
        return tuple(column.joined() for column in self.args), {k: column.joined() for k, column in self.kwargs.items()}


def _bytes_by_row(call: Captured) -> int:
    """Of what a cache keeps of one call."""
    args, kwargs, found, rows = call
    values = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim]
    kept = [value for value in values if value.shape[0] == rows] + list(found)
    return sum(value.numel() * value.element_size() for value in kept)


class _Space:
    """Main memory that is left for caches. bytes: None for as much as there is."""

    def __init__(self, spill: Spill | None) -> None:
        self.bytes = None if spill is None else spill.memory
        self._folder = None if spill is None else spill.folder

    def take(self, bytes_: int) -> Path | None:
        """The folder for caches of this size; None for main memory."""
        if self.bytes is None:
            return None
        if bytes_ > self.bytes:
            return self._folder
        self.bytes -= bytes_
        return None

    def rest(self) -> _Space:
        """What is left, for caches that are dropped before others come."""
        return copy.copy(self)


def _filled(
    denoiser: nn.Module,
    units: Sequence[str],
    batches: Sequence[Call],
    processes: Processes,
    space: _Space,
    *,
    inputs: bool,
    prefix: Prefix | None,
    sizes: Sequence[int] | None = None,
) -> dict[str, _Filling]:
    """What units are called with and return over the calibration set; several processes run every n-th batch each.

    sizes: as in `_captured`, if outputs are not wanted.
    """
    if processes.count == 1:
        calls = _captured(denoiser, units, enumerate(batches), inputs, prefix, sizes)
    else:
        device = next(denoiser.parameters()).device

        def one(number: int) -> list[Captured]:
            return next(_captured(denoiser, units, [(number, batches[number])], inputs, prefix, sizes))

        calls = (on_device(found, device) for found in processes.in_turn(one, range(len(batches))))
    found: dict[str, _Filling] = {}
    for call in calls:
        if not found:
            size = len(batches) * sum(map(_bytes_by_row, call))
            folder = space.take(size)
            found = {unit: _Filling.like(own, folder) for unit, own in zip(units, call, strict=True)}
        for unit, own in zip(units, call, strict=True):
            found[unit].add(own)
    return found


def _caches(
    quantized: nn.Module,
    full_precision: nn.Module,
    units: Sequence[str],
    batches: Sequence[Call],
    bins: Tensor,
    quantized_prefix: bool,
    processes: Processes = ALONE,
    float_inputs: bool = False,
    spill: Spill | None = None,
    prefixes: _Prefixes | None = None,
) -> Iterator[tuple[str, _Cache]]:
    """Each unit with its cache: outputs from full precision, inputs from the quantized or the full-precision prefix.

    The full-precision network runs once for all units; the quantized one runs when a unit is asked for, so that
    units that were rounded meanwhile are in the prefix.

    float_inputs: keep the inputs from full precision as well. spill: where caches lie that its memory does not hold.
    prefixes: of both networks over these batches; None runs everything before a unit.
    """
    if not units:
        return
    space, with_inputs = _Space(spill), float_inputs or not quantized_prefix
    plain_prefix, own_prefix = (None, None) if prefixes is None else (prefixes.full_precision, prefixes.quantized)
    wanted = _filled(full_precision, units, batches, processes, space, inputs=with_inputs, prefix=plain_prefix)

    def cache_of(unit: str) -> _Cache:
        target = wanted.pop(unit)
        sizes = target.outputs[0].sizes
        call = plain = target.call() if with_inputs else None
        if quantized_prefix:
            # Of one unit at a time: each has the space that the targets leave.
            given = _filled(
                quantized, [unit], batches, processes, space.rest(), inputs=True, prefix=own_prefix, sizes=sizes
            )
            call = given[unit].call()
        assert call is not None
        outputs = tuple(output.joined() for output in target.outputs)
        return _Cache(*call, outputs, bins, plain if float_inputs else None)

    for unit in units:
        yield unit, cache_of(unit)


@dataclass(frozen=True)
class _Prefixes:
    """What is before the units of both networks, over one calibration set."""

    full_precision: Prefix
    quantized: Prefix

    @classmethod
    @contextmanager
    def of(cls, job: Job, units: Sequence[Unit]) -> Iterator[_Prefixes]:
        order = [unit.name for unit in units]
        memory, where = (IN_MEMORY // 2, None) if job.spill is None else (0, job.spill.folder)
        with ExitStack() as stack:

            def folder() -> Path:
                return Path(stack.enter_context(TemporaryDirectory(prefix="stepquant-outputs-", dir=where)))

            yield cls(
                Prefix(job.full_precision, order, True, memory=memory, folder=folder),
                Prefix(job.denoiser, order, False, memory=memory, folder=folder),
            )


@dataclass(frozen=True)
class Fit:
    """How one unit is optimised: Adam for `iterations` mini-batches of `batch` calibration samples.

    lr: of the rounding; of activation scales, relative to each, where no rounding is learnt.
    norm: the power p of the reconstruction loss. round_weight, warmup: AdaRound's regulariser.
    compute: what the unit's operators compute in while it is fitted; parameters, loss and optimizer stay in float32.
    qdrop: how rounding and activation scales are learnt together; None learns one or the other.
    layer_weight: of the reconstruction losses of the unit's layers in the loss.
    scale_gradient: how activation scales get theirs (`relative_groups`).
    """

    iterations: int
    batch: int
    lr: float
    norm: float
    round_weight: float = 0.0
    warmup: float = 0.0
    compute: Compute = "float32"
    qdrop: QDrop | None = None
    layer_weight: float = 0.0
    scale_gradient: ScaleGradient = "straight"

    @property
    def float_inputs(self) -> bool:
        """Whether a unit's full-precision inputs are needed beside the quantized ones."""
        return self.layer_weight > 0 or (self.qdrop is not None and self.qdrop.inputs > 0)


@dataclass(frozen=True)
class RoundBlocks:
    """Learn the rounding of every unit's weights so that the unit's output stays.

    Activations are in full precision; with `qdrop` they are quantized, and their scales learn with the rounding.

    Source: Li et al. 2021 (BRECQ) and the public code of Q-Diffusion (Li et al. 2023) for every default.
    quantized_prefix: inputs of a unit come from the already rounded prefix (`asym=True`), targets from full precision.
    together: units whose targets are captured in one pass of the full-precision network; it changes only time and
        memory. Their inputs are captured one unit after another, each behind all that were rounded before.
    weighting: learn how much each calibration sample counts, anew before each unit, on images that are held out of
        the calibration set; None takes the calibration set's own weights.
    keep_rounding: where rounding starts, from 0 (the full-precision fraction) to 1 (the present rounding); above 0.5
        it keeps the directions that an earlier stage such as `RoundLayers` has found.
    compute: "bfloat16" runs the unit's operators in it; parameters, loss and optimizer stay in float32. Units with a
        weight of more than 4 bits are always fitted in float32: what bfloat16 loses is not small beside their error.
    qdrop: quantize activations meanwhile, a random share of their elements at a time. Needs `FitInputRanges` before.
    layer_weight: add this much of the reconstruction loss of every quantized layer of the unit but its last one
        (EDA-DM's fine-grained loss). Layers' targets are those behind the full-precision prefix.
    """

    iterations: int = 20_000
    batch: int = 32
    lr: float = 1e-3
    round_weight: float = 0.01
    warmup: float = 0.2
    quantized_prefix: bool = True
    together: int = 1
    weighting: SampleWeighting | None = None
    keep_rounding: float = 0.0
    compute: Compute = "float32"
    qdrop: QDrop | None = None
    layer_weight: float = 0.0

    needs: ClassVar[frozenset[str]] = frozenset({"trajectories", "calibration", "plan", "model"})
    gives: ClassVar[frozenset[str]] = frozenset({"model"})

    def __post_init__(self) -> None:
        _check_loop(self.iterations, self.batch, self.together)
        if not 0 <= self.keep_rounding <= 1:
            raise SpecError(f"keep_rounding must be from 0 to 1, found {self.keep_rounding}.")
        if self.compute not in ("float32", "bfloat16"):
            raise SpecError(f"compute must be 'float32' or 'bfloat16', found {self.compute!r}.")
        if self.layer_weight < 0:
            raise SpecError(f"layer_weight must not be negative, found {self.layer_weight}.")
        if self.weighting is not None and (self.qdrop is not None or self.layer_weight):
            raise SpecError(
                "Learnt sample weights (weighting) know neither qdrop nor layer_weight: choose one of them."
            )
        if self.qdrop is not None and (not self.quantized_prefix or self.compute != "float32"):
            raise SpecError(
                "qdrop mixes inputs from both prefixes by its own `inputs` and computes in float32: leave "
                "quantized_prefix=True and compute='float32'."
            )

    @property
    def fit(self) -> Fit:
        """How each unit is fitted."""
        return Fit(
            iterations=self.iterations,
            batch=self.batch,
            lr=self.lr,
            norm=2.0,
            round_weight=self.round_weight,
            warmup=self.warmup,
            compute=self.compute,
            qdrop=self.qdrop,
            layer_weight=self.layer_weight,
        )

    def evaluations_for(self, samples: int) -> int:
        """Of the network, for so many calibration samples; without those of learnt weights."""
        return _evaluations(self.fit, samples, networks=2 if self.quantized_prefix else 1)

    def run(self, job: Job) -> Figures:
        every = quantized_layers(job.denoiser)
        if self.qdrop is not None:
            _check_ranges(job, every)
        layers = {n: x for n, x in every.items() if isinstance(x, QuantizedLayer)}
        learns_scales = self.qdrop is not None and self.qdrop.lr_scales
        readers = readers_of_sample(job) if learns_scales else frozenset()
        soften_all_(job, layers, keep=self.keep_rounding)
        units = units_of(job.denoiser, list(job.handed["plan"]))
        samples = _Samples.of(job, self.weighting)
        batches = _batches_of(job, samples.captured, self.batch)
        bins = _bins_of(job.denoiser, batches)
        fit = self.fit
        losses: dict[str, Any] = {}
        with (
            _Prefixes.of(job, units) as prefixes,
            job.run.progress.track("Rounding weights, block by block", len(units)) as advance,
            without_input_quantizers(job.denoiser) if self.qdrop is None else nullcontext(),
        ):
            for first in range(0, len(units), self.together):
                group = units[first : first + self.together]
                losses |= self._group(job, group, layers, batches, bins, first, fit, samples, readers, prefixes)
                advance(len(group))
        evaluations = self.evaluations_for(len(samples.captured))
        if samples.learner is None:
            return {"losses": losses, "evaluations": evaluations}
        blocks = len(losses) * samples.unit_evaluations
        return {
            "losses": losses,
            "evaluations": evaluations + round(blocks / len(units)),  # once through every unit is once the network
            "block_evaluations": blocks,
            "validation_samples": sum(map(len, samples.validation)),
        }

    def _group(
        self,
        job: Job,
        group: Sequence[Unit],
        layers: Mapping[str, QuantizedLayer],
        batches: Sequence[Call],
        bins: Tensor,
        first: int,
        fit: Fit,
        samples: _Samples,
        readers: frozenset[str],
        prefixes: _Prefixes,
    ) -> Figures:
        """Round the units that are captured together. Kept as a whole: a resumed run captures what this one did."""
        soft = {
            unit.name: soft_roundings({name: layers[name] for name in unit.layers if name in layers}) for unit in group
        }
        scales = _learnt_scales(job, group, fit, readers)
        kept = job.keeper.load(f"units-{first}") if job.keeper else None
        if kept is not None:
            for roundings in soft.values():
                for name, rounding in roundings.items():
                    rounding.alpha.data.copy_(kept[0][name])
                    harden_soft_(layers[name])
            for quantizers in scales.values():
                for name, quantizer in quantizers.items():
                    quantizer.scale.copy_(kept[0][_KEPT_SCALE + name])
            losses = kept[1]
            if samples.learner is not None:
                samples.learner.logits = kept[0][_KEPT_LOGITS]
        else:
            wanted = [unit.name for unit in group if soft[unit.name] or scales[unit.name]]
            caches = _caches(
                job.denoiser,
                job.full_precision,
                wanted,
                batches,
                bins,
                self.quantized_prefix,
                job.run.processes,
                fit.float_inputs,
                job.spill,
                prefixes,
            )
            losses = {}
            named = {unit.name: (number, unit) for number, unit in enumerate(group, start=first)}
            for name, cache in caches:
                number, unit = named[name]
                with brought(job, job.denoiser.get_submodule(name)):
                    learnt = samples.learn_(job, unit, cache, soft[name], number)
                    fitted = fit_unit(
                        job,
                        unit,
                        cache,
                        fit,
                        soft=soft[name],
                        scales=scales[name],
                        stream=("round", number),
                        weights=samples.weights,
                    )
                losses[name] = fitted | learnt
                for layer in soft[name]:
                    harden_soft_(layers[layer])  # before the next unit's inputs are captured behind it
                del cache  # before there is another
            if job.keeper:
                tensors = {name: r.alpha.detach() for roundings in soft.values() for name, r in roundings.items()}
                for quantizers in scales.values():
                    tensors |= {_KEPT_SCALE + name: q.scale.detach() for name, q in quantizers.items()}
                if samples.learner is not None:
                    tensors[_KEPT_LOGITS] = samples.learner.logits
                job.keeper.save(f"units-{first}", tensors, losses)
        return losses


_READ_AT_ONCE = 32
"""Samples whose outputs are in memory at once while the power of several outputs is measured."""

_KEPT_LOGITS = ".sample_logits"
"""Where sample weights are kept among roundings by layer name; no layer's name begins with a dot."""

_KEPT_SCALE = ".scale."
"""What precedes `layer.attribute` where a learnt activation scale is kept among roundings."""


def _learnt_scales(
    job: Job, group: Sequence[Unit], fit: Fit, readers: frozenset[str]
) -> dict[str, dict[str, InputQuantizer]]:
    """The activation quantizers of each unit whose scales learn with the rounding."""
    if fit.qdrop is None or not fit.qdrop.lr_scales:
        return {unit.name: {} for unit in group}
    return _scales_of(job, group, readers)


def _scales_of(job: Job, group: Sequence[Unit], readers: frozenset[str]) -> dict[str, dict[str, InputQuantizer]]:
    layers = quantized_layers(job.denoiser)
    return {unit.name: input_scales({name: layers[name] for name in unit.layers}, readers) for unit in group}


def readers_of_sample(job: Job) -> frozenset[str]:
    """`sample_readers`, by one of the recorded calls; the one batch it takes is not among a stage's `evaluations`."""
    call = job.handed["trajectories"][0].steps[0].calls[0]
    return sample_readers(job.denoiser, call.args, call.kwargs)


def _check_ranges(job: Job, layers: Mapping[str, QuantizedLayer | QuantizedMatmul]) -> None:
    """Raise CalibrationError for an activation that should be quantized and has no range yet."""
    plan: dict[str, LayerScheme] = job.handed["plan"]
    for name, layer in layers.items():
        for attribute, _ in operand_specs(plan[name]):
            if getattr(layer, attribute) is None:
                raise CalibrationError(
                    f"The {attribute} of {name} has no range yet, and qdrop quantizes activations: run the stage "
                    "FitInputRanges before this one."
                )


@dataclass(frozen=True)
class _Samples:
    """The samples of a block stage, and how much each counts.

    captured: all entries that units are run on: those that calibrate, then those that validate.
    fixed: weights of the calibrating entries with mean 1, `[N]`; None where all are equal.
    learner: what learns weights; None leaves the fixed ones. The rest is empty without it.
    validation: positions in `captured` of each timestep group.
    """

    captured: CalibrationSet
    fixed: Tensor | None
    learner: WeightLearner | None = None
    validation: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, job: Job, setting: SampleWeighting | None) -> _Samples:
        chosen: CalibrationSet = job.handed["calibration"]
        if setting is None:
            return cls(chosen, _fixed_weights(chosen))
        held: HeldOut = hold_out(job.handed["trajectories"], chosen, share=setting.validation, groups=setting.groups)
        training, groups = held.training, held.groups
        entries = training.entries + tuple(entry for group in groups for entry in group.entries)
        captured = CalibrationSet(entries, training.weights + (1.0,) * (len(entries) - len(training)))
        starts = [*itertools.accumulate(map(len, groups), initial=len(training))]
        validation = tuple(torch.arange(start, stop) for start, stop in itertools.pairwise(starts))
        strata = torch.tensor([step for _, step, _ in training.entries])
        return cls(captured, None, WeightLearner(setting, strata, held.steps, training.weights), validation)

    @property
    def weights(self) -> Tensor | None:
        """Of each sample that calibrates, mean 1, `[N]`; None if all calibrate alike."""
        return self.fixed if self.learner is None else self.learner.weights

    @property
    def unit_evaluations(self) -> int:
        """What learning weights costs at one unit, in forward passes of one image through it."""
        if self.learner is None:
            return 0
        count = sum(map(len, self.validation))
        return self.learner.setting.unit_evaluations(len(self.captured) - count, count, len(self.validation))

    def learn_(self, job: Job, unit: Unit, cache: _Cache, soft: Mapping[str, SoftRounding], number: int) -> Figures:
        """Update the learner's weights for one unit, before it is fitted."""
        if self.learner is None:
            return {}
        theta = _theta_of(job, soft, self.learner.setting.hardness)
        losses = _unit_losses(job, unit, cache, soft, theta, self.validation)
        return {"weighting": self.learner.update_(losses, job.run.generator("weighting", number))}


def _fixed_weights(chosen: CalibrationSet) -> Tensor | None:
    weights = torch.tensor(chosen.weights, dtype=torch.float64)
    return None if bool((weights == weights[0]).all()) else weights / weights.mean()


def _theta_of(job: Job, soft: Mapping[str, SoftRounding], hardness: float) -> Theta:
    """Rounding variables between where they are and their nearest rounding."""
    weights = rounding_targets(job, list(soft))
    found = []
    for name, rounding in soft.items():
        h = rounding.h().detach()
        start = h + hardness * ((rounding.alpha.detach() >= 0).to(h) - h)
        found.append(SoftRounding(rounding.quantizer, weights[name], start).alpha.detach())
    return tuple(found)


def _unit_losses(
    job: Job,
    unit: Unit,
    cache: _Cache,
    soft: Mapping[str, SoftRounding],
    theta: Theta,
    validation: Sequence[Tensor],
) -> UnitLosses:
    """A unit's losses as functions of its rounding variables; the unit itself stays as it is."""
    module, clock = job.denoiser.get_submodule(unit.name), clocked(job.denoiser)
    name_of = {id(parameter): name for name, parameter in module.named_parameters()}
    names = [name_of[id(rounding.alpha)] for rounding in soft.values()]
    powers = cache.powers(2.0, _READ_AT_ONCE)

    def losses(theta: Theta, chosen: Tensor) -> Tensor:
        args, kwargs, wanted, at = cache.batch(chosen)
        clock.bin = at
        output = functional_call(module, dict(zip(names, theta, strict=True)), args, kwargs)
        return balanced(list(map(sample_losses, output_tensors(output), wanted)), powers)

    def of_group(chosen: Tensor) -> GroupLoss:
        return lambda theta: losses(theta, chosen).mean()

    return UnitLosses(theta, losses, tuple(of_group(chosen) for chosen in validation))


@dataclass(frozen=True)
class ScaleBlocks:
    """Learn every unit's activation scales so that the unit's output stays, inputs from full precision.

    lr is relative to the mean over each quantizer's rows (`relative_groups`), with cosine decay to 0. together: as in
    RoundBlocks; it changes only time and memory here. scale_gradient: "straight" as in the public code, or "difference"
    (`relative_groups`).
    Source: the activation stage of Q-Diffusion's public code (5000 iterations, p = 2.4).
    """

    iterations: int = 5_000
    batch: int = 32
    lr: float = 4e-3
    norm: float = 2.4
    together: int = 4
    scale_gradient: ScaleGradient = "difference"

    needs: ClassVar[frozenset[str]] = frozenset({"trajectories", "calibration", "plan", "model"})
    gives: ClassVar[frozenset[str]] = frozenset({"model"})

    def __post_init__(self) -> None:
        _check_loop(self.iterations, self.batch, self.together)
        check_scale_gradient("ScaleBlocks", self.scale_gradient)

    @property
    def fit(self) -> Fit:
        """How each unit is fitted."""
        return Fit(self.iterations, self.batch, self.lr, self.norm, scale_gradient=self.scale_gradient)

    def evaluations_for(self, samples: int) -> int:
        """Of the network, for so many calibration samples."""
        return _evaluations(self.fit, samples, networks=1)

    def run(self, job: Job) -> Figures:
        units = units_of(job.denoiser, list(job.handed["plan"]))
        chosen: CalibrationSet = job.handed["calibration"]
        batches = _batches_of(job, chosen, self.batch)
        bins = _bins_of(job.denoiser, batches)
        fit = self.fit
        readers = readers_of_sample(job)
        losses: dict[str, Any] = {}
        with (
            _Prefixes.of(job, units) as prefixes,
            job.run.progress.track("Fitting activation scales, block by block", len(units)) as advance,
        ):
            for first in range(0, len(units), self.together):
                group = units[first : first + self.together]
                losses |= self._group(job, group, batches, bins, first, fit, _fixed_weights(chosen), readers, prefixes)
                advance(len(group))
        return {"losses": losses, "evaluations": self.evaluations_for(len(chosen))}

    def _group(
        self,
        job: Job,
        group: Sequence[Unit],
        batches: Sequence[Call],
        bins: Tensor,
        first: int,
        fit: Fit,
        weights: Tensor | None,
        readers: frozenset[str],
        prefixes: _Prefixes,
    ) -> Figures:
        scales = _scales_of(job, group, readers)
        kept = job.keeper.load(f"units-{first}") if job.keeper else None
        if kept is not None:
            for quantizers in scales.values():
                for name, quantizer in quantizers.items():
                    quantizer.scale.copy_(kept[0][name])
            return kept[1]
        wanted = [unit.name for unit in group if scales[unit.name]]
        caches = _caches(
            job.denoiser,
            job.full_precision,
            wanted,
            batches,
            bins,
            False,
            job.run.processes,
            spill=job.spill,
            prefixes=prefixes,
        )
        losses: Figures = {}
        named = {unit.name: (number, unit) for number, unit in enumerate(group, start=first)}
        for name, cache in caches:
            number, unit = named[name]
            with brought(job, job.denoiser.get_submodule(name)):
                losses[name] = fit_unit(
                    job, unit, cache, fit, scales=scales[name], stream=("scale", number), weights=weights
                )
            del cache  # before there is another
        if job.keeper:
            tensors = {name: q.scale.detach() for quantizers in scales.values() for name, q in quantizers.items()}
            job.keeper.save(f"units-{first}", tensors, losses)
        return losses


def _check_loop(iterations: int, batch: int, together: int) -> None:
    if iterations < 1 or batch < 1 or together < 1:
        raise SpecError(f"iterations, batch and together must be at least 1, found {iterations}, {batch}, {together}.")


def _evaluations(fit: Fit, samples: int, networks: int) -> int:
    """Work in forward passes of one image.

    One iteration of every unit is one forward and backward (worth two forwards) of the whole network. Each network runs
    once over the calibration set, and over a batch to see what reads what.
    """
    forward = 1 if fit.layer_weight else 0  # of the full-precision unit, for what its layers should return
    return (3 + forward) * fit.batch * fit.iterations + networks * (samples + min(fit.batch, samples))


def soft_roundings(layers: Mapping[str, Any]) -> dict[str, SoftRounding]:
    """The learnable roundings among some layers, by layer name."""
    return {
        name: layer.weight_quantizer
        for name, layer in layers.items()
        if isinstance(layer, QuantizedLayer) and isinstance(layer.weight_quantizer, SoftRounding)
    }


def soften_all_(job: Job, layers: Mapping[str, QuantizedLayer], keep: float) -> None:
    """Reopen the rounding of every layer whose weight is quantized, from its full-precision weight."""
    names = [name for name, layer in layers.items() if layer.weight_quantizer is not None]
    weights = rounding_targets(job, names)
    for name in names:
        soften_(layers[name], weights[name], keep)


def fit_unit(
    job: Job,
    unit: Unit,
    cache: _Cache,
    fit: Fit,
    *,
    stream: tuple[object, ...],
    soft: Mapping[str, SoftRounding] | None = None,
    scales: Mapping[str, InputQuantizer] | None = None,
    weights: Tensor | None = None,
) -> Figures:
    """Optimise the rounding variables, the activation scales or both of one unit; returns its loss before and after.

    The loss that is returned is the unit's own on one mini-batch, of quantized inputs and with nothing dropped.
    Several processes take a part of each mini-batch, and their gradients are added; with `qdrop`, which draws numbers
    for the elements of whole mini-batches, each takes all of it.
    weights: `[N]` with mean 1, of the cache's first N samples, which alone are fitted; None fits all of them alike.
    """
    module, clock = job.denoiser.get_submodule(unit.name), clocked(job.denoiser)
    roundings, quantizers = list((soft or {}).values()), dict(scales or {})
    parameters: list[dict[str, Any]] = []
    if roundings:
        decay = {"base_lr": fit.lr} if fit.qdrop is not None and fit.qdrop.decay_rounding else {}
        parameters.append({"params": [rounding.alpha for rounding in roundings], "lr": fit.lr, **decay})
    if quantizers:
        rate = fit.lr if fit.qdrop is None else fit.qdrop.lr_scales
        parameters += relative_groups(quantizers, rate, fit.scale_gradient)
    optimizer = adam(parameters)
    least = {name: quantizer.scale.detach() / 10 for name, quantizer in quantizers.items()}
    generator = job.run.generator("blocks", *stream)
    processes = job.run.processes if fit.qdrop is None else ALONE

    short = fit.compute == "bfloat16" and all(rounding.quantizer.spec.bits <= MOST_BITS_SHORT for rounding in roundings)

    layers = {name: layer for name, layer in quantized_layers(job.denoiser).items() if name in unit.layers}
    inner = [name for name in unit.layers if isinstance(layers[name], QuantizedLayer)][:-1] if fit.layer_weight else []
    drops = job.run.generator("drop", *stream)
    powers = cache.powers(fit.norm, fit.batch)

    def loss_of(chosen: Tensor, *, short: bool = False, fitting: bool = False) -> Tensor:
        args, kwargs, wanted, at = cache.batch(chosen)
        if fitting and fit.qdrop is not None and fit.qdrop.inputs:
            args, kwargs = _mixed_call((args, kwargs), cache.float_batch(chosen), fit.qdrop.inputs, drops)
        clock.bin = at
        counts = None if weights is None else weights[chosen]
        with (
            torch.autocast(wanted[0].device.type, torch.bfloat16) if short else nullcontext(),
            _outputs_of(job.denoiser, inner) as given,
        ):
            found = output_tensors(module(*args, **kwargs))
        loss = balanced(
            [
                reconstruction_loss(one.float() if short else one, other, fit.norm, counts)
                for one, other in zip(found, wanted, strict=True)
            ],
            powers,
        )
        if fitting and inner:
            loss = loss + fit.layer_weight * _layer_losses(
                job, unit, cache.float_batch(chosen), given, fit.norm, counts
            )
        return loss

    count = len(cache.bins) if weights is None else len(weights)
    probe = torch.arange(min(count, fit.batch))
    with torch.no_grad():
        before = float(loss_of(probe))
    with (
        dropping(layers if fit.qdrop else {}, fit.qdrop.activations if fit.qdrop else 0.0, drops),
        candidates_kept(roundings),
    ):
        following = torch.randint(count, (min(fit.batch, count),), generator=generator)
        for iteration in range(fit.iterations):
            progress = iteration / fit.iterations
            chosen, following = following, torch.randint(count, following.shape, generator=generator)
            cache.expect(following)
            part = processes.part(len(chosen))
            loss = part.share * loss_of(part.of(chosen), short=short, fitting=True)
            for group in optimizer.param_groups:
                if "base_lr" in group:
                    group["lr"] = group["base_lr"] * cosine(progress)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            processes.sum_([p.grad for group in parameters for p in group["params"] if p.grad is not None])
            beta = annealed_beta(progress, fit.warmup) if fit.round_weight else None
            if beta is not None:
                for rounding in roundings:
                    rounding.regularise_(beta, fit.round_weight)
            optimizer.step()
            clamp_scales_(quantizers, least)
    fix_scales_(quantizers)
    with torch.no_grad():
        after = float(loss_of(probe))
    return {"before": before, "after": after}


def _mixed_call(quantized: Call, plain: Call, share: float, generator: torch.Generator) -> Call:
    """A unit's arguments with a random share of the elements of each tensor from the full-precision prefix."""
    (args, kwargs), (plain_args, plain_kwargs) = quantized, plain
    return (
        tuple(mixed(one, other, share, generator) for one, other in zip(args, plain_args, strict=True)),
        {key: mixed(value, plain_kwargs[key], share, generator) for key, value in kwargs.items()},
    )


@contextmanager
def _outputs_of(network: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Inside, the first output of each named layer in a call is noted."""
    found: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            found.setdefault(name, output)

        return hook

    handles = [network.get_submodule(name).register_forward_hook(note(name)) for name in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _layer_losses(
    job: Job, unit: Unit, call: Call, given: Mapping[str, Tensor], norm: float, counts: Tensor | None
) -> Tensor:
    """Sum of the reconstruction losses of layers of one unit.

    call: the unit's full-precision inputs. given: the quantized layers' outputs, by name.
    """
    with torch.no_grad(), _outputs_of(job.full_precision, list(given)) as wanted:
        job.full_precision.get_submodule(unit.name)(*call[0], **call[1])
    return torch.stack([reconstruction_loss(given[name], wanted[name], norm, counts) for name in given]).sum()


class _Batches(Sequence[Call]):
    """The denoiser's arguments for a calibration set, `size` samples at a time, put together whenever asked for."""

    def __init__(self, trajectories: Sequence[Any], chosen: CalibrationSet, size: int) -> None:
        self._trajectories, self._chosen, self._size = trajectories, chosen, size

    def __len__(self) -> int:
        return -(-len(self._chosen) // self._size)

    @overload
    def __getitem__(self, index: int) -> Call: ...
    @overload
    def __getitem__(self, index: slice) -> list[Call]: ...
    def __getitem__(self, index: int | slice) -> Call | list[Call]:
        places = range(len(self))[index]
        if isinstance(places, range):
            return [self[place] for place in places]
        start = places * self._size
        positions = range(start, min(start + self._size, len(self._chosen)))
        args, kwargs = inputs(self._trajectories, self._chosen, positions)
        return tuple(args), dict(kwargs)


def _batches_of(job: Job, chosen: CalibrationSet, size: int) -> Sequence[Call]:
    """Of the job's trajectories; at once where everything may be in memory."""
    batches = _Batches(job.handed["trajectories"], chosen, size)
    return list(batches) if job.spill is None else batches


def _bins_of(denoiser: nn.Module, batches: Sequence[Call]) -> Tensor:
    """The timestep bin of every calibration sample, `[N]`."""
    clock = clocked(denoiser)
    found = []
    for args, kwargs in batches:
        timestep = kwargs[clock.argument] if clock.argument in kwargs else args[clock.position]
        clock.set(timestep)
        size = next(
            value.shape[0] for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim > 1
        )
        found.append(clock.bin.expand(size) if len(clock.bin) == 1 else clock.bin)
    return torch.cat(found)
