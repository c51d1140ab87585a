"""The bytes of what format version 2 adds, by hand: a transform, a branch, and levels at powers of two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from stepquant.checkpoint import load_checkpoint, save_checkpoint
from stepquant.model.clock import StepClock, attach_clock
from stepquant.model.layer import LowRankBranch, Matmul
from stepquant.model.pipeline import DenoiserPipeline
from stepquant.model.quantizer import LogQuantizer, WeightQuantizer
from stepquant.model.surgery import swap_layers_
from stepquant.model.transform import InputTransform
from stepquant.numerics.affine import QParams
from stepquant.numerics.spec import LayerScheme, QuantSpec
from stepquant.storage import read_header

WEIGHT = QuantSpec(4, "channel", symmetric=True)
LOG = QuantSpec(2, nonnegative=True, logarithmic=True)


class Two(nn.Module):
    """A linear layer, and a matmul whose left operand is never negative."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1, bias=False)
        self.values = Matmul("values")

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        y: Tensor = self.layer(sample)
        product: Tensor = self.values(y.abs(), torch.ones(1, 2))
        return product


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    net = Two()
    net.layer.weight.data = torch.tensor([[3.0, -1.0]])
    swap_layers_(net, {"layer": LayerScheme(WEIGHT), "values": LayerScheme(input=LOG)})
    clock = StepClock(torch.tensor([500.0]))
    attach_clock(net, clock)
    layer: Any = net.layer
    # Scaled: (6, -1). Rotated: (5, 7) / sqrt(2). Less the branch: (5 / sqrt(2) - 4, 7 / sqrt(2)), levels 0 and 5.
    layer.input_transform = InputTransform(2, -1, scale=torch.tensor([2.0, 1.0]), block=2)
    layer.branch = LowRankBranch(layer.geometry, torch.tensor([[2.0, 0.0]]), torch.tensor([[2.0]]))
    layer.weight.data = layer.folded(layer.weight)
    layer.weight_quantizer = WeightQuantizer(WEIGHT, QParams(torch.ones(1, 1), torch.zeros(1, 1)))
    layer.harden_()
    net.values.input_quantizer = LogQuantizer(
        LOG, clock, torch.tensor([8.0, 0.5]), torch.tensor([True, False]), torch.tensor([1, 0])
    )
    pipe = DenoiserPipeline(net, DDIMScheduler(), sample_shape=(1, 1, 2))
    save_checkpoint(
        tmp_path / "q", pipe=pipe, denoiser_name="denoiser", denoiser=net, base_model="two", created="2026-01-01"
    )
    return tmp_path / "q"


def test_tensors_by_hand(folder: Path) -> None:
    path = folder / "denoiser" / "stepquant.safetensors"
    data, entries = path.read_bytes(), read_header(path)
    assert {name: data[entry.begin : entry.end] for name, entry in entries.items()} == {
        "layer.weight": bytes([0xD8]),  # levels 0 and 5, plus 8: 8 and 13
        "layer.weight_quantizer.scale": bytes.fromhex("0000803f"),
        "layer.weight_quantizer.zero_point": bytes([8]),
        "layer.input_transform.scale": bytes.fromhex("00000040 0000803f"),
        "layer.branch.down": bytes.fromhex("0040 0000"),  # float16: nothing is lost
        "layer.branch.up": bytes.fromhex("0040"),
        "values.input_quantizer.scale": bytes.fromhex("00000041 0000003f"),
        "values.input_quantizer.logarithmic": bytes([1, 0]),
        "values.input_quantizer.row_of_bin": bytes([1, 0]),
        "stepquant_clock.edges": bytes.fromhex("0000fa43"),
    }


def test_the_manifest_declares_them(folder: Path) -> None:
    manifest = json.loads((folder / "stepquant.json").read_text())
    assert manifest["format_version"] == 2
    assert manifest["layers"] == [
        {
            "scheme": {"weight": {"bits": 4, "granularity": "channel", "symmetric": True}},
            "rows": {},
            "layers": {"layer": [1, 2]},
            "transform": {"scaled": True, "block": 2},
            "rank": 1,
        },
        {
            "scheme": {"input": {"bits": 2, "nonnegative": True, "logarithmic": True}},
            "rows": {"input_quantizer": 2},
            "layers": {"values": []},
        },
    ]


def test_it_loads_to_these_numbers(folder: Path) -> None:
    loaded, _ = load_checkpoint(folder, denoiser=Two())
    # x_t = (1 / sqrt(2), 1 / sqrt(2)): 5 / sqrt(2) and 4 / sqrt(2) of the branch make 6.36.
    sample = torch.tensor([[2.0, 0.0]])
    assert loaded.denoiser.layer(sample).item() == pytest.approx(9 / 2**0.5, rel=1e-6)
    # Bin 1 has levels 8, 4, 2 and 0, bin 0 has 0 to 1.5 in steps of a half.
    assert loaded.denoiser(sample, 999).tolist() == [[8.0, 8.0]]
    assert loaded.denoiser(sample, 0).tolist() == [[1.5, 1.5]]
