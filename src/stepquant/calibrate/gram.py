"""Rounding every layer for the least error of its own output, from the Gram matrix of its inputs.

With u an input patch `[K]` (im2col), w the full-precision weight of one output and w_hat its rounded one, the layer's
squared error over all samples and positions is a quadratic form of d = w_hat - w:

    L(d) = sum_u (d u)^2 = d G d^T,    G = sum_u u u^T    [K, K]

so the data are needed once, to add up G. Turning weight i to its other neighbour on the grid, a step of delta_i, gives

    L(d + delta_i e_i) - L(d) = 2 delta_i v_i + delta_i^2 G_ii,    v = d G

and afterwards v grows by delta_i G_i. Outputs do not depend on one another, so each takes its best turn at once, until
no turn of a single weight lowers its error. The error falls with every turn and never exceeds that of the start.

G has the square of K numbers: too many for convolutions of a thousand channels. Such a layer is rounded in parts of its
inputs, one after the other, each for the error of the whole output beside the other parts as they are by then. With d_p
the error of the part's weights, u_p what they are multiplied with, and e what the output is off by without the part,

    L(d_p) = d_p G_p d_p^T + 2 d_p r_p^T + sum_u e^2,    G_p = sum_u u_p u_p^T,    r_p = sum_u e u_p^T

so every part takes a pass over the data, and the error falls with each.

Source: the objective is AdaRound's (Nagel et al. 2020, eq. 13), with its two candidates for each weight. The descent
is greedy coordinate descent as in CDQuant (Nair and Suggala 2024), here over those two candidates.

Differs from AdaRound: turns instead of a relaxation that is annealed, so there is neither rate nor regulariser; what
the layer sees comes from the rounded prefix, and its target is the full-precision weight on that same input.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stepquant.calibrate.feedback import LEAST_GAIN, MOST_ROUNDS, Grid, fed_back, settled
from stepquant.calibrate.offload import brought
from stepquant.calibrate.patches import add_products_, transformed_products
from stepquant.calibrate.reconstruct import rounding_targets, without_input_quantizers
from stepquant.calibrate.rounding import SoftRounding
from stepquant.calibrate.select import CalibrationSet, inputs
from stepquant.errors import CalibrationError, SpecError
from stepquant.model.layer import QuantizedLayer
from stepquant.model.quantizer import WeightQuantizer
from stepquant.model.surgery import Unit, quantized_layers, units_of
from stepquant.numerics.affine import grouped
from stepquant.recipe import Figures, Job

__all__ = ["RoundLayers", "descended", "layer_losses"]


@dataclass
class Beside:
    """What the inputs outside of a part add to the loss as a function of the part's error.

    slope: r_p, `[O, K_p]`. constant: sum_u e^2, `[O]`.
    """

    slope: Tensor
    constant: Tensor


class _Gram:
    """Adds up G of a layer, or of a part of its input channels, `[groups, K, K]`, in float32 or the input's wider type.

    beside: what the other channels do, if G is of a part. count: patches seen.
    """

    def __init__(self, layer: QuantizedLayer, part: slice | None = None, error: Tensor | None = None) -> None:
        """part: of every group's channels. error: of the weight as it is now; needed for a part."""
        self.geometry, self.kernel = layer.geometry, tuple(layer.weight.shape[2:])
        self.channels = layer.weight.shape[1]
        self.total: Tensor | None = None
        self.count = 0
        self.beside: Beside | None = None
        self.part = part
        if part is not None:
            assert error is not None
            self.transform = layer.input_transform
            self.outside = error.clone()
            self.outside[:, part] = 0

    @property
    def inputs(self) -> slice:
        """Which of an output's K inputs G is of."""
        first, last, _ = (self.part or slice(None)).indices(self.channels)
        each = math.prod(self.kernel)
        return slice(first * each, last * each)

    def add(self, x: Tensor, weights: Tensor | None) -> None:
        """x: the layer's input. weights: of each sample, or None."""
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        if weights is not None:
            root = weights.to(x).sqrt().repeat_interleave(len(x) // len(weights))
            x = x * root.reshape(-1, *(1,) * (x.ndim - 1))
        if self.part is not None:
            x = self._part_of(x, self.part)
        if self.total is None:
            size = self.inputs.stop - self.inputs.start
            self.total = x.new_zeros(self.geometry.groups, size, size)
        self.count += add_products_(self.total, self.geometry, self.kernel, x)

    def _part_of(self, x: Tensor, part: slice) -> Tensor:
        """The part's channels, transformed. What the others make of the output goes into `beside`."""
        if self.transform is not None:
            x = self.transform(x)  # parts of x_t are not transforms of parts
        self.outside = self.outside.to(x)
        apart = self.geometry.apply(x, self.outside, None)
        axis = self.geometry.channel_axis
        grouped = torch.unflatten(x, axis, (self.geometry.groups, -1))
        x = grouped.narrow(axis, part.start, part.stop - part.start).flatten(axis - 1, axis)
        with torch.enable_grad():
            # Products of inputs with what is at the outputs: a gradient of the weight, whatever the weight.
            weight = torch.zeros_like(self.outside[:, part]).requires_grad_()
            (slope,) = torch.autograd.grad(self.geometry.apply(x.detach(), weight, None), weight, apart)
        found = Beside(slope.flatten(1), apart.movedim(axis, 0).flatten(1).square().sum(1))
        if self.beside is None:
            self.beside = found
        else:
            self.beside.slope += found.slope
            self.beside.constant += found.constant
        return x


def layer_losses(gram: Tensor, error: Tensor, beside: Beside | None = None) -> Tensor:
    """`d G d^T` of every output, `[O]`, or L(d_p) beside other inputs.

    gram: `[groups, K, K]`; error: `[O, K]`, of the weight.
    """
    parts = error.reshape(len(gram), -1, error.shape[1])
    own = (torch.bmm(parts, gram) * parts).sum(2).flatten()
    return own if beside is None else own + 2 * (error * beside.slope).sum(1) + beside.constant


def descended(gram: Tensor, weight: Tensor, now: Tensor, other: Tensor, beside: Beside | None = None) -> Tensor:
    """Which weights to turn from `now` to `other`, `[O, K]`, so that no further single turn lowers an output's loss.

    gram: `[groups, K, K]`. weight: full precision. now, other: both candidates, `[O, K]`. All of a part of the inputs,
    if they are `beside` others. No output's loss is above that of `now`.
    """
    turned = torch.zeros_like(now, dtype=torch.bool)
    diagonal = gram.diagonal(dim1=1, dim2=2)
    groups = torch.arange(len(gram), device=gram.device).repeat_interleave(len(now) // len(gram))
    rows = torch.arange(len(now), device=now.device)
    best = layer_losses(gram, now - weight, beside)
    for _ in range(MOST_ROUNDS):
        error = torch.where(turned, other, now) - weight
        steps = torch.where(turned, now - other, other - now)
        losses = layer_losses(gram, error, beside)
        trial = turned.clone()
        v = torch.bmm(error.reshape(len(gram), -1, error.shape[1]), gram).reshape(error.shape)
        if beside is not None:
            v += beside.slope
        squares = diagonal[groups]
        active = rows
        for _ in range(2 * now.shape[1]):
            step = steps[active]
            gain, place = (step * (2 * v[active] + step * squares[active])).min(1)
            moves = gain < -LEAST_GAIN * losses[active]
            active, place = active[moves], place[moves]
            if not len(active):
                break
            losses[active] += gain[moves]
            v[active] += steps[active, place][:, None] * gram[groups[active], place]
            steps[active, place] *= -1
            trial[active, place] = ~trial[active, place]
        found = layer_losses(gram, torch.where(trial, other, now) - weight, beside)
        better = found < best
        if not bool(better.any()):
            break
        turned[better], best[better] = trial[better], found[better]
    return turned


class _Reached(Exception):  # noqa: N818 - control flow: leaves a forward call once all units have run
    pass


@contextmanager
def _adding_up(
    denoiser: nn.Module, units: Sequence[Unit], grams: Mapping[str, _Gram], sample_weights: list[Tensor | None]
) -> Iterator[None]:
    """Inside, a forward call adds to the Gram matrices and ends with `_Reached` once all units have run.

    sample_weights: its last entry belongs to the call at hand.
    """
    left: set[str] = set()

    def begin(_module: nn.Module, _args: Any) -> None:
        left.update(unit.name for unit in units)

    def adds(gram: _Gram) -> Any:
        return lambda _module, args: gram.add(args[0].detach(), sample_weights[-1])

    def ends(unit: str) -> Any:
        def hook(_module: nn.Module, _args: Any, _output: Any) -> None:
            left.discard(unit)
            if not left:
                raise _Reached

        return hook

    handles = [denoiser.register_forward_pre_hook(begin)]
    handles += [denoiser.get_submodule(name).register_forward_pre_hook(adds(gram)) for name, gram in grams.items()]
    handles += [denoiser.get_submodule(unit.name).register_forward_hook(ends(unit.name)) for unit in units]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class RoundLayers:
    """Round every layer's weights for the least squared error of its own output; a quick start for `RoundBlocks`.

    samples: calibration samples, spread evenly over the calibration set. batch: of them at a time.
    together: units that are captured in one pass; the prefix of the later ones is rounded only up to the first.
    most_inputs: to an output, that are rounded at a time. Layers with more are rounded in parts, with a pass for each.
    feedback: also round with feedback (GPTQ, `stepquant.calibrate.feedback`), where weights may go beyond neighbours
        of their full-precision values; every output keeps the better. Not for recipes with blocks behind, which choose
        between these neighbours. Off until the quality table has it.
    """

    samples: int = 64
    batch: int = 32
    together: int = 1
    most_inputs: int = 6_000
    feedback: bool = False

    needs: ClassVar[frozenset[str]] = frozenset({"trajectories", "calibration", "plan", "model"})
    gives: ClassVar[frozenset[str]] = frozenset({"model"})

    def __post_init__(self) -> None:
        for name in ("samples", "batch", "together", "most_inputs"):
            if getattr(self, name) < 1:
                raise SpecError(f"{name} of RoundLayers must be at least 1, found {getattr(self, name)}.")

    def run(self, job: Job) -> Figures:
        layers = {
            name: layer
            for name, layer in quantized_layers(job.denoiser).items()
            if isinstance(layer, QuantizedLayer) and layer.weight_quantizer is not None
        }
        units = units_of(job.denoiser, list(job.handed["plan"]))
        chosen: CalibrationSet = job.handed["calibration"]
        count = min(self.samples, len(chosen))
        spread = torch.linspace(0, len(chosen) - 1, count).round().long().tolist()
        parts = {name: self._parts(layer) for name, layer in layers.items()}
        losses: dict[str, Any] = {}
        passes = 0
        with (
            job.run.progress.track("Rounding weights, layer by layer", len(units)) as advance,
            without_input_quantizers(job.denoiser),
            torch.no_grad(),
        ):
            for first in range(0, len(units), self.together):
                group = units[first : first + self.together]
                wanted = {n: layers[n] for unit in group for n in unit.layers if n in layers}
                if wanted:
                    losses |= self._group(job, group, wanted, parts, spread, first)
                    passes += max(len(parts[name]) for name in wanted)
                advance(len(group))
        # A pass ends behind its units: half of the network on average.
        in_parts = [name for name, found in parts.items() if len(found) > 1]
        return {"losses": losses, "in_parts": in_parts, "evaluations": passes * count // 2}

    def passes(self, most: Sequence[int]) -> int:
        """Over the data. most: inputs to an output of each unit's largest layer, in order of execution."""
        groups = [most[first : first + self.together] for first in range(0, len(most), self.together)]
        return sum(-(-max(group) // self.most_inputs) for group in groups)

    def _parts(self, layer: QuantizedLayer) -> list[slice]:
        """Of the input channels of a layer's groups, about equally large; one channel at least."""
        channels = layer.weight.shape[1]
        count = min(channels, -(-layer.weight[0].numel() // self.most_inputs))
        return [slice(channels * i // count, channels * (i + 1) // count) for i in range(count)]

    def _group(
        self,
        job: Job,
        group: Sequence[Unit],
        layers: Mapping[str, QuantizedLayer],
        parts: Mapping[str, Sequence[slice]],
        spread: list[int],
        first: int,
    ) -> Figures:
        """Round the layers of units that are captured together."""
        kept = job.keeper.load(f"units-{first}") if job.keeper else None
        if kept is not None:
            for name, layer in layers.items():
                layer.weight.data.copy_(kept[0][name])
            return kept[1]
        weights = rounding_targets(job, list(layers))
        losses: dict[str, Any] = {}
        for turn in range(max(len(parts[name]) for name in layers)):
            now = {name: layer for name, layer in layers.items() if turn < len(parts[name])}
            grams = {}
            for name, layer in now.items():
                if len(parts[name]) == 1:
                    grams[name] = _Gram(layer)
                    continue
                with brought(job, layer):
                    error = layer.weight.detach() - weights[name].to(layer.weight)
                grams[name] = _Gram(layer, parts[name][turn], error)
            self._add_up(job, group, grams, spread)
            for name, layer in now.items():
                gram = grams.pop(name)
                if gram.total is None:
                    continue  # it never ran
                with brought(job, layer):
                    before, after = round_layer_(layer, weights[name].to(layer.weight.device), gram, self.feedback)
                entry = losses.setdefault(name, {"before": before / gram.count})
                entry["after"] = after / gram.count
        if job.keeper:
            job.keeper.save(f"units-{first}", {name: layer.weight for name, layer in layers.items()}, losses)
        return losses

    def _add_up(self, job: Job, group: Sequence[Unit], grams: Mapping[str, _Gram], spread: list[int]) -> None:
        """One pass over the data."""
        chosen: CalibrationSet = job.handed["calibration"]
        of_entry = torch.tensor(chosen.weights, dtype=torch.float64)
        even = bool((of_entry == of_entry[0]).all())
        sample_weights: list[Tensor | None] = [None]
        with _adding_up(job.denoiser, group, grams, sample_weights):
            for start in range(0, len(spread), self.batch):
                positions = spread[start : start + self.batch]
                sample_weights[-1] = None if even else of_entry[positions] / of_entry.mean()
                args, kwargs = inputs(job.handed["trajectories"], chosen, positions)
                try:
                    job.denoiser(*args, **kwargs)
                except _Reached:
                    continue
                names = ", ".join(unit.name for unit in group)
                raise CalibrationError(f"Not all of {names} ran in a forward call of the denoiser.")


def round_layer_(
    layer: QuantizedLayer, full_precision: Tensor, gram: _Gram, feedback: bool = False
) -> tuple[float, float]:
    """Round a hardened layer anew, or the part of it that G is of, for the least `layer_losses`.

    feedback: as in `RoundLayers`. Returns their sum before and after.
    """
    quantizer = layer.weight_quantizer
    if not isinstance(quantizer, WeightQuantizer) or not layer.on_grid:
        raise CalibrationError("Only hardened layers can be rounded: run the stage FitWeightRanges before this one.")
    assert gram.total is not None
    # A part's inputs were transformed before they were added up.
    total = gram.total if gram.part is not None else transformed_products(layer.input_transform, gram.total)
    part = gram.inputs
    soft = SoftRounding(quantizer, full_precision)
    dtype = layer.weight.dtype
    low, high = (
        values.reshape(layer.weight.shape).flatten(1)[:, part].to(dtype).to(total.dtype) for values in soft.candidates()
    )
    weight = full_precision.flatten(1)[:, part].to(total.dtype)
    now = layer.weight.detach().flatten(1)[:, part].to(total.dtype)
    # What is at neither candidate (it was never rounded to a neighbour) has nothing to turn to, and stays.
    other = torch.where(now == low, high, torch.where(now == high, low, now))
    turned = descended(total, weight, now, other, gram.beside)
    found = torch.where(turned, other, now)
    if feedback:
        found = _with_feedback(layer, quantizer, found, weight, total, gram)
    before = float(layer_losses(total, now - weight, gram.beside).sum())
    after = float(layer_losses(total, found - weight, gram.beside).sum())
    rounded = layer.weight.detach().flatten(1).clone()
    rounded[:, part] = found.to(dtype)
    layer.weight.data = rounded.reshape(layer.weight.shape)
    return before, after


def _with_feedback(
    layer: QuantizedLayer, quantizer: WeightQuantizer, turned: Tensor, weight: Tensor, total: Tensor, gram: _Gram
) -> Tensor:
    """The better of `turned` and of rounding with feedback, for every output, both moved on over all levels."""
    shape = grouped(layer.weight, quantizer.spec).shape
    scale, zero_point = (
        values.expand(shape).reshape(layer.weight.shape).flatten(1)[:, gram.inputs].to(total)
        for values in (quantizer.scale, quantizer.zero_point)
    )
    grid = Grid(scale, zero_point, quantizer.spec.qmin, quantizer.spec.qmax)
    slope = gram.beside.slope.to(total) if gram.beside is not None else None
    one, two = (settled(total, weight, begun, grid, slope) for begun in (turned, fed_back(total, weight, grid, slope)))
    losses = [layer_losses(total, values - weight, gram.beside) for values in (one, two)]
    return torch.where((losses[1] < losses[0])[:, None], two, one)
