"""Sampling: one generator per image, and a word about arguments that are not those of the calibration."""

from __future__ import annotations

import logging

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler

import tiny
from stepquant.api import quantize, sample
from stepquant.methods import METHODS


def test_an_image_depends_on_its_seed_and_not_on_its_batch() -> None:
    pipe = DDIMPipeline(tiny.tiny_unet(), DDIMScheduler())
    together = sample(pipe, seeds=[7, 8], steps=3, batch_size=2)
    alone = sample(pipe, seeds=[8, 7], steps=3, batch_size=1)
    # In full precision only the order of sums differs between batch sizes.
    torch.testing.assert_close(together, alone.flip(0), atol=1e-4, rtol=0)
    assert float((together[0] - together[1]).abs().max()) > 0.05


def test_other_guidance_or_noise_than_was_calibrated_with_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    pipe = DDIMPipeline(tiny.tiny_unet(), DDIMScheduler())
    made = quantize(pipe, METHODS["rtn"](samples=2, batch=2), steps=2, arguments={"eta": 0.5}).pipe
    with caplog.at_level(logging.WARNING, logger="stepquant.api"):
        sample(made, seeds=[1], steps=2, arguments={"eta": 0.5})
        sample(pipe, seeds=[1], steps=2)
        assert caplog.messages == []
        for _ in range(2):
            sample(made, seeds=[1], steps=2)
    (told,) = caplog.messages
    assert told.startswith("The checkpoint was calibrated with eta=0.5 and is sampled with eta=0: give that argument")
