"""Where in the network error is made: the relative output error of every layer at every sampling step.

Both networks are called with what the full-precision network was called with in step k of a recorded trajectory. With
f_l a full-precision layer, x its input there, g_l the candidate's layer of the same name and y what the candidate's
layers before it give it,

    made[l][k]    = |g_l(x) - f_l(x)| / |f_l(x)|     the layer alone, at its full-precision input
    carried[l][k] = |g_l(y) - f_l(x)| / |f_l(x)|     the layer inside the candidate: with the errors that reach it

|.| is the root of the sum of squares over all images and over all calls of the layer in the step. `made` says which
layer to give more bits; where `carried` is far above it, the error came from layers before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.calibrate.own_errors import Pairs, beside, products, reference_of
from stepquant.calibrate.steps import DenoiserCall
from stepquant.calibrate.trajectory import Trajectory
from stepquant.errors import EvaluationError
from stepquant.model.layer import Matmul, QuantizedMatmul
from stepquant.model.surgery import quantizable

__all__ = ["LayerErrors", "layer_errors"]


@dataclass(frozen=True)
class LayerErrors:
    """Layer name, in order of execution -> one value for each step, noise end first; definitions in the module.

    None stands for a value that is not finite: NaN or infinity in the candidate, or an error where f_l(x) is 0.
    """

    timesteps: list[float]
    made: dict[str, list[float | None]]
    carried: dict[str, list[float | None]]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


@torch.no_grad()
def layer_errors(candidate: nn.Module, full_precision: nn.Module, trajectories: Iterable[Trajectory]) -> LayerErrors:
    """Errors of the layers that both networks have, at the recorded calls of full-precision trajectories.

    candidate: a denoiser with `full_precision`'s layer names, quantized by whomever.
    trajectories: of one schedule; taken one after the other, and nothing of them is kept but sums.

    Costs two calls of the network, and every layer once more, for each recorded call. Of one call at a time the
    candidate's layer outputs are in memory. The full-precision network's attention is rebuilt while this runs where
    the candidate has the matmuls of attention as layers; afterwards it is as it was.
    Raises EvaluationError without trajectories, if they have different numbers of steps, if the networks have no layer
    name in common (an engine that runs the whole network has no layers), or if a layer of both does not run in both.
    """
    sums: dict[str, Tensor] = {}
    timesteps: list[float] = []
    explicit = any(isinstance(module, Matmul | QuantizedMatmul) for module in candidate.modules())
    reference = reference_of(full_precision) if explicit else full_precision
    pairs = _pairs(candidate, reference)
    for trajectory in trajectories:
        found = [float(torch.as_tensor(step.timestep).reshape(-1)[0]) for step in trajectory.steps]
        if timesteps and len(found) != len(timesteps):
            raise EvaluationError(
                f"Layer errors are measured over trajectories of one length; got {len(timesteps)} and "
                f"{len(found)} steps."
            )
        timesteps = found
        for step in trajectory.steps:
            for call in step.calls:
                for name, added in _errors_of_call(candidate, reference, pairs, call).items():
                    row = sums.setdefault(name, torch.zeros(len(timesteps), 3, dtype=torch.float64))
                    row[step.index] += added
    if not timesteps:
        raise EvaluationError("Layer errors are measured along at least one trajectory; got none.")
    return LayerErrors(
        timesteps,
        made={name: _relative(row[:, 0], row[:, 2]) for name, row in sums.items()},
        carried={name: _relative(row[:, 1], row[:, 2]) for name, row in sums.items()},
    )


def _pairs(candidate: nn.Module, reference: nn.Module) -> Pairs:
    theirs = dict(candidate.named_modules())
    found = {name: (layer, theirs[name]) for name, layer in quantizable(reference).items() if name in theirs}
    if not found:
        raise EvaluationError(
            f"{type(candidate).__name__} has none of the layers of {type(reference).__name__} under their names: "
            "layer errors are measured on a network whose layers run one by one, not on a compiled graph."
        )
    return found


def _errors_of_call(candidate: nn.Module, reference: nn.Module, pairs: Pairs, call: DenoiserCall) -> dict[str, Tensor]:
    """Layer -> sums of squares of its error alone, of its error inside the candidate, and of its output: `[3]`."""
    inside: dict[str, list[Tensor]] = {}
    sums: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            inside.setdefault(name, []).append(output)

        return hook

    def see(name: str, _layer: nn.Module, own: Tensor, exact: Tensor) -> None:
        waiting = inside.get(name)
        if not waiting or waiting[0].shape != exact.shape:
            raise EvaluationError(
                f"{name} does not run the same way in both networks: full precision gives {list(exact.shape)}, "
                f"the candidate {list(waiting[0].shape) if waiting else 'nothing'}."
            )
        _, _, norm, made = products(own, exact)
        carried = (waiting.pop(0).double() - exact.double()).square().sum().cpu()
        added = torch.stack([made, carried, norm])
        sums[name] = sums[name] + added if name in sums else added

    with ExitStack() as stack:
        for name, (_, ours) in pairs.items():
            stack.callback(ours.register_forward_hook(keep(name)).remove)
        candidate(*call.args, **call.kwargs)
    # The candidate's step clock still shows this call's timestep: it was called just before.
    with beside(pairs, see):
        reference(*call.args, **call.kwargs)
    left = [name for name, outputs in inside.items() if outputs]
    if left:
        raise EvaluationError(f"{left[0]} runs more often in the candidate than in full precision.")
    return sums


def _relative(errors: Tensor, norms: Tensor) -> list[float | None]:
    """sqrt(errors / norms), 0 where there is no error, None where it is not finite."""
    ratios = torch.where(errors == 0, torch.zeros_like(errors), (errors / norms).sqrt())
    return [value if math.isfinite(value) else None for value in ratios.tolist()]
