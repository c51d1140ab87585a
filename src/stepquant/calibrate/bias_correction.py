"""Biases that make up for what quantization does to the mean output of every channel.

Rounding weights and activations shifts the mean of a layer's output. With y of the full-precision network and y^ of the
quantized one on the same samples, layer by layer as they run

    b <- b + s mean(y - y^)    by channel, over samples and positions

where layers before have been corrected. One mini-batch after the other goes through both networks; in the quantized one
each layer's output is corrected by the mini-batch's own difference before the next layer sees it, and the bias gets the
average over mini-batches. So a round costs two forward passes of each state, whatever the number of layers, and nothing
at run time.

The strength s is one number for all layers, chosen by where sampling ends (`stepquant.calibrate.judging`). s = 0 is
where the search begins: what restores the means at full-precision inputs need not help along the trajectory, and more
than the whole shift may help, too.

Source: empirical bias correction, Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
Correction", ICCV 2019.

Differs from the paper: there, layers are corrected one after the other, with a pass over all samples for each, and
s = 1. And activations are quantized while means are taken, so what their rounding and clipping do is corrected, too.
Layers without a bias stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from stepquant.calibrate.judging import Judge, judged_images
from stepquant.calibrate.select import CalibrationSet, at_steps, inputs
from stepquant.calibrate.trajectory import Trajectory
from stepquant.errors import CalibrationError, SpecError
from stepquant.model.layer import QuantizedLayer
from stepquant.model.surgery import quantized_layers
from stepquant.recipe import Figures, Job

__all__ = ["CorrectBiases"]

MOST_WALKS = 4
"""Strengths that are tried at most: 0, 1, then 0.5 or 2 and perhaps 3. Ours."""


@dataclass(frozen=True)
class CorrectBiases:
    """Correct the biases of quantized layers, each behind the corrected layers before it.

    samples: recorded states to take means over, the same number at every step, images drawn for each step anew. All
        that were recorded are drawn from, not only those that `Select` has chosen: means need many. batch: of them at a
        time, spread over all timesteps.
    rounds: how often, each from where the one before has ended.
    strength: "auto" chooses from 0, 0.5, 1, 2 and 3 times the shift by the final error of sampling; a number is taken
        as it is.
    judged: recorded images to sample for that, at least (`Judge.of`).
    """

    samples: int = 512
    batch: int = 32
    rounds: int = 1
    strength: float | Literal["auto"] = "auto"
    judged: int = 32

    needs: ClassVar[frozenset[str]] = frozenset({"trajectories", "plan", "model"})
    gives: ClassVar[frozenset[str]] = frozenset({"model"})

    def __post_init__(self) -> None:
        for name in ("samples", "batch", "rounds", "judged"):
            if getattr(self, name) < 1:
                raise SpecError(f"{name} of CorrectBiases must be at least 1, found {getattr(self, name)}.")
        if self.strength != "auto" and not (isinstance(self.strength, int | float) and math.isfinite(self.strength)):
            raise SpecError(f'strength of CorrectBiases must be "auto" or a finite number, found {self.strength!r}.')

    def evaluations_for(self, *, images: int, batch: int, steps: int, rows: int) -> float:
        """Of the network, with three strengths tried. images: recorded in mini-batches of `batch`. rows: of a step."""
        means = 2 * self.rounds * min(images, -(-self.samples // steps))
        judged = (
            0 if self.strength != "auto" else (MOST_WALKS - 1) * judged_images(self.judged, images=images, batch=batch)
        )
        return (means + judged) * steps * rows

    def _states(self, job: Job) -> CalibrationSet:
        trajectories: Sequence[Trajectory] = job.handed["trajectories"]
        steps, images = len(trajectories[0].steps), sum(trajectory.images for trajectory in trajectories)
        each = min(images, -(-self.samples // steps))
        drawn = [torch.randperm(images, generator=job.run.generator("biases", step))[:each] for step in range(steps)]
        return at_steps(trajectories, [(step, int(image)) for step, found in enumerate(drawn) for image in found])

    def run(self, job: Job) -> Figures:
        chosen = self._states(job)
        layers = {
            name: layer
            for name, layer in quantized_layers(job.denoiser).items()
            if isinstance(layer, QuantizedLayer) and layer.bias is not None
        }
        count = len(chosen)
        batches = [range(first, count, -(-count // self.batch)) for first in range(-(-count // self.batch))]
        rounds = []
        before = {name: _bias(layer).detach().clone() for name, layer in layers.items()}
        title = "Correcting biases"
        with job.run.progress.track(title, self.rounds * len(batches)) as advance, torch.no_grad():
            for _ in range(self.rounds):
                shifts = _Shifts(layers)
                for positions in batches:
                    args, kwargs = inputs(job.handed["trajectories"], chosen, positions)
                    shifts.add(job, args, kwargs, len(positions))
                    advance(1)
                rounds.append(shifts.apply_())
        figures = {"shifts": rounds[0], "last_shifts": rounds[-1]}
        evaluations = 2 * self.rounds * count
        whole = {name: _bias(layer).detach() - before[name] for name, layer in layers.items()}

        def scale_(strength: float) -> None:
            for name, layer in layers.items():
                _bias(layer).data = before[name] + strength * whole[name]

        if self.strength != "auto":
            scale_(self.strength)
            return figures | {"strength": self.strength, "evaluations": evaluations}
        judge = Judge.of(job, self.judged)
        strength = _best(judge, scale_)
        scale_(strength)
        evaluations += judge.evaluations
        return figures | {"strength": strength, "candidates": judge.report("strength"), "evaluations": evaluations}


def _best(judge: Judge, scale_: Callable[[float], None]) -> float:
    """The last strength of 0, 1, 2, 3 that was better than the one before; 0.5 where 1 is not better than 0."""
    title = "Choosing how far to correct biases"
    with judge.job.run.progress.track(title, MOST_WALKS * judge.images) as advance:

        def better(strength: float, other: float) -> bool:
            scale_(strength)
            judge.sample(strength, advance)
            return judge.better(strength, other)

        scale_(0.0)
        judge.sample(0.0, advance)
        best = 0.0
        while best < 3 and better(best + 1, best):
            best += 1
        if best == 0 and better(0.5, 0.0):
            best = 0.5
        advance((MOST_WALKS - len(judge.errors)) * judge.images)
    if not judge.finite(best):
        raise CalibrationError(
            "The quantized network leaves the finite numbers along the recorded trajectories, whatever the biases: "
            "give it more bits, or set correct_biases=false and look at the checkpoint with `stepquant doctor`."
        )
    return best


def _bias(layer: QuantizedLayer) -> nn.Parameter:
    assert layer.bias is not None
    return layer.bias


class _Shifts:
    """Sums of mean(y - y^) over mini-batches, by layer. A layer that runs several times in a call has their average."""

    def __init__(self, layers: Mapping[str, QuantizedLayer]) -> None:
        self.layers = layers
        self.totals: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.powers: dict[str, float] = {}

    def add(self, job: Job, args: Any, kwargs: Any, samples: int) -> None:
        """samples: in the mini-batch."""
        wanted: dict[str, list[Tensor]] = {name: [] for name in self.layers}

        def keep(name: str, y: Tensor) -> None:
            wanted[name].append(self._mean(name, y))

        def correct(name: str, y: Tensor) -> Tensor:
            if not wanted[name]:
                raise CalibrationError(f"{name} runs more often in the quantized network than in full precision.")
            mean = wanted[name].pop(0)
            shift = mean - self._mean(name, y)
            self.totals[name] = self.totals.get(name, torch.zeros_like(shift)) + samples * shift
            self.counts[name] = self.counts.get(name, 0) + samples
            self.powers[name] = self.powers.get(name, 0.0) + samples * float(mean.norm())
            axis = self.layers[name].geometry.channel_axis
            return y + shift.to(y).reshape(-1, *(1,) * (-1 - axis))

        for network, see in ((job.full_precision, keep), (job.denoiser, correct)):
            with _watching(network, self.layers, see):
                network(*args, **kwargs)

    def _mean(self, name: str, y: Tensor) -> Tensor:
        """By channel, `[O]` float64."""
        return y.detach().movedim(self.layers[name].geometry.channel_axis, -1).double().flatten(0, -2).mean(0)

    def apply_(self) -> dict[str, float]:
        """Add the averages to the biases; returns the size of each beside the mean output's."""
        for name, total in self.totals.items():
            bias = _bias(self.layers[name])
            bias.data = bias.data + (total / self.counts[name]).to(bias)
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
