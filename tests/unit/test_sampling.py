"""Sampling: one generator per image."""

from __future__ import annotations

import torch
from diffusers import DDIMPipeline, DDIMScheduler

import tiny
from stepquant.api import sample


def test_an_image_depends_on_its_seed_and_not_on_its_batch() -> None:
    pipe = DDIMPipeline(tiny.tiny_unet(), DDIMScheduler())
    together = sample(pipe, seeds=[7, 8], steps=3, batch_size=2)
    alone = sample(pipe, seeds=[8, 7], steps=3, batch_size=1)
    # In full precision only the order of sums differs between batch sizes.
    torch.testing.assert_close(together, alone.flip(0), atol=1e-4, rtol=0)
    assert float((together[0] - together[1]).abs().max()) > 0.05
