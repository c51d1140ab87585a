"""Each layer's own error along full-precision trajectories, step by step.

The full-precision network runs on the recorded states, and every layer that the candidate computes differently beside
its original (`calibrate.own_errors`), so its error is its own and nothing of the layers and steps before it:

    cosine[l][k]   = <q, f> / (|q| |f|)          q, f: the outputs of both, over all images and calls of the step
    relative[l][k] = |q - f| / |f|
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.calibrate.own_errors import Pairs, beside, clock_following, products, still
from stepquant.calibrate.trajectory import Trajectory, predict, state_at
from stepquant.doctor.health import ChannelSpread
from stepquant.doctor.layers import axis_of_channels

__all__ = ["LayerError", "layer_errors"]


@dataclass(frozen=True)
class LayerError:
    """A layer's own error by step, noise end first. NaN where either output is not finite.

    A cosine with an output that is 0 is 1 if both are, otherwise 0.
    """

    layer: str
    cosine: tuple[float, ...]
    relative: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; None for what is not finite."""
        return {"layer": self.layer, "cosine": _plain(self.cosine), "relative": _plain(self.relative)}


def _plain(values: Sequence[float]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values]


@torch.no_grad()
def layer_errors(
    candidate: nn.Module,
    reference: nn.Module,
    pairs: Pairs,
    trajectories: Sequence[Trajectory],
    *,
    done: Callable[[int], None] = lambda _images: None,
) -> tuple[list[LayerError], dict[str, ChannelSpread]]:
    """Errors of the paired layers that run, in order of execution, and the channels of their full-precision outputs.

    done: called with the number of images after each step. One network evaluation an image and step.
    """
    steps = len(trajectories[0].steps)
    sums: dict[str, Tensor] = {}
    spreads: dict[str, ChannelSpread] = {}
    step = 0

    def see(name: str, layer: nn.Module, found: Tensor, output: Tensor) -> None:
        row = sums.setdefault(name, torch.zeros(steps, 4, dtype=torch.float64))
        row[step] += products(found, output)
        axis = axis_of_channels(layer)
        if axis is not None:
            spreads.setdefault(name, ChannelSpread(axis)).see(output)

    with still(candidate, reference), clock_following(reference, candidate), beside(pairs, see):
        for trajectory in trajectories:
            for step in range(len(trajectory.steps)):
                predict(reference, trajectory, step, state_at(trajectory, step))
                done(trajectory.batch)
    return [_error(name, rows) for name, rows in sums.items()], spreads


def _error(name: str, rows: Tensor) -> LayerError:
    cosines, relative = [], []
    for product, found, exact, error in rows.tolist():
        if not all(map(math.isfinite, (product, found, exact, error))):
            cosines.append(math.nan)
            relative.append(math.nan)
            continue
        norms = (found * exact) ** 0.5
        cosines.append(product / norms if norms > 0 else float(found == exact))
        relative.append((error / exact) ** 0.5 if exact > 0 else (0.0 if error == 0 else math.inf))
    return LayerError(name, tuple(cosines), tuple(relative))
