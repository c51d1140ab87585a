"""A layer's input as the patches that its weight is multiplied with, and sums over their products.

A convolution is the product of its weight `[O, K]` with patches `[K]`, so that one description serves all layers. K
runs over a group's channels and then the kernel, as in `weight.flatten(1)`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from stepquant.model.layer import Geometry
from stepquant.model.transform import InputTransform

__all__ = ["add_products_", "columns", "transformed_patches", "transformed_products"]

CHUNK = 1 << 24
"""Elements of patches that are in memory at a time."""


def columns(geometry: Geometry, kernel: Sequence[int], x: Tensor) -> Tensor:
    """The patches that a layer multiplies its weight with, `[groups, K, patches]`."""
    if geometry.kind == "linear":
        return x.reshape(1, -1, x.shape[-1]).mT
    x, size, stride, dilation = _as_image(geometry, kernel, x)
    found = F.unfold(x, size, dilation=dilation, stride=stride)
    parts = found.reshape(len(x), geometry.groups, -1, found.shape[-1])
    return parts.permute(1, 2, 0, 3).flatten(2)


def add_products_(total: Tensor, geometry: Geometry, kernel: Sequence[int], x: Tensor) -> int:
    """Add sum_u u u^T over the patches u of x to `total`, `[groups, K, K]`; returns their number.

    Patches of a convolution overlap. A product of two rows of the image is in as many entries as the kernel has pairs
    of rows that far apart, and is computed once for all of them where rows follow one another (stride 1).
    """
    row = 1 if geometry.kind == "linear" else kernel[0]
    spread = max(1, x[0].numel() // x.shape[-1 if geometry.kind == "linear" else 1])
    wide = total.shape[1] * geometry.groups
    count = 0
    for part in torch.split(x, max(1, CHUNK // (spread * wide))):
        if row > 1 and geometry.stride[0] == 1:
            image, size, stride, dilation = _as_image(geometry, kernel, part)
            if image.shape[2] - (row - 1) * dilation[0] >= (row - 1) * dilation[0]:
                count += _add_products_of_rows_(total, geometry.groups, image, size, stride[1], dilation)
                continue
        patches = columns(geometry, kernel, part)
        total.baddbmm_(patches, patches.mT)
        count += patches.shape[-1]
    return count


def _add_products_of_rows_(
    total: Tensor, groups: int, x: Tensor, kernel: tuple[int, int], stride: int, dilation: tuple[int, int]
) -> int:
    """`add_products_` for padded images `[N, C, H, W]`. stride: along W; along H it is 1.

    With U_q the patches of a kernel of one row in row q of the image, and `out` rows of output, the entry of kernel
    rows i and j = i + ahead is

        sum of U_q U_(q + ahead)^T over q = i, ..., out - 1 + i        (times the dilation)

    so entries of one `ahead` differ by what the first and the last rows have.
    """
    rows, step = kernel[0], dilation[0]
    unfolded = F.unfold(x, (1, kernel[1]), dilation=(1, dilation[1]), stride=(1, stride))
    size = unfolded.shape[1] // groups
    parts = unfolded.reshape(len(x), groups, size, x.shape[2], -1).permute(1, 2, 3, 0, 4).contiguous()
    out = x.shape[2] - (rows - 1) * step
    channels = size // kernel[1]
    entries = total.view(groups, channels, rows, kernel[1], channels, rows, kernel[1])

    def products(first: int, last: int, ahead: int) -> Tensor:
        here, there = (parts[:, :, first + off : last + off].flatten(2) for off in (0, ahead * step))
        return torch.bmm(here, there.mT)

    for ahead in range(rows):
        most = rows - 1 - ahead
        inner = products(most * step, out, ahead)
        top, bottom = [inner], [torch.zeros_like(inner)]
        for i in range(most):
            top.append(top[-1] + products((most - 1 - i) * step, (most - i) * step, ahead))
            bottom.append(bottom[-1] + products(out + i * step, out + (i + 1) * step, ahead))
        for i in range(most + 1):
            found = (top[most - i] + bottom[i]).reshape(groups, channels, kernel[1], channels, kernel[1])
            entries[:, :, i, :, :, i + ahead] += found
            if ahead:
                entries[:, :, i + ahead, :, :, i] += found.permute(0, 3, 4, 1, 2)
    return len(x) * out * parts.shape[-1]


def _as_image(
    geometry: Geometry, kernel: Sequence[int], x: Tensor
) -> tuple[Tensor, tuple[int, int], tuple[int, int], tuple[int, int]]:
    """A convolution's padded input `[N, C, H, W]`, and its kernel, stride and dilation along both axes.

    One axis is taken for H.
    """
    if geometry.padding == "same":
        total = [d * (k - 1) for d, k in zip(geometry.dilation, kernel, strict=True)]
        sides = [(width // 2, width - width // 2) for width in total]
    else:
        assert not isinstance(geometry.padding, str)
        sides = [(width, width) for width in geometry.padding]
    pads = [side for pair in reversed(sides) for side in pair]
    x = F.pad(x, pads, mode="constant" if geometry.padding_mode == "zeros" else geometry.padding_mode)
    if len(kernel) == 1:
        return x.unsqueeze(3), (kernel[0], 1), (geometry.stride[0], 1), (geometry.dilation[0], 1)
    (height, width), (down, right), (below, beside) = kernel, geometry.stride, geometry.dilation
    return x, (height, width), (down, right), (below, beside)


def transformed_products(transform: InputTransform | None, total: Tensor) -> Tensor:
    """Sums of products `[1, K, K]` over x_t, from those over x: T G T^T with x_t = T x."""
    if transform is None:
        return total
    once = transformed_patches(transform, total[0])
    return transformed_patches(transform, once.mT.contiguous())[None]


def transformed_patches(transform: InputTransform | None, patches: Tensor) -> Tensor:
    """x_t of patches `[N, K]`."""
    if transform is None:
        return patches
    parts = patches.reshape(len(patches), transform.channels, -1)
    return transform.of_last_axis(parts.mT).mT.reshape(patches.shape)
