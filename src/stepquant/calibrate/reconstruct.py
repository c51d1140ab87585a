"""Fitting units of the network: block-wise reconstruction, and the parts that every optimising stage shares.

Source of the loop: BRECQ (Li et al. 2021) as in the public code of Q-Diffusion.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stepquant.calibrate.rounding import (
    SoftRounding,
    annealed_beta,
    cosine,
    harden_soft_,
    input_scales,
    relative_groups,
    soften_,
)
from stepquant.calibrate.select import CalibrationSet, inputs
from stepquant.errors import CalibrationError, SpecError
from stepquant.model.clock import clock_of
from stepquant.model.layer import QuantizedLayer, QuantizedMatmul
from stepquant.model.quantizer import InputQuantizer
from stepquant.model.surgery import Unit, quantized_layers, units_of
from stepquant.recipe import Figures, Job

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
    "reconstruction_loss",
    "soft_roundings",
    "soften_all_",
    "without_input_quantizers",
]

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of one forward call of the denoiser."""

Captured = tuple[tuple[Any, ...], dict[str, Any], Tensor]
"""Arguments and first output of one call of a unit."""


def reconstruction_loss(found: Tensor, wanted: Tensor, norm: float = 2.0) -> Tensor:
    """|found - wanted|^norm summed over axis 1, averaged over everything else (BRECQ, Q-Diffusion)."""
    return (found - wanted).abs().pow(norm).sum(1).mean()


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


class _Reached(Exception):  # noqa: N818 - control flow: leaves a forward call once the unit's values are known
    pass


@dataclass
class _Cache:
    """A unit's calls over the calibration set: arguments with samples concatenated, outputs `[N, ...]`, bins `[N]`."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: Tensor
    bins: Tensor

    def batch(self, chosen: Tensor) -> tuple[tuple[Any, ...], dict[str, Any], Tensor, Tensor]:
        count = len(self.bins)

        def take(value: Any) -> Any:
            if isinstance(value, Tensor) and value.ndim and value.shape[0] == count:
                return value[chosen]
            return value

        kwargs = {key: take(value) for key, value in self.kwargs.items()}
        return tuple(take(value) for value in self.args), kwargs, self.outputs[chosen], self.bins[chosen]


def _first_tensor(value: Any) -> Tensor:
    while isinstance(value, tuple | list):
        value = value[0]
    assert isinstance(value, Tensor)
    return value


def _capture(
    denoiser: nn.Module, units: Sequence[str], batches: Sequence[Call], with_inputs: bool
) -> dict[str, list[Captured]]:
    """What units are called with and return on each batch. A forward call ends as soon as all of them have run."""
    seen: dict[str, list[Captured]] = {unit: [] for unit in units}

    def hook_of(unit: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if len(seen[unit]) < len(done):  # a module that runs twice is fitted on its first call
                seen[unit].append((args if with_inputs else (), kwargs if with_inputs else {}, _first_tensor(output)))
            if all(len(calls) == len(done) for calls in seen.values()):
                raise _Reached

        return hook

    done: list[int] = []
    handles = [denoiser.get_submodule(unit).register_forward_hook(hook_of(unit), with_kwargs=True) for unit in units]
    try:
        with torch.no_grad():
            for number, (args, kwargs) in enumerate(batches):
                done.append(number)
                try:
                    denoiser(*args, **kwargs)
                except _Reached:
                    continue
                missing = [unit for unit, calls in seen.items() if len(calls) < len(done)]
                raise CalibrationError(f"{', '.join(missing)} did not run in a forward call of the denoiser.")
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _join(values: list[Any], sizes: list[int]) -> Any:
    """Concatenate per-sample tensors of several calls; anything else must be the same in all of them."""
    first = values[0]
    if isinstance(first, Tensor) and first.ndim and all(v.shape[0] == n for v, n in zip(values, sizes, strict=True)):
        return torch.cat(values)
    return first


def _caches(
    quantized: nn.Module,
    full_precision: nn.Module,
    units: Sequence[str],
    batches: Sequence[Call],
    bins: Tensor,
    quantized_prefix: bool,
) -> dict[str, _Cache]:
    """Inputs from the quantized or the full-precision prefix, outputs always from full precision."""
    if not units:
        return {}
    wanted = _capture(full_precision, units, batches, with_inputs=not quantized_prefix)
    given = _capture(quantized, units, batches, with_inputs=True) if quantized_prefix else wanted
    return {unit: _joined(given[unit], [output for _, _, output in wanted[unit]], bins) for unit in units}


def _joined(given: list[Captured], outputs: list[Tensor], bins: Tensor) -> _Cache:
    sizes = [int(output.shape[0]) for output in outputs]
    args = tuple(_join([call[0][i] for call in given], sizes) for i in range(len(given[0][0])))
    kwargs = {key: _join([call[1][key] for call in given], sizes) for key in given[0][1]}
    return _Cache(args, kwargs, torch.cat(outputs), bins)


@dataclass(frozen=True)
class Fit:
    """How one unit is optimised: Adam for `iterations` mini-batches of `batch` calibration samples.

    norm: the power p of the reconstruction loss. round_weight, warmup: AdaRound's regulariser.
    """

    iterations: int
    batch: int
    lr: float
    norm: float
    round_weight: float = 0.0
    warmup: float = 0.0


@dataclass(frozen=True)
class RoundBlocks:
    """Learn the rounding of every unit's weights so that the unit's output stays, activations in full precision.

    Source: Li et al. 2021 (BRECQ) and the public code of Q-Diffusion (Li et al. 2023) for every default.
    quantized_prefix: inputs of a unit come from the already rounded prefix (`asym=True`), targets from full precision.
    together: units that are captured in one pass over the calibration set. With more than one, the prefix of the later
        ones is rounded only up to the first; passes, which dominate the time of short runs, become fewer.
    """

    iterations: int = 20_000
    batch: int = 32
    lr: float = 1e-3
    round_weight: float = 0.01
    warmup: float = 0.2
    quantized_prefix: bool = True
    together: int = 1

    needs: ClassVar[frozenset[str]] = frozenset({"trajectories", "calibration", "plan", "model"})
    gives: ClassVar[frozenset[str]] = frozenset({"model"})

    def __post_init__(self) -> None:
        _check_loop(self.iterations, self.batch, self.together)

    def run(self, job: Job) -> Figures:
        layers = {n: x for n, x in quantized_layers(job.denoiser).items() if isinstance(x, QuantizedLayer)}
        soften_all_(job, layers, keep=0.0)
        units = units_of(job.denoiser, list(job.handed["plan"]))
        chosen: CalibrationSet = job.handed["calibration"]
        batches = list(_batches(job.handed["trajectories"], chosen, self.batch))
        bins = _bins_of(job.denoiser, batches)
        fit = Fit(self.iterations, self.batch, self.lr, 2.0, self.round_weight, self.warmup)
        losses: dict[str, Any] = {}
        with (
            job.run.progress.track("Rounding weights, block by block", len(units)) as advance,
            without_input_quantizers(job.denoiser),
        ):
            for first in range(0, len(units), self.together):
                group = units[first : first + self.together]
                losses |= self._group(job, group, layers, batches, bins, first, fit)
                advance(len(group))
        evaluations = _evaluations(fit, len(chosen), len(units), self.together, 2 if self.quantized_prefix else 1)
        return {"losses": losses, "evaluations": evaluations}

    def _group(
        self,
        job: Job,
        group: Sequence[Unit],
        layers: Mapping[str, QuantizedLayer],
        batches: Sequence[Call],
        bins: Tensor,
        first: int,
        fit: Fit,
    ) -> Figures:
        """Round the units that are captured together. Kept as a whole: a resumed run captures what this one did."""
        soft = {
            unit.name: soft_roundings({name: layers[name] for name in unit.layers if name in layers}) for unit in group
        }
        kept = job.keeper.load(f"units-{first}") if job.keeper else None
        if kept is not None:
            for roundings in soft.values():
                for name, rounding in roundings.items():
                    rounding.alpha.data.copy_(kept[0][name])
            losses = kept[1]
        else:
            wanted = [unit.name for unit in group if soft[unit.name]]
            caches = _caches(job.denoiser, job.full_precision, wanted, batches, bins, self.quantized_prefix)
            losses = {}
            for number, unit in enumerate(group, start=first):
                if soft[unit.name]:
                    cache = caches.pop(unit.name)
                    losses[unit.name] = fit_unit(job, unit, cache, fit, soft=soft[unit.name], stream=("round", number))
            if job.keeper:
                tensors = {name: r.alpha.detach() for roundings in soft.values() for name, r in roundings.items()}
                job.keeper.save(f"units-{first}", tensors, losses)
        for roundings in soft.values():
            for name in roundings:
                harden_soft_(layers[name])
        return losses


@dataclass(frozen=True)
class ScaleBlocks:
    """Learn every unit's activation scales so that the unit's output stays, inputs from full precision.

    lr is relative to each scale (`relative_groups`), with cosine decay to 0. together: as in RoundBlocks; it changes
    only time and memory here.
    Source: the activation stage of Q-Diffusion's public code (5000 iterations, p = 2.4).
    """

    iterations: int = 5_000
    batch: int = 32
    lr: float = 4e-3
    norm: float = 2.4
    together: int = 4

    needs: ClassVar[frozenset[str]] = frozenset({"trajectories", "calibration", "plan", "model"})
    gives: ClassVar[frozenset[str]] = frozenset({"model"})

    def __post_init__(self) -> None:
        _check_loop(self.iterations, self.batch, self.together)

    def run(self, job: Job) -> Figures:
        layers = quantized_layers(job.denoiser)
        units = units_of(job.denoiser, list(job.handed["plan"]))
        chosen: CalibrationSet = job.handed["calibration"]
        batches = list(_batches(job.handed["trajectories"], chosen, self.batch))
        bins = _bins_of(job.denoiser, batches)
        fit = Fit(self.iterations, self.batch, self.lr, self.norm)
        losses: dict[str, Any] = {}
        with job.run.progress.track("Fitting activation scales, block by block", len(units)) as advance:
            for first in range(0, len(units), self.together):
                group = units[first : first + self.together]
                losses |= self._group(job, group, layers, batches, bins, first, fit)
                advance(len(group))
        evaluations = _evaluations(fit, len(chosen), len(units), self.together, 1)
        return {"losses": losses, "evaluations": evaluations}

    def _group(
        self,
        job: Job,
        group: Sequence[Unit],
        layers: Mapping[str, QuantizedLayer | QuantizedMatmul],
        batches: Sequence[Call],
        bins: Tensor,
        first: int,
        fit: Fit,
    ) -> Figures:
        scales = {unit.name: input_scales({name: layers[name] for name in unit.layers}) for unit in group}
        kept = job.keeper.load(f"units-{first}") if job.keeper else None
        if kept is not None:
            for quantizers in scales.values():
                for name, quantizer in quantizers.items():
                    quantizer.scale.copy_(kept[0][name])
            return kept[1]
        wanted = [unit.name for unit in group if scales[unit.name]]
        caches = _caches(job.denoiser, job.full_precision, wanted, batches, bins, quantized_prefix=False)
        losses: Figures = {}
        for number, unit in enumerate(group, start=first):
            if scales[unit.name]:
                cache = caches.pop(unit.name)
                losses[unit.name] = fit_unit(job, unit, cache, fit, scales=scales[unit.name], stream=("scale", number))
        if job.keeper:
            tensors = {name: q.scale.detach() for quantizers in scales.values() for name, q in quantizers.items()}
            job.keeper.save(f"units-{first}", tensors, losses)
        return losses


def _check_loop(iterations: int, batch: int, together: int) -> None:
    if iterations < 1 or batch < 1 or together < 1:
        raise SpecError(f"iterations, batch and together must be at least 1, found {iterations}, {batch}, {together}.")


def _evaluations(fit: Fit, samples: int, units: int, together: int, passes: int) -> int:
    """Work in forward passes of one image.

    One iteration of every unit is one forward and backward (worth two forwards) of the whole network; a capture runs
    the network up to its units, half of it on average.
    """
    return 3 * fit.batch * fit.iterations + passes * samples * -(-units // together) // 2


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
    weights = float_layers(job.full_precision, names)
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
) -> Figures:
    """Optimise the rounding variables or the activation scales of one unit; returns its loss before and after."""
    module, clock = job.denoiser.get_submodule(unit.name), clocked(job.denoiser)
    roundings, quantizers = list((soft or {}).values()), dict(scales or {})
    if roundings:
        optimizer = torch.optim.Adam([rounding.alpha for rounding in roundings], lr=fit.lr)
    else:
        optimizer = torch.optim.Adam(relative_groups(quantizers, fit.lr))
    least = {name: quantizer.scale.detach() / 10 for name, quantizer in quantizers.items()}
    generator = job.run.generator("blocks", *stream)

    def loss_of(chosen: Tensor) -> Tensor:
        args, kwargs, wanted, at = cache.batch(chosen)
        clock.bin = at
        return reconstruction_loss(_first_tensor(module(*args, **kwargs)), wanted, fit.norm)

    count = len(cache.bins)
    probe = torch.arange(min(count, fit.batch))
    with torch.no_grad():
        before = float(loss_of(probe))
    for iteration in range(fit.iterations):
        progress = iteration / fit.iterations
        loss = loss_of(torch.randint(count, (min(fit.batch, count),), generator=generator))
        beta = annealed_beta(progress, fit.warmup)
        if beta is not None:
            for rounding in roundings:
                loss = loss + fit.round_weight * rounding.regulariser(beta)
        if quantizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * cosine(progress)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        clamp_scales_(quantizers, least)
    for quantizer in quantizers.values():
        quantizer.scale.requires_grad_(False)
        quantizer.scale.grad = None
    with torch.no_grad():
        after = float(loss_of(probe))
    return {"before": before, "after": after}


def _batches(trajectories: Sequence[Any], chosen: CalibrationSet, size: int) -> Iterator[Call]:
    for start in range(0, len(chosen), size):
        positions = range(start, min(start + size, len(chosen)))
        args, kwargs = inputs(trajectories, chosen, positions)
        yield tuple(args), dict(kwargs)


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
