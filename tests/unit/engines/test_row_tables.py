"""Rows of a graph: their tables as one, their borders, and what bfloat16 leaves of their scales."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tiny
from stepquant.engines import openvino as engine_module
from stepquant.engines.borders import MOST_PATTERNS
from stepquant.engines.graph import GraphLayer, lower
from stepquant.engines.openvino import OpenVINOEngine
from stepquant.model.clock import StepClock, attach_clock
from stepquant.model.layer import QuantizedLayer
from stepquant.model.quantizer import InputQuantizer, WeightQuantizer
from stepquant.model.surgery import quantized_layers, swap_layers_
from stepquant.numerics.affine import QParams, choose_qparams, range_of
from stepquant.numerics.spec import LayerScheme, QuantSpec

pytestmark = pytest.mark.skipif(not engine_module.has_vnni(), reason="int8 layers need a processor with VNNI")

TIMESTEPS = (50, 150, 450)


class OneLayer(nn.Module):
    """A denoiser of a single layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        result: Tensor = self.layer(sample)
        return result


def of_positive(layer: nn.Module) -> Any:
    """A quantized network of a layer for what SiLU gives: four rows whose zero points lie together, far from 128."""
    net, source, weight = OneLayer(layer), QuantSpec(8), QuantSpec(4, "channel")
    swap_layers_(net, {"layer": LayerScheme(weight, source)})
    clock = StepClock(torch.tensor([100.0, 200.0, 300.0, 400.0]))
    attach_clock(net, clock)
    quantized = net.layer
    assert isinstance(quantized, QuantizedLayer)
    quantized.weight_quantizer = WeightQuantizer(weight, choose_qparams(*range_of(quantized.weight, weight), weight))
    params = choose_qparams(-torch.linspace(0.2, 0.35, 4), torch.linspace(3, 6, 4), source)
    assert set(params.zero_point.flatten().tolist()) == {14.0, 15.0, 16.0}
    quantized.input_quantizer = InputQuantizer(source, clock, params, torch.arange(5) % 4)
    quantized.harden_()
    return net.requires_grad_(False).eval()


def needs_bf16() -> None:
    if "BF16" not in engine_module._core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("the processor has no bfloat16")


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_bf16_rounds_what_goes_between_layers_and_not_the_scales_of_rows(kind: str) -> None:
    needs_bf16()
    torch.manual_seed(0)
    layer, shape = (
        (nn.Conv2d(32, 24, 3, padding=1), (4, 32, 12, 12)) if kind == "conv" else (nn.Linear(32, 24), (99, 32))
    )
    net = of_positive(layer)
    compiled = OpenVINOEngine("bf16").compile(net)
    x = F.silu(2 * torch.randn(shape))
    for timestep in TIMESTEPS:
        with torch.no_grad():
            expected = net(x, timestep)
            error = compiled(x, timestep) - expected
        # Half of the distance of neighbouring numbers is 2^-9 at most. Scales that are rounded are the same for all
        # values of a layer: 1.4e-3 of what is expected here, with zero points around 128 an error of 3.9e-3 in all.
        assert error.norm() < 2**-9 * expected.norm()
        assert (error * expected).sum().abs() < 2e-4 * expected.square().sum()
    assert compiled.runtime_precisions()["layer"] in ("u8", "i8")


@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_a_network_has_one_table_for_all_rows(precision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if precision == "bf16":
        needs_bf16()
    net = tiny.quantize_(tiny.small_unet(), rows=4)
    for number, quantizer in enumerate(m for m in net.modules() if isinstance(m, InputQuantizer)):
        spread = 1 + 0.05 * torch.arange(len(quantizer.scale)) + 0.01 * number
        quantizer.scale.data.mul_(spread.reshape(quantizer.scale.shape))
        if not quantizer.spec.symmetric and not quantizer.spec.nonnegative:
            moved = quantizer.zero_point + torch.arange(len(quantizer.scale)).reshape(quantizer.zero_point.shape) % 3
            quantizer.zero_point.data.copy_(moved.clamp(0, 255))

    def made(joined: bool) -> tuple[list[Tensor], int]:
        with monkeypatch.context() as patch:
            if not joined:
                patch.setattr(engine_module, "join_row_tables_", lambda *_: 0)
            compiled = OpenVINOEngine(precision).compile(net)
            sample = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
            with torch.no_grad():
                outputs = [compiled(sample, torch.tensor(timestep)).sample for timestep in (10, 400, 990)]
        (graph,) = compiled._compiled.values()
        kinds = [node.get_rt_info()["layerType"].astype(str) for node in graph.model.get_runtime_model().get_ops()]
        return outputs, kinds.count("Gather")

    (apart, before), (together, after) = made(False), made(True)
    assert not torch.equal(together[0], together[1])
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-2 if precision == "bf16" else 2e-5)
    layers = len(quantized_layers(net))
    assert before > 2 * layers
    assert after < 20


GEOMETRIES = {
    "plain": ({"kernel_size": 3, "padding": 1}, (7, 9)),
    "strided": ({"kernel_size": (5, 3), "stride": (2, 1), "padding": (2, 1)}, (8, 7)),
    "dilated": ({"kernel_size": 3, "dilation": (1, 2), "padding": (1, 3)}, (9, 9)),
    "wide": ({"kernel_size": 2, "padding": 1}, (4, 5)),
    "grouped": ({"kernel_size": 3, "padding": 1, "groups": 2}, (5, 5)),
    "one axis": ({"kernel_size": 3, "stride": 2, "padding": 2}, (11,)),
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_border_is_what_padding_leaves_out(name: str) -> None:
    """Oracle: the whole sum of the weights less the operator on ones."""
    given, spatial = GEOMETRIES[name]
    build: Any = nn.Conv2d if len(spatial) == 2 else nn.Conv1d
    low = lower(of_positive(build(4, 6, **given))).module.layer
    assert isinstance(low, GraphLayer)
    weight = (low.levels * low.scale.reshape(-1, *[1] * (low.levels.ndim - 1))).double()
    inside = low.geometry.apply(torch.ones(1, 4, *spatial).double(), weight, None)
    expected = weight.flatten(1).sum(1).reshape(1, -1, *[1] * len(spatial)) - inside
    assert low.taps is not None
    border = low._border(low.taps, spatial)
    assert len(border.table) <= MOST_PATTERNS
    found = torch.from_numpy(border.whole())[None]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    middle = found[(..., *(size // 2 for size in found.shape[2:]))]
    assert torch.equal(middle, torch.zeros_like(middle))
    assert float(found.abs().max()) > 0.01


def test_rows_with_one_zero_point_have_no_border() -> None:
    net = of_positive(nn.Conv2d(4, 6, 3, padding=1))
    source = net.layer.input_quantizer
    alike = QParams(source.scale, torch.full_like(source.zero_point, 15))
    net.layer.input_quantizer = InputQuantizer(source.spec, source.clock, alike, source.row_of_bin)
    low: Any = lower(net).module.layer
    assert low.taps is None
    assert low.total is None
    assert low.input.zero_point == 15
