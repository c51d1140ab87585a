"""The int_mm engine on the CPU: the integers of the simulation, scaled once."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from integer_layers import assert_exact, quantized
from torch import nn

from stepquant.engines.base import AUTO_ORDER, choose, pack_
from stepquant.engines.int_mm import IntMmEngine, IntMmLayer
from stepquant.errors import EngineError
from stepquant.model.layer import QuantizedMatmul
from stepquant.numerics.spec import QuantSpec, scheme_for
from tiny import quantize_, tiny_unet

CPU, CUDA = torch.device("cpu"), torch.device("cuda")

LAYERS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(24, 8), (3, 24)),
    "linear of images": (lambda: nn.Linear(24, 8, bias=False), (3, 5, 2, 24)),
    "pointwise": (lambda: nn.Conv2d(24, 8, 1), (3, 24, 5, 4)),
    "conv1d": (lambda: nn.Conv1d(24, 8, 1, bias=False), (3, 24, 7)),
    "same": (lambda: nn.Conv2d(24, 8, 1, padding="same"), (3, 24, 5, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("bits", [4, 8])
def test_every_geometry_every_row_and_mixed_timesteps(name: str, bits: int) -> None:
    make, shape = LAYERS[name]
    layer = quantized(make(), QuantSpec(bits, "channel"))
    packed, clock = IntMmLayer(layer), layer.input_quantizer.clock  # type: ignore[union-attr]
    assert torch.equal(packed.weight, layer.weight)
    for timestep in (0.0, 1.0, 3.0, torch.tensor([3.0, 0.0, 1.0])):
        clock.set(timestep)  # type: ignore[operator]
        assert_exact(layer, packed, torch.randn(shape) * 2)
    assert_exact(layer, packed, torch.randn(6, *shape[1:]))  # two parts of each sample


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_every_bit_width(bits: int, symmetric: bool) -> None:
    layer = quantized(
        nn.Linear(24, 8), QuantSpec(bits, "channel", symmetric=symmetric), QuantSpec(bits, symmetric=symmetric)
    )
    assert_exact(layer, IntMmLayer(layer), torch.randn(40, 24) * 2)


def test_inputs_without_a_sign_and_one_row() -> None:
    layer = quantized(nn.Linear(24, 8), QuantSpec(8, "tensor"), QuantSpec(7, nonnegative=True), rows=1)
    assert_exact(layer, IntMmLayer(layer), torch.randn(4, 24).abs())


def test_bfloat16_copies_and_gradients() -> None:
    layer = quantized(nn.Linear(24, 8))
    packed, x = IntMmLayer(layer), torch.randn(4, 24)
    assert torch.equal(copy.deepcopy(packed)(x), packed(x))
    short = copy.deepcopy(packed).to(torch.bfloat16)
    assert short.levels.dtype == torch.int8
    found = short(x.bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), packed(x.bfloat16().float()), rtol=2.0**-6, atol=2.0**-6)
    with pytest.raises(EngineError, match="has no gradient"):
        packed(x.requires_grad_())


@pytest.mark.parametrize(
    ("make", "device", "reason"),
    [
        (lambda: QuantizedMatmul("scores"), CPU, "It is a matmul"),
        (lambda: quantized(nn.Conv2d(8, 8, 3)), CPU, "looks at more than one position"),
        (lambda: quantized(nn.Conv2d(8, 8, 1, stride=2)), CPU, "looks at more than one position"),
        (lambda: quantized(nn.Conv2d(8, 8, 1, padding=1)), CPU, "looks at more than one position"),
        (lambda: quantized(nn.Conv2d(8, 8, 1, groups=2)), CPU, "or has groups"),
        (lambda: quantized(nn.Linear(12, 8)), CUDA, "12 inputs and 8 outputs.*multiples of 8.*not yet run on a GPU"),
        (lambda: quantized(nn.Linear(8, 12)), CUDA, "8 inputs and 12 outputs"),
        (lambda: quantized(nn.Linear(8, 8)), torch.device("mps"), "on mps; torch._int_mm runs on cpu and cuda"),
    ],
)
def test_refusals(make: Callable[[], Any], device: torch.device, reason: str) -> None:
    assert re.search(reason, IntMmEngine().refuses(make(), device) or "")


def test_it_runs_by_name_and_never_by_itself() -> None:
    layer = quantized(nn.Linear(16, 8))
    assert "int_mm" not in AUTO_ORDER
    assert choose(layer, CPU, "int_mm").engine == choose(layer, CUDA, "int_mm").engine == "int_mm"
    assert choose(layer, CUDA).engine == "simulated"
    denoiser = quantize_(tiny_unet(), scheme_for(8, 8))
    placed = pack_(denoiser, "int_mm")
    assert {place.engine for place in placed.values()} == {"int_mm", "simulated"}
    assert bool(denoiser(torch.randn(2, 1, 8, 8), 3).sample.isfinite().all())
