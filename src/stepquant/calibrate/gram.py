"""Rounding every layer for the least error of its own output, from the Gram matrix of its inputs.

With u an input patch `[K]` (im2col), w the full-precision weight of one output and w_hat its rounded one, the layer's
squared error over all samples and positions is a quadratic form of d = w_hat - w:

    L(d) = sum_u (d u)^2 = d G d^T,    G = sum_u u u^T    [K, K]

so the data are needed once, to add up G. Turning weight i to its other neighbour on the grid, a step of delta_i, gives

    L(d + delta_i e_i) - L(d) = 2 delta_i v_i + delta_i^2 G_ii,    v = d G

and afterwards v grows by delta_i G_i. Outputs do not depend on one another, so each takes its best turn at once, until
no turn of a single weight lowers its error. The error falls with every turn and never exceeds that of the start.

Source: the objective is AdaRound's (Nagel et al. 2020, eq. 13), with its two candidates for each weight. The descent
is greedy coordinate descent as in CDQuant (Nair and Suggala 2024), here over those two candidates.

Differs from AdaRound: turns instead of a relaxation that is annealed, so there is neither rate nor regulariser; what
the layer sees comes from the rounded prefix, and its target is the full-precision weight on that same input.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepquant.calibrate.offload import brought
from stepquant.calibrate.reconstruct import rounding_targets, without_input_quantizers
from stepquant.calibrate.rounding import SoftRounding
from stepquant.calibrate.select import CalibrationSet, inputs
from stepquant.errors import CalibrationError, SpecError
from stepquant.model.layer import Geometry, QuantizedLayer
from stepquant.model.quantizer import WeightQuantizer
from stepquant.model.surgery import Unit, quantized_layers, units_of
from stepquant.model.transform import InputTransform
from stepquant.recipe import Figures, Job

__all__ = ["RoundLayers", "columns", "descended", "layer_losses", "transformed_gram", "transformed_patches"]

CHUNK = 1 << 24
"""Elements of im2col columns that are in memory at a time."""

LEAST_GAIN = 1e-6
"""A turn must lower an output's error by this share of it; what is below is rounding of float32."""

MOST_ROUNDS = 4
"""Descents, each from v computed anew: the last of many turns are decided on a v with their rounding errors."""


def columns(geometry: Geometry, kernel: Sequence[int], x: Tensor) -> Tensor:
    """The patches that a layer multiplies its weight with, `[groups, K, patches]`.

    K runs over a group's channels and the kernel in the order of `weight.flatten(1)`.
    """
    if geometry.kind == "linear":
        return x.reshape(1, -1, x.shape[-1]).mT
    if geometry.padding == "same":
        total = [d * (k - 1) for d, k in zip(geometry.dilation, kernel, strict=True)]
        sides = [(width // 2, width - width // 2) for width in total]
    else:
        assert not isinstance(geometry.padding, str)
        sides = [(width, width) for width in geometry.padding]
    pads = [side for pair in reversed(sides) for side in pair]
    x = F.pad(x, pads, mode="constant" if geometry.padding_mode == "zeros" else geometry.padding_mode)
    ahead = (1,) * (2 - len(kernel))
    if ahead:
        x = x.unsqueeze(2)
    size = ahead + tuple(kernel)
    found = F.unfold(x, size, dilation=ahead + geometry.dilation, stride=ahead + geometry.stride)
    parts = found.reshape(len(x), geometry.groups, -1, found.shape[-1])
    return parts.permute(1, 2, 0, 3).flatten(2)


class _Gram:
    """Adds up G of a layer, `[groups, K, K]`, in float32 or the input's wider type. count: patches seen."""

    def __init__(self, layer: QuantizedLayer) -> None:
        self.geometry, self.kernel = layer.geometry, tuple(layer.weight.shape[2:])
        self.size = layer.weight[0].numel()
        self.total: Tensor | None = None
        self.count = 0

    def add(self, x: Tensor, weights: Tensor | None) -> None:
        """x: the layer's input. weights: of each sample, or None."""
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        if weights is not None:
            root = weights.to(x).sqrt().repeat_interleave(len(x) // len(weights))
            x = x * root.reshape(-1, *(1,) * (x.ndim - 1))
        positions = max(1, x[0].numel() // x.shape[-1 if self.geometry.kind == "linear" else 1])
        for part in torch.split(x, max(1, CHUNK // (positions * self.size * self.geometry.groups))):
            patches = columns(self.geometry, self.kernel, part)
            if self.total is None:
                self.total = patches.new_zeros(len(patches), self.size, self.size)
            self.total.baddbmm_(patches, patches.mT)
            self.count += patches.shape[-1]


def layer_losses(gram: Tensor, error: Tensor) -> Tensor:
    """`d G d^T` of every output, `[O]`. gram: `[groups, K, K]`; error: `[O, K]`, of the weight."""
    parts = error.reshape(len(gram), -1, error.shape[1])
    return (torch.bmm(parts, gram) * parts).sum(2).flatten()


def descended(gram: Tensor, weight: Tensor, now: Tensor, other: Tensor) -> Tensor:
    """Which weights to turn from `now` to `other`, `[O, K]`, so that no further single turn lowers an output's loss.

    gram: `[groups, K, K]`. weight: full precision. now, other: both candidates, `[O, K]`.
    No output's loss is above that of `now`.
    """
    turned = torch.zeros_like(now, dtype=torch.bool)
    diagonal = gram.diagonal(dim1=1, dim2=2)
    groups = torch.arange(len(gram), device=gram.device).repeat_interleave(len(now) // len(gram))
    rows = torch.arange(len(now), device=now.device)
    best = layer_losses(gram, now - weight)
    for _ in range(MOST_ROUNDS):
        error = torch.where(turned, other, now) - weight
        steps = torch.where(turned, now - other, other - now)
        losses = layer_losses(gram, error)
        trial = turned.clone()
        v = torch.bmm(error.reshape(len(gram), -1, error.shape[1]), gram).reshape(error.shape)
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
        found = layer_losses(gram, torch.where(trial, other, now) - weight)
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
    most_inputs: layers with more inputs to an output stay as they are, because G has the square of that many numbers.
    """

    samples: int = 64
    batch: int = 32
    together: int = 1
    most_inputs: int = 6_000

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
        large = [name for name, layer in layers.items() if layer.weight[0].numel() > self.most_inputs]
        losses: dict[str, Any] = {}
        passes = 0
        with (
            job.run.progress.track("Rounding weights, layer by layer", len(units)) as advance,
            without_input_quantizers(job.denoiser),
            torch.no_grad(),
        ):
            for first in range(0, len(units), self.together):
                group = units[first : first + self.together]
                wanted = {n: layers[n] for unit in group for n in unit.layers if n in layers and n not in large}
                if wanted:
                    losses |= self._group(job, group, wanted, spread, first)
                    passes += 1
                advance(len(group))
        # A pass ends behind its units: half of the network on average.
        return {"losses": losses, "too_large": large, "evaluations": passes * count // 2}

    def _group(
        self, job: Job, group: Sequence[Unit], layers: Mapping[str, QuantizedLayer], spread: list[int], first: int
    ) -> Figures:
        """Round the layers of units that are captured together."""
        kept = job.keeper.load(f"units-{first}") if job.keeper else None
        if kept is not None:
            for name, layer in layers.items():
                layer.weight.data.copy_(kept[0][name])
            return kept[1]
        grams = self._grams(job, group, layers, spread)
        weights = rounding_targets(job, list(layers))
        losses: dict[str, Any] = {}
        for name, layer in layers.items():
            gram = grams.pop(name)
            if gram.total is None:
                continue  # it never ran
            with brought(job, layer):
                total = transformed_gram(layer.input_transform, gram.total)
                before, after = round_layer_(layer, weights[name].to(layer.weight.device), total)
            losses[name] = {"before": before / gram.count, "after": after / gram.count}
        if job.keeper:
            job.keeper.save(f"units-{first}", {name: layer.weight for name, layer in layers.items()}, losses)
        return losses

    def _grams(
        self, job: Job, group: Sequence[Unit], layers: Mapping[str, QuantizedLayer], spread: list[int]
    ) -> dict[str, _Gram]:
        chosen: CalibrationSet = job.handed["calibration"]
        of_entry = torch.tensor(chosen.weights, dtype=torch.float64)
        even = bool((of_entry == of_entry[0]).all())
        grams = {name: _Gram(layer) for name, layer in layers.items()}
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
        return grams


def round_layer_(layer: QuantizedLayer, full_precision: Tensor, gram: Tensor) -> tuple[float, float]:
    """Round a hardened layer anew for the least `layer_losses`; returns their sum before and after."""
    quantizer = layer.weight_quantizer
    if not isinstance(quantizer, WeightQuantizer) or not layer.on_grid:
        raise CalibrationError("Only hardened layers can be rounded: run the stage FitWeightRanges before this one.")
    soft = SoftRounding(quantizer, full_precision)
    dtype = layer.weight.dtype
    low, high = (values.reshape(layer.weight.shape).flatten(1).to(dtype).to(gram.dtype) for values in soft.candidates())
    weight, now = full_precision.flatten(1).to(gram.dtype), layer.weight.detach().flatten(1).to(gram.dtype)
    # What is at neither candidate (it was never rounded to a neighbour) has nothing to turn to, and stays.
    other = torch.where(now == low, high, torch.where(now == high, low, now))
    turned = descended(gram, weight, now, other)
    found = torch.where(turned, other, now)
    before = float(layer_losses(gram, now - weight).sum())
    after = float(layer_losses(gram, found - weight).sum())
    layer.weight.data = found.reshape(layer.weight.shape).to(dtype)
    return before, after


def transformed_gram(transform: InputTransform | None, gram: Tensor) -> Tensor:
    """The Gram matrix `[1, K, K]` of x_t, from that of x: T G T^T with x_t = T x."""
    if transform is None:
        return gram
    once = transformed_patches(transform, gram[0])
    return transformed_patches(transform, once.mT.contiguous())[None]


def transformed_patches(transform: InputTransform | None, patches: Tensor) -> Tensor:
    """x_t of patches `[N, K]`."""
    if transform is None:
        return patches
    parts = patches.reshape(len(patches), transform.channels, -1)
    return transform.of_last_axis(parts.mT).mT.reshape(patches.shape)
