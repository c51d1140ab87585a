"""Rotation of channels by a block-diagonal Hadamard matrix: spreads a large channel over its block.

    H_1 = [1],   H_2n = [[H_n, H_n], [H_n, -H_n]],   R_n = H_n / sqrt(n)                      n a power of two

R_n is symmetric and orthogonal, so it is its own inverse. C channels that are no power of two are rotated in blocks of
n consecutive ones, n a power of two that divides C: `block_size(1152)` is 128, nine blocks. An odd number of channels
has no block but n = 1, which does nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stepquant.errors import SpecError

__all__ = ["block_size", "check_block", "rotated"]


def block_size(channels: int) -> int:
    """The largest power of two that divides `channels`."""
    return channels & -channels


def check_block(channels: int, size: int) -> None:
    """Raises SpecError if `size` is no power of two above 1 that divides `channels`."""
    if size < 2 or size & (size - 1) or channels % size:
        raise SpecError(
            f"A rotation works on blocks of a power of two that divides the {channels} channels (2 to "
            f"{block_size(channels)}), found {size}."
        )


def rotated(x: Tensor, size: int) -> Tensor:
    """`x R` on the last axis, in blocks of `size` (a power of two that divides the axis). x's dtype and shape.

    Sums and differences instead of a product with a matrix: n log2(n) operations for a block, and their order does not
    depend on the other axes, so a sample's result does not depend on its batch.
    """
    shape, half = x.shape, 1
    while half < size:
        x = x.reshape(*shape[:-1], -1, 2, half)
        even, odd = x[..., 0, :], x[..., 1, :]
        x = torch.stack((even + odd, even - odd), -2)
        half *= 2
    return x.reshape(shape) / math.sqrt(size)
