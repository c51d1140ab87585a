from __future__ import annotations

import pytest
import torch

from stepquant.evaluate.flat_field import has_flat_field, noise_level, white_point


def test_of_white_noise_it_is_the_standard_deviation() -> None:
    noise = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    scaled = noise * torch.tensor([0.5, 2.0]).view(2, 1, 1, 1)
    assert noise_level(scaled).tolist() == pytest.approx([0.5, 2.0], rel=0.02)


def test_blind_to_constants_ramps_and_straight_edges() -> None:
    y, x = torch.meshgrid(torch.linspace(0, 1, 16), torch.linspace(0, 1, 16), indexing="ij")
    pictures = torch.stack([torch.full((16, 16), 0.7), 2 * x - 3 * y, (x > 0.5).float(), (y > 0.3).float()])
    assert noise_level(pictures[:, None]).tolist() == pytest.approx([0.0] * 4, abs=1e-6)
    assert float(noise_level((x > y).float()[None, None])) > 0.01


def test_white_point_is_the_mean_of_each_channel() -> None:
    sample = torch.rand(2, 3, 4, 5)
    assert torch.allclose(white_point(sample)[1, 2], sample[1, 2].double().mean())
    assert white_point(sample).shape == (2, 3)


def test_what_is_no_picture() -> None:
    assert has_flat_field(torch.zeros(1, 4, 3, 3))
    assert not has_flat_field(torch.zeros(1, 4, 2, 8))
    assert not has_flat_field(torch.zeros(1, 16, 64))
    assert not has_flat_field(torch.zeros(1, 4, 3, 8, 8))
