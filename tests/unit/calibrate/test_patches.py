"""Patches multiply to a layer's output; sums of their products do not depend on how they are computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from stepquant.calibrate import patches
from stepquant.calibrate.patches import add_products_, columns, transformed_patches, transformed_products
from stepquant.model.layer import geometry_of
from stepquant.model.transform import InputTransform

LAYERS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 4), (5, 3, 6)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), (3, 4, 5, 6)),
    "pointwise": (lambda: nn.Conv2d(4, 6, 1), (3, 4, 5, 6)),
    "five": (lambda: nn.Conv2d(4, 6, 5, padding=2), (3, 4, 8, 6)),
    "without padding": (lambda: nn.Conv2d(4, 6, (3, 1)), (3, 4, 6, 5)),
    "two rows": (lambda: nn.Conv2d(4, 6, (2, 4), padding=1, padding_mode="reflect"), (3, 4, 4, 5)),
    "fewer rows than the kernel": (lambda: nn.Conv2d(4, 6, 5, padding=2), (3, 4, 2, 6)),
    "strided": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (3, 4, 5, 6)),
    "strided along a row": (lambda: nn.Conv2d(4, 6, 3, stride=(1, 2), padding=1), (3, 4, 5, 6)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (3, 4, 5, 6)),
    "same": (lambda: nn.Conv2d(4, 6, (4, 3), padding="same", dilation=(2, 1)), (3, 4, 9, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, groups=2), (3, 4, 9)),
    "strided conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, stride=2), (3, 4, 9)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_columns_multiply_to_the_layers_output(name: str) -> None:
    make, shape = LAYERS[name]
    layer = make().double()
    geometry, x = geometry_of(layer), torch.randn(shape, dtype=torch.float64)
    expected = geometry.apply(x, layer.weight, None).movedim(geometry.channel_axis, 0)
    found = columns(geometry, layer.weight.shape[2:], x)
    product = torch.bmm(layer.weight.reshape(geometry.groups, -1, found.shape[1]), found)
    torch.testing.assert_close(product.reshape(expected.shape), expected)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("chunk", [1, 1 << 24])
def test_products_of_rows_are_those_of_patches(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patches, "CHUNK", chunk)
    make, shape = LAYERS[name]
    layer = make()
    geometry, kernel, x = geometry_of(layer), layer.weight.shape[2:], torch.randn(shape, dtype=torch.float64)
    each = columns(geometry, kernel, x)
    total = torch.ones(len(each), each.shape[1], each.shape[1], dtype=torch.float64)
    expected = total + torch.bmm(each, each.mT)
    assert add_products_(total, geometry, kernel, x) == each.shape[2]
    torch.testing.assert_close(total, expected, rtol=0, atol=1e-12)


def test_rows_are_multiplied_once_where_they_follow_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    monkeypatch.setattr(patches, "columns", lambda *args: called.append("columns") or columns(*args))
    for name, (make, shape) in LAYERS.items():
        layer = make()
        size = layer.weight[0].numel()
        groups = getattr(layer, "groups", 1)
        called.clear()
        add_products_(torch.zeros(groups, size, size), geometry_of(layer), layer.weight.shape[2:], torch.randn(shape))
        direct = name in ("linear", "pointwise", "fewer rows than the kernel", "strided", "strided conv1d")
        assert bool(called) == direct, name


def test_products_of_transformed_patches() -> None:
    transform = InputTransform(4, -3, scale=torch.rand(4) + 0.5, block=4)
    each = torch.randn(50, 36)
    found, expected = transformed_patches(transform, each), transformed_products(transform, (each.mT @ each)[None])
    torch.testing.assert_close((found.mT @ found)[None], expected, rtol=1e-4, atol=1e-3)
    assert transformed_products(None, expected) is expected
