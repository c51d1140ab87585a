"""The shipped model: opens with no network, samples digits, and takes a seventh of its bytes at W4A8."""

from __future__ import annotations

import importlib.resources
import socket
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor

from stepquant.api import Quantized, load, open_model, quantize, sample
from stepquant.evaluate.features import DigitFeatures
from stepquant.inspection import inspect_checkpoint
from stepquant.methods.baseline import rtn

FOLDER = importlib.resources.files("stepquant") / "assets" / "digits-unet"

pytestmark = pytest.mark.skipif(
    not (FOLDER / "model_index.json").is_file(),
    reason="the shipped model is not in src/stepquant/assets/digits-unet: train it with training/digits_unet.py",
)

STEPS = 2
"""Sampling steps: enough for a size and a shape, far too few for a digit."""


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise AssertionError(f"The network was asked for {args[1:]}.")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


@pytest.fixture(scope="module")
def quantized() -> Quantized:
    torch.set_num_threads(1)
    recipe = rtn(weights=4, activations=8, samples=2, batch=2, ranges="minmax")
    return quantize(open_model("digits-unet"), recipe, steps=STEPS, base_model="digits-unet")


def read(images: Tensor) -> list[int]:
    return DigitFeatures().logits(images).argmax(1).tolist()


def assert_images(images: Tensor, count: int) -> None:
    assert images.shape == (count, 1, 32, 32)
    assert images.dtype == torch.float32
    assert 0 <= float(images.min()) <= float(images.max()) <= 1
    assert float(images.std()) > 0.01


def test_opens_without_a_network_and_seeds_give_images() -> None:
    pipe = open_model("digits-unet")
    assert all(parameter.dtype == torch.float32 for parameter in pipe.unet.parameters())
    images = sample(pipe, seeds=[3, 4], steps=STEPS)
    assert_images(images, 2)
    assert not torch.equal(images[0], images[1])
    # An image depends on its seed only; another batch may round differently in the last bits.
    torch.testing.assert_close(sample(pipe, seeds=[4], steps=STEPS), images[1:], rtol=0, atol=1e-4)


def test_samples_are_the_digits_that_the_seeds_or_the_labels_ask_for() -> None:
    pipe = open_model("digits-unet")
    images = sample(pipe, seeds=range(1000, 1020), steps=20, batch_size=20)
    assert sum(found == seed % 10 for seed, found in enumerate(read(images), 1000)) >= 16
    threes = sample(pipe, seeds=range(1000, 1004), steps=20, arguments={"class_labels": [3] * 4})
    assert read(threes) == [3] * 4


def test_w4a8_takes_at_most_a_seventh_of_float32(quantized: Quantized, tmp_path: Path) -> None:
    quantized.save(tmp_path / "w4a8")
    saved = sum(path.stat().st_size for path in (tmp_path / "w4a8").rglob("*") if path.is_file())
    parameters = sum(parameter.numel() for parameter in open_model("digits-unet").unet.parameters())
    assert saved <= 0.16 * 4 * parameters
    told = inspect_checkpoint(tmp_path / "w4a8")
    assert told["bytes"] == saved
    assert told["float32_bytes"] == 4 * parameters
    assert told["ratio"] <= 0.16


def test_the_checkpoint_opens_without_a_network_too(quantized: Quantized, tmp_path: Path) -> None:
    quantized.save(tmp_path / "w4a8")
    images = sample(load(tmp_path / "w4a8", engine="simulated"), seeds=[3, 4], steps=STEPS)
    assert_images(images, 2)
    assert torch.equal(images, sample(quantized.pipe, seeds=[3, 4], steps=STEPS))
