"""Integer engines where the input has scales of its own, or a transform or a branch around the layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from integer_layers import assert_exact, quantized
from torch import nn

from stepquant.engines import onednn
from stepquant.engines.base import pack_
from stepquant.engines.int_mm import IntMmEngine, IntMmLayer
from stepquant.engines.onednn import OneDnnEngine, OneDnnLayer
from stepquant.errors import EngineError
from stepquant.model.layer import LowRankBranch, QuantizedLayer
from stepquant.model.quantizer import DynamicQuantizer
from stepquant.model.transform import InputTransform
from stepquant.numerics.spec import LayerScheme, QuantSpec
from tiny import quantize_, tiny_unet

CPU = torch.device("cpu")
needs_vnni = pytest.mark.skipif(onednn.unavailable() is not None, reason=str(onednn.unavailable()))
ENGINES = [pytest.param(OneDnnLayer, marks=needs_vnni, id="onednn"), pytest.param(IntMmLayer, id="int_mm")]


@pytest.fixture(autouse=True)
def _nothing_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in ("LEAST_CONV_WEIGHTS", "LEAST_LINEAR_WEIGHTS", "LEAST_PRODUCTS"):
        monkeypatch.setattr(onednn, limit, 0)


def at_run_time(layer: nn.Linear | nn.Conv2d, weight: QuantSpec, given: QuantSpec) -> QuantizedLayer:
    made = quantized(layer, weight)
    made.input_quantizer = DynamicQuantizer(given)
    return made


def uneven(*shape: int) -> torch.Tensor:
    """Tokens of very different sizes, one of them off-centre and one of them zero."""
    x = torch.randn(shape) * torch.logspace(-2, 2, shape[-2])[:, None]
    x[..., 1, :] += 30
    x[..., 2, :] = 0
    return x


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("granularity", ["token", "tensor"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    "weight", [QuantSpec(8, "channel"), QuantSpec(8, "channel", symmetric=True), QuantSpec(4, "channel")]
)
def test_scales_of_tokens_and_samples(engine: Any, granularity: Any, symmetric: bool, weight: QuantSpec) -> None:
    for bits in (4, 8):
        given = QuantSpec(bits, granularity, symmetric=symmetric, dynamic=True)
        for bias in (True, False):
            layer = at_run_time(nn.Linear(24, 16, bias=bias), weight, given)
            packed = engine(layer)
            assert_exact(layer, packed, uneven(3, 5, 24))
            # Scales are the input's own: another input has others.
            assert_exact(layer, packed, 1e-3 * uneven(2, 7, 24))


def test_scales_of_samples_of_a_convolution() -> None:
    given = QuantSpec(8, dynamic=True)
    layer = at_run_time(nn.Conv2d(8, 16, 3, padding=1), QuantSpec(8, "channel"), given)
    x = torch.randn(3, 8, 5, 4) * torch.tensor([0.01, 1.0, 100.0]).reshape(3, 1, 1, 1)
    assert_exact(layer, IntMmLayer(layer), x)
    assert "Each sample has a zero point of its own" in (OneDnnEngine().refuses(layer, CPU) or "")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("given", [QuantSpec(8), QuantSpec(8, "token", symmetric=True, dynamic=True)])
@pytest.mark.parametrize("parts", ["transform", "branch", "transform and branch"])
def test_a_transform_before_and_a_branch_beside(engine: Any, given: QuantSpec, parts: str) -> None:
    layer = quantized(nn.Linear(24, 16), QuantSpec(4, "channel"), None if given.dynamic else given)
    if given.dynamic:
        layer.input_quantizer = DynamicQuantizer(given)
    if "transform" in parts:
        layer.input_transform = InputTransform(24, -1, scale=torch.linspace(0.5, 2, 24), block=8)
    if "branch" in parts:
        layer.branch = LowRankBranch(layer.geometry, torch.randn(2, 24), torch.randn(16, 2))
    packed, x = engine(layer), torch.randn(3, 5, 24)
    torch.testing.assert_close(packed(x), layer(x), rtol=1e-4, atol=1e-4)
    # Each of them matters: without it the output is another one.
    for name in ("input_transform", "branch"):
        if getattr(layer, name) is not None:
            kept = getattr(layer, name)
            setattr(layer, name, None)
            assert not torch.allclose(packed(x), layer(x), rtol=1e-2, atol=1e-2)
            setattr(layer, name, kept)


@pytest.mark.parametrize("engine", [OneDnnEngine(), IntMmEngine()])
def test_refusals(engine: Any) -> None:
    both = at_run_time(
        nn.Linear(24, 16), QuantSpec(8, "channel"), QuantSpec(8, "channel_token", symmetric=True, dynamic=True)
    )
    assert "a scale for each channel" in (engine.refuses(both, CPU) or "")
    lines = at_run_time(nn.Conv2d(8, 8, 3), QuantSpec(8, "channel"), QuantSpec(8, "token", dynamic=True))
    assert "a scale for each of its lines" in (engine.refuses(lines, CPU) or "")
    with pytest.raises(EngineError, match="each of its lines"):
        IntMmLayer(lines)


@pytest.mark.parametrize("name", [pytest.param("onednn", marks=needs_vnni), "int_mm"])
def test_a_denoiser_with_scales_per_token(name: str) -> None:
    """Its linear layers run on integers, its convolutions stay simulated, and the prediction is the simulation's."""
    given = QuantSpec(8, "token", dynamic=True)
    unet = quantize_(tiny_unet(), LayerScheme(QuantSpec(8, "channel"), given))
    sample = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        expected = unet(sample, 300).sample
        placed = pack_(unet, name)
        found = unet(sample, 300).sample
    assert {place.engine for place in placed.values()} == {name, "simulated"}
    assert float((found - expected).norm() / expected.norm()) < 0.02  # a level may flip
