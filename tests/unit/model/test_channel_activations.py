"""Activation quantizers with a scale per timestep row and channel."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from stepquant.calibrate.steps import prediction_of
from stepquant.checkpoint import load_checkpoint, save_checkpoint
from stepquant.engines.base import pack_
from stepquant.engines.reference import PackedLayer
from stepquant.errors import CheckpointError, ModelError, SpecError
from stepquant.manifest import MANIFEST_NAME
from stepquant.model.assembly import assemble_, channel_axis, describe
from stepquant.model.clock import StepClock
from stepquant.model.layer import QuantizedLayer, geometry_of
from stepquant.model.pipeline import DenoiserPipeline
from stepquant.model.quantizer import InputQuantizer
from stepquant.model.surgery import quantized_layers
from stepquant.numerics.affine import QParams, fake_quantize
from stepquant.numerics.spec import QuantSpec
from stepquant.storage import write_summed
from tiny import TinyNet, quantize_, tiny_pipe, tiny_unet

SPEC = QuantSpec(4, "channel")


def table(rows: int, channels: int) -> QParams:
    generator = torch.Generator().manual_seed(rows * channels)
    scale = 0.05 + torch.rand(rows, channels, generator=generator)
    return QParams(scale, torch.randint(0, 16, (rows, channels), generator=generator).float())


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 4), (4, 6)),
        (nn.Linear(6, 4), (4, 5, 6)),
        (nn.Linear(6, 4), (8, 5, 6)),  # two heads or frames of each sample
        (nn.Conv1d(6, 4, 3), (4, 6, 9)),
        (nn.Conv2d(6, 4, 3), (4, 6, 5, 3)),
    ],
)
@pytest.mark.parametrize("rows", [1, 3])
def test_each_sample_and_channel_uses_its_own_scale(layer: Any, shape: tuple[int, ...], rows: int) -> None:
    clock, params = StepClock(torch.tensor([250.0, 500.0, 750.0])), table(rows, 6)
    axis = channel_axis(QuantizedLayer(geometry_of(layer), layer.weight, None))
    assert shape[axis] == 6
    row_of_bin = torch.arange(4) % rows
    quantizer = InputQuantizer(SPEC, clock, params, row_of_bin, channel_axis=axis)
    x = 3 * torch.randn(shape)

    def expected(part: Tensor, number: int) -> Tensor:
        channels = []
        for scale, zero_point, values in zip(
            params.scale[row_of_bin[number]], params.zero_point[row_of_bin[number]], part.unbind(axis), strict=True
        ):
            channels.append(fake_quantize(values, QParams(scale, zero_point), SPEC))
        return torch.stack(channels, axis)

    for number, timestep in enumerate((0, 300, 600, 900)):
        clock.set(timestep)
        assert torch.equal(quantizer(x), expected(x, number))
    clock.set(torch.tensor([900, 0, 300, 600]))
    mixed = torch.cat([expected(part, number) for part, number in zip(x.chunk(4), (3, 0, 1, 2), strict=True)])
    assert torch.equal(quantizer(x), mixed)


def test_tables_of_the_wrong_shape_are_refused() -> None:
    clock = StepClock(torch.tensor([500.0]))
    with pytest.raises(SpecError, match=r"\[rows, channels\], found shapes \[3\] and \[3\]"):
        InputQuantizer(SPEC, clock, QParams(torch.ones(3), torch.zeros(3)))
    with pytest.raises(SpecError, match=r"found shapes \[2, 3\] and \[2, 1\]"):
        InputQuantizer(SPEC, clock, QParams(torch.ones(2, 3), torch.zeros(2, 1)))
    with pytest.raises(SpecError, match="per tensor or per channel"):
        InputQuantizer(QuantSpec(4, "group", group_size=2), clock, QParams(torch.ones(3), torch.zeros(3)))


def per_channel_(denoiser: Any, steps: int = 5) -> Any:
    """Give every layer with a weight a table per channel, of one row or of one for each timestep."""
    for number, layer in enumerate(quantized_layers(denoiser).values()):
        if isinstance(layer, QuantizedLayer):
            before: Any = layer.input_quantizer
            rows = steps if number % 2 else 1
            layer.input_quantizer = InputQuantizer(
                replace(before.spec, granularity="channel"),
                before.clock,
                table(rows, layer.in_features),
                torch.arange(steps) % rows,
                channel_axis=channel_axis(layer),
            )
    return denoiser


def same(one: Any, other: Any, shape: tuple[int, ...]) -> bool:
    x = torch.randn(shape)
    timesteps: list[Any] = [0, 400, 999, torch.tensor([10, 900])]
    return all(torch.equal(prediction_of(one(x, t)), prediction_of(other(x, t))) for t in timesteps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_keeps_them(tmp_path: Path, dtype: torch.dtype) -> None:
    pipe, _ = tiny_pipe()
    quantized = per_channel_(quantize_(nn.Module.to(tiny_unet(), dtype)))
    save_checkpoint(
        tmp_path / "q", pipe=pipe, denoiser_name="unet", denoiser=quantized, base_model="tiny", created="2026-01-01"
    )
    loaded, _ = load_checkpoint(tmp_path / "q")
    assert describe(loaded.unet) == describe(quantized)
    for key, value in quantized.state_dict().items():
        assert torch.equal(value, loaded.unet.state_dict()[key]), key
    for t in (0, 999, torch.tensor([10, 900])):
        x = torch.randn(2, 1, 8, 8, dtype=dtype)
        assert torch.equal(loaded.unet(x, t).sample, quantized(x, t).sample)


def test_the_reference_engine_runs_them() -> None:
    simulated = per_channel_(quantize_(tiny_unet(), ends="same"))
    packed = copy.deepcopy(simulated)
    pack_(packed, "reference")
    assert isinstance(packed.conv_in, PackedLayer)
    assert same(simulated, packed, (2, 1, 8, 8))


def test_tables_that_do_not_fit_the_layer_are_refused(tmp_path: Path) -> None:
    quantized = per_channel_(quantize_(TinyNet()))
    layer = quantized.conv
    pipe = DenoiserPipeline(TinyNet(), DDIMScheduler(), sample_shape=(2, 4, 4))

    def saved(name: str) -> Path:
        save_checkpoint(
            tmp_path / name, pipe=pipe, denoiser_name="denoiser", denoiser=quantized, base_model="", created=""
        )
        return tmp_path / name

    loaded, _ = load_checkpoint(saved("good"), denoiser=TinyNet())
    assert same(loaded.denoiser, quantized, (2, 2, 4, 4))
    layer.input_quantizer = InputQuantizer(layer.input_quantizer.spec, layer.input_quantizer.clock, table(1, 3))
    with pytest.raises(CheckpointError, match=r"conv.input_quantizer.scale: shape \[1, 3\], expected \[1, 2\]"):
        load_checkpoint(saved("channels"), denoiser=TinyNet())

    manifest = tmp_path / "good" / MANIFEST_NAME
    text = manifest.read_text()
    assert '"granularity":"channel"' in text
    first = text.index('"input":{')
    write_summed(manifest, text[:first] + text[first:].replace(',"granularity":"channel"', "", 1))
    with pytest.raises(CheckpointError, match=r"scale: shape \[\d, \d\], but the manifest declares \d rows"):
        load_checkpoint(tmp_path / "good", denoiser=TinyNet())


def test_a_matmul_has_no_channels() -> None:
    quantized = quantize_(tiny_unet())
    structure = describe(quantized)
    name = next(name for name in structure.layers if name.endswith("scores"))
    scheme = structure.layers[name].scheme
    assert scheme.input is not None
    structure.layers[name] = replace(
        structure.layers[name], scheme=replace(scheme, input=replace(scheme.input, granularity="channel"))
    )
    with pytest.raises(ModelError, match=f"{name} is a matmul"):
        assemble_(tiny_unet(), structure)
