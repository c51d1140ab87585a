"""What a number of bits in one place does to the end of sampling, to first order, for every place and number at once.

Let y_kl be the output of layer l in step k of a recorded full-precision trajectory, and d_klc the error that candidate
c (these many bits for this weight, or for these activations, rounded to nearest) makes in it at the full-precision
input. To first order the final state moves by

    dx_T(c) = sum_k J_kl d_klc,     J_kl = dx_T / dy_kl

A weight has the same error in every step, so the terms of the sum do not cancel as independent ones would: they are
added first and squared afterwards. Where activations may have other bits in other groups of timesteps, every group has
a sum of its own, over its steps; errors of different groups then count as independent, as those of layers do. For a
random unit vector v of the D values of x_T

    E_v (v^T dx_T)^2 = |dx_T|^2 / D = rms(dx_T)^2                    (Hutchinson's trace estimator of dx_T dx_T^T / D)
    v^T dx_T(c) = sum_k < g_kl, d_klc >,    g_kl = J_kl^T v          all g_kl from one pass backwards

The pass is the adjoint recursion of `calibrate.final_state` from lambda_T = v. Every step starts from the recorded
state, so there is nothing to replay, and one step's graph is in memory at a time. The error of activations needs no
layer: < g, W d_x > = < W^T g, d_x >.

Scores of a candidate, all in units of rms(x_T)^2 but the last two, means over images and vectors:

    final           (sum_k < g_kl, d_klc >)^2
    incoherent      sum_k < g_kl, d_klc >^2           as if the errors of steps were independent
    mse             |d_klc|^2 / n_l                   the layer's own output, the usual baseline
    relative_mse    sum |d_klc|^2 / sum |y_kl|^2      the same, relative to the output (the inverse of an SQNR)
    decoupled       measured by sampling, `calibrate.decoupled`

Ours are the coherent sum, the projections, and what follows from a batch: a layer that runs once for all images of a
batch (a time embedding of one row) has no output per image; its products belong to their sum, and since the v of
images are independent, E (sum_i s_i)^2 = sum_i E s_i^2, so every image gets an n-th of the square.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from stepquant.calibrate.final_state import Adjoints, final_drifts, final_states
from stepquant.calibrate.ranges import Observer, RangeRule, observing, weight_params
from stepquant.calibrate.reconstruct import clocked
from stepquant.calibrate.step_groups import TimedScheme, Timeline, joined
from stepquant.calibrate.steps import DenoiserCall
from stepquant.calibrate.trajectory import State, Trajectory, advance, state_at
from stepquant.errors import CalibrationError
from stepquant.model.layer import QuantizedLayer, QuantizedMatmul
from stepquant.model.quantizer import InputQuantizer, WeightQuantizer
from stepquant.model.surgery import Plan, operand_specs, quantized_layers
from stepquant.numerics.affine import QParams
from stepquant.numerics.spec import QuantSpec, weight_at
from stepquant.recipe import Keeper
from stepquant.run import Run

__all__ = ["SCORES", "Item", "Operand", "Probe", "Score", "Scores", "final_drift", "final_scores", "output_scores"]

Operand = Literal["weights", "activations"]
Score = Literal["final", "incoherent", "mse", "relative_mse", "decoupled"]
SCORES: tuple[str, ...] = get_args(Score)

KEPT_VALUES = 16_384
"""Activations kept for each range, over all calls. Ours: ranges of seven bit widths are fitted to them."""


@dataclass(frozen=True)
class Item:
    """Something that gets a number of bits: a layer's weight, or all its quantized activations.

    bits: candidates, ascending.
    group: of timesteps that activations are meant in, noise first; None is all of them, and full precision is a
        candidate too, which a quantizer with bits over time cannot have.
    """

    layer: str
    operand: Operand
    bits: tuple[int, ...]
    group: int | None = None

    @property
    def candidates(self) -> tuple[int | None, ...]:
        """With full precision (None) where it may be chosen, ascending."""
        return self.bits if self.group is not None else (*self.bits, None)

    def __str__(self) -> str:
        part = "" if self.group is None else f" in group {self.group + 1}"
        return f"{self.layer} {self.operand}{part}"


Scores = dict[Item, dict[int, float]]
"""Item -> bits -> score. Full precision scores 0."""


class Probe:
    """A copy of the full-precision network that can be quantized to nearest by any plan, and back.

    denoiser: its layers are in place (`swap_layers_`) with weights in full precision and no quantizers.
    plan: a spec for every operand that may ever be quantized; other bits are taken by `at`.
    rule: of the ranges.
    until: ends of all groups of timesteps but the last; the activations of each have ranges of their own.
    """

    timeline: Timeline
    groups: tuple[int, ...]
    """Of timesteps, for every bin. Both are known once trajectories have been observed."""

    def __init__(self, denoiser: nn.Module, plan: Plan, rule: RangeRule, until: tuple[float, ...] = ()) -> None:
        self.denoiser = denoiser
        self.plan = plan
        self.rule = rule
        self.until = until
        self.layers = quantized_layers(denoiser)
        self.weights = {name: x.weight.detach() for name, x in self.layers.items() if isinstance(x, QuantizedLayer)}
        self.elements: dict[str, float] = {}
        self._observers: dict[tuple[str, str], Observer] = {}
        self._params: dict[tuple[str, str, QuantSpec, tuple[int, ...]], QParams] = {}
        self._installed: Plan = {}

    @torch.no_grad()
    def observe(self, trajectories: Sequence[Trajectory], run: Run) -> int:
        """See every activation of the recorded calls once, in full precision. Returns network evaluations in images.

        elements: of a layer's quantized operands, for one row of the batch and one call.
        """
        calls = [call for trajectory in trajectories for step in trajectory.steps for call in step.calls]
        clock = clocked(self.denoiser)
        self.timeline = Timeline.of(clock, trajectories)
        self.groups = self.timeline.groups_of(self.until)
        with (
            observing(self.denoiser, self.plan, clock, run.generator("allocate")) as observers,
            run.progress.track("Observing activations in full precision", len(calls)) as done,
        ):
            for observer in observers.values():
                observer.keep = max(1, KEPT_VALUES // len(calls))
            for number, call in enumerate(calls):
                counted = self.layers if number == 0 else {}
                with _counting(counted, call.prediction.shape[0], self.elements):
                    self.denoiser(*call.args, **call.kwargs)
                done(1)
        self._observers = observers
        return sum(call.prediction.shape[0] for call in calls)

    def sample_rows(self) -> dict[str, tuple[tuple[int, ...], int]]:
        """Layers that read the sample itself: how many rows `FitInputRanges` gives each group, and of how many bins."""
        found = {}
        for (name, _), seen in self._observers.items():
            if seen.reads_sample:
                rows = [sum(self.groups[at] == group for at in seen.seen) for group in range(max(self.groups) + 1)]
                found[name] = tuple(rows), len(self.groups)
        return found

    def group_of(self, call: DenoiserCall) -> int:
        """The group of timesteps that a call belongs to. Raises CalibrationError for a call in several of them."""
        clock = clocked(self.denoiser)
        value = call.kwargs[clock.argument] if clock.argument in call.kwargs else call.args[clock.position]
        clock.set(torch.as_tensor(value).detach())
        found = {self.groups[int(at)] for at in clock.bin}
        if len(found) > 1:
            raise CalibrationError(
                "The images of one call are at timesteps of different groups, so that bits cannot be found for each of "
                "them: leave step_groups at 1."
            )
        return found.pop()

    def weight_params(self, name: str, spec: QuantSpec) -> QParams:
        """Scale and zero point of a weight, fitted once."""
        key = (name, "weight", spec, ())
        if key not in self._params:
            self._params[key] = weight_params(self.weights[name], spec, self.rule)
        return self._params[key]

    def input_params(self, name: str, attribute: str, spec: QuantSpec, row: Sequence[bool] | None = None) -> QParams:
        """Scale and zero point of an activation, one row for all timestep bins or for those in `row`, fitted once."""
        bins = tuple(at for at in range(len(self.groups)) if row is None or row[at])
        key = (name, attribute, spec, bins)
        if key not in self._params:
            rows = torch.full((len(self.groups),), -1)
            rows[list(bins)] = 0
            seen = self._observers[name, attribute]
            self._params[key] = seen.params(spec, rows, self.rule, f"The {attribute} of {name}")
        return self._params[key]

    def quantizer(self, name: str, attribute: str, spec: QuantSpec, group: int | None = None) -> InputQuantizer:
        """A quantizer for one of a layer's operands, with the range of all timesteps or of a group of them."""
        clock = clocked(self.denoiser)
        row = None if group is None else [own == group for own in self.groups]
        return InputQuantizer(spec, clock, self.input_params(name, attribute, spec, row)).to(clock.edges.device)

    def timed_quantizer(self, name: str, attribute: str, spec: QuantSpec, scheme: TimedScheme) -> InputQuantizer:
        """A quantizer with bits over time, each with a range of its own."""
        clock, groups = clocked(self.denoiser), self.timeline.groups_of(scheme.until)
        bits = [entry.bits for entry in scheme.over_time]
        rows = [
            self.input_params(name, attribute, replace(spec, bits=own), [group == number for group in groups])
            for number, own in enumerate(bits)
        ]
        quantizer = InputQuantizer(spec, clock, joined(rows), torch.tensor(groups), bits=bits)
        return quantizer.to(clock.edges.device)

    @torch.no_grad()
    def weight_error(self, name: str, spec: QuantSpec) -> Tensor:
        """Rounded weight minus weight."""
        weight = self.weights[name]
        return self._rounded(name, spec) - weight

    def _rounded(self, name: str, spec: QuantSpec) -> Tensor:
        weight = self.weights[name]
        quantizer = WeightQuantizer(spec, self.weight_params(name, spec)).to(weight.device)
        rounded: Tensor = quantizer(weight)
        return rounded

    @torch.no_grad()
    def install(self, plan: Plan) -> None:
        """Quantize by `plan`, rounding to nearest; what it does not name is in full precision. `{}` undoes all."""
        for name, layer in self.layers.items():
            wanted, present = plan.get(name), self._installed.get(name)
            if wanted == present:
                continue
            if isinstance(layer, QuantizedLayer):
                spec = None if wanted is None else wanted.weight
                layer.weight.data = self.weights[name] if spec is None else self._rounded(name, spec)
            elif isinstance(layer, QuantizedMatmul):
                layer.second_quantizer = None
            layer.input_quantizer = None
            for attribute, spec in operand_specs(wanted) if wanted is not None else []:
                if isinstance(wanted, TimedScheme):
                    setattr(layer, attribute, self.timed_quantizer(name, attribute, spec, wanted))
                else:
                    setattr(layer, attribute, self.quantizer(name, attribute, spec))
        self._installed = dict(plan)


@contextmanager
def _counting(layers: Mapping[str, nn.Module], rows: int, into: dict[str, float]) -> Iterator[None]:
    """Count the values that enter each layer, for each of `rows` rows."""

    def counter(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            into[name] = into.get(name, 0.0) + sum(x.numel() for x in args) / rows

        return hook

    handles = [layer.register_forward_pre_hook(counter(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Tap:
    """One run of one layer.

    rows, group: of the denoiser's call; of timesteps. inputs: operands as they came. output: only where no graph is
        wanted.
    shifts: zeros added to the operands and to the output; derivatives with respect to them are J^T of the two.
    """

    name: str
    rows: int
    group: int
    inputs: tuple[Tensor, ...]
    output: Tensor | None
    input_shifts: tuple[Tensor, ...] = ()
    output_shift: Tensor | None = None

    @property
    def leaves(self) -> list[Tensor]:
        """The shifts that there are."""
        return [leaf for leaf in (*self.input_shifts, self.output_shift) if leaf is not None]


@contextmanager
def _tapped(
    probe: Probe, items: Sequence[Item], recorded: Sequence[DenoiserCall], *, shifted: bool
) -> Iterator[list[_Tap]]:
    """Note every run of the items' layers; with `shifted`, put leaves into the graph where items make errors.

    recorded: calls of the step that runs inside, in their order.
    """
    operands: dict[str, set[Operand]] = {}
    for item in items:
        operands.setdefault(item.layer, set()).add(item.operand)
    taps: list[_Tap] = []
    calls = iter([(call.prediction.shape[0], probe.group_of(call)) for call in recorded])
    present = [(0, 0)]

    def next_call(_module: nn.Module, _args: Any) -> None:
        present[0] = next(calls)

    def before(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            tap = _Tap(name, *present[0], tuple(x.detach() for x in args), None)
            taps.append(tap)
            if not shifted or "activations" not in operands[name]:
                return args
            tap.input_shifts = tuple(torch.zeros_like(x).requires_grad_() for x in args)
            return tuple(x + shift for x, shift in zip(args, tap.input_shifts, strict=True))

        return hook

    def after(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            tap = next(tap for tap in reversed(taps) if tap.name == name)
            if not shifted:
                tap.output = output.detach()
                return output
            if "weights" not in operands[name]:
                return output
            tap.output_shift = torch.zeros_like(output).requires_grad_()
            return output + tap.output_shift

        return hook

    handles = [probe.denoiser.register_forward_pre_hook(next_call)]
    for name in operands:
        handles.append(probe.layers[name].register_forward_pre_hook(before(name)))
        handles.append(probe.layers[name].register_forward_hook(after(name)))
    try:
        yield taps
    finally:
        for handle in handles:
            handle.remove()


def _operand_errors(probe: Probe, item: Item, bits: int, tap: _Tap) -> list[Tensor]:
    """Rounded minus unrounded, of each of a layer's operands."""
    errors = []
    specs = dict(operand_specs(probe.plan[item.layer]))
    for attribute, x in zip(("input_quantizer", "second_quantizer"), tap.inputs, strict=False):
        spec = replace(specs[attribute], bits=bits)
        errors.append(probe.quantizer(item.layer, attribute, spec, item.group)(x) - x)
    return errors


def _weight_spec(probe: Probe, item: Item, bits: int) -> QuantSpec:
    spec = probe.plan[item.layer].weight
    assert spec is not None
    return weight_at(spec, bits)


def _per_image(products: Tensor, rows: int, images: int) -> Tensor:
    """Sums [J, images] in float64 of products [J, n] of n rows, or of `rows` rows with parts of a row side by side.

    Where rows cannot be told apart, every image gets 1 / sqrt(images) of the sum (see the module's docstring).
    """
    count = products.shape[1]
    if count % rows or rows % images:
        return (products.double().sum(1, keepdim=True) / math.sqrt(images)).expand(-1, images)
    of_rows = products.double().reshape(len(products), rows, -1).sum(2)
    return of_rows.reshape(len(products), -1, images).sum(1)  # row r belongs to image r modulo the images


def _dots(gradients: Sequence[Tensor | None], error: Tensor, rows: int, images: int) -> Tensor:
    """< g_j, error > of every image, [J, images] float64."""
    flat = error.reshape(error.shape[0], -1).to(torch.promote_types(error.dtype, torch.float32))
    nothing = torch.zeros(len(flat), dtype=flat.dtype, device=flat.device)
    products = [nothing if g is None else (g.reshape_as(flat) * flat).sum(1) for g in gradients]
    return _per_image(torch.stack(products), rows, images).cpu()


def _directions(trajectory: Trajectory, count: int, run: Run, number: int) -> list[Tensor]:
    """Random vectors like the final sample, of unit length for every image."""
    final = trajectory.steps[-1].next_sample
    images, generator = len(trajectory.seeds), run.generator("projections", number)
    drawn = torch.randn(count, *final.shape, generator=generator, dtype=torch.float64)
    parts = drawn.reshape(count, len(final) // images, images, -1)
    unit = parts / parts.square().sum((1, 3), keepdim=True).sqrt()
    return list(unit.reshape(drawn.shape).to(final.device, final.dtype))


def final_scores(
    probe: Probe,
    trajectories: Sequence[Trajectory],
    items: Sequence[Item],
    *,
    projections: int,
    run: Run,
    keeper: Keeper | None = None,
) -> tuple[Scores, Scores, int]:
    """Scores "final" and "incoherent", and the network evaluations spent, in images (a backward pass counts two).

    trajectories: sealed. projections: J random vectors for every image.
    keeper: finished trajectories are kept there.
    """
    bits = max((len(item.bits) for item in items), default=0)
    coherent = torch.zeros(len(items), bits, dtype=torch.float64)
    incoherent = torch.zeros_like(coherent)
    evaluations = 0
    total = sum(len(trajectory.steps) for trajectory in trajectories)
    with run.progress.track("Sensitivity of the final state", total) as done:
        for number, trajectory in enumerate(trajectories):
            images = len(trajectory.seeds)
            kept = None if keeper is None else keeper.load(f"sensitivity-{number}")
            if kept is None:
                directions = _directions(trajectory, projections, run, number)
                sums = torch.zeros(2, len(items), bits, projections, images, dtype=torch.float64)
                for products in _products(probe, trajectory, items, directions, bits):
                    sums += torch.stack([products, products.square()])
                    done(1)
                found = torch.stack([sums[0].square(), sums[1]]).sum((-2, -1))
                if keeper is not None:
                    keeper.save(f"sensitivity-{number}", {"sums": found}, {})
            else:
                found = kept[0]["sums"]
                done(len(trajectory.steps))
            coherent += found[0]
            incoherent += found[1]
            own = len({item.operand for item in items} & {"weights"}) * bits
            rows = sum(call.prediction.shape[0] for step in trajectory.steps for call in step.calls)
            evaluations += rows * (1 + 2 * projections + own)
    count = projections * sum(len(trajectory.seeds) for trajectory in trajectories)
    return _table(items, coherent / count), _table(items, incoherent / count), evaluations


def _table(items: Sequence[Item], values: Tensor) -> Scores:
    return {
        item: dict(zip(item.bits, row[: len(item.bits)].tolist(), strict=True))
        for item, row in zip(items, values, strict=True)
    }


def _products(
    probe: Probe, trajectory: Trajectory, items: Sequence[Item], directions: Sequence[Tensor], bits: int
) -> Iterator[Tensor]:
    """v^T J_kl d_klc of every step, the last one first: [items, bits, J, images] float64."""
    adjoints = Adjoints(directions)
    for index in range(len(trajectory.steps) - 1, -1, -1):
        kept: list[_Tap] = []

        def step(state: State, index: int = index, kept: list[_Tap] = kept) -> tuple[State, list[Tensor]]:
            with _tapped(probe, items, trajectory.steps[index].calls, shifted=True) as taps:
                after = advance(probe.denoiser, trajectory, index, state)
            kept += taps
            return after, [leaf for tap in taps for leaf in tap.leaves]

        found = adjoints.pull(state_at(trajectory, index), step, inner=index > 0)
        leaves = [leaf for tap in kept for leaf in tap.leaves]
        by_leaf = {id(leaf): [gradients[place] for gradients in found] for place, leaf in enumerate(leaves)}
        yield _step_products(probe, items, kept, by_leaf, bits, len(directions), len(trajectory.seeds))


def _within(item: Item, taps: Sequence[_Tap]) -> list[_Tap]:
    """The runs at timesteps that the item is about."""
    return [tap for tap in taps if item.group is None or item.group == tap.group]


@torch.no_grad()
def _step_products(
    probe: Probe,
    items: Sequence[Item],
    taps: Sequence[_Tap],
    by_leaf: Mapping[int, Sequence[Tensor | None]],
    bits: int,
    projections: int,
    images: int,
) -> Tensor:
    found = torch.zeros(len(items), bits, projections, images, dtype=torch.float64)
    of_layer: dict[str, list[_Tap]] = {}
    for tap in taps:
        of_layer.setdefault(tap.name, []).append(tap)
    for place, item in enumerate(items):
        for candidate, wanted in enumerate(item.bits):
            own = (
                probe.weight_error(item.layer, _weight_spec(probe, item, wanted)) if item.operand == "weights" else None
            )
            for tap in _within(item, of_layer.get(item.layer, [])):
                if own is not None:
                    layer = probe.layers[item.layer]
                    assert isinstance(layer, QuantizedLayer)
                    errors, leaves = [layer.geometry.apply(tap.inputs[0], own, None)], [tap.output_shift]
                else:
                    errors, leaves = _operand_errors(probe, item, wanted, tap), list(tap.input_shifts)
                for error, leaf in zip(errors, leaves, strict=True):
                    found[place, candidate] += _dots(by_leaf[id(leaf)], error, tap.rows, images)
    return found


@torch.no_grad()
def output_scores(
    probe: Probe, trajectories: Sequence[Trajectory], items: Sequence[Item], *, run: Run
) -> tuple[Scores, Scores, int]:
    """Scores "mse" and "relative_mse", and the network evaluations spent, in images."""
    errors: dict[tuple[Item, int], float] = {}
    energy: dict[str, float] = {}
    values: dict[str, int] = {}
    evaluations = 0
    total = sum(len(trajectory.steps) for trajectory in trajectories)
    with run.progress.track("Errors of layers", total) as done:
        for trajectory in trajectories:
            for step in trajectory.steps:
                rows = [call.prediction.shape[0] for call in step.calls]
                with _tapped(probe, items, step.calls, shifted=False) as taps:
                    for call in step.calls:
                        probe.denoiser(*call.args, **call.kwargs)
                for tap in taps:
                    assert tap.output is not None
                    energy[tap.name] = energy.get(tap.name, 0.0) + float(tap.output.double().square().sum())
                    values[tap.name] = values.get(tap.name, 0) + tap.output.numel()
                for item in items:
                    meant = _within(item, [tap for tap in taps if tap.name == item.layer])
                    for bits in item.bits:
                        own = sum(_output_error(probe, item, bits, tap) for tap in meant)
                        errors[item, bits] = errors.get((item, bits), 0.0) + own
                evaluations += sum(rows) * (1 + sum(len(item.bits) for item in items) // max(1, len(energy)))
                done(1)
    mse = {item: {b: errors[item, b] / values[item.layer] for b in item.bits} for item in items}
    relative = {item: {b: errors[item, b] / max(energy[item.layer], 1e-300) for b in item.bits} for item in items}
    return mse, relative, evaluations


def _output_error(probe: Probe, item: Item, bits: int, tap: _Tap) -> float:
    """Squared error of a layer's output, summed over everything."""
    layer = probe.layers[item.layer]
    if isinstance(layer, QuantizedMatmul):
        rounded = [x + error for x, error in zip(tap.inputs, _operand_errors(probe, item, bits, tap), strict=True)]
        error = rounded[0] @ rounded[1] - tap.inputs[0] @ tap.inputs[1]
    elif item.operand == "weights":
        own = probe.weight_error(item.layer, _weight_spec(probe, item, bits))
        error = layer.geometry.apply(tap.inputs[0], own, None)
    else:
        (own,) = _operand_errors(probe, item, bits, tap)
        error = layer.geometry.apply(own, layer.weight, None)
    return float(error.double().square().sum())


def final_drift(denoiser: nn.Module, trajectories: Sequence[Trajectory], advance_: Callable[[int], None]) -> Tensor:
    """Final drift of a free run from the recorded noise, of every image, `[N]`; see `calibrate.final_state`."""
    return final_drifts(final_states(denoiser, trajectories, done=advance_), trajectories)
