"""Types of numbers: a network among tensors of another dtype, and float32 that is float32.

A bfloat16 model replays what a float32 model was called with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn

from stepquant.calibrate.steps import prediction_of
from stepquant.model.surgery import dtype_of

__all__ = ["in_own_dtype", "whole_float32"]


@contextmanager
def whole_float32() -> Iterator[None]:
    """Inside, a GPU multiplies float32 as it is. By default cuDNN rounds it to TensorFloat-32, of 10 bits of mantissa,
    and features of one image would depend on what they are computed on.
    """
    switches = _switches()
    before = [getattr(place, name) for place, name, _ in switches]
    for place, name, whole in switches:
        setattr(place, name, whole)
    try:
        yield
    finally:
        for (place, name, _), value in zip(switches, before, strict=True):
            setattr(place, name, value)


def _switches() -> list[tuple[Any, str, Any]]:
    """Where torch is told about TensorFloat-32: place, name, and the value that is without."""
    backends: Any = torch.backends
    if hasattr(backends.cudnn, "conv"):  # the older names raise once somebody has used these, of torch 2.9
        return [(place, "fp32_precision", "ieee") for place in (backends.cuda.matmul, backends.cudnn.conv)]
    return [(place, "allow_tf32", False) for place in (backends.cuda.matmul, backends.cudnn)]


def in_own_dtype(network: nn.Module, recorded: nn.Module) -> nn.Module:
    """The network as it is if it has the dtype of the one whose calls were recorded, else one that takes these calls.

    Its inputs are cast to its own dtype, its prediction to the recorded one.
    """
    own, other = dtype_of(network), dtype_of(recorded)
    return network if None in (own, other) or own == other else _InOwnDtype(network, own, other)


@final
class _InOwnDtype(nn.Module):
    def __init__(self, network: nn.Module, own: torch.dtype | None, other: torch.dtype | None) -> None:
        super().__init__()
        self._network, self._own, self._other = network, own, other

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        inside = self._network(*self._cast(args), **self._cast(kwargs))
        return prediction_of(inside).to(self._other)

    def _cast(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: self._cast(entry) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._cast(entry) for entry in value)
        # Timesteps have fewer dimensions; bfloat16 does not tell 999 from 1000, and networks cast them themselves.
        cast = isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1
        return value.to(self._own) if cast else value
