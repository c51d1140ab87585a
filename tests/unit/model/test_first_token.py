"""A layer whose first token passes by its input quantizer: arithmetic by hand, checkpoints, engines, exporters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from stepquant.checkpoint import load_checkpoint, save_checkpoint
from stepquant.engines.base import choose, pack_
from stepquant.engines.graph import lower
from stepquant.errors import CheckpointError, ModelError, SpecError
from stepquant.inspection import inspect_checkpoint
from stepquant.integrations.graphs import export_onnx
from stepquant.model.assembly import ClockStructure, LayerStructure, Structure, assemble_, describe
from stepquant.model.clock import StepClock, attach_clock
from stepquant.model.first_token import FirstToken
from stepquant.model.layer import Geometry, LowRankBranch, Matmul, QuantizedLayer
from stepquant.model.pipeline import DenoiserPipeline
from stepquant.model.quantizer import InputQuantizer, WeightQuantizer
from stepquant.model.surgery import swap_layers_
from stepquant.model.transform import InputTransform
from stepquant.numerics.affine import QParams
from stepquant.numerics.spec import LayerScheme, QuantSpec, scheme_for
from stepquant.storage import write_summed

WEIGHT = QuantSpec(4, "channel", symmetric=True)
ACTIVATION = QuantSpec(8, symmetric=True)


class Reader(nn.Module):
    """Every pixel's channels are tokens of a sequence that a fixed first token begins."""

    def __init__(self, channels: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(channels, channels)
        self.register_buffer("start", torch.full((channels,), 50.0), persistent=True)

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        tokens = sample.flatten(2).transpose(1, 2)
        first = self.start.expand(len(tokens), 1, -1)
        y: Tensor = self.layer(torch.cat([first, tokens], 1))
        return (y[:, 1:] + 0.01 * y[:, :1]).transpose(1, 2).reshape(sample.shape)


def quantized(dtype: torch.dtype = torch.float32) -> Any:
    net = Reader().to(dtype)
    output = net.layer(net.start).detach()
    swap_layers_(net, {"layer": scheme_for(4, 8)})
    clock = StepClock(torch.tensor([500.0]))
    attach_clock(net, clock)
    layer: Any = net.layer
    layer.weight_quantizer = WeightQuantizer(
        QuantSpec(4, "channel"), QParams(torch.full((2, 1), 0.1), torch.full((2, 1), 8.0))
    )
    layer.harden_()
    layer.input_quantizer = InputQuantizer(QuantSpec(8), clock, QParams(torch.tensor([0.02]), torch.tensor([128.0])))
    layer.first_token = FirstToken(net.start, output)
    return net.requires_grad_(False).eval()


def by_hand() -> QuantizedLayer:
    """Weight (2, -1), input levels 1 apart up to 127."""
    layer = QuantizedLayer(Geometry("linear"), torch.tensor([[2.0, -1.0]]), torch.tensor([0.5]))
    layer.weight_quantizer = WeightQuantizer(WEIGHT, QParams(torch.ones(1, 1), torch.zeros(1, 1)))
    layer.harden_()
    layer.input_quantizer = InputQuantizer(
        ACTIVATION, StepClock(torch.empty(0)), QParams(torch.ones(1), torch.zeros(1))
    )
    layer.first_token = FirstToken(torch.tensor([300.0, 40.0]), torch.tensor([7.25]))
    return layer


def test_first_tokens_by_hand() -> None:
    layer = by_hand()
    known, other, near = [300.0, 40.0], [0.0, 200.25], [301.0, 39.0]
    x = torch.tensor([[known, [1.4, 0.0]], [other, [1.4, 200.25]], [near, [-1.6, 0.0]]])
    # The known one has the output that it was given. Another keeps its input as it is, above the range and between
    # levels. Tokens behind are rounded and clipped.
    expected = [[7.25, 2.5], [-199.75, 2 - 127 + 0.5], [7.25, -4 + 0.5]]
    assert layer(x)[..., 0].tolist() == expected


def test_another_first_token_goes_through_transform_and_branch() -> None:
    layer = by_hand()
    layer.input_transform = InputTransform(2, -1, scale=torch.tensor([4.0, 1.0]))
    layer.branch = LowRankBranch(layer.geometry, torch.tensor([[10.0, 0.0]]), torch.tensor([[1.0]]))
    x = torch.tensor([[[1.0, 0.3], [1.0, 0.0]]])
    # x / scale = (0.25, 0.3): 2 * 0.25 - 0.3 + 10 * 0.25 + 0.5. Behind it 0.25 is rounded to 0, but not in the branch.
    torch.testing.assert_close(layer(x)[0, :, 0], torch.tensor([3.2, 3.0]))


def test_half_precision() -> None:
    layer = by_hand().half()
    y = layer(torch.tensor([[[300.0, 40.0], [1.0, 0.0]]]).half())
    assert y.dtype == torch.float16
    assert y.flatten().tolist() == [7.25, 2.5]


def test_shapes_are_checked() -> None:
    with pytest.raises(SpecError, match=r"found \[1, 2\] and \[1\]"):
        FirstToken(torch.ones(1, 2), torch.ones(1))


def save(folder: Path, net: Any) -> Path:
    pipe = DenoiserPipeline(net, DDIMScheduler(), sample_shape=(2, 3, 3))
    save_checkpoint(
        folder, pipe=pipe, denoiser_name="denoiser", denoiser=net, base_model="reader", created="2026-01-01"
    )
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_checkpoint_has_it(tmp_path: Path, dtype: torch.dtype) -> None:
    net = quantized(dtype)
    save(tmp_path / "q", net)
    loaded, manifest = load_checkpoint(tmp_path / "q", denoiser=Reader())
    assert manifest.format_version == 2
    assert describe(loaded.denoiser) == describe(net)
    for name, tensor in net.state_dict().items():
        assert torch.equal(loaded.denoiser.state_dict()[name], tensor), name
    x = torch.randn(2, 2, 3, 3, dtype=dtype)
    assert torch.equal(loaded.denoiser(x, 5), net(x, 5))
    (group,) = json.loads((tmp_path / "q" / "stepquant.json").read_text())["layers"]
    assert group["first_token"] is True
    found = inspect_checkpoint(tmp_path / "q")
    assert found["layers"][0]["additions"] == ["a first token of its own"]
    # float16 holds the token without loss; its output stays in float32 unless the model is in float16.
    assert found["bytes_by_kind"]["first_tokens"] == 2 * 2 + 2 * (4 if dtype == torch.float32 else 2)
    assert found["bytes"] == sum(found["bytes_by_kind"].values())


def test_without_it_a_checkpoint_says_nothing_of_it(tmp_path: Path) -> None:
    net = quantized()
    net.layer.first_token = None
    save(tmp_path / "q", net)
    text = (tmp_path / "q" / "stepquant.json").read_text()
    assert json.loads(text)["format_version"] == 1
    assert "first_token" not in json.loads(text)["layers"][0]
    assert not any("first_token" in name for name in json.loads(text)["checksums"])


def test_an_edited_version_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "q", quantized())
    path = tmp_path / "q" / "stepquant.json"
    data = json.loads(path.read_text())
    data["format_version"] = 1
    write_summed(path, json.dumps(data))
    with pytest.raises(CheckpointError, match="layer has a first token of its own, which format version 1"):
        load_checkpoint(tmp_path / "q", denoiser=Reader())


def test_convolutions_and_matmuls_have_none() -> None:
    for layer, message in ((nn.Conv2d(2, 2, 1), "layer is a convolution"), (Matmul("scores"), "layer is a matmul")):
        scheme = LayerScheme(QuantSpec(4, "channel")) if isinstance(layer, nn.Conv2d) else LayerScheme(input=ACTIVATION)
        described = {"layer": LayerStructure(scheme, {}, first_token=True)}
        with pytest.raises(ModelError, match=message):
            assemble_(nn.ModuleDict({"layer": layer}), Structure(ClockStructure(1, "timestep", 1), described, False))


def test_engines_refuse_it_and_graphs_simulate_it(tmp_path: Path) -> None:
    net = quantized()
    refusals = choose(net.layer, torch.device("cpu")).refusals
    for engine in ("reference", "onednn", "int_mm", "openvino", "weight_only"):
        assert "first token passes by the input quantizer" in refusals[engine], engine
    x = torch.randn(2, 2, 3, 3)
    wanted = net(x, 5)
    lowered = lower(net)
    assert "first token" in lowered.refusals["layer"]
    assert torch.equal(lowered.module.forward(x, 5), wanted)
    placed = pack_(net, "reference")
    assert placed["layer"].engine == "simulated"
    assert torch.equal(net(x, 5), wanted)


def test_it_is_exported(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    inputs = {"sample": torch.randn(2, 2, 3, 3), "timestep": torch.tensor(5)}
    exported = export_onnx(quantized(), tmp_path / "net.onnx", inputs=inputs)
    assert "first token" in exported.float_layers["layer"]
    onnx.checker.check_model(str(exported.path))
