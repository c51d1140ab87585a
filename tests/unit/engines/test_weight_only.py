"""The weight_only engine on the CPU: the checkpoint's levels and scales, and few roundings."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from integer_layers import EPSILON, quantized
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from stepquant.engines.base import choose, engines, pack_, place
from stepquant.engines.reference import PackedLayer
from stepquant.engines.weight_only import WeightOnlyEngine, WeightOnlyLayer
from stepquant.errors import EngineError
from stepquant.model.layer import LowRankBranch, QuantizedLayer, QuantizedMatmul
from stepquant.model.quantizer import WeightQuantizer
from stepquant.model.transform import InputTransform
from stepquant.numerics.spec import QuantSpec, scheme_for
from tiny import TinyNet, quantize_, tiny_unet

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

LAYERS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(24, 8), (3, 24)),
    "linear of images": (lambda: nn.Linear(24, 8, bias=False), (3, 5, 2, 24)),
    "one vector": (lambda: nn.Linear(13, 7), (13,)),
    "pointwise": (lambda: nn.Conv2d(24, 8, 1), (3, 24, 5, 4)),
    "kernel": (lambda: nn.Conv2d(3, 5, 3, padding=1), (3, 3, 5, 4)),
    "strided": (lambda: nn.Conv2d(8, 8, 3, stride=2, padding=(1, 0), dilation=(1, 2)), (3, 8, 9, 9)),
    "grouped": (lambda: nn.Conv2d(6, 9, 3, padding=1, groups=3, bias=False), (3, 6, 5, 5)),
    "circular": (lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), (3, 8, 4, 4)),
    "sequence": (lambda: nn.Conv1d(6, 10, 3, padding="same", dilation=2), (3, 6, 7)),
}


def weight_only(
    layer: nn.Linear | nn.Conv1d | nn.Conv2d, spec: QuantSpec | None = None, dtype: torch.dtype = torch.float32
) -> QuantizedLayer:
    """The hardened layer, its weight off-centre and its input in floating point."""
    made = quantized(layer, spec)
    made.input_quantizer = None
    return made.to(dtype)


def integers(layer: QuantizedLayer) -> tuple[Tensor, Tensor]:
    """q - z in the weight's shape, and the scale in a shape that broadcasts against it, both in float64."""
    quantizer: Any = layer.weight_quantizer
    shape = (-1, *(1,) * (layer.weight.ndim - 1))
    levels, zero_point = quantizer.levels(layer.weight).double(), quantizer.zero_point.double().reshape(shape)
    return levels - zero_point, quantizer.scale.double().reshape(shape)


def assert_exact(layer: QuantizedLayer, packed: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Within rounding of what the integers give in float64.

    The sum is of K exact terms in float32, each rounding at most EPSILON of the sum of sizes. The sum and the result
    are rounded to x's dtype, each at most half a unit of its own size. Between them are three float32 operations.
    """
    found = packed(x)
    whole, scale = integers(layer)
    product = layer.geometry.apply(x.double(), whole * scale, None)
    size = layer.geometry.apply(x.double().abs(), (whole * scale).abs(), None)
    bias = (
        torch.zeros(()) if layer.bias is None else layer.bias.double().reshape(-1, *(1,) * len(layer.geometry.stride))
    )
    half = torch.finfo(x.dtype).eps / 2
    terms = layer.weight[0].numel()
    bound = half * (product.abs() + (product + bias).abs()) + (terms + 8) * EPSILON * (size + bias.abs())
    simulated = layer(x)
    assert found.shape == simulated.shape
    assert found.dtype == simulated.dtype == x.dtype
    error = (found.double() - product - bias).abs()
    # One more half for terms of second order, and float16's steps below its normal numbers.
    tiny = torch.finfo(x.dtype).smallest_normal * half
    assert bool((error <= (1 + half) * bound + 4 * tiny).all()), float((error / bound).max())
    # The simulated layer rounds each weight to x's dtype, which the size of the sum bounds.
    apart = (simulated.double() - found.double()).abs()
    assert bool((apart <= 2 * bound + (half + 2 * EPSILON) * size + 8 * tiny).all())


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_every_geometry(name: str, dtype: torch.dtype, bits: int) -> None:
    make, shape = LAYERS[name]
    layer = weight_only(make(), QuantSpec(bits, "channel"), dtype)
    packed = WeightOnlyLayer(layer)
    assert_exact(layer, packed, torch.randn(shape).to(dtype))
    assert (packed.in_features, packed.out_channels) == (layer.in_features, layer.out_channels)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_levels_and_scales_are_the_checkpoints(bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    """Of unit vectors, for which a sum has one exact term, the layer gives the simulated weight to the bit."""
    layer = weight_only(nn.Linear(24, 8, bias=False), QuantSpec(bits, "channel", symmetric=symmetric), dtype)
    packed = WeightOnlyLayer(layer)
    assert torch.equal(packed.weight, layer.weight)
    assert torch.equal(packed(torch.eye(24).to(dtype)), layer.weight.T)
    assert_exact(layer, packed, torch.randn(40, 24).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-9, 1e-3, 1.0, 100.0])
def test_scales_of_every_size(size: float, dtype: torch.dtype) -> None:
    """Also where float16 does not hold the scale's power of two."""
    linear = nn.Linear(24, 8, bias=False)
    nn.init.normal_(linear.weight, std=size)
    layer = weight_only(linear)
    packed = WeightOnlyLayer(layer).to(dtype)
    expected = layer.weight.to(dtype)
    found = packed(torch.eye(24).to(dtype)).T
    step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert bool(((found - expected).double().abs() <= step).all())
    assert size < 1e-3 or torch.equal(found, expected)


def test_float16_does_not_overflow_where_the_simulation_does_not() -> None:
    """The sum of the levels themselves is beyond float16; that of the weights is not."""
    layer = weight_only(nn.Linear(64, 8), dtype=torch.float16)
    x = 50 * layer.weight.sign()
    whole, _ = integers(layer)
    assert float((x.double() @ whole.flatten(1).T).abs().max()) > torch.finfo(torch.float16).max
    packed = WeightOnlyLayer(layer)
    assert_exact(layer, packed, x)
    wide = copy.deepcopy(packed).float()
    with torch.autocast("cpu", torch.float16):
        found = wide(x.float())
    assert found.dtype == torch.float16
    assert bool(found.isfinite().all())


@pytest.mark.parametrize("spec", [QuantSpec(8, "tensor"), QuantSpec(3, "tensor", symmetric=True)])
def test_one_scale_for_the_whole_weight(spec: QuantSpec) -> None:
    layer = weight_only(nn.Conv2d(6, 10, 3, padding=1), spec)
    assert_exact(layer, WeightOnlyLayer(layer), torch.randn(3, 6, 5, 4))


@pytest.mark.parametrize(("bits", "size"), [(2, 288), (4, 288), (5, 576), (8, 576)])
def test_a_level_takes_a_byte_or_half_of_one(bits: int, size: int) -> None:
    packed = WeightOnlyLayer(weight_only(nn.Conv2d(8, 8, 3), QuantSpec(bits, "channel")))
    assert packed.levels.numel() * packed.levels.element_size() == size
    assert not any(parameter.numel() == 576 for parameter in packed.parameters())


def test_channels_last() -> None:
    layer = weight_only(nn.Conv2d(8, 16, 3, padding=1))
    packed, x = WeightOnlyLayer(layer), torch.randn(2, 8, 6, 5).contiguous(memory_format=torch.channels_last)
    assert_exact(layer, packed, x)
    assert_exact(layer, nn.Module.to(packed, memory_format=torch.channels_last), x)  # type: ignore[call-overload]


def test_transforms_and_branches_stay_in_floating_point() -> None:
    """The branch takes the transformed input, and its result is added to the layer's."""
    layer = weight_only(nn.Linear(24, 8))
    layer.input_transform = InputTransform(24, -1, scale=torch.linspace(0.5, 2, 24))
    layer.branch = LowRankBranch(layer.geometry, torch.randn(2, 24), torch.randn(8, 2))
    x = torch.randn(5, 24)
    packed = WeightOnlyLayer(layer)
    torch.testing.assert_close(packed(x), layer(x))
    plain = copy.copy(layer)
    plain._modules = {**layer._modules, "input_transform": None, "branch": None}
    turned = layer.input_transform(x)
    torch.testing.assert_close(packed(x), WeightOnlyLayer(plain)(turned) + layer.branch(turned))


def test_copies_casts_and_state_dicts() -> None:
    layer = weight_only(nn.Linear(24, 8))
    packed, x = WeightOnlyLayer(layer), torch.randn(4, 24)
    assert torch.equal(copy.deepcopy(packed)(x), packed(x))
    for dtype in (torch.bfloat16, torch.float16):
        cast = copy.deepcopy(packed).to(dtype)
        assert cast.weight_quantizer.scale.dtype == torch.float32
        assert cast.levels.dtype == torch.int8
        at_once = WeightOnlyLayer(copy.deepcopy(layer).to(dtype))
        assert torch.equal(cast(x.to(dtype)), at_once(x.to(dtype)))
        assert torch.equal(cast.float().weight, layer.weight)
    other = WeightOnlyLayer(weight_only(nn.Linear(24, 8)))
    assert not torch.equal(other(x), packed(x))
    other.load_state_dict(packed.state_dict())
    assert torch.equal(other(x), packed(x))


def test_gradients_reach_the_input() -> None:
    layer = weight_only(nn.Linear(24, 8))
    x = torch.randn(4, 24, requires_grad=True)
    (found,) = torch.autograd.grad(WeightOnlyLayer(layer)(x).square().sum(), x)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_all_timesteps_run_through_two_compiled_graphs_at_most(bits: int) -> None:
    denoiser = quantize_(TinyNet(), scheme_for(bits, None), ends="same")
    placed = pack_(denoiser, "weight_only")
    assert {placement.engine for placement in placed.values()} == {"weight_only"}
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(denoiser), backend=counter)
    sample = torch.randn(2, 2, 4, 4)
    with torch.no_grad():
        for timestep in (0, 250, 500, 750, 999):
            expected = denoiser(sample, torch.tensor(timestep))
            assert torch.equal(compiled(sample, torch.tensor(timestep)), expected)
    torch._dynamo.reset()
    assert 1 <= counter.frame_count <= 2


def _loose(layer: QuantizedLayer) -> QuantizedLayer:
    layer.on_grid = False
    return layer


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: QuantizedMatmul("scores"), "^It is a matmul and has no weight to pack.$"),
        (lambda: quantized(nn.Linear(8, 8)), "^Its input is quantized; this engine is for inputs in floating point.$"),
        (lambda: weight_only(nn.Linear(8, 8), QuantSpec(4, "group", group_size=4)), "a scale for each group of inputs"),
        (lambda: _loose(weight_only(nn.Linear(8, 8))), "^Its weight has not been hardened.$"),
        (lambda: QuantizedLayer(weight_only(nn.Linear(2, 2)).geometry, torch.ones(2, 2), None), "is not quantized"),
    ],
)
def test_refusals(make: Callable[[], Any], reason: str) -> None:
    layer = make()
    assert re.search(reason, WeightOnlyEngine().refuses(layer, CPU) or "")
    assert re.search(reason, choose(layer, CPU, "weight_only").refusals["weight_only"])
    assert choose(layer, CPU, "weight_only").engine == "simulated"
    if isinstance(layer, QuantizedLayer):
        with pytest.raises(EngineError, match="cannot be packed for the weight_only engine"):
            WeightOnlyLayer(layer)


def test_weights_off_the_grid_are_an_error() -> None:
    layer = weight_only(nn.Linear(8, 8))
    layer.weight.data += 1e-3
    with pytest.raises(EngineError, match="does not lie on the grid"):
        WeightOnlyLayer(layer)


def test_layers_on_meta_are_judged_without_their_values() -> None:
    layer = weight_only(nn.Linear(8, 8)).to("meta")
    assert isinstance(layer.weight_quantizer, WeightQuantizer)
    assert WeightOnlyEngine().refuses(layer, torch.device("meta")) is None


def test_it_runs_by_name_and_never_by_itself() -> None:
    assert "weight_only" in engines()
    simulated = quantize_(tiny_unet(), scheme_for(4, None), ends="same")
    _, placed = place(copy.deepcopy(simulated))
    assert "weight_only" not in {placement.engine for placement in placed.values()}
    packed, placed = place(copy.deepcopy(simulated), "weight_only")
    assert {placement.engine for placement in placed.values()} == {"weight_only"}
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        expected, found = simulated(x, 3).sample, packed(x, 3).sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_with_quantized_inputs_is_left_simulated_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    denoiser = quantize_(TinyNet(), scheme_for(8, 8))
    x = torch.randn(1, 2, 4, 4)
    expected = denoiser(x, 0)
    assert torch.equal(place(denoiser, "weight_only")[0](x, 0), expected)
    assert "Engine 'weight_only' takes none of the 2 quantized layers" in caplog.text
    assert "(2) Its input is quantized; this engine is for inputs in floating point." in caplog.text
    caplog.clear()
    pack_(quantize_(TinyNet(), scheme_for(8, None), ends="same"), "weight_only")
    assert not caplog.text


def test_it_computes_what_the_reference_engine_does() -> None:
    """In float32 the two differ by the roundings of the product and of the scale behind it."""
    layer = weight_only(nn.Conv2d(8, 16, 3, padding=1), QuantSpec(3, "channel"))
    x = torch.randn(2, 8, 6, 5)
    torch.testing.assert_close(WeightOnlyLayer(layer)(x), PackedLayer(layer)(x), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_on_a_gpu(name: str, dtype: torch.dtype, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on the CPU, and two of the geometries compiled. Without the short formats that torch may take for sums."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    for option in ("allow_tf32", "allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction"):
        monkeypatch.setattr(torch.backends.cuda.matmul, option, False)
    make, shape = LAYERS[name]
    layer = weight_only(make(), QuantSpec(bits, "channel"), dtype).cuda()
    packed, x = WeightOnlyLayer(layer), torch.randn(shape).to("cuda", dtype)
    assert_exact(layer, packed, x)
    if name in ("linear", "kernel"):
        torch._dynamo.reset()
        assert_exact(layer, torch.compile(packed), x)
        torch._dynamo.reset()
