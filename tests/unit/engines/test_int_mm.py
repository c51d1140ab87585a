"""The int_mm engine on the CPU: the integers of the simulation, scaled once."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from integer_layers import ALONE, assert_alone, assert_exact, quantized
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from stepquant.engines.base import automatic, choose, pack_
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
    "one position in two": (lambda: nn.Conv2d(24, 8, 1, stride=2), (3, 24, 5, 4)),
    "kernel": (lambda: nn.Conv2d(8, 16, 3, padding=1), (3, 8, 5, 4)),
    "strided": (lambda: nn.Conv2d(8, 8, 3, stride=2, padding=(1, 0), dilation=(1, 2)), (3, 8, 9, 9)),
    "even": (lambda: nn.Conv2d(8, 8, 4, padding="same", dilation=2, bias=False), (3, 8, 9, 8)),
    "circular": (lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), (3, 8, 4, 4)),
    "sequence": (lambda: nn.Conv1d(8, 8, 3, padding=1), (3, 8, 7)),
    # Neither inputs nor outputs are multiples of eight, as in the first and last layer of a denoiser.
    "odd": (lambda: nn.Conv2d(3, 5, 3, padding=1), (3, 3, 5, 4)),
    "odd linear": (lambda: nn.Linear(13, 7), (3, 13)),
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


@pytest.mark.parametrize("make", [lambda: nn.Conv2d(3, 5, 3, padding=1), lambda: nn.Linear(13, 7)])
def test_the_kernel_of_a_gpu_gets_the_sizes_that_it_takes(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """cuBLASLt wants more than 16 rows, and inputs and outputs in multiples of eight."""
    plain, shapes = torch._int_mm, []

    def watched(a: Tensor, b: Tensor) -> Tensor:
        shapes.append((*a.shape, b.shape[1]))
        return plain(a, b)

    monkeypatch.setattr(torch, "_int_mm", watched)
    layer = quantized(make())
    assert_exact(
        layer, IntMmLayer(layer), torch.randn(2, 13) if len(layer.weight.shape) == 2 else torch.randn(1, 3, 2, 2)
    )
    ((rows, terms, outputs),) = shapes
    assert rows > 16
    assert terms % 8 == outputs % 8 == 0


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("make", "x"),
    [
        (lambda: nn.Conv2d(64, 64, 1), torch.randn(1, 64, 8, 8)),
        (lambda: nn.Conv2d(64, 64, 1), torch.randn(2, 64, 8, 8)),
        (lambda: nn.Conv2d(64, 64, 1), torch.randn(1, 64, 8, 8).contiguous(memory_format=torch.channels_last)),
        (lambda: nn.Conv2d(8, 64, 3, padding=1), torch.randn(1, 8, 8, 8)),
        (lambda: nn.Conv1d(64, 64, 1), torch.randn(1, 64, 32)),
        (lambda: nn.Linear(64, 64), torch.randn(1, 64, 32).transpose(1, 2)),
    ],
)
def test_the_kernel_gets_rows_and_the_weight_by_columns(
    make: Any, x: Tensor, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As int8 kernels want them: the terms of each sum side by side in memory, for one image as for several."""
    plain, strides = torch._int_mm, []

    def watched(a: Tensor, b: Tensor) -> Tensor:
        strides.append((a.stride(1), b.stride(0)))
        return plain(a, b)

    monkeypatch.setattr(torch, "_int_mm", watched)
    layer = quantized(make(), QuantSpec(bits, "channel"))
    assert_exact(layer, IntMmLayer(layer), x)
    assert strides == [(1, 1)]


def test_the_input_is_summed_for_weights_of_nine_bits_only(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, sums = Tensor.sum, []

    def watched(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        sums.append(tuple(self.shape))
        return plain(self, *args, **kwargs)

    short, long = (IntMmLayer(quantized(nn.Linear(64, 64), QuantSpec(bits, "channel"))) for bits in (7, 8))
    monkeypatch.setattr(Tensor, "sum", watched)
    short(torch.randn(32, 64))
    assert sums == []
    long(torch.randn(32, 64))
    assert sums == [(32, 64)]


@pytest.mark.parametrize("engine", ["int_mm", "reference"])
def test_all_timesteps_run_through_two_compiled_graphs_at_most(engine: str) -> None:
    denoiser = quantize_(tiny_unet(), scheme_for(8, 8))
    pack_(denoiser, engine)
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(denoiser), backend=counter)
    sample = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        for timestep in (0, 250, 500, 750, 999):
            expected = denoiser(sample, torch.tensor(timestep)).sample
            assert torch.equal(compiled(sample, torch.tensor(timestep)).sample, expected)
    torch._dynamo.reset()
    assert 1 <= counter.frame_count <= 2


@pytest.mark.parametrize("kind", ALONE)
def test_one_sample_without_a_batch(kind: str) -> None:
    make, shape = ALONE[kind]
    layer = quantized(make())
    assert_alone(layer, IntMmLayer(layer), torch.randn(shape))


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
        (lambda: quantized(nn.Conv2d(8, 8, 3, groups=2)), CPU, "It is a convolution with 2 groups"),
        (lambda: quantized(nn.Linear(8, 8)), torch.device("mps"), "on mps; torch._int_mm runs on cpu and cuda"),
    ],
)
def test_refusals(make: Callable[[], Any], device: torch.device, reason: str) -> None:
    assert re.search(reason, IntMmEngine().refuses(make(), device) or "")


def test_it_runs_by_name_and_never_by_itself() -> None:
    layer = quantized(nn.Linear(16, 8))
    assert automatic({"layer": layer})[0] != "int_mm"
    assert choose(layer, CPU, "int_mm").engine == choose(layer, CUDA, "int_mm").engine == "int_mm"
    denoiser = quantize_(tiny_unet(), scheme_for(8, 8))
    placed = pack_(denoiser, "int_mm")
    assert {place.engine for place in placed.values()} == {"int_mm", "simulated"}
    assert bool(denoiser(torch.randn(2, 1, 8, 8), 3).sample.isfinite().all())
