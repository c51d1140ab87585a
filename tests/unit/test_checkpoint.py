"""Saving and loading: bit-identity, layout, reproducible bytes, refusals. Damage is in tests/hostile."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    UNet2DModel,
)
from torch import nn

from stepquant.checkpoint import load_checkpoint, save_checkpoint
from stepquant.engines.base import pack_
from stepquant.errors import CheckpointError, ModelError
from stepquant.inspection import inspect_checkpoint
from stepquant.model.assembly import describe
from stepquant.model.correction import CorrectedScheduler, StepCorrection
from stepquant.model.pipeline import DenoiserPipeline
from stepquant.model.surgery import quantized_layers
from stepquant.numerics.spec import LayerScheme, QuantSpec, scheme_for
from tiny import TinyNet, quantize_, sampled, tiny_pipe, tiny_unet

GROUPED = LayerScheme(QuantSpec(3, "group", symmetric=True, group_size=2), QuantSpec(8, "token", dynamic=True))


def save(folder: Path, pipe: Any, denoiser: nn.Module, name: str = "unet", **options: Any) -> Any:
    return save_checkpoint(
        folder, pipe=pipe, denoiser_name=name, denoiser=denoiser, base_model="tiny", created="2026-01-01", **options
    )


def same_outputs(one: Any, other: Any) -> bool:
    sample = torch.randn(2, 1, 8, 8)
    timesteps: list[Any] = [0, 400, 999, torch.tensor([10, 900])]
    dtype = next(one.parameters()).dtype
    return all(torch.equal(one(sample.to(dtype), t).sample, other(sample.to(dtype), t).sample) for t in timesteps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_loaded_model_computes_the_same_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    pipe, _ = tiny_pipe()
    quantized = quantize_(nn.Module.to(tiny_unet(), dtype))
    saved = save(tmp_path / "q", pipe, quantized)
    loaded, manifest = load_checkpoint(tmp_path / "q")
    assert manifest == saved
    assert describe(loaded.unet) == describe(quantized)
    assert all(layer.on_grid for layer in quantized_layers(loaded.unet).values() if hasattr(layer, "on_grid"))
    for key, value in quantized.state_dict().items():
        assert torch.equal(value, loaded.unet.state_dict()[key]), key
    assert same_outputs(quantized, loaded.unet)


@pytest.mark.parametrize(
    "scheme", [scheme_for(8, 8), scheme_for(2, None), scheme_for(None, 8), GROUPED, scheme_for(3, 6)]
)
def test_every_scheme_survives(tmp_path: Path, scheme: LayerScheme) -> None:
    denoiser = quantize_(TinyNet(), scheme, ends="same")
    pipe = DenoiserPipeline(TinyNet(), DDIMScheduler(), sample_shape=(2, 4, 4), max_timestep=900)
    save(tmp_path / "q", pipe, denoiser, "denoiser")
    loaded, _ = load_checkpoint(tmp_path / "q", denoiser=TinyNet())
    assert isinstance(loaded, DenoiserPipeline)
    assert (loaded.sample_shape, loaded.max_timestep) == ((2, 4, 4), 900)
    sample = torch.randn(3, 2, 4, 4)
    for timestep in (0, 500, 999):
        assert torch.equal(denoiser(sample, timestep), loaded.denoiser(sample, timestep))


def test_pipeline_samples_the_same_images(tmp_path: Path) -> None:
    pipe, quantized = tiny_pipe()
    save(tmp_path / "q", pipe, quantized)
    state = torch.random.get_rng_state()
    loaded, _ = load_checkpoint(tmp_path / "q")
    assert torch.equal(state, torch.random.get_rng_state()), "loading must not draw random numbers"
    loaded.set_progress_bar_config(disable=True)
    pipe.unet = quantized
    assert isinstance(loaded, DDIMPipeline)
    for key, value in pipe.scheduler.config.items():
        assert key.startswith("_") or loaded.scheduler.config[key] == value
    assert np.array_equal(sampled(pipe), sampled(loaded))


def test_a_correction_is_saved_with_the_scheduler(tmp_path: Path) -> None:
    pipe, quantized = tiny_pipe()
    pipe.scheduler.set_timesteps(5)
    identity = StepCorrection.identity(pipe.scheduler.timesteps, 1)
    correction = replace(identity, gain=identity.gain * 0.9, offset=identity.offset + 0.01)
    pipe.unet, pipe.scheduler = quantized, CorrectedScheduler(pipe.scheduler, correction)
    manifest = save(tmp_path / "q", pipe, quantized)
    assert manifest.correction == (5, 1)
    loaded, _ = load_checkpoint(tmp_path / "q")
    loaded.set_progress_bar_config(disable=True)
    assert isinstance(loaded.scheduler, CorrectedScheduler)
    assert torch.equal(loaded.scheduler.correction.gain, correction.gain)
    assert np.array_equal(sampled(pipe), sampled(loaded))


def test_equal_inputs_give_equal_bytes(tmp_path: Path) -> None:
    pipe, quantized = tiny_pipe()
    for name in ("one", "two"):
        save(tmp_path / name, pipe, copy.deepcopy(quantized), recipe={"name": "x"}, quality={"psnr": 20.5})
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert [str(path) for path in files] == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "stepquant.json",
        "stepquant.json.sha256",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors.index.json",
        "unet/stepquant.safetensors",
    ]
    for path in files:
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes(), path
    # A loaded checkpoint saved again is the same checkpoint.
    loaded, _ = load_checkpoint(tmp_path / "one")
    save(tmp_path / "three", loaded, loaded.unet, recipe={"name": "x"}, quality={"psnr": 20.5})
    for path in files:
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "three" / path).read_bytes(), path


def test_a_pipeline_with_an_autoencoder(tmp_path: Path) -> None:
    vae = AutoencoderKL(in_channels=1, out_channels=1, block_out_channels=(4,), norm_num_groups=2, latent_channels=4)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        norm_num_groups=4,
        sample_size=8,
        num_embeds_ada_norm=10,
    )
    quantized = quantize_(copy.deepcopy(transformer).half())
    pipe = DiTPipeline(transformer, vae.half(), DDIMScheduler())
    save(tmp_path / "one", pipe, quantized, "transformer")
    loaded, _ = load_checkpoint(tmp_path / "one")
    assert loaded.vae.dtype == torch.float16
    for key, value in vae.state_dict().items():
        assert torch.equal(value, loaded.vae.state_dict()[key]), key
    arguments = {"class_labels": torch.tensor([1, 2]), "timestep": torch.tensor([5, 900])}
    sample = torch.randn(2, 4, 8, 8).half()
    with torch.no_grad():
        assert torch.equal(quantized(sample, **arguments).sample, loaded.transformer(sample, **arguments).sample)
    save(tmp_path / "two", loaded, loaded.transformer, "transformer")
    for path in (path for path in (tmp_path / "one").rglob("*") if path.is_file()):
        again = tmp_path / "two" / path.relative_to(tmp_path / "one")
        assert path.read_bytes() == again.read_bytes(), path


def test_an_existing_folder_is_refused_and_replaced_only_when_asked(tmp_path: Path) -> None:
    pipe, quantized = tiny_pipe()
    folder = tmp_path / "q"
    save(folder, pipe, quantized, quality={"take": 1})
    with pytest.raises(CheckpointError, match=r"q exists already.*overwrite=True"):
        save(folder, pipe, quantized)
    save(folder, pipe, quantized, quality={"take": 2}, overwrite=True)
    assert load_checkpoint(folder)[1].quality == {"take": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["q"]
    (tmp_path / "precious").mkdir()
    with pytest.raises(CheckpointError, match="is not a stepquant checkpoint"):
        save(tmp_path / "precious", pipe, quantized, overwrite=True)


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    pipe, quantized = tiny_pipe()
    save(tmp_path / "q", pipe, quantized, quality={"take": 1})
    with pytest.raises(CheckpointError, match="quality of the manifest is not JSON"):
        save(tmp_path / "q", pipe, quantized, quality={"psnr": float("nan")}, overwrite=True)
    assert load_checkpoint(tmp_path / "q")[1].quality == {"take": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


def test_models_that_cannot_be_saved_are_refused(tmp_path: Path) -> None:
    pipe, quantized = tiny_pipe()
    with pytest.raises(ModelError, match="has not been quantized"):
        save(tmp_path / "q", pipe, pipe.unet)
    moved = copy.deepcopy(quantized)
    moved.conv_out.weight.data += 1e-3
    with pytest.raises(CheckpointError, match=r"conv_out\.weight does not lie on the grid"):
        save(tmp_path / "q", pipe, moved)
    broken = copy.deepcopy(quantized)
    broken.conv_norm_out.weight.data[0] = float("nan")
    with pytest.raises(ModelError, match=r"conv_norm_out\.weight"):
        save(tmp_path / "q", pipe, broken)
    packed = copy.deepcopy(quantized)
    pack_(packed, "reference")
    with pytest.raises(CheckpointError, match="packed by an engine"):
        save(tmp_path / "q", pipe, packed)
    odd = copy.deepcopy(quantized)
    odd.conv_out.input_quantizer.zero_point += 0.5
    with pytest.raises(CheckpointError, match=r"conv_out\.input_quantizer\.zero_point: the zero point is not a level"):
        save(tmp_path / "q", pipe, odd)
    assert list(tmp_path.iterdir()) == []


def test_layers_that_the_configuration_does_not_build_are_refused(tmp_path: Path) -> None:
    """Circular convolutions, for pictures that tile, would be loaded with zeros around them."""
    pipe, quantized = tiny_pipe()
    plain = quantized_layers(quantized)["conv_in"]
    geometry = plain.geometry
    plain.geometry = replace(geometry, padding_mode="circular")
    with pytest.raises(CheckpointError, match=r"conv_in is Geometry\(.*'circular'.* builds Geometry\(.*'zeros'"):
        save(tmp_path / "q", pipe, quantized)
    assert not (tmp_path / "q").exists()
    plain.geometry = geometry
    save(tmp_path / "q", pipe, quantized)
    unquantized = quantize_(tiny_unet(), ends="full")
    unquantized.conv_in.padding_mode = "circular"
    assert isinstance(unquantized.conv_in, nn.Conv2d)
    with pytest.raises(CheckpointError, match=r"conv_in is Conv2d\(.*padding_mode=circular"):
        save(tmp_path / "other", pipe, unquantized)


def test_plain_parts_must_be_passed_by_the_caller(tmp_path: Path) -> None:
    class OwnScheduler:
        pass

    pipe = DenoiserPipeline(TinyNet(), OwnScheduler(), sample_shape=(2, 4, 4))
    save(tmp_path / "q", pipe, quantize_(TinyNet()), "denoiser")
    with pytest.raises(CheckpointError, match=r"TinyNet, which diffusers does not know.*denoiser="):
        load_checkpoint(tmp_path / "q")
    with pytest.raises(CheckpointError, match="denoiser= is a Linear"):
        load_checkpoint(tmp_path / "q", denoiser=nn.Linear(1, 1))
    with pytest.raises(CheckpointError, match="quantized already"):
        load_checkpoint(tmp_path / "q", denoiser=quantize_(TinyNet()))
    with pytest.raises(CheckpointError, match=r"OwnScheduler, which diffusers does not know.*components="):
        load_checkpoint(tmp_path / "q", denoiser=TinyNet())
    with pytest.raises(CheckpointError, match="no component 'schedule'"):
        load_checkpoint(tmp_path / "q", denoiser=TinyNet(), components={"schedule": 1})
    own, given = OwnScheduler(), TinyNet()
    loaded, _ = load_checkpoint(tmp_path / "q", denoiser=given, components={"scheduler": own})
    assert loaded.scheduler is own
    assert isinstance(given.conv, nn.Conv2d), "the caller's module is left as it was"


def test_tensors_that_fit_float16_are_stored_in_it(tmp_path: Path) -> None:
    pipe, _ = tiny_pipe()
    quantized = quantize_(tiny_unet().half().float())
    save(tmp_path / "half", pipe, quantized)
    save(tmp_path / "full", pipe, quantize_(tiny_unet()))
    half, full = (inspect_checkpoint(tmp_path / name)["bytes_by_kind"]["unquantized"] for name in ("half", "full"))
    assert half < 0.7 * full
    loaded, _ = load_checkpoint(tmp_path / "half")
    assert loaded.unet.conv_in.bias.dtype == torch.float32
    assert same_outputs(quantized, loaded.unet)


def test_inspection_adds_up(tmp_path: Path) -> None:
    pipe, quantized = tiny_pipe()
    save(tmp_path / "q", pipe, quantized, schedule={"steps": 5})
    found = json.loads(json.dumps(inspect_checkpoint(tmp_path / "q")))
    assert found["schema"] == 1
    assert found["schedule"] == {"steps": 5}
    assert found["bytes"] == sum(path.stat().st_size for path in (tmp_path / "q").rglob("*") if path.is_file())
    assert found["bytes"] == sum(found["bytes_by_kind"].values())
    assert found["float32_bytes"] == 4 * sum(parameter.numel() for parameter in tiny_unet().parameters())
    layers = {layer["name"]: layer for layer in found["layers"]}
    assert set(layers) == set(quantized_layers(quantized))
    conv = layers["down_blocks.0.resnets.0.conv1"]
    assert (conv["kind"], conv["shape"], conv["bits"]) == (
        "conv2d",
        [8, 8, 3, 3],
        {"weight": 4, "input": 8, "second": None},
    )
    # 288 bytes of levels, 8 scales and zero points, 8 biases, a table of 3 rows for 5 bins
    assert conv["bytes"] == 288 + 8 * 5 + 8 * 4 + 3 * 5 + 5
    assert conv["rows"] == 3
    values = layers["mid_block.attentions.0.processor.values"]
    assert (values["kind"], values["engine"]) == ("matmul", "simulated")
    assert values["refusals"]["reference"] == "It is a matmul and has no weight to pack."
    assert "simulated" not in values["refusals"]


def test_a_w4a8_unet_takes_a_seventh_of_float32(tmp_path: Path) -> None:
    unet = UNet2DModel(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64, 128),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
        norm_num_groups=16,
    )
    pipe = DDIMPipeline(unet, DDIMScheduler())
    save(tmp_path / "q", pipe, quantize_(copy.deepcopy(unet).half().float(), rows=20, steps=20))
    size = sum(path.stat().st_size for path in (tmp_path / "q").rglob("*") if path.is_file())
    parameters = sum(parameter.numel() for parameter in unet.parameters())
    assert size / (4 * parameters) < 0.16
