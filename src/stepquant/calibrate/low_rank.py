"""A low-rank branch beside the quantized weight takes what rounding finds hardest: W_t = Q(W_t - L2 L1) + L2 L1.

    L = SVD_r(W_t),   then in turn   W_q = Q(W_t - L),   L = SVD_r(W_t - W_q)      as long as the layer's output gains

with the best pair kept. SVD_r is the nearest matrix of rank r. L2 `[O, r]` and L1 `[r, C, *kernel]` hold values of
16-bit floating point.

Source: SVDQuant (Li et al. 2025), which stops as soon as the error rises; the same alternation in LSGQuant (2026).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from stepquant.calibrate.layer_inputs import (
    captured,
    check_patterns,
    chosen_layers,
    originals,
    output_error,
    refit_,
)
from stepquant.calibrate.ranges import RangeRule
from stepquant.errors import SpecError
from stepquant.model.layer import LowRankBranch, QuantizedLayer
from stepquant.model.surgery import Plan, quantizable
from stepquant.numerics.spec import QuantSpec
from stepquant.recipe import Figures, Job

__all__ = ["AddLowRank", "nearest_of_rank"]

LARGEST_SHARE = 4
"""A branch has at most a quarter of the rank that the layer can have: beyond that it is the layer itself."""


def nearest_of_rank(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """L1 `[rank, K]` and L2 `[O, rank]` whose product is the matrix of this rank nearest to `weight` `[O, K]`.

    From the eigenvectors of the smaller of W W^T and W^T W in float64; rounded to values that float16 holds.
    """
    wide = weight.double()
    tall = wide.shape[0] > wide.shape[1]
    gram = wide.mT @ wide if tall else wide @ wide.mT
    vectors = torch.linalg.eigh(gram).eigenvectors[:, -rank:]
    # The sign of an eigenvector is arbitrary; this one does not depend on the library.
    signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    vectors = vectors * signs
    down, up = (vectors.mT, wide @ vectors) if tall else (vectors.mT @ wide, vectors)
    return down.half().to(weight.dtype), up.half().to(weight.dtype)


@dataclass(frozen=True)
class AddLowRank:
    """Give layers a low-rank branch, and round what is left of their weights to nearest.

    rank: at most; a layer gets no more than a quarter of the smaller of its outputs and its inputs.
    refits: turns of the alternation at most.
    layers: patterns of names. Layers with groups, and those whose weight is not quantized, are left as they are.
    samples, batch, patches: what the error is measured on, as in BalanceChannels. ranges: of the weights.
    """

    rank: int = 32
    refits: int = 100
    layers: tuple[str, ...] = ("*",)
    samples: int = 64
    batch: int = 32
    patches: int = 512
    ranges: RangeRule = "mse"

    needs: ClassVar[frozenset[str]] = frozenset({"trajectories", "calibration", "plan", "model"})
    gives: ClassVar[frozenset[str]] = frozenset({"model"})

    def __post_init__(self) -> None:
        for name in ("rank", "samples", "batch", "patches"):
            if getattr(self, name) < 1:
                raise SpecError(f"{name} of AddLowRank must be at least 1, found {getattr(self, name)}.")
        if self.refits < 0:
            raise SpecError(f"refits must not be negative, found {self.refits}.")

    def check(self, job: Job) -> None:
        """Patterns that match nothing show before anything is recorded."""
        check_patterns(self.layers, quantizable(job.full_precision))

    def run(self, job: Job) -> Figures:
        plan: Plan = job.handed["plan"]
        layers = {name: layer for name, layer in chosen_layers(job, self.layers).items() if plan[name].weight}
        ranks = {name: min(self.rank, _most(layer)) for name, layer in layers.items()}
        wanted = {name: layer for name, layer in layers.items() if ranks[name]}
        seen, evaluations = captured(
            job, list(wanted), stage="low_rank", samples=self.samples, batch=self.batch, patches=self.patches
        )
        weights = originals(job, wanted)
        errors: dict[str, Any] = {}
        with job.run.progress.track("Fitting low-rank branches", len(seen)) as advance:
            for name, found in seen.items():
                errors[name] = self._fit_(wanted[name], weights[name], found.patches, plan[name].input, ranks[name])
                advance(1)
        return {
            "errors": errors,
            "too_small": [name for name in layers if name not in wanted],
            "evaluations": evaluations,
        }

    def _fit_(
        self, layer: QuantizedLayer, weight: Tensor, patches: Tensor, spec: QuantSpec | None, rank: int
    ) -> Figures:
        layer.branch = None
        refit_(layer, weight, self.ranges)
        target = layer.folded(weight).float().flatten(1)
        before = output_error(layer, patches, weight, spec)
        least, best, used = float("inf"), None, 0
        down, up = nearest_of_rank(target, rank)
        for turn in range(self.refits + 1):
            layer.branch = self._branch(layer, down, up)
            refit_(layer, weight, self.ranges)
            error = output_error(layer, patches, weight, spec)
            if error >= least:
                break
            least, best, used = error, (down, up), turn
            down, up = nearest_of_rank(target - layer.weight.detach().float().flatten(1), rank)
        assert best is not None
        layer.branch = self._branch(layer, *best)
        refit_(layer, weight, self.ranges)
        return {"before": before, "after": least, "rank": rank, "refits": used}

    @staticmethod
    def _branch(layer: QuantizedLayer, down: Tensor, up: Tensor) -> LowRankBranch:
        like = layer.weight
        return LowRankBranch(
            layer.geometry,
            down.reshape(-1, *like.shape[1:]).to(like.dtype).contiguous(),
            up.to(like.dtype).contiguous(),
        )


def _most(layer: QuantizedLayer) -> int:
    return min(layer.out_features, layer.weight[0].numel()) // LARGEST_SHARE
