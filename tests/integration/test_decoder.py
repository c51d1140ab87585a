"""An autoencoder whose decoder has weights of few bits: quantize, save, load, the same images."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, AutoModel, DiffusionPipeline
from torch import Tensor, nn

import tiny_pipelines
from stepquant.api import quantize, sample
from stepquant.calibrate.ranges import weight_params
from stepquant.errors import CheckpointError, ModelError, SpecError
from stepquant.integrations.decoder import quantize_decoder
from stepquant.methods import METHODS
from stepquant.model.layer import QuantizedLayer
from stepquant.model.surgery import quantized_layers
from stepquant.numerics.affine import fake_quantize
from tiny_pipelines import FAMILIES

SEEDS = [1, 2]


def images_of(pipe: Any, **arguments: Any) -> Tensor:
    return sample(pipe, seeds=SEEDS, steps=2, arguments=arguments or {"class_labels": [1, 2]})


def accelerated() -> None:
    pytest.importorskip("accelerate", reason="diffusers loads quantized models with accelerate only")


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_are_rounded_channel_by_channel_and_nothing_else_changes(bits: int) -> None:
    vae = tiny_pipelines.vae()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    made = quantize_decoder(vae, weights=bits)
    layers = quantized_layers(made)
    assert "post_quant_conv" in layers
    assert not any(name.startswith("encoder.") for name in layers)
    for name, layer in layers.items():
        assert isinstance(layer, QuantizedLayer)
        quantizer: Any = layer.weight_quantizer
        assert quantizer.spec.bits == (8 if name in ("decoder.conv_in", "decoder.conv_out") else bits), name
        assert quantizer.scale.numel() == layer.out_features
        weight = before[f"{name}.weight"]
        params = weight_params(weight, quantizer.spec, "mse")
        assert torch.equal(layer.weight.flatten(1), fake_quantize(weight.flatten(1), params, quantizer.spec))
        assert layer.input_quantizer is None
    assert sum(isinstance(m, nn.Linear | nn.Conv2d) for m in made.decoder.modules()) == 0
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pictures = made.decode(latents).sample
    full = vae.decode(latents).sample
    assert not torch.equal(pictures, full)
    torch.testing.assert_close(pictures, full, atol=0.5 if bits == 4 else 0.05, rtol=0.1)
    for name, value in vae.state_dict().items():
        assert torch.equal(value, before[name])
        if name.startswith(("encoder.", "quant_conv.")):
            assert torch.equal(made.state_dict()[name], value)


def test_an_autoencoder_is_saved_packed_and_loaded(tmp_path: Path) -> None:
    accelerated()
    made = quantize_decoder(tiny_pipelines.vae(), weights=4)
    made.save_pretrained(tmp_path / "vae")
    tiny_pipelines.vae().save_pretrained(tmp_path / "full")
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pixels = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    for kind in (AutoencoderKL, AutoModel):
        loaded = kind.from_pretrained(str(tmp_path / "vae"))
        assert type(loaded) is AutoencoderKL
        assert torch.equal(loaded.decode(latents).sample, made.decode(latents).sample)
        assert torch.equal(loaded(pixels).sample, made(pixels).sample)  # its `forward`, which reads a clock
    sizes = [(tmp_path / name / "diffusion_pytorch_model.safetensors").stat().st_size for name in ("vae", "full")]
    assert sizes[0] < sizes[1]


def test_a_pipeline_with_a_quantized_denoiser_too(tmp_path: Path) -> None:
    """Both are saved by diffusers' own call; a checkpoint of stepquant holds one quantized network and says so."""
    accelerated()
    pipe = tiny_pipelines.dit()
    full = images_of(pipe)
    recipe = METHODS["rtn"](samples=2, batch=2)
    made = quantize(pipe, recipe, steps=2, arguments={"class_labels": [1, 2]})
    one = images_of(made.pipe)
    made.pipe.vae = quantize_decoder(pipe.vae)
    both = images_of(made.pipe)
    assert not torch.equal(one, both)
    assert not torch.equal(one, full)
    with pytest.raises(CheckpointError, match=r"vae is quantized too.*pipe.save_pretrained\(folder\) saves both"):
        made.save(tmp_path / "q")
    made.pipe.save_pretrained(tmp_path / "both")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "both")
    assert torch.equal(images_of(loaded), both)
    pipe.vae = made.pipe.vae
    pipe.save_pretrained(tmp_path / "decoder")
    assert torch.equal(images_of(DiffusionPipeline.from_pretrained(tmp_path / "decoder")), images_of(pipe))


@pytest.mark.parametrize("family", ["sana", "ldm"])
def test_other_autoencoders(family: str, tmp_path: Path) -> None:
    accelerated()
    pytest.importorskip("transformers", reason="diffusers defines some of these pipelines only beside transformers")
    pipe = FAMILIES[family].build()
    name = "vqvae" if family == "ldm" else "vae"
    vae = getattr(pipe, name)
    made = quantize_decoder(vae, weights=8)
    made.save_pretrained(tmp_path / "vae")
    loaded = type(vae).from_pretrained(tmp_path / "vae")
    channels = vae.config.latent_channels
    latents = torch.randn(1, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.decode(latents).sample, made.decode(latents).sample)
    assert not torch.equal(vae.decode(latents).sample, made.decode(latents).sample)


def test_what_cannot_be_quantized_is_refused() -> None:
    vae = tiny_pipelines.vae()
    with pytest.raises(SpecError, match="2 to 8 bits, found 16"):
        quantize_decoder(vae, weights=16)
    with pytest.raises(ModelError, match="has been quantized before"):
        quantize_decoder(quantize_decoder(vae))
    with pytest.raises(ModelError, match="Expected an autoencoder of diffusers with a decoder, found Linear"):
        quantize_decoder(nn.Linear(1, 1))
    with pytest.raises(ModelError, match=r"Only \d+% of the weights in the decoder of AutoencoderKLWan.*Conv3d"):
        quantize_decoder(
            diffusers.AutoencoderKLWan(base_dim=4, z_dim=4, num_res_blocks=1, temperal_downsample=[False, True, True])
        )
    untouched = copy.deepcopy(vae).state_dict()
    assert all(torch.equal(value, untouched[name]) for name, value in vae.state_dict().items())
