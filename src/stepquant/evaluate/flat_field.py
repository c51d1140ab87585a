"""The flat-field test: how noisy and how bright samples are, step by step.

Users measure quantization by hand with a prompt for an even surface: grain that grows from step to step, and a white
that drifts to a colour, show there before any metric of whole images sees them. Both figures are made for any sample;
a prompt for an even surface makes them sharpest, since the image itself then has no detail.

    noise level   sqrt(mean (m * x)^2) / 6,  m = [[1, -2, 1], [-2, 4, -2], [1, -2, 1]],  over pixels and channels
    white point   mean of every channel

m is a high-pass that is blind to constants, ramps and straight edges along the axes; the sum of its squares is 36, so
the noise level of white noise is its standard deviation.

Source: Immerkær 1996, "Fast noise variance estimation", for m and the root mean square.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["has_flat_field", "noise_level", "white_point"]

_MASK = torch.tensor([[1.0, -2.0, 1.0], [-2.0, 4.0, -2.0], [1.0, -2.0, 1.0]], dtype=torch.float64)


def has_flat_field(sample: Tensor) -> bool:
    """Whether a sample is a picture, `[B, C, H, W]` with at least 3 x 3 places. Packed tokens and videos are not."""
    return sample.ndim == 4 and min(sample.shape[2:]) >= 3


def noise_level(sample: Tensor) -> Tensor:
    """`[B]` float64 on the CPU, in units of the sample, of `[B, C, H, W]`."""
    x = sample.detach().double().cpu()
    channels = x.shape[1]
    residual = F.conv2d(x, _MASK.expand(channels, 1, 3, 3), groups=channels)
    return residual.square().mean(dim=(1, 2, 3)).sqrt() / 6


def white_point(sample: Tensor) -> Tensor:
    """`[B, C]` float64 on the CPU, in units of the sample, of `[B, C, H, W]`."""
    return sample.detach().double().cpu().mean(dim=(2, 3))
