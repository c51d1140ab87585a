"""Block-wise rounding as straightforward as it can be written: what `benchmarks/calibration.py` compares with.

This is how it was done in the first version: every unit is captured in two passes of its own, rounding, regulariser and
loss are the formulas operation by operation, and Adam is torch's default. Tests hold `fit_unit` to the same result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stepquant.calibrate import reconstruct
from stepquant.calibrate.reconstruct import clocked, rounding_targets, soft_roundings, without_input_quantizers
from stepquant.calibrate.rounding import GAMMA, ZETA, SoftRounding, annealed_beta, harden_soft_
from stepquant.model.layer import QuantizedLayer
from stepquant.model.surgery import Unit, quantized_layers, units_of

__all__ = ["PlainRounding", "fit", "round_blocks", "soften_all_"]


class PlainRounding(SoftRounding):
    """The formulas of AdaRound, each operation by itself."""

    def h(self) -> Tensor:
        return torch.clamp(torch.sigmoid(self.alpha) * (ZETA - GAMMA) + GAMMA, 0, 1)

    def forward(self, weight: Tensor) -> Tensor:
        spec, (scale, zero_point) = self.quantizer.spec, self.quantizer.params
        levels = torch.clamp(self.floor + self.h() + zero_point, spec.qmin, spec.qmax)
        return ((levels - zero_point) * scale).reshape(weight.shape).to(weight.dtype)

    def regulariser(self, beta: float) -> Tensor:
        return (1 - (2 * self.h() - 1).abs().pow(beta)).sum()


def soften_all_(job: Any) -> None:
    """Reopen the rounding of every layer, from its full-precision weight."""
    layers = {n: x for n, x in _layers(job).items() if x.weight_quantizer is not None}
    for name, weight in rounding_targets(job, list(layers)).items():
        quantizer: Any = layers[name].weight_quantizer
        layers[name].weight_quantizer = PlainRounding(quantizer, weight)
        layers[name].on_grid = False


def round_blocks(job: Any, iterations: int, batch: int, lr: float) -> None:
    """What `RoundBlocks(iterations, batch, lr)` does."""
    soften_all_(job)
    batches = reconstruct._batches_of(job, job.handed["calibration"], batch)
    bins = reconstruct._bins_of(job.denoiser, batches)
    with without_input_quantizers(job.denoiser):
        for number, unit in enumerate(units_of(job.denoiser, list(job.handed["plan"]))):
            layers = {name: layer for name, layer in _layers(job).items() if name in unit.layers}
            soft = soft_roundings(layers)
            if not soft:
                continue
            caches = dict(reconstruct._caches(job.denoiser, job.full_precision, [unit.name], batches, bins, True))
            fit(job, unit, caches[unit.name], list(soft.values()), iterations, batch, lr, ("round", number))
            for name in soft:
                harden_soft_(layers[name])


def fit(
    job: Any,
    unit: Unit,
    cache: Any,
    soft: Sequence[SoftRounding],
    iterations: int,
    batch: int,
    lr: float,
    stream: tuple[object, ...],
    round_weight: float = 0.01,
) -> dict[str, float]:
    """What `fit_unit` does with `Fit(iterations, batch, lr, 2.0, round_weight, 0.2)`; the loss before and after."""
    module, clock = job.denoiser.get_submodule(unit.name), clocked(job.denoiser)
    optimizer = torch.optim.Adam([rounding.alpha for rounding in soft], lr=lr)
    generator = job.run.generator("blocks", *stream)
    count = len(cache.bins)

    def rows(value: Any, chosen: Tensor) -> Any:
        return value[chosen] if isinstance(value, Tensor) and value.ndim and value.shape[0] == count else value

    def loss_of(chosen: Tensor) -> Tensor:
        clock.bin = cache.bins[chosen]
        args = tuple(rows(value, chosen) for value in cache.args)
        output = module(*args, **{key: rows(value, chosen) for key, value in cache.kwargs.items()})
        found = reconstruct.output_tensors(output)[0]
        return (found - cache.outputs[0][chosen]).abs().pow(2.0).sum(1).mean()

    probe = torch.arange(min(count, batch))
    with torch.no_grad():
        before = float(loss_of(probe))
    for iteration in range(iterations):
        loss = loss_of(torch.randint(count, (min(batch, count),), generator=generator))
        beta = annealed_beta(iteration / iterations, 0.2)
        if beta is not None:
            for rounding in soft:
                loss = loss + round_weight * rounding.regulariser(beta)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        after = float(loss_of(probe))
    return {"before": before, "after": after}


def _layers(job: Any) -> dict[str, QuantizedLayer]:
    return {name: layer for name, layer in quantized_layers(job.denoiser).items() if isinstance(layer, QuantizedLayer)}
