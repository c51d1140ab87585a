"""What convolutions meet of their padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["MOST_PATTERNS", "Border", "border_of"]

MOST_PATTERNS = 7
"""How many a graph adds one by one: a kernel of 7 has as many. More are a table of the output's size."""


@dataclass(frozen=True)
class Border:
    """The sum of a convolution's weights that meet padding: where the last axis is at pattern p, `table[p]`.

    table: float64 `[patterns, O, ...]`, with the output's axes but for the last, the most frequent pattern first.
    where: int `[outputs]`, the pattern at each place of the last axis.
    """

    table: NDArray[np.float64]
    where: NDArray[np.int64]

    def whole(self) -> NDArray[np.float64]:
        """`[O, *outputs]`."""
        return np.moveaxis(self.table[self.where], 0, -1)


def border_of(
    taps: NDArray[np.float64],
    inputs: Sequence[int],
    outputs: Sequence[int],
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Border:
    """Of taps `[O, *kernel]`, the weights summed over input channels, with one or two spatial axes.

    inputs, outputs: spatial shapes. padding: before the first place, of each axis.
    """
    inside: list[Any] = []  # by axis, which tap of which output lies inside, [outputs, taps]
    for axis, (size, count) in enumerate(zip(inputs, outputs, strict=True)):
        steps = np.arange(taps.shape[axis + 1]) * dilation[axis] - padding[axis]
        place = np.arange(count)[:, None] * stride[axis] + steps
        inside.append(((place >= 0) & (place < size)).astype(np.float64))
    patterns, where, counts = np.unique(inside.pop(), axis=0, return_inverse=True, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    patterns, where = patterns[order], np.argsort(order)[where.reshape(-1)]
    if not inside:
        return Border(np.einsum("pd,zd->pz", 1 - patterns, taps), where)
    both = np.einsum("ab,pd->pabd", inside[0], patterns)
    return Border(np.einsum("pabd,zbd->pza", 1 - both, taps), where)
