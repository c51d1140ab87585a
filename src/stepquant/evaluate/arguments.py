"""The arguments of a pipeline's call as JSON values: what a result says about how its images were made."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

__all__ = ["first_of", "plain_arguments"]


def plain_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """By name. Numbers, words and lists as they are; tensors, arrays and pictures as dtype or mode, shape and SHA-256.

    Anything else is its `repr` in a mapping. Arguments that differ give values that differ, but for objects whose
    `repr` says nothing about what they hold.
    """
    return {str(name): _plain(arguments[name]) for name in sorted(arguments)}


def first_of(arguments: Mapping[str, Any], images: int, count: int) -> dict[str, Any] | None:
    """Arguments for the first `count` of `images` images, from what `plain_arguments` made of them.

    None if that does not bring them back: tensors, arrays, pictures and objects are only named there.
    """

    def whole(value: Any) -> bool:
        if isinstance(value, Mapping):
            return not value.keys() & {"sha256", "repr"} and all(whole(entry) for entry in value.values())
        return all(whole(entry) for entry in value) if isinstance(value, list) else True

    if not all(whole(value) for value in arguments.values()):
        return None
    return {
        name: value[:count] if isinstance(value, list) and len(value) == images else value
        for name, value in arguments.items()
    }


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)  # JSON has no NaN
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, Tensor):
        # One picture for ten thousand images is a view that must not be written out.
        own = value[:1] if value.ndim and value.stride(0) == 0 else value
        data = own.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return _hashed(str(value.dtype).removeprefix("torch."), value.shape, data)
    if isinstance(value, np.ndarray) and value.dtype != object:
        return _hashed(str(value.dtype), value.shape, value.tobytes())
    if isinstance(value, Image.Image):
        return _hashed(value.mode, value.size, value.tobytes())
    return {"repr": repr(value)}


def _hashed(kind: str, shape: Sequence[int], data: bytes) -> dict[str, Any]:
    return {"dtype": kind, "shape": list(shape), "sha256": hashlib.sha256(data).hexdigest()}
