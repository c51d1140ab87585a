"""What a module that stands in a denoiser's place hands out of it: what can be read, and no method that changes it.

The denoiser behind such a module is not what runs, or soon will not be: a method of it that changes something would
change nothing that anybody sees, without a word.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from stepquant.errors import EngineError

__all__ = ["changes", "no_change"]

READERS = frozenset({"_reset_stateful_cache", "active_adapters", "cache_context"})
"""Methods that diffusers calls on denoisers while it samples, and that have no effect on what these compute."""

READING = ("build_", "get_", "has_", "is_", "num_", "prepare_")
"""How the names of other methods begin that only read."""


def changes(denoiser: nn.Module, name: str, value: Any) -> bool:
    """Whether the attribute is a method that may change or save the denoiser."""
    if not inspect.ismethod(value) or value.__self__ is not denoiser:
        return False
    return not (name in READERS or name.startswith(READING))


def no_change(denoiser: nn.Module, what: str) -> EngineError:
    """what: the call or assignment that is refused."""
    return EngineError(
        f"{what} would not reach the graph that runs in the place of the {type(denoiser).__name__}: load the "
        "checkpoint with engine='simulated', do it there, and compile the denoiser then if it is to run as a graph: "
        "place(pipe.unet, 'openvino') of stepquant.engines.base."
    )
