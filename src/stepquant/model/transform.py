"""What a layer does to its input before the input quantizer, with the inverse folded into its weight.

    x_t = R (x / s)        W_t = W diag(s) R^T        W_t x_t = W x

s `[C]` balances the channels between activation and weight, R rotates blocks of channels (`numerics.hadamard`). Either
may be missing. Both act on channels alone, so they pass through the padding of a convolution: zeros stay zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stepquant.errors import SpecError
from stepquant.model.clock import keep_float32
from stepquant.numerics.hadamard import check_block, rotated

__all__ = ["InputTransform", "TransformSpec"]


@dataclass(frozen=True)
class TransformSpec:
    """scaled: whether channels are divided by a vector. block: channels in a rotated block, None without rotation.

    Raises SpecError if it does nothing.
    """

    scaled: bool = False
    block: int | None = None

    def __post_init__(self) -> None:
        if not self.scaled and self.block is None:
            raise SpecError("A transform of the input scales or rotates; found neither.")


class InputTransform(nn.Module):
    """Divides channels by a vector, then rotates them.

    scale `[C]`: float32, > 0; None without scaling. channel_axis: where the C channels are, from the end.
    Computes in float32 and returns x's dtype.
    """

    scale: Tensor | None

    def __init__(self, channels: int, channel_axis: int, *, scale: Tensor | None = None, block: int | None = None):
        super().__init__()
        self.spec = TransformSpec(scale is not None, block)
        if block is not None:
            check_block(channels, block)
        if scale is not None and tuple(scale.shape) != (channels,):
            raise SpecError(f"A layer of {channels} input channels needs as many scales, found {list(scale.shape)}.")
        self.channels = channels
        self.channel_axis = channel_axis
        self.register_buffer("scale", None if scale is None else scale.detach().float().clone())

    def forward(self, x: Tensor) -> Tensor:
        if self.channel_axis == -1:
            return self.of_last_axis(x)
        return self.of_last_axis(x.movedim(self.channel_axis, -1)).movedim(-1, self.channel_axis)

    def of_last_axis(self, x: Tensor) -> Tensor:
        """x_t of an x whose channels are the last axis."""
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        if self.scale is not None:
            wide = wide / self.scale
        if self.spec.block is not None:
            wide = rotated(wide, self.spec.block)
        return wide.to(x.dtype)

    def fold(self, weight: Tensor) -> Tensor:
        """W_t of a weight `[O, C, *kernel]`."""
        last = weight.movedim(1, -1)
        if self.scale is not None:
            last = last * self.scale
        if self.spec.block is not None:
            last = rotated(last, self.spec.block)
        return last.movedim(-1, 1).contiguous()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> InputTransform:  # noqa: ARG002
        keep_float32(self, fn)
        return self

    def extra_repr(self) -> str:
        return f"{self.channels}, scaled={self.spec.scaled}, block={self.spec.block}"
