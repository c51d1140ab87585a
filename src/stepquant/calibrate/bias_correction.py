"""Biases that make up for what quantization does to the mean output of every channel.

Rounding weights and activations shifts the mean of a layer's output, by the same amount at every position of every
image, and much the same at every step: what adds up along a trajectory. With y of the full-precision network and y^ of
the quantized one on the same samples, layer by layer as they run

    b <- b + mean(y - y^)    by channel, over samples and positions

where layers before have been corrected. One mini-batch after the other goes through both networks; in the quantized one
each layer's output is corrected by the mini-batch's own difference before the next layer sees it, and the bias gets the
average over mini-batches. So a round costs two forward passes of the calibration set, whatever the number of layers,
and nothing at run time.

Source: empirical bias correction, Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
Correction", ICCV 2019.

Differs from the paper: there, layers are corrected one after the other, with a pass over all samples for each. And
activations are quantized while means are taken, so what their rounding and clipping do is corrected, too. Layers
without a bias stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stepquant.calibrate.select import CalibrationSet, inputs
from stepquant.errors import CalibrationError, SpecError
from stepquant.model.layer import QuantizedLayer
from stepquant.model.surgery import quantized_layers
from stepquant.recipe import Figures, Job

__all__ = ["CorrectBiases"]


@dataclass(frozen=True)
class CorrectBiases:
    """Correct the biases of quantized layers, each behind the corrected layers before it.

    samples: calibration samples to take means over, spread evenly over the calibration set. batch: of them at a time,
        spread over all timesteps.
    rounds: how often, each from where the one before has ended.
    """

    samples: int = 256
    batch: int = 32
    rounds: int = 1

    needs: ClassVar[frozenset[str]] = frozenset({"trajectories", "calibration", "plan", "model"})
    gives: ClassVar[frozenset[str]] = frozenset({"model"})

    def __post_init__(self) -> None:
        for name in ("samples", "batch", "rounds"):
            if getattr(self, name) < 1:
                raise SpecError(f"{name} of CorrectBiases must be at least 1, found {getattr(self, name)}.")

    def run(self, job: Job) -> Figures:
        chosen: CalibrationSet = job.handed["calibration"]
        layers = {
            name: layer
            for name, layer in quantized_layers(job.denoiser).items()
            if isinstance(layer, QuantizedLayer) and layer.bias is not None
        }
        count = min(self.samples, len(chosen))
        spread = torch.linspace(0, len(chosen) - 1, count).round().long().tolist()
        batches = [spread[first :: -(-count // self.batch)] for first in range(-(-count // self.batch))]
        rounds = []
        title = "Correcting biases"
        with job.run.progress.track(title, self.rounds * len(batches)) as advance, torch.no_grad():
            for _ in range(self.rounds):
                shifts = _Shifts(layers)
                for positions in batches:
                    args, kwargs = inputs(job.handed["trajectories"], chosen, positions)
                    shifts.add(job, args, kwargs, torch.tensor([chosen.weights[position] for position in positions]))
                    advance(1)
                rounds.append(shifts.apply_())
        return {"shifts": rounds[0], "last_shifts": rounds[-1], "evaluations": 2 * self.rounds * count}


class _Shifts:
    """Sums of mean(y - y^) over mini-batches, by layer. A layer that runs several times in a call has their average."""

    def __init__(self, layers: Mapping[str, QuantizedLayer]) -> None:
        self.layers = layers
        self.totals: dict[str, Tensor] = {}
        self.weights: dict[str, float] = {}
        self.powers: dict[str, float] = {}

    def add(self, job: Job, args: Any, kwargs: Any, weights: Tensor) -> None:
        """weights: of the mini-batch's samples."""
        if float(weights.sum()) == 0:
            return
        wanted: dict[str, list[Tensor]] = {name: [] for name in self.layers}

        def keep(name: str, y: Tensor) -> None:
            wanted[name].append(self._mean(name, y, weights))

        def correct(name: str, y: Tensor) -> Tensor:
            if not wanted[name]:
                raise CalibrationError(f"{name} runs more often in the quantized network than in full precision.")
            mean = wanted[name].pop(0)
            shift = mean - self._mean(name, y, weights)
            share = float(weights.sum())
            self.totals[name] = self.totals.get(name, torch.zeros_like(shift)) + share * shift
            self.weights[name] = self.weights.get(name, 0.0) + share
            self.powers[name] = self.powers.get(name, 0.0) + share * float(mean.norm())
            axis = self.layers[name].geometry.channel_axis
            return y + shift.to(y).reshape(-1, *(1,) * (-1 - axis))

        for network, see in ((job.full_precision, keep), (job.denoiser, correct)):
            with _watching(network, self.layers, see):
                network(*args, **kwargs)

    def _mean(self, name: str, y: Tensor, weights: Tensor) -> Tensor:
        """By channel, `[O]` float64."""
        rows = y.detach().movedim(self.layers[name].geometry.channel_axis, -1).double()
        if len(rows) % len(weights):
            return rows.flatten(0, -2).mean(0)  # no rows of samples: an embedding of positions, say
        rows = rows.reshape(len(weights), -1, rows.shape[-1]).mean(1)
        return weights.to(rows) @ rows / weights.sum().to(rows)

    def apply_(self) -> dict[str, float]:
        """Add the averages to the biases; returns the size of each beside the mean output's."""
        for name, total in self.totals.items():
            bias = self.layers[name].bias
            assert bias is not None
            bias.data = bias.data + (total / self.weights[name]).to(bias)
        return {name: float(total.norm()) / max(self.powers[name], 1e-12) for name, total in self.totals.items()}


@contextmanager
def _watching(
    network: nn.Module, names: Mapping[str, Any], see: Callable[[str, Tensor], Tensor | None]
) -> Iterator[None]:
    """Inside, `see` is called with every layer's output, and replaces it by what it returns."""

    def hook_of(name: str) -> Any:
        return lambda _module, _args, output: see(name, output)

    handles = [network.get_submodule(name).register_forward_hook(hook_of(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
