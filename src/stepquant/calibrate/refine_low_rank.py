"""Weights and low-rank branches refined together by gradient, longer for layers whose inputs change more.

    minimise over V, L1, L2:    mean over patches of  | Q_x(x_t) Q(V)^T + x_t (L2 L1)^T - x W^T |^2

from V = W_t - L2 L1, with Q's scales fixed and straight-through gradients, and as many iterations as the layer's
sensitivity says. With mu_i [C] the mean of the layer's input over the positions of calibration sample i:

    sensitivity = mean_c Var_i mu_ic              frozen <= 0.001 < light <= 0.075 < free

frozen layers get one iteration, light ones `light`, free ones as many as they gain from. What is kept is the state with
the least error on patches that the gradient has not seen; no layer ends above the error that it began with on these.

Source: LSGQuant (2026, arXiv:2602.03182), sensitivity (VOLTS) and tiers, joint refinement (QAO). Rates, the share of
patches held out and the rule for stopping are ours: the paper's are not known to us.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from stepquant.calibrate.layer_inputs import captured, check_patterns, chosen_layers, originals, rounded_inputs
from stepquant.calibrate.patches import transformed_patches
from stepquant.errors import CalibrationError, SpecError
from stepquant.model.layer import LowRankBranch, QuantizedLayer
from stepquant.model.quantizer import WeightQuantizer
from stepquant.model.surgery import Plan, quantizable
from stepquant.numerics.spec import QuantSpec
from stepquant.recipe import Figures, Job

__all__ = ["RefineLowRank", "Tier", "refine_layer_", "sensitivity_of", "tier_of"]

Tier = Literal["frozen", "light", "free"]

FROZEN, LIGHT = 0.001, 0.075
"""The paper's bounds on the sensitivity, in squared units of the layer's input."""

HELD_OUT = 4
"""Every fourth patch is held out."""

PATIENCE, LEAST_GAIN = 50, 1e-3
"""A free layer has converged when this many iterations have lowered the held-out error by less than this share."""


def sensitivity_of(means: Tensor) -> float:
    """Mean over channels of the variance over samples. means: `[N, C]`."""
    return float(means.double().var(0, unbiased=False).mean())


def tier_of(sensitivity: float) -> Tier:
    """Which tier a layer of this sensitivity belongs to."""
    return "frozen" if sensitivity <= FROZEN else "light" if sensitivity <= LIGHT else "free"


@dataclass(frozen=True)
class RefineLowRank:
    """Refine weights and branches of the layers that have a low-rank branch.

    light: iterations for layers of medium sensitivity. most: iterations at most for those of high sensitivity.
    lr_levels: how far weights move in an iteration of Adam, in levels. lr_branch: the same of the branch, relative to
        the root mean square of its values.
    layers: patterns of names. samples, batch, patches: what the error is measured on, as in BalanceChannels.
    """

    light: int = 30
    most: int = 2_000
    lr_levels: float = 0.02
    lr_branch: float = 1e-3
    layers: tuple[str, ...] = ("*",)
    samples: int = 64
    batch: int = 32
    patches: int = 2_048

    needs: ClassVar[frozenset[str]] = frozenset({"trajectories", "calibration", "plan", "model"})
    gives: ClassVar[frozenset[str]] = frozenset({"model"})

    def __post_init__(self) -> None:
        for name in ("light", "most", "samples", "batch"):
            if getattr(self, name) < 1:
                raise SpecError(f"{name} of RefineLowRank must be at least 1, found {getattr(self, name)}.")
        if self.patches < HELD_OUT:
            raise SpecError(f"patches must be at least {HELD_OUT}, some of which are held out, found {self.patches}.")
        if self.lr_levels < 0 or self.lr_branch < 0:
            raise SpecError(f"Rates must not be negative, found {self.lr_levels} and {self.lr_branch}.")

    def check(self, job: Job) -> None:
        """Patterns that match nothing show before anything is recorded."""
        check_patterns(self.layers, quantizable(job.full_precision))

    def run(self, job: Job) -> Figures:
        plan: Plan = job.handed["plan"]
        layers = {
            name: layer
            for name, layer in chosen_layers(job, self.layers).items()
            if plan[name].weight is not None and layer.branch is not None
        }
        seen, evaluations = captured(
            job, list(layers), stage="refine_low_rank", samples=self.samples, batch=self.batch, patches=self.patches
        )
        weights = originals(job, layers)
        figures: dict[str, Any] = {}
        with job.run.progress.track("Refining low-rank branches", len(seen)) as advance:
            for number, (name, found) in enumerate(seen.items()):
                kept = job.keeper.load(f"layer-{number}") if job.keeper else None
                if kept is None:
                    figures[name] = self._refine_(layers[name], weights[name], found.patches, found.means, plan[name])
                    self._keep(job, number, layers[name], figures[name])
                else:
                    _put_(layers[name], *(kept[0][key].to(weights[name].device) for key in ("weight", "down", "up")))
                    figures[name] = kept[1]
                advance(1)
        return {"layers": figures, "evaluations": evaluations}

    def _refine_(self, layer: QuantizedLayer, weight: Tensor, patches: Tensor, means: Tensor, scheme: Any) -> Figures:
        sensitivity = sensitivity_of(means)
        tier = tier_of(sensitivity)
        iterations = {"frozen": 1, "light": self.light, "free": self.most}[tier]
        fitted = refine_layer_(
            layer,
            weight,
            patches,
            scheme.input,
            iterations=iterations,
            lr_levels=self.lr_levels,
            lr_branch=self.lr_branch,
            until_converged=tier == "free",
        )
        return {"sensitivity": sensitivity, "tier": tier, **fitted}

    @staticmethod
    def _keep(job: Job, number: int, layer: QuantizedLayer, figures: Figures) -> None:
        if job.keeper is not None:
            assert layer.branch is not None
            tensors = {"weight": layer.weight.detach(), "down": layer.branch.down, "up": layer.branch.up}
            job.keeper.save(f"layer-{number}", tensors, figures)


def refine_layer_(
    layer: QuantizedLayer,
    full_precision: Tensor,
    patches: Tensor,
    spec: QuantSpec | None,
    *,
    iterations: int,
    lr_levels: float,
    lr_branch: float,
    until_converged: bool,
) -> Figures:
    """Refine one hardened layer with a branch; returns its held-out error before and after, and iterations done.

    patches: `[N, K]` of the layer's input before the transform. full_precision: the original weight.
    spec: of the input.
    """
    quantizer, branch = layer.weight_quantizer, layer.branch
    if not isinstance(quantizer, WeightQuantizer) or branch is None:
        raise CalibrationError("Only hardened layers with a branch can be refined: run the stage AddLowRank before.")
    x = transformed_patches(layer.input_transform, patches.float())
    rounded = rounded_inputs(x, spec)
    wanted = patches.float() @ full_precision.float().flatten(1).T
    held = torch.arange(len(x), device=x.device) % HELD_OUT == HELD_OUT - 1
    latent = layer.folded(full_precision).detach().float().clone().requires_grad_()
    down, up = (part.detach().float().clone().requires_grad_() for part in (branch.down, branch.up))
    quantized: Callable[[Tensor], Tensor] = quantizer

    def error(rows: Tensor, weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
        found = rounded[rows] @ weight.flatten(1).T + (x[rows] @ down.flatten(1).T) @ up.T
        return (found - wanted[rows]).square().sum() / len(found)

    def rate(part: Tensor) -> float:
        return lr_branch * float(part.detach().square().mean().sqrt())

    optimizer = torch.optim.Adam(
        [
            {"params": [latent], "lr": lr_levels * float(quantizer.scale.mean())},
            {"params": [down], "lr": rate(down)},
            {"params": [up], "lr": rate(up)},
        ]
    )
    with torch.no_grad():
        before = least = float(error(held, layer.weight.float(), down, up))
    best: tuple[Tensor, Tensor, Tensor] | None = None
    reached, since, done = least, 0, 0
    for _ in range(iterations):
        optimizer.zero_grad(set_to_none=True)
        with torch.enable_grad():
            error(~held, quantized(latent), down, up).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        done += 1
        with torch.no_grad():
            # As they will be stored.
            state = latent.to(full_precision.dtype).clone(), down.half().float(), up.half().float()
            found = float(error(held, quantized(state[0]).float(), *state[1:]))
        if found < least:
            least, best = found, state
        since += 1
        if least < reached * (1 - LEAST_GAIN):
            reached, since = least, 0
        if until_converged and since >= PATIENCE:
            break
    if best is not None:
        _put_(layer, *best)
    return {"before": before, "after": least, "iterations": done}


def _put_(layer: QuantizedLayer, weight: Tensor, down: Tensor, up: Tensor) -> None:
    """Give a layer a weight, which is rounded, and a branch."""
    dtype = layer.weight.dtype
    layer.branch = LowRankBranch(layer.geometry, down.to(dtype).contiguous(), up.to(dtype).contiguous())
    layer.weight.data = weight.to(dtype)
    layer.on_grid = False
    layer.harden_()
