"""The bytes of one tiny checkpoint. If this fails, the format has changed: raise FORMAT_VERSION, or undo the change."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from stepquant.checkpoint import load_checkpoint, save_checkpoint
from stepquant.model.clock import StepClock, attach_clock
from stepquant.model.pipeline import DenoiserPipeline
from stepquant.model.quantizer import InputQuantizer, WeightQuantizer
from stepquant.model.surgery import swap_layers_
from stepquant.numerics.affine import QParams
from stepquant.numerics.spec import LayerScheme, QuantSpec
from stepquant.storage import read_header

WEIGHT = QuantSpec(3, "channel", symmetric=True)
INPUT = QuantSpec(8)

TENSORS_SHA256 = "b4fb91beabf2f10f61d2b0a6318715b82f869092bf914d0b00e9ff236322894c"


class OneLayer(nn.Module):
    """A linear layer of fixed values."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.layer.weight.data = torch.tensor([[-2.0, 0.0, 1.5], [0.25, -0.5, 0.75]])
        self.layer.bias.data = torch.tensor([0.5, 0.1])

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        result: Tensor = self.layer(sample)
        return result


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    net = OneLayer()
    swap_layers_(net, {"layer": LayerScheme(WEIGHT, INPUT)})
    clock = StepClock(torch.tensor([250.0, 750.0]))
    attach_clock(net, clock)
    layer: Any = net.layer
    layer.weight_quantizer = WeightQuantizer(WEIGHT, QParams(torch.tensor([[0.5], [0.25]]), torch.zeros(2, 1)))
    layer.input_quantizer = InputQuantizer(
        INPUT, clock, QParams(torch.tensor([0.5, 2.0]), torch.tensor([128.0, 3.0])), torch.tensor([1, 0, 1])
    )
    layer.harden_()
    pipe = DenoiserPipeline(net, DDIMScheduler(), sample_shape=(1, 2, 3))
    save_checkpoint(
        tmp_path / "q", pipe=pipe, denoiser_name="denoiser", denoiser=net, base_model="one layer", created="2026-01-01"
    )
    return tmp_path / "q"


def test_tensors_by_hand(folder: Path) -> None:
    path = folder / "denoiser" / "stepquant.safetensors"
    data, entries = path.read_bytes(), read_header(path)
    held = {name: data[entry.begin : entry.end] for name, entry in entries.items()}
    # Levels -4, 0, 3 and 1, -2, 3, plus 4: 0, 4, 7, 5, 2, 7 in three bits each, lowest bit first.
    stream = sum(level << (3 * place) for place, level in enumerate([0, 4, 7, 5, 2, 7]))
    assert held == {
        "layer.weight": stream.to_bytes(3, "little"),
        "layer.bias": bytes.fromhex("0000003f cdcccc3d"),  # 0.5 and 0.1; 0.1 does not survive float16
        "layer.weight_quantizer.scale": bytes.fromhex("0000003f 0000803e"),
        "layer.weight_quantizer.zero_point": bytes([4, 4]),
        "layer.input_quantizer.scale": bytes.fromhex("0000003f 00000040"),
        "layer.input_quantizer.zero_point": bytes([128, 3]),
        "layer.input_quantizer.row_of_bin": bytes([1, 0, 1]),
        "stepquant_clock.edges": bytes.fromhex("00007a43 00803b44"),
    }


def test_the_file_has_these_bytes(folder: Path) -> None:
    data = (folder / "denoiser" / "stepquant.safetensors").read_bytes()
    assert hashlib.sha256(data).hexdigest() == TENSORS_SHA256


def test_the_manifest_has_these_keys(folder: Path) -> None:
    manifest = json.loads((folder / "stepquant.json").read_text())
    assert list(manifest) == [
        "format_version",
        "stepquant",
        "torch",
        "diffusers",
        "created",
        "base_model",
        "base_config_hash",
        "denoiser",
        "pipeline",
        "clock",
        "explicit_attention",
        "layers",
        "correction",
        "schedule",
        "recipe",
        "run",
        "quality",
        "checksums",
    ]
    assert manifest["format_version"] == 1
    assert manifest["base_config_hash"] == hashlib.sha256(b"{}").hexdigest()
    assert manifest["denoiser"] == {
        "name": "denoiser",
        "library": "plain",
        "class_name": f"{OneLayer.__module__}.OneLayer",
        "config": {},
        "dtype": "float32",
        "dtypes": {},
    }
    assert manifest["pipeline"] == {
        "library": "stepquant",
        "class_name": "DenoiserPipeline",
        "arguments": {"sample_shape": [1, 2, 3], "max_timestep": None},
        "components": {"scheduler": {"library": "diffusers", "class_name": "DDIMScheduler"}},
    }
    assert manifest["clock"] == {"bins": 3, "argument": "timestep", "position": 1}
    assert manifest["layers"] == [
        {
            "scheme": {"weight": {"bits": 3, "granularity": "channel", "symmetric": True}, "input": {"bits": 8}},
            "rows": {"input_quantizer": 2},
            "layers": {"layer": [2, 3]},
        }
    ]


def test_it_loads_to_these_numbers(folder: Path) -> None:
    loaded, _ = load_checkpoint(folder, denoiser=OneLayer())
    assert loaded.denoiser.layer.weight.tolist() == [[-2.0, 0.0, 1.5], [0.25, -0.5, 0.75]]
    # Bin 1 uses row 0, scale 0.5: 1.2 -> 1.0. Bins 0 and 2 use row 1, scale 2: 1.2 -> 2.0.
    sample = torch.tensor([[1.2, 0.0, 0.0]])
    assert loaded.denoiser(sample, 500)[0, 0].item() == -1.5
    assert loaded.denoiser(sample, 0)[0, 0].item() == loaded.denoiser(sample, 999)[0, 0].item() == -3.5
