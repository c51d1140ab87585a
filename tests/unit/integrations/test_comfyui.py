"""A file for ComfyUI, decoded by the rules that ComfyUI publishes and by diffusers' readers of the original names.

ComfyUI's page on its format (QUANTIZATION.md): the layers that `_quantization_metadata` lists have quantized weights,
and weight = quantized * weight_scale.
"""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils
from safetensors import safe_open
from torch import Tensor

import tiny
import tiny_pipelines
from stepquant.errors import ModelError, SpecError
from stepquant.integrations.comfyui import export_comfyui
from stepquant.model.families import find_denoiser
from stepquant.model.layer import QuantizedLayer
from stepquant.model.surgery import quantized_layers
from stepquant.numerics.spec import LayerScheme, QuantSpec, scheme_for
from tiny_pipelines import FAMILIES

pytest.importorskip("transformers", reason="diffusers defines these pipelines only beside transformers")


def decoded(path: Path) -> dict[str, Tensor]:
    """The weights, by the published rule; also checks the file against it."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        described = json.loads(file.metadata()["_quantization_metadata"])
    assert described["format_version"] == "1.0"
    found = {}
    for layer, what in described["layers"].items():
        assert what == {"format": "int8_tensorwise"}
        levels, scale = tensors.pop(f"{layer}.weight"), tensors.pop(f"{layer}.weight_scale")
        assert (levels.dtype, scale.dtype) == (torch.int8, torch.float32)
        assert scale.shape == (levels.shape[0], 1)
        found[f"{layer}.weight"] = levels.float() * scale
    assert not any(tensor.dtype == torch.int8 for tensor in tensors.values())
    assert not any(name.endswith("_scale") for name in tensors)
    return {**tensors, **found}


def flux_reader(inner: int) -> Any:
    """diffusers' converter, which has the published model's width as a constant."""
    source = inspect.getsource(single_file_utils.convert_flux_transformer_checkpoint_to_diffusers)
    assert source.count("inner_dim = 3072") == 1
    space = dict(vars(single_file_utils))
    exec(source.replace("inner_dim = 3072", f"inner_dim = {inner}"), space)
    return space["convert_flux_transformer_checkpoint_to_diffusers"]


def read_back(family: str, tensors: dict[str, Tensor], denoiser: Any) -> dict[str, Tensor]:
    """Under diffusers' names."""
    prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}
    if family == "flux":
        reader = flux_reader(denoiser.config.num_attention_heads * denoiser.config.attention_head_dim)
    elif family == "wan":
        reader = single_file_utils.convert_wan_transformer_to_diffusers
    else:
        reader = single_file_utils.convert_ldm_unet_checkpoint
    found: dict[str, Tensor] = reader(prefixed, config=dict(denoiser.config))
    return found


def quantized(family: str, scheme: LayerScheme | None = None, **options: Any) -> tuple[Any, Any]:
    pipe = FAMILIES[family].build()
    denoiser = find_denoiser(pipe)[1]
    tiny.quantize_(denoiser, scheme or scheme_for(4, 8), **options)
    return pipe, denoiser


@pytest.mark.parametrize("family", ["sd15", "inpaint", "sdxl", "flux", "wan"])
def test_a_reader_of_the_original_names_finds_the_checkpoints_weights(family: str, tmp_path: Path) -> None:
    pipe, denoiser = quantized(family, ends="same")
    plain = set(find_denoiser(FAMILIES[family].build())[1].state_dict())
    expected = {key: value for key, value in denoiser.state_dict().items() if key in plain}
    made = export_comfyui(pipe, tmp_path / "net.safetensors", dtype=torch.float32)
    assert len(made.int8) >= 20
    assert not any("rounded again" in sentence for sentence in made.lost)
    tensors = decoded(tmp_path / "net.safetensors")
    found = read_back(family, tensors, denoiser)
    assert set(found) == plain
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_what_is_lost_is_said(tmp_path: Path) -> None:
    pipe, _ = quantized("sd15")
    pipe.scheduler.register_to_config(prediction_type="v_prediction")
    made = export_comfyui(pipe, tmp_path / "net.safetensors")
    said = " ".join(made.lost)
    assert "ComfyUI quantizes the inputs of int8 layers itself" in said
    assert "Weights of 4 bits take 8 bits each" in said
    assert "have weights in float16: convolutions" in said
    assert "no text encoders, VAE or scheduler" in said
    assert "predicts v_prediction" in said
    with safe_open(tmp_path / "net.safetensors", framework="pt") as file:
        assert file.get_tensor("input_blocks.0.0.weight").dtype == torch.float16
    flux, _ = quantized("flux")
    export_comfyui(flux, tmp_path / "flux.safetensors")
    with safe_open(tmp_path / "flux.safetensors", framework="pt") as file:
        assert file.get_tensor("img_in.bias").dtype == torch.bfloat16
    assert sorted(path.name for path in tmp_path.iterdir()) == ["flux.safetensors", "net.safetensors"]


def test_layers_that_are_joined_are_int8_together_or_not_at_all(tmp_path: Path) -> None:
    """One projection of three in floating point: its row scales would be missing."""
    pipe, denoiser = quantized("flux")
    before = export_comfyui(pipe, tmp_path / "before.safetensors")
    layer = quantized_layers(denoiser)["transformer_blocks.0.attn.to_k"]
    assert isinstance(layer, QuantizedLayer)
    layer.weight_quantizer = None
    made = export_comfyui(pipe, tmp_path / "net.safetensors", dtype=torch.float32)
    assert "double_blocks.0.img_attn.qkv" not in made.int8
    assert "double_blocks.0.txt_attn.qkv" in made.int8
    found = read_back("flux", decoded(tmp_path / "net.safetensors"), denoiser)
    for own in ("to_q", "to_k", "to_v"):
        name = f"transformer_blocks.0.attn.{own}.weight"
        assert torch.equal(found[name], denoiser.state_dict()[name])
    assert not any("have weights in" in sentence for sentence in before.lost)
    assert any(
        "2 layers, the first is transformer_blocks.0.attn.to_q, have weights in float32" in sentence
        for sentence in made.lost
    )


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(bits=4, symmetric=False, granularity="group", group_size=4),
        QuantSpec(bits=8, symmetric=False, granularity="channel"),
    ],
    ids=["groups", "nine bits"],
)
def test_weights_that_have_no_place_are_rounded_again(spec: QuantSpec, tmp_path: Path) -> None:
    """To the nearest of 255 levels of their row, and said."""
    pipe, denoiser = quantized("flux", LayerScheme(spec, None, None))
    made = export_comfyui(pipe, tmp_path / "net.safetensors", dtype=torch.float32)
    assert any(re.search(r"\d+ layers, the first is .*, were rounded again", sentence) for sentence in made.lost)
    found = read_back("flux", decoded(tmp_path / "net.safetensors"), denoiser)
    changed = 0
    for name, layer in quantized_layers(denoiser).items():
        weight, other = layer.weight, found[f"{name}.weight"]  # type: ignore[union-attr]
        half_a_level = weight.abs().amax(1, keepdim=True) / 254
        assert bool(((weight - other).abs() <= half_a_level * 1.001).all()), name
        changed += not torch.equal(weight, other)
    assert changed > 10


def test_nothing_to_export(tmp_path: Path) -> None:
    pipe, _ = quantized("wan", LayerScheme(None, QuantSpec(bits=8), None))
    with pytest.raises(ModelError, match="nothing to export"):
        export_comfyui(pipe, tmp_path / "net.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_what_comfyui_would_not_recognise_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "net.safetensors"
    with pytest.raises(ModelError, match=r"known here for UNet2DConditionModel .*found SD3Transformer2DModel"):
        export_comfyui(quantized("sd3")[0], target)
    with pytest.raises(ModelError, match=r"time_embedding.cond_proj.weight of UNet2DConditionModel has no name"):
        export_comfyui(quantized("lcm")[0], target)
    with pytest.raises(ModelError, match="is not a quantized model of diffusers"):
        export_comfyui(tiny_pipelines.sd15(), target)
    with pytest.raises(SpecError, match=r"must end in \.safetensors, found 'net'"):
        export_comfyui(quantized("sd15")[0], tmp_path / "net")
    target.touch()
    with pytest.raises(SpecError, match="exists: choose another name"):
        export_comfyui(quantized("sd15")[0], target)
