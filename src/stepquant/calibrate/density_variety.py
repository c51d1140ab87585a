"""How many calibration samples each timestep contributes, by the density and variety of its features.

With F_t `[B, C, ...]` the network's bottleneck features at step t, of one batch along the full-precision trajectory:

    density   D_t = #{ s != t : mean((F_t - F_s)^2) <= r }
    variety   V_t = sum_{s != t} sum over batch and positions of (1 - cos(F_t, F_s)),   cos over channels
    weight    w_t = D_t + lambda V_t,   D and V each scaled to [0, 1] over the steps
    samples   n_t = round(N w_t / sum w); what is missing goes to the steps with the largest n_t, one each; what is
              too much is taken from the last steps that have any, one each

A step that many others look like stands for them, and one that looks like none has something of its own.

Source: Liu et al. 2024 (EDA-DM, arXiv:2401.04585), temporal distribution alignment calibration, and its public code:
r = 3.0 for CIFAR-10 and ImageNet and 0.3 for LSUN and Stable Diffusion, lambda from 1.0 to 5.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stepquant.calibrate.select import at_steps
from stepquant.calibrate.trajectory import Trajectory, seen_in_steps
from stepquant.errors import SpecError
from stepquant.model.surgery import execution_order, quantizable, units_of
from stepquant.recipe import Figures, Job

__all__ = ["SelectDensityVariety", "bottleneck_inputs", "density", "pairwise", "sample_counts", "variety"]


def pairwise(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared distances and summed cosine distances of all pairs of steps, both `[T, T]`, float64.

    features: `[T, B, C, ...]`, of any float type; cosines are over C and sums over everything behind it and B.
    """
    flat = features.double().flatten(1)
    squares = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist").square() / flat.shape[1]
    unit = torch.nn.functional.normalize(features.double(), dim=2).flatten(1)
    positions = flat.shape[1] / features.shape[2]
    return squares, positions - unit @ unit.mT


def density(squares: Tensor, radius: float) -> Tensor:
    """D_t `[T]`: the number of other steps within `radius`, of mean squared distances `[T, T]`."""
    return (squares <= radius).sum(1).double() - 1


def variety(cosine_distances: Tensor) -> Tensor:
    """V_t `[T]`: the sum of the cosine distances `[T, T]` to the other steps."""
    return cosine_distances.sum(1) - cosine_distances.diagonal()


def _scaled(values: Tensor) -> Tensor:
    """Linearly to [0, 1]; zeros where all values are alike."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else torch.zeros_like(values)


def sample_counts(dense: Tensor, various: Tensor, total: int, variety_weight: float) -> list[int]:
    """n_t of every step in order of sampling; they add up to `total`. Steps that are all alike get equal shares."""
    weights = _scaled(dense) + variety_weight * _scaled(various)
    if float(weights.sum()) == 0:
        weights = torch.ones_like(weights)
    counts = [int(count) for count in (total * weights / weights.sum()).round().tolist()]
    largest_first = sorted(range(len(counts)), key=lambda step: -counts[step])
    missing = total - sum(counts)
    for number in range(max(0, missing)):
        counts[largest_first[number % len(counts)]] += 1
    while (excess := sum(counts) - total) > 0:
        for step in [step for step in reversed(range(len(counts))) if counts[step] > 0][:excess]:
            counts[step] -= 1
    return counts


def bottleneck_inputs(denoiser: nn.Module, trajectory: Trajectory) -> Tensor:
    """F of every recorded step, `[T, B, C, ...]`, noise first, float32; costs a forward pass per call of every step.

    It is the input of the attention in the middle of a UNet, of its `mid_block` if that has no attention, or of the
    block in the middle of the execution (transformers: tokens `[B, L, C]` are turned to `[B, C, L]`). B are the
    rows of all calls of a step: guidance may have its halves in calls of their own.
    """
    name = _bottleneck(denoiser, trajectory)
    found: list[Tensor] = []

    def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value = args[0] if args else kwargs["hidden_states"]
        found.append((value.mT if value.ndim == 3 else value).detach().float())

    handle = denoiser.get_submodule(name).register_forward_pre_hook(note, with_kwargs=True)
    try:
        with torch.no_grad():
            return torch.stack(list(seen_in_steps(denoiser, trajectory, name, found)))
    finally:
        handle.remove()


def _bottleneck(denoiser: nn.Module, trajectory: Trajectory) -> str:
    names = dict(denoiser.named_modules())
    for name in ("mid_block.attentions.0", "mid_block"):
        if name in names:
            return name
    call = trajectory.steps[0].calls[0]
    units = units_of(denoiser, execution_order(denoiser, list(quantizable(denoiser)), call.args, call.kwargs))
    return units[len(units) // 2].name


@dataclass(frozen=True)
class SelectDensityVariety:
    """Calibrate each recorded image at one step; how many images a step gets follows density and variety.

    radius: r; None takes the median of the mean squared distances between two steps, so that half of all pairs count
        as near whatever the scale of the features is.
    variety_weight: lambda.
    draws: samples, N, the images in turn; None takes each image once, as the paper does.
    """

    radius: float | None = None
    variety_weight: float = 1.2
    draws: int | None = None

    needs: ClassVar[frozenset[str]] = frozenset({"trajectories"})
    gives: ClassVar[frozenset[str]] = frozenset({"calibration"})

    def __post_init__(self) -> None:
        if (self.radius is not None and self.radius <= 0) or self.variety_weight < 0:
            raise SpecError(
                f"radius must be above 0 and variety_weight not negative, found {self.radius}, {self.variety_weight}."
            )
        if self.draws is not None and self.draws < 1:
            raise SpecError(f"draws must be at least 1, found {self.draws}.")

    def run(self, job: Job) -> Figures:
        trajectories: list[Trajectory] = job.handed["trajectories"]
        images = sum(trajectory.images for trajectory in trajectories)
        squares, cosines = pairwise(bottleneck_inputs(job.full_precision, trajectories[0]).cpu())
        radius = self.radius if self.radius is not None else _median_between(squares)
        counts = sample_counts(density(squares, radius), variety(cosines), self.draws or images, self.variety_weight)
        labels = torch.tensor([step for step, count in enumerate(counts) for _ in range(count)])
        order = torch.randperm(len(labels), generator=job.run.generator("density_variety"))
        picks = [(int(step), number % images) for number, step in enumerate(labels[order].tolist())]
        chosen = at_steps(trajectories, picks)
        job.handed["calibration"] = chosen
        evaluations = trajectories[0].evaluations
        return {"samples": len(chosen), "counts": counts, "radius": radius, "evaluations": evaluations}


def _median_between(squares: Tensor) -> float:
    between = squares[~torch.eye(len(squares), dtype=torch.bool)]
    return float(between.median()) if len(between) else 0.0
