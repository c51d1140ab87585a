"""The resize of the protocol `clean` against its definition, written out: what Pillow does, and clean-fid with it.

Along one axis, with s = input length / output length, f = max(s, 1) and Keys' cubic kernel k with a = -1/2, output
pixel i is the mean of the input pixels j with the weights k((j + 1/2 - (i + 1/2) s) / f), which add up to 1.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stepquant.evaluate.protocol import PROTOCOLS


def keys(x: np.ndarray) -> np.ndarray:
    """Keys 1981, equation 15."""
    x = np.abs(x)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def weights(length: int, size: int) -> np.ndarray:
    """[size, length]."""
    s = length / size
    places = (np.arange(length)[None] + 0.5 - (np.arange(size)[:, None] + 0.5) * s) / max(s, 1.0)
    found = keys(places)
    return found / found.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(("rows", "columns", "size"), [(12, 20, 29), (40, 33, 17), (29, 64, 29), (300, 7, 50)])
@pytest.mark.parametrize("channels", [1, 3])
def test_clean_is_the_antialiased_cubic_resize_of_each_channel(
    rows: int, columns: int, size: int, channels: int
) -> None:
    generator = torch.Generator().manual_seed(rows)
    levels = torch.randint(0, 256, (2, channels, rows, columns), generator=generator)
    # Edges along both axes, at which the kernel overshoots.
    levels[0, :, : rows // 4], levels[0, :, rows // 4 : rows // 2] = 255, 0
    levels[1, :, :, : columns // 4], levels[1, :, :, columns // 4 : columns // 2] = 255, 0
    found = PROTOCOLS["clean"].prepare(levels.float() / 255, size) * 255
    along = np.einsum("ih,bchw->bciw", weights(rows, size), levels.double().numpy())
    both = np.einsum("jw,bciw->bcij", weights(columns, size), along)
    assert both.min() < 0
    assert both.max() > 255
    assert torch.allclose(found.double(), torch.from_numpy(both.clip(0, 255)), rtol=1e-4, atol=1e-3)
