"""Two quantizers for the input of a shortcut that reads two tensors side by side.

Where the decoder of a UNet goes on from a hidden state h `[B, C_h, ...]` and the encoder's s `[B, C_s, ...]`, a
residual block reads their concatenation. Its main path begins with a normalisation, but its shortcut, a 1x1
convolution, sees both as they are, and their ranges differ:

    W * [h, s] + b = W_h * h + W_s * s + b        Q(h), Q(s) of their own; so are the scales of W_h and W_s

Which layers these are, and where their inputs join, is seen in one call of the network.

Source: Li et al. 2023 (Q-Diffusion, arXiv:2302.04304), shortcut-splitting quantization.

Differs from the paper: W has scales for groups of gcd(C_h, C_s) channels in each output, so that no group has channels
of both parts; the paper has one scale for each part. Where that divisor is below `LEAST_GROUP`, W keeps one scale for
each output. Found by looking; the code names the layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stepquant.calibrate.trajectory import Trajectory
from stepquant.model.layer import QuantizedLayer
from stepquant.model.surgery import Plan, quantizable, quantized_layers
from stepquant.recipe import Figures, Job

__all__ = ["LEAST_GROUP", "SplitShortcuts", "shortcut_splits"]

LEAST_GROUP = 8
"""Weights that share a scale, at least: with fewer, scales would take a good part of what levels save. Ours."""

_JOINING = (torch.cat, torch.concat, torch.concatenate)
_KEEPING: tuple[Callable[..., Any], ...] = (
    Tensor.contiguous,
    Tensor.to,
    Tensor.float,
    Tensor.half,
    Tensor.bfloat16,
    Tensor.clone,
    F.interpolate,
    F.avg_pool2d,
    F.dropout,
)
"""Operations that leave channels where they are, and may come between the concatenation and the shortcut."""


class _Joined(TorchFunctionMode):
    """Notes which tensors are concatenations along axis 1 of two others, and how many channels the first has.

    Tensors are kept while they are noted, so that no other one gets their identity.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, tuple[Tensor, int]] = {}

    def split_of(self, x: Tensor) -> int | None:
        """Channels of the first part of a noted tensor; None for any other."""
        found = self._seen.get(id(x))
        return None if found is None else found[1]

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        result = func(*args, **given)
        if func in _JOINING:
            parts = args[0] if args else given["tensors"]
            axis = given.get("dim", args[1] if len(args) > 1 else 0)
            if len(parts) == 2 and isinstance(result, Tensor) and axis % result.ndim == 1:
                self._seen[id(result)] = (result, parts[0].shape[1])
        elif func in _KEEPING and isinstance(result, Tensor) and args and isinstance(args[0], Tensor):
            at = self.split_of(args[0])
            if at is not None and result.ndim == args[0].ndim and result.shape[1] == args[0].shape[1]:
                self._seen[id(result)] = (result, at)
        return result


def _is_pointwise(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv1d | nn.Conv2d)
        and module.groups == 1
        and all(width == 1 for width in module.kernel_size)
    )


@torch.no_grad()
def shortcut_splits(
    denoiser: nn.Module, names: Iterable[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, int]:
    """1x1 convolutions of `names` that read a concatenation of two tensors, and the channels of the first one.

    Found by one call. A layer that runs several times must read the same split each time, else it is left out.
    """
    found: dict[str, set[int | None]] = {}
    layers = quantizable(denoiser)
    joined = _Joined()

    def look(name: str) -> Any:
        return lambda _module, inputs: found.setdefault(name, set()).add(joined.split_of(inputs[0]))

    handles = [
        layers[name].register_forward_pre_hook(look(name))
        for name in names
        if name in layers and _is_pointwise(layers[name])
    ]
    try:
        with joined:
            denoiser(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return {name: at for name, splits in found.items() if len(splits) == 1 for at in splits if at is not None}


@dataclass(frozen=True)
class SplitShortcuts:
    """Give shortcuts that read a concatenation two input quantizers, and scales of their weight for each part.

    weights: whether the weight's scales are split too. Belongs between `Place` and the stages that fit ranges.
    Layers whose input is not quantized, or whose range is found at run time, are left as they are.
    """

    weights: bool = True

    needs: ClassVar[frozenset[str]] = frozenset({"trajectories", "model", "plan"})
    gives: ClassVar[frozenset[str]] = frozenset({"model", "plan"})

    def run(self, job: Job) -> Figures:
        trajectories: list[Trajectory] = job.handed["trajectories"]
        plan: Plan = dict(job.handed["plan"])
        static = [name for name, scheme in plan.items() if scheme.input is not None and not scheme.input.dynamic]
        call = trajectories[0].steps[0].calls[0]
        splits = shortcut_splits(job.full_precision, static, call.args, call.kwargs)
        layers = quantized_layers(job.denoiser)
        whole = []
        for name, at in splits.items():
            layer, scheme = layers[name], plan[name]
            assert isinstance(layer, QuantizedLayer)
            layer.split_input_(at)
            scheme = replace(scheme, second=scheme.input)
            if self.weights and scheme.weight is not None:
                size = math.gcd(at, layer.in_features)
                if scheme.weight.group_size is not None and at % scheme.weight.group_size == 0:
                    pass  # groups that were asked for, none of which has channels of both parts
                elif size >= LEAST_GROUP:
                    scheme = replace(scheme, weight=replace(scheme.weight, granularity="group", group_size=size))
                else:
                    whole.append(name)
            plan[name] = scheme
        job.handed["plan"] = plan
        return {"splits": splits, "weights_left_whole": whole, "evaluations": call.prediction.shape[0]}
