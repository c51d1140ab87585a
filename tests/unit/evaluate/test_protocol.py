from __future__ import annotations

import math

import pytest
import torch

from stepquant.errors import SpecError
from stepquant.evaluate.protocol import PROTOCOLS, protocol_named, resize_tensorflow1


@pytest.mark.parametrize(("rows", "columns", "size"), [(5, 7, 9), (9, 8, 4), (6, 6, 6)])
def test_tensorflow_1_by_its_definition(rows: int, columns: int, size: int) -> None:
    image = torch.rand(1, 2, rows, columns, generator=torch.Generator().manual_seed(0))
    found = resize_tensorflow1(image, size)
    for i in range(size):
        for j in range(size):
            y, x = i * rows / size, j * columns / size
            top, left = math.floor(y), math.floor(x)
            below, right = min(top + 1, rows - 1), min(left + 1, columns - 1)
            a, b = y - top, x - left
            expected = (
                (1 - a) * (1 - b) * image[0, :, top, left]
                + (1 - a) * b * image[0, :, top, right]
                + a * (1 - b) * image[0, :, below, left]
                + a * b * image[0, :, below, right]
            )
            assert torch.allclose(found[0, :, i, j], expected, atol=1e-5)


def test_clean_is_antialiased_and_the_others_are_not() -> None:
    """A checkerboard of single pixels is grey once it is averaged; samples of it are black or white."""
    board = ((torch.arange(64)[:, None] + torch.arange(64)) % 2).float().view(1, 1, 64, 64)
    clean = PROTOCOLS["clean"].prepare(board, 16)
    assert clean.shape == (1, 1, 16, 16)
    assert float((clean - 0.5).abs().max()) < 0.05
    sampled = PROTOCOLS["torch-fidelity"].prepare(board, 16)
    assert set(sampled.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(PROTOCOLS["adm"].prepare(board, 16), sampled)


def test_clean_keeps_rows_columns_and_range() -> None:
    edge = torch.zeros(1, 3, 8, 8)
    edge[:, :, :4] = 1.0
    edge[:, 1] = 0.5
    found = PROTOCOLS["clean"].prepare(edge, 32)
    assert float(found[0, 0, 2, 5]) == pytest.approx(1.0)
    assert float(found[0, 0, 29, 5]) == pytest.approx(0.0)
    assert torch.allclose(found[0, 1], torch.tensor(128 / 255), atol=1e-6)
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1


def test_rounding() -> None:
    image = torch.tensor([0.4, 0.6, 127.4]).view(1, 1, 1, 3) / 255
    assert torch.equal(PROTOCOLS["as-sampled"].prepare(image, None), image)
    for name in ("clean", "torch-fidelity", "adm"):
        levels = PROTOCOLS[name].prepare(image, None) * 255
        assert levels.flatten().tolist() == pytest.approx([0, 1, 127])


def test_a_protocol_that_does_not_resize_refuses_to() -> None:
    with pytest.raises(SpecError, match=r"want 299 x 299 .* use one of clean, torch-fidelity, adm"):
        PROTOCOLS["as-sampled"].prepare(torch.zeros(1, 3, 8, 8), 299)


def test_names() -> None:
    assert protocol_named(None, None).name == "as-sampled"
    assert protocol_named(None, 299).name == "clean"
    assert protocol_named("adm", None).splits == 0
    with pytest.raises(SpecError, match="Did you mean 'clean'"):
        protocol_named("claen", None)
