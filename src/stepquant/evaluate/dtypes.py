"""A network among tensors of another dtype: a bfloat16 model replays what a float32 model was called with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from stepquant.calibrate.steps import prediction_of
from stepquant.model.surgery import dtype_of

__all__ = ["in_own_dtype"]


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
