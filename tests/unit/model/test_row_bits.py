"""Rows of an activation quantizer with bits of their own: arithmetic, checkpoint, engines and what people are told."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from mixed_bits import BITS, ROWS, mixed, mixed_, table
from stepquant.checkpoint import load_checkpoint, save_checkpoint
from stepquant.doctor.layers import bits_of
from stepquant.doctor.weights import clipping_losses
from stepquant.engines.base import choose, pack_
from stepquant.errors import SpecError
from stepquant.inspection import inspect_checkpoint
from stepquant.model.assembly import assemble_, describe
from stepquant.model.clock import StepClock
from stepquant.model.layer import QuantizedLayer
from stepquant.model.pipeline import DenoiserPipeline
from stepquant.model.quantizer import InputQuantizer
from stepquant.model.surgery import quantized_layers
from stepquant.numerics.affine import QParams, fake_quantize
from stepquant.numerics.spec import QuantSpec
from stepquant.report.layers import bits_text
from stepquant.storage import read_header
from tiny import TinyNet, quantize_, tiny_unet


def saved(folder: Path, denoiser: nn.Module) -> Path:
    pipe = DenoiserPipeline(TinyNet(), DDIMScheduler(), sample_shape=(2, 4, 4))
    save_checkpoint(folder, pipe=pipe, denoiser_name="denoiser", denoiser=denoiser, base_model="tiny", created="today")
    return folder


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("timestep", [[0.0], [250.0], [999.0], [0.0, 999.0, 500.0, 500.0]])
def test_each_sample_is_rounded_with_the_bits_of_its_row(symmetric: bool, timestep: list[float]) -> None:
    clock = StepClock(torch.tensor([100.0, 300.0, 600.0, 900.0]))
    spec = QuantSpec(8, symmetric=symmetric)
    quantizer = mixed(spec, clock)
    clock.set(torch.tensor(timestep))
    torch.manual_seed(0)
    x = (3 * torch.randn(4, 2, 5)).requires_grad_()
    quantizer.scale.requires_grad_(True)
    y = quantizer(x)
    up = torch.randn(y.shape)
    grad_x, grad_scale = torch.autograd.grad((y * up).sum(), [x, quantizer.scale])
    rows = ROWS[torch.bucketize(torch.tensor(timestep), clock.edges)].expand(4)
    params = table(spec, BITS)
    expected_scale = torch.zeros(3)
    for sample, row in enumerate(rows.tolist()):
        scale = params.scale[row].clone().requires_grad_()
        own = x[sample].detach().clone().requires_grad_()
        alone = fake_quantize(own, QParams(scale, params.zero_point[row]), QuantSpec(BITS[row], symmetric=symmetric))
        (alone * up[sample]).sum().backward()
        assert torch.equal(y[sample], alone)
        assert torch.equal(grad_x[sample], own.grad)
        expected_scale[row] += scale.grad
    torch.testing.assert_close(grad_scale, expected_scale)
    with torch.no_grad():
        assert torch.equal(quantizer(x), y)


def test_rows_per_channel_have_bits_too() -> None:
    clock = StepClock(torch.tensor([100.0, 300.0, 600.0, 900.0]))
    spec = QuantSpec(6, "channel")
    params = table(spec, BITS, channels=3)
    quantizer = InputQuantizer(spec, clock, params, ROWS, channel_axis=-2, bits=BITS)
    x = 4 * torch.randn(2, 3, 7)
    for timestep, row in ((0.0, 2), (950.0, 0), (700.0, 1)):
        clock.set(timestep)
        for channel in range(3):
            own = QParams(params.scale[row, channel], params.zero_point[row, channel])
            assert torch.equal(quantizer(x)[:, channel], fake_quantize(x[:, channel], own, QuantSpec(BITS[row])))


def test_bits_that_are_all_the_same_belong_to_the_spec() -> None:
    clock = StepClock(torch.tensor([100.0, 300.0, 600.0, 900.0]))
    params = QParams(torch.ones(3), torch.zeros(3))
    for bits in (4, (4, 4, 4)):
        quantizer = InputQuantizer(QuantSpec(8), clock, params, ROWS, bits=bits)
        assert (quantizer.spec, quantizer.row_bits, quantizer.bits) == (QuantSpec(4), None, (4, 4, 4))
        assert quantizer.levels(torch.zeros(1)) == QuantSpec(4)
    assert InputQuantizer(QuantSpec(8), clock, params, ROWS).row_bits is None
    # A scheme has 8 bits at most.
    assert InputQuantizer(QuantSpec(8), clock, params, ROWS, bits=10).row_bits == (10, 10, 10)
    for wrong in (17, 1, True, (4, 4), (4, 8, 0), (4, 8, 8.0)):
        with pytest.raises(SpecError, match="bits must be"):
            InputQuantizer(QuantSpec(8), clock, params, ROWS, bits=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [BITS, (10, 8, 3)])
def test_a_checkpoint_keeps_the_bits_of_rows(bits: tuple[int, ...], tmp_path: Path) -> None:
    denoiser = mixed_(quantize_(TinyNet()), bits)
    loaded, manifest = load_checkpoint(saved(tmp_path / "q", denoiser), denoiser=TinyNet())
    assert manifest.format_version == 2
    assert loaded.denoiser.conv.input_quantizer.bits == bits
    torch.manual_seed(1)
    for timestep in (0, 300, 500, 999):
        x = 3 * torch.randn(2, 2, 4, 4)
        assert torch.equal(loaded.denoiser(x, timestep), denoiser(x, timestep))


def test_the_bytes_by_hand(tmp_path: Path) -> None:
    """A row of 10 bits takes zero points of four bytes; the bits are in the manifest, one number a row."""
    for name, bits, stored in (("q", (4, 8, 3), bytes([3, 106, 4])), ("wide", (4, 10, 3), None)):
        folder = saved(tmp_path / name, mixed_(quantize_(TinyNet()), bits))
        group = json.loads((folder / "stepquant.json").read_text())["layers"][0]
        assert group["row_bits"] == {"input_quantizer": list(bits)}
        path = folder / "denoiser" / "stepquant.safetensors"
        entry = read_header(path)["conv.input_quantizer.zero_point"]
        data = path.read_bytes()[entry.begin : entry.end]
        if stored is None:
            # round(0.7 / 1.7 * 1023) = 421
            assert data == b"".join(value.to_bytes(4, "little") for value in (3, 421, 4))
        else:
            # round(0.3 / 1.3 * 15), round(0.7 / 1.7 * 255) - 0.5 up to rounding of the scale, round(1.1 / 2.1 * 7)
            assert data in (stored, bytes([3, 105, 4]))
    plain = saved(tmp_path / "plain", quantize_(TinyNet()))
    assert "row_bits" not in (plain / "stepquant.json").read_text()


def test_structures_with_bits_of_rows_are_rebuilt() -> None:
    """As work folders do it: structure, then tensors; the levels follow from the structure."""
    denoiser = mixed_(quantize_(tiny_unet()))
    again = tiny_unet()
    assemble_(again, describe(denoiser))
    assert describe(again) == describe(denoiser)
    again.load_state_dict(denoiser.state_dict())
    for layer in quantized_layers(again).values():
        if isinstance(layer, QuantizedLayer):
            layer.on_grid = True
    x = torch.randn(2, 1, 8, 8)
    for timestep in (0, 300, 999):
        assert torch.equal(again(x, timestep).sample, denoiser(x, timestep).sample)


def test_people_are_told(tmp_path: Path) -> None:
    denoiser = mixed_(quantize_(TinyNet()))
    layers = inspect_checkpoint(saved(tmp_path / "q", denoiser))["layers"]
    conv = next(layer for layer in layers if layer["name"] == "conv")
    assert conv["bits"] == {"weight": 8, "input": 8, "second": None}
    assert conv["row_bits"] == {"input": [4, 8, 3]}
    assert conv["additions"] == ["activation bits that change over time"]
    assert bits_text(conv["bits"], conv["row_bits"]) == "W8 A3-8"
    assert bits_of(denoiser.conv) == (8, 3)


def test_clipping_is_judged_by_the_levels_of_the_row() -> None:
    """At 3 bits, levels 0 to 7, half of these values are cut off; at 8 bits none is."""
    clock = StepClock(torch.tensor([500.0]))
    params = QParams(torch.ones(2), torch.zeros(2))
    quantizer = InputQuantizer(QuantSpec(8), clock, params, torch.tensor([0, 1]), bits=(3, 8))
    x = torch.arange(16.0).reshape(1, 16)
    for timestep, share in ((0.0, 0.5), (999.0, 0.0)):
        clock.set(timestep)
        assert clipping_losses(x, quantizer.current(x), quantizer.levels(x))[0] == share


@pytest.mark.parametrize("engine", ["int_mm", "onednn", "reference"])
def test_integer_layers_clamp_to_the_levels_of_the_row(engine: str) -> None:
    """Against the same layer with that row alone, which has the row's bits in its spec."""
    from stepquant.engines.int_mm import IntMmLayer
    from stepquant.engines.onednn import OneDnnLayer, unavailable
    from stepquant.engines.reference import PackedLayer

    if engine == "onednn" and unavailable() is not None:
        pytest.skip(str(unavailable()))
    kind = {"int_mm": IntMmLayer, "onednn": OneDnnLayer, "reference": PackedLayer}[engine]
    net = quantize_(nn.Sequential(nn.Linear(16, 8)), ends="same")
    layer, clock = net[0], net.stepquant_clock
    for symmetric in (False, True):
        spec = QuantSpec(8, symmetric=symmetric)
        layer.input_quantizer = mixed(spec, clock)
        packed = kind(copy.copy(layer))
        # Enough rows that no engine takes the call for one that is better done in floating point.
        x = 4 * torch.randn(2**14, 16)
        for timestep in (0.0, 300.0, 999.0):
            clock.set(timestep)
            row = int(ROWS[clock.bin])
            alone = copy.copy(layer)
            alone._modules = dict(layer._modules)
            params = table(spec, BITS)
            one = QParams(params.scale[row : row + 1], params.zero_point[row : row + 1])
            alone.input_quantizer = InputQuantizer(spec, clock, one, bits=BITS[row])
            assert torch.equal(packed(x), kind(alone)(x))


def test_engines_say_why_they_do_not_run_more_than_8_bits() -> None:
    denoiser = mixed_(quantize_(TinyNet()), (10, 8, 3))
    refusals = choose(denoiser.conv, torch.device("cpu")).refusals
    for engine in ("int_mm", "onednn", "openvino"):
        assert "10 bits at some timesteps" in refusals[engine], engine
    packed = copy.deepcopy(denoiser)
    pack_(packed, "reference")
    x = torch.randn(2, 2, 4, 4)
    for timestep in (0, 300, 999):
        assert torch.equal(packed(x, timestep), denoiser(x, timestep))


@pytest.mark.parametrize("moving", [False, True])
def test_graphs_clamp_to_the_levels_of_the_row(moving: bool) -> None:
    """Run by torch, a lowered layer computes what the layer computes; inputs lie off the borders between levels."""
    from stepquant.engines.graph import GraphLayer, lower

    class OneLayer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, sample: Tensor, timestep: Any) -> Tensor:
            result: Tensor = self.layer(sample)
            return result

    torch.manual_seed(0)
    net = quantize_(OneLayer(), ends="same")
    clock = net.stepquant_clock
    params = table(QuantSpec(8), BITS) if moving else QParams(torch.tensor([0.5, 0.1, 0.7]), torch.full((3,), 3.0))
    net.layer.input_quantizer = InputQuantizer(QuantSpec(8), clock, params, ROWS, bits=BITS)
    lowered = lower(net)
    assert isinstance(lowered.module.layer, GraphLayer)
    for timestep in (0.0, 300.0, 999.0):
        clock.set(timestep)
        lowered.clock.bin = clock.bin.clone()
        row = int(ROWS[clock.bin])
        # Zeros are levels; the others are between the borders, far beyond the ends too.
        levels = torch.randint(-300, 300, (2, 3, 6, 6)) + (torch.rand(2, 3, 6, 6) - 0.5) * 0.9
        x = levels * params.scale[row]
        torch.testing.assert_close(lowered.module(x, timestep), net(x, timestep), rtol=1e-4, atol=1e-4)


def test_kept_graphs_are_told_apart_by_bits_and_splits() -> None:
    """Neither is a tensor, so the key of the cache of compiled graphs has to have them."""
    from stepquant.engines.openvino import content_of

    pytest.importorskip("openvino")
    unet = mixed_(quantize_(tiny_unet()))
    first = content_of(unet)
    assert content_of(copy.deepcopy(unet)) == first
    other = copy.deepcopy(unet)
    quantizer = other.conv_in.input_quantizer
    params = QParams(quantizer.scale, quantizer.zero_point)
    other.conv_in.input_quantizer = InputQuantizer(quantizer.spec, quantizer.clock, params, ROWS, bits=(5, 8, 3))
    assert content_of(other) != first
    split = copy.deepcopy(unet)
    name = "up_blocks.0.resnets.0.conv_shortcut"
    split.get_submodule(name).split_input_(16)
    assert content_of(split) != first


def test_a_graph_engine_runs_rows_of_different_bits() -> None:
    from stepquant.engines import openvino as engine_module
    from stepquant.engines.base import place

    if not engine_module.has_vnni():
        pytest.skip("int8 layers need a processor with VNNI")
    torch.manual_seed(0)

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, sample: Tensor, timestep: Any) -> Tensor:
            result: Tensor = self.layer(sample)
            return result

    net = quantize_(Flat(), ends="same")
    params = table(QuantSpec(8), BITS)
    net.layer.input_quantizer = InputQuantizer(QuantSpec(8), net.stepquant_clock, params, ROWS, bits=BITS)
    placed, where = place(net, "openvino")
    assert where["layer"].engine == "openvino"
    timesteps = torch.tensor([0, 300, 999])
    rows = ROWS[torch.bucketize(timesteps.float(), net.stepquant_clock.edges)]
    levels = torch.randint(-300, 300, (3, 3, 6, 6)) + (torch.rand(3, 3, 6, 6) - 0.5) * 0.9
    x = levels * params.scale[rows].reshape(3, 1, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(placed(x, timesteps), net(x, timesteps), rtol=1e-4, atol=1e-4)
