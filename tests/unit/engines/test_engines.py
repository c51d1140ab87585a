"""Engines: the reference engine computes what simulation computes, to the last bit."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from stepquant.engines.base import choose, engines, pack_, place
from stepquant.engines.graph import refusal
from stepquant.engines.openvino import usable
from stepquant.engines.reference import PackedLayer, ReferenceEngine
from stepquant.errors import EngineError
from stepquant.model.layer import Geometry, QuantizedLayer
from stepquant.model.surgery import quantized_layers
from stepquant.numerics.spec import LayerScheme, QuantSpec, scheme_for
from tiny import TinyNet, quantize_, tiny_pipe, tiny_unet

GROUPED = LayerScheme(QuantSpec(3, "group", symmetric=True, group_size=2), QuantSpec(8, "token", dynamic=True))


def bytes_of(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_reference_equals_simulation_to_the_bit(bits: int) -> None:
    simulated = quantize_(tiny_unet(), scheme_for(bits, 8), ends="same")
    packed = copy.deepcopy(simulated)
    placed = pack_(packed, "reference")
    assert {placement.engine for placement in placed.values()} == {"reference", "simulated"}
    sample = torch.randn(2, 1, 8, 8)
    for timestep in (0, 999, torch.tensor([3, 700])):
        assert torch.equal(simulated(sample, timestep).sample, packed(sample, timestep).sample)
    assert bytes_of(packed) < bytes_of(simulated)


@pytest.mark.parametrize("scheme", [GROUPED, scheme_for(4, None), scheme_for(None, 8)])
def test_reference_with_other_schemes(scheme: LayerScheme) -> None:
    simulated = quantize_(TinyNet(), scheme, ends="same")
    packed = copy.deepcopy(simulated)
    placed = pack_(packed, "reference")
    sample = torch.randn(2, 2, 4, 4)
    assert torch.equal(simulated(sample, 5), packed(sample, 5))
    if scheme.weight is None:
        assert placed["conv"].refusals["reference"] == "Its weight is not quantized."
        assert placed["conv"].engine == "simulated"
    else:
        assert isinstance(packed.conv, PackedLayer)
        assert (packed.conv.in_channels, packed.conv.out_channels) == (2, 4)
        assert torch.equal(packed.conv.weight, simulated.conv.weight)


def test_a_packed_model_survives_copies_and_casts() -> None:
    simulated = quantize_(TinyNet())
    packed = copy.deepcopy(simulated)
    pack_(packed, "reference")
    copied = copy.deepcopy(packed)
    copied(torch.randn(1, 2, 4, 4), 999)
    assert int(copied.stepquant_clock.bin) == 4
    assert int(packed.stepquant_clock.bin) == 0
    assert copied.conv.input_quantizer.clock is copied.stepquant_clock
    halved, half = copied.to("cpu").half(), simulated.half()
    assert halved.conv.weight_quantizer.scale.dtype == torch.float32
    assert halved.conv.input_quantizer.scale.dtype == torch.float32
    assert halved.conv.packed.dtype == torch.uint8
    sample = torch.randn(1, 2, 4, 4).half()
    assert halved(sample, 10).dtype == torch.float16
    assert torch.equal(halved(sample, 10), half(sample, 10))


def test_state_dict_of_a_packed_model_loads() -> None:
    one, other = quantize_(TinyNet()), quantize_(TinyNet())
    pack_(one, "reference")
    pack_(other, "reference")
    other.load_state_dict(one.state_dict())
    sample = torch.randn(1, 2, 4, 4)
    assert torch.equal(one(sample, 0), other(sample, 0))


def test_layers_stay_simulated_and_it_says_what_else_could_run_them() -> None:
    denoiser = quantize_(tiny_unet())
    before = dict(quantized_layers(denoiser))
    placed = pack_(denoiser)
    assert quantized_layers(denoiser) == before
    assert set(placed) == set(before)
    assert {placement.engine for placement in placed.values()} == {"simulated"}
    assert "reference" not in placed["conv_in"].refusals
    told = placed["mid_block.attentions.0.processor.scores"].refusals
    assert told["reference"] == "It is a matmul and has no weight to pack."


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
@torch.no_grad()
def test_a_layer_with_a_hook_keeps_it(register: str) -> None:
    seen: list[Any] = []
    _, net = tiny_pipe()
    getattr(net.conv_in, register)(lambda *_: seen.append(1))
    answers = choose(net.conv_in, torch.device("cpu"), "reference")
    assert answers.engine == "simulated"
    assert set(answers.refusals) == set(engines()) - {"simulated"}
    assert all("forward hook" in reason for reason in answers.refusals.values())
    assert choose(net.conv_out, torch.device("cpu"), "reference").engine == "reference"
    assert refusal(net.conv_in) == answers.refusals["openvino"]
    pack_(net, "reference")
    net(torch.zeros(1, 1, 8, 8), torch.tensor(500))
    assert seen == [1]


def test_unknown_engines_are_refused_with_the_nearest_name() -> None:
    assert {"simulated", "reference", "onednn", "int_mm", "weight_only"} <= set(engines())
    with pytest.raises(EngineError, match=r"no engine 'referense', only auto, simulated, reference,.* Did you mean 'r"):
        place(nn.Linear(2, 2), "referense")
    with pytest.raises(EngineError, match=r"no engine 'auto', only simulated, reference"):
        pack_(nn.Linear(2, 2), "auto")  # it may take a graph, which takes the place of the whole denoiser


def test_layers_that_are_not_hardened_are_refused() -> None:
    layer = QuantizedLayer(Geometry("linear"), torch.randn(2, 2), None)
    engine, device = ReferenceEngine(), torch.device("cpu")
    layer.weight_quantizer = nn.Identity()
    assert "Identity, which only calibration has" in (engine.refuses(layer, device) or "")
    layer = quantize_(TinyNet()).conv
    layer.on_grid = False
    assert engine.refuses(layer, device) == "Its weight has not been hardened."
    with pytest.raises(EngineError, match="harden_"):
        PackedLayer(layer)
    layer.on_grid = True
    layer.weight.data += 1e-3
    with pytest.raises(EngineError, match="does not lie on the grid"):
        PackedLayer(layer)


def test_a_scheme_for_one_layer_only() -> None:
    scheme = replace(scheme_for(4, 8), input=None)
    denoiser = quantize_(TinyNet(), scheme, ends="same")
    assert denoiser.conv.input_quantizer is None
    pack_(denoiser, "reference")
    assert denoiser(torch.randn(1, 2, 4, 4), 3).shape == (1, 2, 4, 4)


def test_an_engine_that_takes_nothing_says_what_that_costs(caplog: pytest.LogCaptureFixture) -> None:
    """A scheme that no engine has: the checkpoint runs, as slowly as the simulation does."""
    given = QuantSpec(8, "channel_token", symmetric=True, dynamic=True)
    denoiser = quantize_(TinyNet(), LayerScheme(QuantSpec(4, "channel"), given), ends="same")
    expected = denoiser(torch.ones(1, 2, 4, 4), 0)
    for engine in ("onednn", "int_mm", "openvino", "weight_only"):
        caplog.clear()
        ran, placed = place(copy.deepcopy(denoiser), engine)
        assert {placement.engine for placement in placed.values()} == {"simulated"}
        assert f"Engine '{engine}' takes none of the 2 quantized layers" in caplog.text
        assert "the time of the full-precision layers, and that of rounding their inputs besides" in caplog.text
        assert "(2) " in caplog.text
        with torch.no_grad():
            assert torch.allclose(ran(torch.ones(1, 2, 4, 4), 0), expected, rtol=1e-5, atol=1e-5)
    caplog.clear()
    place(copy.deepcopy(denoiser), "auto")
    # Where openvino could run others, it is the scheme that is slow here.
    assert ("The denoiser runs as simulated arithmetic: the time of the" in caplog.text) == usable()
    caplog.clear()
    place(copy.deepcopy(denoiser), "simulated")
    pack_(quantize_(TinyNet(), scheme_for(8, 8)), "int_mm")
    assert not caplog.text
