"""Where tensors stand among the arguments of a recorded call, and the same arguments with others in their place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["Slot", "at", "named", "rebuilt", "tensors", "with_tensors", "with_value"]

Slot = tuple[str, int | str]
"""Where the sample stands among the arguments of a call: ("args", 0) or ("kwargs", "sample")."""


def at(args: tuple[Any, ...], kwargs: Mapping[str, Any], slot: Slot) -> Any:
    """The argument in the slot; None if there is none."""
    where, which = slot
    if where == "args":
        assert isinstance(which, int)
        return args[which] if which < len(args) else None
    return kwargs.get(str(which))


def with_value(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], slot: Slot, value: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with another value in the slot."""
    where, which = slot
    if where == "args":
        assert isinstance(which, int)
        return (*args[:which], value, *args[which + 1 :]), dict(kwargs)
    return args, {**kwargs, str(which): value}


def named(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[Slot, Any]]:
    """Every argument with its slot."""
    positional: list[tuple[Slot, Any]] = [(("args", position), value) for position, value in enumerate(args)]
    return positional + [(("kwargs", key), value) for key, value in kwargs.items()]


def rebuilt(sample: Tensor, recorded: Tensor) -> Tensor | None:
    """The sample, repeated along the batch, with recorded further channels (masks, reference latents); None if it
    does not fit.
    """
    if recorded.shape[0] % sample.shape[0]:
        return None
    repeats = recorded.shape[0] // sample.shape[0]
    tiled = torch.cat([sample] * repeats) if repeats > 1 else sample
    if tiled.ndim > 2 and recorded.shape[1] > tiled.shape[1] and recorded.shape[2:] == tiled.shape[2:]:
        tiled = torch.cat([tiled, recorded[:, tiled.shape[1] :].to(tiled.dtype)], dim=1)
    return tiled.to(recorded.dtype) if tiled.shape == recorded.shape else None


def tensors(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested lists, tuples and mappings, with its path: "residuals.2" """
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors(item, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for position, item in enumerate(value):
            yield from tensors(item, f"{path}.{position}")


def with_tensors(value: Any, path: str, others: Mapping[str, Tensor]) -> Any:
    """The same nest, with other tensors at the paths that `others` names."""
    if isinstance(value, Tensor):
        return others.get(path, value)
    if isinstance(value, Mapping):
        return {key: with_tensors(item, f"{path}.{key}", others) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [with_tensors(item, f"{path}.{position}", others) for position, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    return value
