"""Zero points behind integer operators instead of inside them: the same numbers, whatever meets the padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tiny
from stepquant.engines import openvino as engine_module
from stepquant.engines.openvino import OpenVINOEngine
from stepquant.engines.zero_points import EDGE, take_zero_points_
from stepquant.model.clock import StepClock, attach_clock
from stepquant.model.layer import QuantizedLayer
from stepquant.model.quantizer import InputQuantizer, WeightQuantizer
from stepquant.model.surgery import swap_layers_
from stepquant.numerics.affine import choose_qparams, range_of
from stepquant.numerics.spec import LayerScheme, QuantSpec

pytestmark = pytest.mark.skipif(not engine_module.has_vnni(), reason="int8 layers need a processor with VNNI")


class OneLayer(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        # Something behind the layer: what makes a graph's output loses its name.
        return F.elu(self.layer(sample))


def of_positive(layer: nn.Module) -> Any:
    """A quantized network of a layer for what SiLU gives, with a zero point of 17."""
    net, source, weight = OneLayer(layer), QuantSpec(8), QuantSpec(8, "channel", symmetric=True)
    swap_layers_(net, {"layer": LayerScheme(weight, source)})
    clock = StepClock(torch.tensor([500.0]))
    attach_clock(net, clock)
    quantized = net.layer
    assert isinstance(quantized, QuantizedLayer)
    quantized.weight_quantizer = WeightQuantizer(weight, choose_qparams(*range_of(quantized.weight, weight), weight))
    params = choose_qparams(torch.tensor([-0.28]), torch.tensor([3.9]), source)
    assert params.zero_point.item() == 17
    quantized.input_quantizer = InputQuantizer(source, clock, params, torch.zeros(2, dtype=torch.int64))
    quantized.harden_()
    return net.requires_grad_(False).eval()


CASES: dict[str, tuple[Any, tuple[int, ...], int]] = {
    "linear": (lambda: nn.Linear(24, 40), (3, 7, 24), 0),
    "pointwise": (lambda: nn.Conv2d(24, 40, 1), (2, 24, 6, 5), 0),
    "plain": (lambda: nn.Conv2d(24, 40, 3, padding=1), (2, 24, 6, 9), 2),
    "without bias": (lambda: nn.Conv2d(24, 40, 3, padding=1, bias=False), (2, 24, 6, 9), 2),
    "strided": (lambda: nn.Conv2d(24, 40, (5, 3), stride=(2, 1), padding=(2, 1)), (2, 24, 8, 7), 2),
    "strided pointwise": (lambda: nn.Conv2d(24, 40, 1, stride=(2, 3)), (2, 24, 7, 8), 0),
    "strided pointwise, one axis": (lambda: nn.Conv1d(24, 40, 1, stride=2), (2, 24, 8), 0),
    "one sample alone": (lambda: nn.Conv2d(8, 8, 3, padding=1), (8, 8, 8), 2),
    "one sample alone, one axis": (lambda: nn.Conv1d(8, 8, 3, padding=1), (8, 8), 2),
    "strided to one edge": (lambda: nn.Conv2d(24, 40, 3, stride=2, padding=1), (2, 24, 8, 8), 1),
    "dilated": (lambda: nn.Conv2d(24, 40, 3, dilation=(1, 2), padding=(1, 3)), (2, 24, 9, 9), 4),
    "one row of padding": (lambda: nn.Conv2d(24, 40, 3, padding=(1, 0)), (2, 24, 9, 9), 0),
    "all edge": (lambda: nn.Conv2d(24, 40, 3, padding=1), (2, 24, 2, 1), 0),
    "grouped": (lambda: nn.Conv2d(32, 64, 3, padding=1, groups=2), (2, 32, 5, 5), 2),
    "one axis": (lambda: nn.Conv1d(24, 40, 3, stride=2, padding=2), (2, 24, 11), 2),
}


@pytest.mark.parametrize("name", CASES)
def test_the_same_numbers(name: str) -> None:
    """Oracle: simulated arithmetic, in float32."""
    build, shape, edges = CASES[name]
    torch.manual_seed(0)
    net = of_positive(build())
    compiled = OpenVINOEngine().compile(net)
    x = F.silu(2 * torch.randn(shape))
    with torch.no_grad():
        expected, found = net(x, 1), compiled(x, 1)
    # What cancels, s z sum(w), is of the size of the result or a few times that.
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-6 * float(expected.abs().max()))
    (graph,) = compiled._compiled.values()
    assert len(graph.constants) == edges
    assert compiled.runtime_precisions()["layer"] in ("u8", "i8")


def test_nothing_is_left_inside() -> None:
    """Every operator of a network with a zero point gets another input, and the padding of each is known."""
    net = tiny.quantize_(tiny.small_unet(), rows=1)
    compiled = OpenVINOEngine().compile(net)
    kept: list[Any] = []

    def watched(model: Any) -> Any:
        kept.append((_inside(model), take_zero_points_(model), _inside(model)))
        return kept[-1][1]

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(engine_module, "take_zero_points_", watched)
        sample = torch.randn(2, 1, 8, 8)
        compiled(sample, torch.tensor(10))
    ((before, edges, after),) = kept
    assert before > 10
    assert after == 0
    assert edges
    assert all(name.startswith(EDGE) for name in edges)


def _inside(model: Any) -> int:
    """Operators with constant weights whose input has a zero point."""
    found = 0
    for node in model.get_ordered_ops():
        if node.get_type_name() in ("Convolution", "GroupConvolution", "MatMul"):
            restored = node.input_value(0).get_node()
            moved = restored.input_value(0).get_node() if restored.get_type_name() == "Multiply" else restored
            found += moved.get_type_name() == "Subtract"
    return found


def test_kernels_that_meet_padding_in_many_ways_stay_as_they_are() -> None:
    torch.manual_seed(0)
    net = of_positive(nn.Conv2d(8, 8, 9, padding=4))
    compiled = OpenVINOEngine().compile(net)
    x = F.silu(2 * torch.randn(1, 8, 12, 12))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, 1), net(x, 1), rtol=0, atol=1e-4)
    (graph,) = compiled._compiled.values()
    assert not graph.constants


def test_shapes_that_change_get_edges_of_their_own() -> None:
    torch.manual_seed(0)
    net = of_positive(nn.Conv2d(24, 40, 3, padding=1))
    compiled = OpenVINOEngine().compile(net)
    for width in (6, 9, 6):
        x = F.silu(2 * torch.randn(2, 24, 5, width))
        with torch.no_grad():
            expected = net(x, 1)
            torch.testing.assert_close(compiled(x, 1), expected, rtol=0, atol=3e-6 * float(expected.abs().max()))
