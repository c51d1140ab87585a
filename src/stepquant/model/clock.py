"""The clock of a quantized denoiser: which timestep bin it is in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.errors import ModelError

__all__ = ["CLOCK_NAME", "StepClock", "attach_clock", "clock_of", "edges_between", "keep_float32"]

CLOCK_NAME = "stepquant_clock"


def keep_float32(module: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
    """Move a module's own buffers as `fn` would, but never change their dtype.

    `.half()` reaches into buffers, and a float16 scale is a different scale. The target device is found by applying
    `fn` to an empty probe, so values are never touched.
    """
    for name, buffer in module._buffers.items():
        if buffer is None:
            continue
        device = fn(torch.empty(0, device=buffer.device, dtype=buffer.dtype)).device
        if device == buffer.device:
            continue
        moved = torch.empty_like(buffer, device=device) if buffer.is_meta else buffer.to(device)
        module._buffers[name] = moved


class StepClock(nn.Module):
    """Submodule of the denoiser that holds the current timestep bin of every sample.

    edges `[N-1]`: ascending borders between N bins, float32, in the unit of the denoiser's timestep argument.
    bin `[K]`: int64, K = 1 (all samples share a timestep) or K = B. Bins count upwards with the timestep, so bin 0 is
        the one nearest to the image.
    argument, position: name and place of the timestep among the denoiser's arguments.
    """

    edges: Tensor
    bin: Tensor

    def __init__(self, edges: Tensor, argument: str = "timestep", position: int = 1) -> None:
        super().__init__()
        self.register_buffer("edges", edges.detach().float())
        self.register_buffer("bin", torch.zeros(1, dtype=torch.int64), persistent=False)
        self.argument = argument
        self.position = position

    @property
    def bins(self) -> int:
        """Number of timestep bins."""
        return len(self.edges) + 1

    def set(self, timestep: Tensor | float) -> None:
        """Go to the bin(s) of `timestep`: a number, a 0-d tensor, `[1]` or `[B]`."""
        # Pipelines expand one timestep over the batch, and bucketize warns of strides.
        value = torch.as_tensor(timestep, device=self.edges.device).reshape(-1).float().contiguous()
        self.bin = torch.bucketize(value, self.edges)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StepClock:  # noqa: ARG002
        keep_float32(self, fn)
        return self


def _set_clock(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of every clocked denoiser.

    A plain function that finds the clock on the module it is called on: a closure over the clock would go on setting
    the original's clock after `copy.deepcopy`.
    """
    clock: StepClock = module._modules[CLOCK_NAME]  # type: ignore[assignment]
    if clock.argument in kwargs:
        timestep = kwargs[clock.argument]
    elif len(args) > clock.position:
        timestep = args[clock.position]
    else:
        raise ModelError(
            f"{type(module).__name__} was called without its timestep argument {clock.argument!r}: pass it by name or "
            f"as argument number {clock.position + 1}."
        )
    clock.set(timestep)


def attach_clock(denoiser: nn.Module, clock: StepClock) -> None:
    """Make `clock` a submodule of `denoiser` and set it before every forward call."""
    if CLOCK_NAME in denoiser._modules:
        raise ModelError(f"{type(denoiser).__name__} already has a step clock: it has been quantized before.")
    denoiser.add_module(CLOCK_NAME, clock)
    denoiser.register_forward_pre_hook(_set_clock, with_kwargs=True)


def clock_of(denoiser: nn.Module) -> StepClock | None:
    """The denoiser's clock, or None if it has none."""
    clock = denoiser._modules.get(CLOCK_NAME)
    return clock if isinstance(clock, StepClock) else None


def edges_between(timesteps: Tensor) -> Tensor:
    """Bin edges halfway between the distinct timesteps, ascending, `[N-1]` for N distinct timesteps."""
    values = torch.unique(timesteps.detach().double())
    edges: Tensor = (values[1:] + values[:-1]) / 2
    return edges.float()
