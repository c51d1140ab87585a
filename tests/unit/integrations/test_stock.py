"""torchao's int8 folder: what diffusers reads back are the checkpoint's own weights, and losses are said."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline
from torch import nn

import tiny
import tiny_pipelines
from stepquant.errors import ModelError, SpecError
from stepquant.integrations.stock import export_torchao, levels_of, refuse_additions
from stepquant.model.layer import QuantizedLayer
from stepquant.model.quantizer import WeightQuantizer
from stepquant.model.surgery import quantized_layers
from stepquant.model.transform import InputTransform
from stepquant.numerics.affine import choose_qparams, range_of
from stepquant.numerics.spec import QuantSpec, scheme_for


def dit(weights: int = 4) -> Any:
    pipe = tiny_pipelines.dit()
    tiny.quantize_(pipe.transformer, scheme_for(weights, 8))
    return pipe


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(bits=4, symmetric=False, granularity="channel"),
        QuantSpec(bits=8, symmetric=True, granularity="channel"),
        QuantSpec(bits=4, symmetric=True, granularity="tensor"),
        QuantSpec(bits=4, symmetric=False, granularity="group", group_size=4),
    ],
    ids=["asymmetric", "symmetric", "tensor", "group"],
)
def test_levels_times_scales_are_the_weights(spec: QuantSpec) -> None:
    weight = torch.randn(6, 8)
    quantizer = WeightQuantizer(spec, choose_qparams(*range_of(weight, spec), spec))
    levels, scale = levels_of(quantizer, weight)
    assert levels.shape == (6, 8)
    assert scale.shape[0] == 6
    per_weight = scale.repeat_interleave(8 // scale.shape[1], 1)
    assert torch.equal(levels * per_weight, quantizer(weight))


def test_diffusers_opens_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="the format is torchao's")
    pipe = dit()
    expected = {
        name: layer.weight.clone()
        for name, layer in quantized_layers(pipe.transformer).items()
        if isinstance(layer, QuantizedLayer)
    }
    made = export_torchao(pipe, tmp_path / "out", dtype=torch.float32)
    opened = DiffusionPipeline.from_pretrained(tmp_path / "out", torch_dtype=torch.float32)
    modules = dict(opened.transformer.named_modules())
    assert len(made.int8) > 10
    for name, weight in expected.items():
        found: Any = modules[name].weight
        assert (type(found).__name__ == "Int8Tensor") == (name in made.int8), name
        assert torch.equal(found.dequantize() if name in made.int8 else found, weight), name
    images = opened(class_labels=[1], num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 16, 16, 3)
    said = " ".join(made.lost)
    assert "Activations are not quantized" in said
    assert "Weights of 4 bits take 8 bits each" in said
    assert "1 convolutions have weights in float32" in said
    with pytest.raises(SpecError, match="exists: choose another name"):
        export_torchao(pipe, tmp_path / "out")


def test_what_has_no_place_in_the_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao", reason="the format is torchao's")
    pipe = dit()
    layer = next(
        one
        for one in quantized_layers(pipe.transformer).values()
        if isinstance(one, QuantizedLayer) and one.geometry.kind == "linear"
    )
    layer.input_transform = InputTransform(layer.in_features, -1, scale=torch.ones(layer.in_features))
    with pytest.raises(ModelError, match="stock formats have no place"):
        export_torchao(pipe, tmp_path / "out")
    with pytest.raises(ModelError, match="is not a quantized model of diffusers"):
        export_torchao(tiny_pipelines.dit(), tmp_path / "out")
    conv = DDIMPipeline(tiny.quantize_(tiny.tiny_unet()), DDIMScheduler())
    for one in quantized_layers(conv.unet).values():
        if isinstance(one, QuantizedLayer) and one.geometry.kind == "linear":
            one.weight_quantizer = None
    with pytest.raises(ModelError, match="nothing to export"):
        export_torchao(conv, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["input_transform", "branch", "first_token", "split"])
def test_layers_that_are_more_than_a_weight_are_refused(part: str) -> None:
    unet = tiny.quantize_(tiny.tiny_unet())
    refuse_additions(unet)
    name, layer = next(
        (name, one)
        for name, one in quantized_layers(unet).items()
        if isinstance(one, QuantizedLayer) and one.geometry.kind == "conv2d" and one.in_features > 1
    )
    if part == "split":
        layer.split_input_(layer.in_features // 2)
    else:
        setattr(layer, part, nn.Identity())
    with pytest.raises(ModelError, match=rf"{name} has .*an input that is split between two quantizers"):
        refuse_additions(unet)


def test_without_torchao_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(SpecError, match="pip install torchao"):
        export_torchao(nn.Identity(), tmp_path / "out")
