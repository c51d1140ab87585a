"""What is free to choose in an allocation of bits, and what every choice costs: bits times elements, and bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from stepquant.calibrate.ranges import SAMPLE_MARGIN_BITS
from stepquant.calibrate.sensitivity import Item
from stepquant.calibrate.step_groups import BitsUntil, TimedScheme, Timeline, timed
from stepquant.model.surgery import Plan, operand_specs
from stepquant.numerics.affine import grouped
from stepquant.numerics.packing import packed_bytes
from stepquant.numerics.spec import LayerScheme, QuantSpec, weight_at
from stepquant.slots import Slot, encoded

__all__ = ["Choice", "Costs", "Problem", "costs_of"]

Choice = dict[Item, int | None]
"""Item -> bits; None is full precision."""

SampleRows = Mapping[str, tuple[tuple[int, ...], int]]
"""Of `Probe.sample_rows`."""

_TABLE_BYTES = 4 + 1
"""Of one row of an activation's range in a checkpoint: a scale and a zero point."""

_DESCRIPTION = 175
_MENTIONS = 3
"""Bytes of a tensor's entries in header, index and manifest (offsets, shape, SHA-256), and how often its name is there.

As measured on checkpoints of the shipped models, to one part in a hundred.
"""


@dataclass(frozen=True)
class Costs:
    """What every item and candidate costs, and what the parts cost that are not free to choose.

    fixed: operand -> (bits times elements of the fixed part, elements of all).
    beside_bytes: about what the denoiser's part of a checkpoint has beside the layers: norms, embeddings, and the
        descriptions of all tensors.
    """

    elements: Mapping[Item, float]
    full_bits: int
    bytes: Mapping[Item, Mapping[int | None, int]]
    fixed: Mapping[str, tuple[float, float]]
    fixed_bytes: int
    beside_bytes: int

    def bits(self, item: Item, bits: int | None) -> float:
        """Bits times elements."""
        return self.elements[item] * (self.full_bits if bits is None else bits)

    def average(self, operand: str, choice: Choice) -> float:
        """Average bits of weights or of activations."""
        fixed, elements = self.fixed[operand]
        own = sum(self.bits(item, bits) for item, bits in choice.items() if item.operand == operand)
        return (fixed + own) / elements if elements else 0.0

    def total_bytes(self, choice: Choice) -> int:
        """Of the layers: what a budget of bytes counts."""
        return self.fixed_bytes + sum(self.bytes[item][bits] for item, bits in choice.items())


@dataclass(frozen=True)
class Problem:
    """What is free to choose. full: spec of every operand at 8 bits. base: the plan before any choice.

    until: ends of all groups of timesteps but the last, where items have groups. timeline: None before anything ran.
    """

    order: tuple[str, ...]
    full: Plan
    base: Plan
    items: tuple[Item, ...]
    weights: Mapping[str, Tensor] = field(repr=False)
    until: tuple[float, ...] = ()
    timeline: Timeline | None = None

    def plan(self, choice: Choice) -> Plan:
        """The base plan with the chosen bits."""
        schemes = {name: self.base.get(name, LayerScheme()) for name in self.order}
        for item, bits in choice.items():
            own, full = schemes[item.layer], self.full[item.layer]
            if item.operand == "weights":
                schemes[item.layer] = replace(own, weight=_weight_at(full.weight, bits))
            elif item.group is None:
                schemes[item.layer] = replace(own, input=_at(full.input, bits), second=_at(full.second, bits))
        for name, over_time in self.over_time(choice).items():
            full = self.full[name]
            schemes[name] = timed(replace(schemes[name], input=full.input, second=full.second), over_time)
        return {name: scheme for name, scheme in schemes.items() if scheme.quantizes}

    def over_time(self, choice: Choice) -> dict[str, tuple[BitsUntil, ...]]:
        """Layer -> bits over time, where groups of timesteps choose."""
        found: dict[str, list[BitsUntil]] = {}
        ends = (*self.until, None)
        for item, bits in sorted(
            ((item, bits) for item, bits in choice.items() if item.group is not None), key=lambda one: one[0].group or 0
        ):
            assert item.group is not None
            assert bits is not None
            found.setdefault(item.layer, []).append(BitsUntil(bits, ends[item.group]))
        return {name: tuple(entries) for name, entries in found.items()}

    def share(self, item: Item) -> float:
        """Of the steps, that an item is about."""
        if item.group is None:
            return 1.0
        groups = max(one.group or 0 for one in self.items) + 1
        return 1 / groups if self.timeline is None else self.timeline.shares(self.until)[item.group]


def _at(spec: QuantSpec | None, bits: int | None) -> QuantSpec | None:
    return None if spec is None or bits is None else replace(spec, bits=bits)


def _bits_of(spec: QuantSpec | None) -> tuple[int, ...]:
    """What the base plan has: may be no candidate, and is compared with."""
    return () if spec is None else (spec.bits,)


def _weight_at(spec: QuantSpec | None, bits: int | None) -> QuantSpec | None:
    return None if spec is None or bits is None else weight_at(spec, bits)


def costs_of(
    problem: Problem,
    denoiser: nn.Module,
    activations: Mapping[str, float],
    sample_rows: SampleRows | None = None,
) -> Costs:
    """activations: values that enter each layer in one evaluation of one image; empty if not known yet.
    sample_rows: None if not known yet.
    """
    sizes = {"weights": {name: float(w.numel()) for name, w in problem.weights.items() if name in problem.order}}
    sizes["activations"] = {name: activations.get(name, 0.0) for name in problem.order}
    dtype = next(iter(problem.weights.values())).dtype
    full_bits = 8 * dtype.itemsize
    free = {(item.operand, item.layer) for item in problem.items}
    fixed = {}
    for operand, elements in sizes.items():
        spent = 0.0
        for name, count in elements.items():
            scheme = problem.base.get(name, LayerScheme())
            spec = scheme.weight if operand == "weights" else scheme.input
            if (operand, name) in free:
                continue
            bits: float = full_bits if spec is None else spec.bits
            if operand == "activations" and spec is not None and problem.timeline is not None:
                bits = problem.timeline.mean_bits(scheme)
            spent += count * bits
        fixed[operand] = (spent, sum(elements.values()))
    modules = dict(denoiser.named_modules())
    of_item: dict[Item, dict[int | None, int]] = {}
    fixed_bytes = 0
    items: dict[tuple[str, str], list[Item]] = {}
    for item in problem.items:
        items.setdefault((item.operand, item.layer), []).append(item)
    for name in problem.order:
        base, full = problem.base.get(name, LayerScheme()), problem.full[name]
        sample = (sample_rows or {}).get(name)
        for item in items.get(("activations", name), ()):
            of_item[item] = {None: 0}
            for bits in (*item.bits, *_bits_of(base.input)):
                specs = [_at(spec, bits) for _, spec in operand_specs(full)]
                of_item[item][bits] = sum(_table_bytes(spec, sample, item.group) for spec in specs)
        bins = 0 if problem.timeline is None else len(problem.timeline.times)
        if ("activations", name) in items:
            wide = sample is not None and sum(sample[0]) > 256
            fixed_bytes += len(operand_specs(full)) * bins * (4 if wide else 1) if problem.until else 0
        elif isinstance(base, TimedScheme):
            fixed_bytes += len(operand_specs(base)) * (len(base.over_time) * _TABLE_BYTES + bins)
        else:
            fixed_bytes += sum(_table_bytes(spec, sample) for _, spec in operand_specs(base))
        if name not in sizes["weights"]:
            continue
        module, weight = modules[name], problem.weights[name]
        fixed_bytes += 0 if module.bias is None else _plain_bytes(module, "bias")
        if ("weights", name) in items:
            (item,) = items["weights", name]
            of_weight = {bits: _weight_at(full.weight, bits) for bits in (*item.bits, *_bits_of(base.weight), None)}
            of_item[item] = {bits: _weight_bytes(module, weight, spec) for bits, spec in of_weight.items()}
        else:
            fixed_bytes += _weight_bytes(module, weight, base.weight)
    of_items = {item: sizes[item.operand][item.layer] * problem.share(item) for item in problem.items}
    return Costs(of_items, full_bits, of_item, fixed, fixed_bytes, _beside_bytes(problem, denoiser))


def _beside_bytes(problem: Problem, denoiser: nn.Module) -> int:
    """Of a checkpoint's denoiser without its layers: see `Costs`."""
    modules = dict(denoiser.named_modules())
    inside = {id(part) for layer in problem.order for part in modules[layer].modules()}
    names, plain = [], 0
    for owner, module in modules.items():  # each once, though it may sit in several places
        if id(module) in inside:
            continue
        for name in module.state_dict():
            if "." not in name:
                names.append(f"{owner}.{name}")
                plain += _plain_bytes(module, name)
    for layer in problem.order:
        if layer in problem.weights:
            names += [f"{layer}.{part}" for part in ("weight", "weight_quantizer.scale", "weight_quantizer.zero_point")]
            names += [] if modules[layer].bias is None else [f"{layer}.bias"]
        for attribute, _ in operand_specs(problem.base.get(layer, LayerScheme())):
            names += [f"{layer}.{attribute}.{part}" for part in ("scale", "zero_point")]
    return plain + sum(_DESCRIPTION + _MENTIONS * len(name) for name in names)


def _table_bytes(
    spec: QuantSpec | None, sample_rows: tuple[tuple[int, ...], int] | None, group: int | None = None
) -> int:
    """Of an activation's ranges, or of those of one group of timesteps; several rows also need the row of every bin,
    which groups have in any case.
    """
    assert spec is not None
    if sample_rows is None or spec.bits < SAMPLE_MARGIN_BITS:
        return _TABLE_BYTES
    of_groups, bins = sample_rows
    if group is not None:
        return of_groups[group] * _TABLE_BYTES
    rows = sum(of_groups)
    return _TABLE_BYTES if rows == 1 else rows * _TABLE_BYTES + bins * (1 if rows <= 256 else 4)


def _weight_bytes(module: nn.Module, weight: Tensor, spec: QuantSpec | None) -> int:
    """Levels, scales and zero points in a checkpoint, or the floating-point weight."""
    if spec is None:
        return _plain_bytes(module, "weight")
    groups = 1 if spec.granularity == "tensor" else grouped(weight, spec).numel() // grouped(weight, spec).shape[-1]
    return packed_bytes(weight.numel(), spec.bits) + groups * (4 + 1)


def _plain_bytes(module: nn.Module, attribute: str) -> int:
    stored = encoded(attribute, Slot(module, attribute, "plain"))
    return stored.numel() * stored.element_size()
