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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.calibrate.steps import DenoiserCall
from stepquant.calibrate.trajectory import Trajectory
from stepquant.errors import EvaluationError
from stepquant.model.families import make_attention_explicit_
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
    with _explicit_attention(full_precision, like=candidate):
        pairs = _pairs(candidate, full_precision)
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
                    for name, added in _errors_of_call(candidate, full_precision, pairs, call).items():
                        row = sums.setdefault(name, torch.zeros(len(timesteps), 3, dtype=torch.float64))
                        row[step.index] += added
    if not timesteps:
        raise EvaluationError("Layer errors are measured along at least one trajectory; got none.")
    return LayerErrors(
        timesteps,
        made={name: _relative(row[:, 0], row[:, 2]) for name, row in sums.items()},
        carried={name: _relative(row[:, 1], row[:, 2]) for name, row in sums.items()},
    )


@contextmanager
def _explicit_attention(full_precision: nn.Module, *, like: nn.Module) -> Iterator[None]:
    """Inside, the matmuls of attention are modules if those of `like` are."""
    if not any(isinstance(module, Matmul | QuantizedMatmul) for module in like.modules()):
        yield
        return
    before = [
        (module, module.processor)
        for module in full_precision.modules()
        if hasattr(module, "set_processor") and hasattr(module, "processor")
    ]
    make_attention_explicit_(full_precision)
    try:
        yield
    finally:
        for module, processor in before:
            if module.processor is not processor:
                module.set_processor(processor)  # type: ignore[operator]


def _pairs(candidate: nn.Module, full_precision: nn.Module) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Name -> the candidate's and the full-precision layer."""
    theirs = dict(candidate.named_modules())
    found = {name: (theirs[name], layer) for name, layer in quantizable(full_precision).items() if name in theirs}
    if not found:
        raise EvaluationError(
            f"{type(candidate).__name__} has none of the layers of {type(full_precision).__name__} under their names: "
            "layer errors are measured on a network whose layers run one by one, not on a compiled graph."
        )
    return found


def _errors_of_call(
    candidate: nn.Module,
    full_precision: nn.Module,
    pairs: dict[str, tuple[nn.Module, nn.Module]],
    call: DenoiserCall,
) -> dict[str, Tensor]:
    """Layer -> sums of squares of its error alone, of its error inside the candidate, and of its output: `[3]`."""
    inside: dict[str, list[Tensor]] = {}
    sums: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            inside.setdefault(name, []).append(output)

        return hook

    def compare(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            waiting = inside.get(name)
            if not waiting or waiting[0].shape != output.shape:
                raise EvaluationError(
                    f"{name} does not run the same way in both networks: full precision gives {list(output.shape)}, "
                    f"the candidate {list(waiting[0].shape) if waiting else 'nothing'}."
                )
            ours, theirs = pairs[name]
            # The candidate's step clock still shows this call's timestep: it was called just before. A layer that
            # both networks share would end up in this hook again.
            alone = output if ours is theirs else ours(*args, **kwargs)
            exact = output.double()
            added = torch.stack([_square(alone - exact), _square(waiting.pop(0) - exact), _square(exact)])
            sums[name] = sums[name] + added if name in sums else added

        return hook

    with _hooks({ours: keep(name) for name, (ours, _) in pairs.items()}):
        candidate(*call.args, **call.kwargs)
    with _hooks({theirs: compare(name) for name, (_, theirs) in pairs.items()}, with_kwargs=True):
        full_precision(*call.args, **call.kwargs)
    left = [name for name, outputs in inside.items() if outputs]
    if left:
        raise EvaluationError(f"{left[0]} runs more often in the candidate than in full precision.")
    return sums


@contextmanager
def _hooks(hooks: dict[nn.Module, Callable[..., None]], *, with_kwargs: bool = False) -> Iterator[None]:
    handles = [module.register_forward_hook(hook, with_kwargs=with_kwargs) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _square(tensor: Tensor) -> Tensor:
    """Sum of squares on the CPU."""
    return tensor.square().sum().cpu()


def _relative(errors: Tensor, norms: Tensor) -> list[float | None]:
    """sqrt(errors / norms), 0 where there is no error, None where it is not finite."""
    ratios = torch.where(errors == 0, torch.zeros_like(errors), (errors / norms).sqrt())
    return [value if math.isfinite(value) else None for value in ratios.tolist()]
