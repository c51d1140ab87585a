"""Every family of diffusers on a tiny pipeline: record, seal, quantize, save, load, sample.

Weights are random, so images mean nothing; what is checked is that the whole way works and that a loaded checkpoint
computes bit for bit what was saved.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
import tiny_pipelines
from stepquant.api import Quantized, load, quantize, sample
from stepquant.errors import UnsupportedPipeline
from stepquant.methods import METHODS
from stepquant.model.assembly import describe
from stepquant.model.families import find_denoiser, sensitive_layers
from stepquant.model.pipeline import DenoiserPipeline
from stepquant.model.surgery import quantizable, quantized_layers
from tiny_pipelines import FAMILIES

STEPS = 2
SEEDS = [1, 2]
ROUNDING = METHODS["rtn"](weights=4, activations=8, samples=tiny_pipelines.BATCH, batch=tiny_pipelines.BATCH)

# Steps that were asked for and not made: image to image skips the leading ones.
SKIPPED = {"img2img": 1}


def pipe_of(family: str) -> tuple[Any, dict[str, Any]]:
    if FAMILIES[family].needs_transformers:
        pytest.importorskip("transformers", reason="diffusers defines this pipeline only beside transformers")
    return FAMILIES[family].build(), FAMILIES[family].arguments()


def images_of(pipe: Any, arguments: dict[str, Any], steps: int = STEPS) -> Tensor:
    return sample(pipe, seeds=SEEDS, steps=steps, arguments=arguments)


def assert_round_trip(quantized: Quantized, arguments: dict[str, Any], folder: Path) -> Tensor:
    """The images of the checkpoint, after comparing them with those before it was saved."""
    before = images_of(quantized.pipe, arguments)
    quantized.save(folder)
    loaded = load(folder, engine="simulated")
    assert torch.equal(images_of(loaded, arguments), before)
    assert describe(find_denoiser(loaded)[1]) == describe(find_denoiser(quantized.pipe)[1])
    return before


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(family: str, tmp_path: Path) -> None:
    pipe, arguments = pipe_of(family)
    full_precision = images_of(pipe, arguments)
    quantized = quantize(pipe, ROUNDING, steps=STEPS, arguments=arguments)
    recorded, _, placed = quantized.figures[:3]
    assert recorded["steps"] == STEPS - SKIPPED.get(family, 0)
    assert placed["layers_that_never_ran"] == []
    images = assert_round_trip(quantized, arguments, tmp_path / "q")
    assert images.shape[0] == len(SEEDS)
    assert images.isfinite().all()
    assert not torch.equal(images, full_precision), "quantizing changed nothing"
    assert torch.equal(images_of(pipe, arguments), full_precision), "the given pipeline has changed"


@pytest.mark.parametrize("family", ["dit", "flux"])
def test_accuquant(family: str, tmp_path: Path) -> None:
    pipe, arguments = pipe_of(family)
    recipe = METHODS["accuquant"](
        weights=4,
        samples=tiny_pipelines.BATCH,
        batch=tiny_pipelines.BATCH,
        window=2,
        iterations=4,
        block_iterations=2,
        lr_weights=5e-2,
        block_lr=5e-2,
    )
    quantized = quantize(pipe, recipe, steps=STEPS, arguments=arguments)
    rounded = quantize(pipe, ROUNDING, steps=STEPS, arguments=arguments)
    images = assert_round_trip(quantized, arguments, tmp_path / "q")
    assert not torch.equal(images, images_of(rounded.pipe, arguments))


def test_plain_module(tmp_path: Path) -> None:
    """A network that diffusers does not know. The caller passes it when loading."""
    from diffusers import DDIMScheduler

    net = tiny.TinyNet()
    pipe = DenoiserPipeline(net, DDIMScheduler(), (2, 4, 4))
    quantized = quantize(pipe, ROUNDING, steps=STEPS)
    # Two channels are no image of PIL, and none is made: arrays are compared.
    before = sample(quantized.pipe, seeds=SEEDS, steps=STEPS)
    quantized.save(tmp_path / "q")
    loaded = load(tmp_path / "q", denoiser=tiny.TinyNet(), engine="simulated")
    assert torch.equal(sample(loaded, seeds=SEEDS, steps=STEPS), before)


# Class of layer names that diffusers itself keeps in higher precision -> an example in the tiny model.
SENSITIVE = {
    "dit": ["transformer_blocks.0.norm1.linear", "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1"],
    "sd3": ["transformer_blocks.0.norm1_context.linear", "norm_out.linear"],
    "flux": ["single_transformer_blocks.1.norm.linear", "norm_out.linear"],
    "pixart": ["adaln_single.linear", "adaln_single.emb.timestep_embedder.linear_1"],
    "wan": ["condition_embedder.time_embedder.linear_1", "condition_embedder.time_proj"],
}


@pytest.mark.parametrize("family", SENSITIVE)
def test_layers_that_diffusers_keeps_have_eight_bits(family: str) -> None:
    pipe, arguments = pipe_of(family)
    quantized = quantize(pipe, ROUNDING, steps=STEPS, arguments=arguments)
    layers = describe(find_denoiser(quantized.pipe)[1]).layers
    for name in SENSITIVE[family]:
        weight = layers[name].scheme.weight
        assert weight is not None
        assert weight.bits == 8, name
    four = [name for name, layer in layers.items() if layer.scheme.weight is not None and layer.scheme.weight.bits == 4]
    assert any(".attn" in name for name in four)
    assert any(".ff" in name or "proj_mlp" in name for name in four)


def test_a_plain_unet_keeps_only_its_ends() -> None:
    """Its patterns name norms, which have no quantizable layers: plans of U-Nets are as they were."""
    unet = tiny.tiny_unet()
    assert unet._skip_layerwise_casting_patterns
    assert sensitive_layers(unet, list(quantizable(unet))) == []
    assert sensitive_layers(nn.Linear(2, 2), ["norm"]) == []  # a model without such lists


def test_a_quantized_unet_runs_in_a_controlnet_pipeline() -> None:
    """A UNet that was calibrated without one."""
    pipe, arguments = pipe_of("sd15")
    quantized = quantize(pipe, ROUNDING, steps=STEPS, arguments=arguments)
    guided = tiny_pipelines.controlnet()
    image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    before = images_of(guided, {**arguments, "image": image})
    guided.unet = quantized.pipe.unet
    images = images_of(guided, {**arguments, "image": image})
    assert images.isfinite().all()
    assert not torch.equal(images, before)


def test_a_pipeline_without_generators_is_refused_before_anything_runs() -> None:
    pipe = tiny_pipelines.ddim()

    class NoGenerators(type(pipe)):  # type: ignore[misc]
        def __call__(self, batch_size: int = 1) -> Any:
            raise AssertionError("it was called")

    without = copy.copy(pipe)
    without.__class__ = NoGenerators
    with pytest.raises(UnsupportedPipeline, match="takes no `generator`"):
        quantize(without, ROUNDING, steps=STEPS)


def test_text_conditions_are_not_bound_to_the_calibration(tmp_path: Path) -> None:
    """Other prompts and another guidance scale run on the same checkpoint."""
    pipe, arguments = pipe_of("sd15")
    quantized = quantize(pipe, ROUNDING, steps=STEPS, arguments=arguments)
    assert quantized.schedule.guidance == "cfg(3)"
    other = {**arguments, "prompt_embeds": tiny_pipelines.tokens(5, 16, seed=99), "guidance_scale": 1.0}
    changed = images_of(quantized.pipe, other)
    assert not torch.equal(changed, images_of(quantized.pipe, arguments))
    assert len(quantized_layers(quantized.pipe.unet)) > 50
