"""Moving the difficulty of channels from activations to weights: a vector s for each layer, and a rotation.

    y = W x = (W diag(s) R^T) (R (x / s))

A channel with large activations is divided by a large s_c, and its weights are multiplied by it. Rules for s, with
A_c = max |x_c| over calibration samples, A_tc of those at step t, and W_c = max |w_oc| over outputs and kernel:

    smooth:     s_c = A_c^a / W_c^(1-a)                               SmoothQuant (Xiao et al. 2023, eq. 4)
    search:     the a of `points` + 1 evenly spaced from 0 to 1, or no scaling at all, with the least error of the
                layer's output, weights and inputs rounded            SVDQuant (Li et al. 2025)
    salience:   s_c = sqrt(sum_t eta_t A_tc / W_c)                    PTQ4DiT (Wu et al. 2024)
                eta = softmax over t of -Spearman(A_t, W)
    timesteps:  s_c = clamp(sum_t A_tc r_tc / sum_t A_tc, 1, most),   r_tc = A_tc / min_c' A_tc'    TCAQ-DM
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from stepquant.calibrate.layer_inputs import (
    LayerInputs,
    captured,
    check_patterns,
    chosen_layers,
    originals,
    output_error,
    refit_,
)
from stepquant.calibrate.offload import brought
from stepquant.calibrate.ranges import RangeRule
from stepquant.errors import SpecError, nearest
from stepquant.model.layer import QuantizedLayer
from stepquant.model.surgery import Plan, quantizable
from stepquant.model.transform import InputTransform
from stepquant.numerics.hadamard import block_size
from stepquant.numerics.spec import QuantSpec
from stepquant.recipe import Figures, Job

__all__ = ["BalanceChannels", "BalanceRule", "RotateChannels", "salience_scale", "smooth_scale", "timestep_scale"]

BalanceRule = Literal["smooth", "search", "salience", "timesteps"]
RULES = ("smooth", "search", "salience", "timesteps")

SAMPLES_OF_STEP = 3
"""Calibration samples for each step, for rules whose peaks are by step."""

LEAST_SHARE = 1e-5
"""Peaks count as at least this share of the layer's largest: a channel that is always 0 has no size of its own."""


def _kept_off_zero(peaks: Tensor) -> Tensor:
    """Positive peaks; ones for a tensor that is 0 everywhere."""
    largest = peaks.amax()
    return peaks.clamp(min=float(largest) * LEAST_SHARE) if float(largest) > 0 else torch.ones_like(peaks)


def weight_peaks(weight: Tensor) -> Tensor:
    """W_c of a weight `[O, C, *kernel]`."""
    return weight.detach().float().abs().movedim(1, 0).flatten(1).amax(1)


def smooth_scale(activation: Tensor, weight: Tensor, strength: float) -> Tensor:
    """s of "smooth" `[C]`. activation, weight: peaks `[C]`. strength: a, 0 leaves all difficulty to activations."""
    return _kept_off_zero(activation).pow(strength) / _kept_off_zero(weight).pow(1 - strength)


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 0, those of equal values averaged."""
    _, inverse, counts = torch.unique(values, sorted=True, return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    ranks: Tensor = (ends - (counts.double() + 1) / 2)[inverse]
    return ranks


def spearman(one: Tensor, other: Tensor) -> float:
    """Rank correlation; 0 if one of them is constant."""
    a, b = (ranks - ranks.mean() for ranks in (_ranks(one), _ranks(other)))
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size else 0.0


def salience_scale(activations: Tensor, weight: Tensor) -> Tensor:
    """s of "salience" `[C]`. activations: peaks by step `[T, C]`. weight: peaks `[C]`."""
    rho = torch.tensor([spearman(peaks, weight) for peaks in activations], dtype=torch.float64)
    eta = torch.softmax(-rho, 0).to(activations)
    return (_kept_off_zero(eta @ activations) / _kept_off_zero(weight)).sqrt()


def timestep_scale(activations: Tensor, most: float) -> Tensor:
    """s of "timesteps" `[C]`. activations: peaks by step `[T, C]`. most: R_trunc."""
    peaks = torch.stack([_kept_off_zero(row) for row in activations])
    ratio = peaks / peaks.amin(1, keepdim=True)
    return ((peaks * ratio).sum(0) / peaks.sum(0)).clamp(1, most)


@dataclass(frozen=True)
class BalanceChannels:
    """Divide the input channels of layers by a vector, and multiply their weights by it, rounded to nearest again.

    rule: as above. strength: a of "smooth". points: of "search". most: of "timesteps".
    layers: patterns of names. Layers with groups, and those whose input is not quantized, are left as they are.
    samples: calibration samples to watch, batch of them at a time; "salience" and "timesteps" watch `SAMPLES_OF_STEP`
        times as many as there are steps, if that is more. patches: inputs kept of each layer for "search".
    ranges: of the weights afterwards.
    """

    rule: BalanceRule = "search"
    strength: float = 0.5
    points: int = 20
    most: float = 10.0
    layers: tuple[str, ...] = ("*",)
    samples: int = 64
    batch: int = 32
    patches: int = 512
    ranges: RangeRule = "mse"

    needs: ClassVar[frozenset[str]] = frozenset({"trajectories", "calibration", "plan", "model"})
    gives: ClassVar[frozenset[str]] = frozenset({"model"})

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise SpecError(f"rule must be one of {', '.join(RULES)}, found {self.rule!r}.{nearest(self.rule, RULES)}")
        if not 0 <= self.strength <= 1:
            raise SpecError(f"strength must be from 0 to 1, found {self.strength}.")
        if self.most < 1:
            raise SpecError(f"most must be at least 1, found {self.most}.")
        for name in ("points", "samples", "batch", "patches"):
            if getattr(self, name) < 1:
                raise SpecError(f"{name} of BalanceChannels must be at least 1, found {getattr(self, name)}.")

    def check(self, job: Job) -> None:
        """Patterns that match nothing show before anything is recorded."""
        check_patterns(self.layers, quantizable(job.full_precision))

    def run(self, job: Job) -> Figures:
        plan: Plan = job.handed["plan"]
        layers = {name: layer for name, layer in chosen_layers(job, self.layers).items() if plan[name].input}
        seen, evaluations = captured(
            job,
            list(layers),
            stage="balance",
            samples=self.samples,
            batch=self.batch,
            patches=self.patches,
            of_step=SAMPLES_OF_STEP if self.rule in ("salience", "timesteps") else 0,
        )
        weights = originals(job, layers)
        errors: dict[str, Any] = {}
        with job.run.progress.track("Balancing channels", len(seen)) as advance:
            for name, found in seen.items():
                layer, spec = layers[name], plan[name].input
                with brought(job, layer):
                    weight = weights[name].to(layer.weight.device)
                    before = output_error(layer, found.patches, weight, spec)
                    strength = self._balance_(layer, weight, found, spec)
                    errors[name] = {"before": before, "after": output_error(layer, found.patches, weight, spec)}
                if self.rule == "search":
                    errors[name]["strength"] = strength
                advance(1)
        return {"errors": errors, "evaluations": evaluations}

    def _balance_(
        self, layer: QuantizedLayer, weight: Tensor, seen: LayerInputs, spec: QuantSpec | None
    ) -> float | None:
        """Give the layer its transform. Returns the strength that "search" found, None for no scaling."""
        if self.rule == "search":
            return self._search_(layer, weight, seen, spec)
        if self.rule == "smooth":
            scale = smooth_scale(seen.peak, weight_peaks(weight), self.strength)
        elif self.rule == "salience":
            scale = salience_scale(torch.stack(list(seen.peaks.values())), weight_peaks(weight))
        else:
            scale = timestep_scale(torch.stack(list(seen.peaks.values())), self.most)
        _set_transform_(layer, weight, scale, _block_of(layer), self.ranges)
        return None

    def _search_(
        self, layer: QuantizedLayer, weight: Tensor, seen: LayerInputs, spec: QuantSpec | None
    ) -> float | None:
        activation, sizes, block = seen.peak, weight_peaks(weight), _block_of(layer)
        candidates: list[float | None] = [None, *(i / self.points for i in range(self.points + 1))]
        best, least = None, float("inf")
        for strength in candidates:
            scale = None if strength is None else smooth_scale(activation, sizes, strength)
            # Least and largest values cover all: the search of ranges would take most of the time.
            _set_transform_(layer, weight, scale, block, "minmax")
            error = output_error(layer, seen.patches, weight, spec)
            if error < least:
                best, least = strength, error
        scale = None if best is None else smooth_scale(activation, sizes, best)
        _set_transform_(layer, weight, scale, block, self.ranges)
        return best


@dataclass(frozen=True)
class RotateChannels:
    """Rotate the input channels of layers by a Hadamard matrix.

    A block is the largest power of two that divides the channels.
    layers: patterns of names. largest: block size at most. ranges: of the weights afterwards.
    Layers with groups, with an odd number of channels or without a quantized input are left as they are.
    """

    layers: tuple[str, ...] = ("*",)
    largest: int = 1024
    ranges: RangeRule = "mse"

    needs: ClassVar[frozenset[str]] = frozenset({"plan", "model"})
    gives: ClassVar[frozenset[str]] = frozenset({"model"})

    def __post_init__(self) -> None:
        if self.largest < 2 or self.largest & (self.largest - 1):
            raise SpecError(f"largest must be a power of two of at least 2, found {self.largest}.")

    def check(self, job: Job) -> None:
        """Patterns that match nothing show before anything is recorded."""
        check_patterns(self.layers, quantizable(job.full_precision))

    def run(self, job: Job) -> Figures:
        plan: Plan = job.handed["plan"]
        layers = {name: layer for name, layer in chosen_layers(job, self.layers).items() if plan[name].input}
        weights = originals(job, layers)
        blocks: dict[str, int] = {}
        with job.run.progress.track("Rotating channels", len(layers)) as advance:
            for name, layer in layers.items():
                size = min(block_size(layer.in_features), self.largest)
                if size > 1:
                    scale = None if layer.input_transform is None else layer.input_transform.scale
                    _set_transform_(layer, weights[name], scale, size, self.ranges)
                    blocks[name] = size
                advance(1)
        return {"blocks": blocks, "left": [name for name in layers if name not in blocks], "evaluations": 0}


def _block_of(layer: QuantizedLayer) -> int | None:
    return None if layer.input_transform is None else layer.input_transform.spec.block


def _set_transform_(
    layer: QuantizedLayer, weight: Tensor, scale: Tensor | None, block: int | None, ranges: RangeRule
) -> None:
    """Replace a layer's transform and fold it into its weight. A branch was fitted to another weight, so it goes."""
    layer.branch = None
    layer.input_transform = None
    if scale is not None or block is not None:
        layer.input_transform = InputTransform(
            layer.in_features, layer.geometry.channel_axis, scale=scale, block=block
        ).to(layer.weight.device)
    refit_(layer, weight, ranges)
