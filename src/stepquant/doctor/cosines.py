"""Each layer's own error along full-precision trajectories, step by step.

The full-precision network runs on the recorded states; every layer that the candidate computes differently is called
with the very input of its original, so its error is its own and nothing of the layers and steps before it:

    cosine[l][k]   = <q, f> / (|q| |f|)          q, f: the outputs of both, over all images and calls of the step
    relative[l][k] = |q - f| / |f|
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.calibrate.trajectory import Trajectory, predict, state_at
from stepquant.doctor.health import ChannelSpread
from stepquant.doctor.layers import axis_of_channels, clock_following, still
from stepquant.errors import EvaluationError

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
    pairs: Mapping[str, tuple[nn.Module, nn.Module]],
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

    def compare(name: str, quantized: nn.Module) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            found = quantized.forward(*args, **kwargs)
            if not isinstance(found, Tensor) or found.shape != output.shape:
                raise EvaluationError(f"{name} gives {type(found).__name__} unlike full precision: other networks?")
            exact, found = output.double(), found.double()
            row = sums.setdefault(name, torch.zeros(steps, 4, dtype=torch.float64))
            products = (
                (found * exact).sum(),
                found.square().sum(),
                exact.square().sum(),
                (found - exact).square().sum(),
            )
            row[step] += torch.stack(products).cpu()
            axis = axis_of_channels(module)
            if axis is not None:
                spreads.setdefault(name, ChannelSpread(axis)).see(output)

        return hook

    with ExitStack() as stack:
        stack.enter_context(still(candidate, reference))
        stack.enter_context(clock_following(reference, candidate))
        for name, (exact, quantized) in pairs.items():
            stack.callback(exact.register_forward_hook(compare(name, quantized), with_kwargs=True).remove)
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
