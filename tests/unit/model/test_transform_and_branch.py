"""Transforms of a layer's input, low-rank branches, tables with levels at powers of two: alone and in checkpoints."""

from __future__ import annotations

import copy
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
from stepquant.model.assembly import LayerStructure, Structure, assemble_, describe
from stepquant.model.clock import StepClock, clock_of
from stepquant.model.layer import Geometry, LowRankBranch, QuantizedLayer, geometry_of
from stepquant.model.pipeline import DenoiserPipeline
from stepquant.model.quantizer import InputQuantizer, LogQuantizer, WeightQuantizer
from stepquant.model.surgery import quantized_layers
from stepquant.model.transform import InputTransform, TransformSpec
from stepquant.numerics.affine import QParams, choose_qparams, range_of
from stepquant.numerics.spec import LayerScheme, QuantSpec
from stepquant.storage import checksum, write_summed
from tiny import TinyNet, quantize_, tiny_unet

LOG = QuantSpec(4, nonnegative=True, logarithmic=True)
CONV = "down_blocks.0.resnets.0.conv1"
LINEAR = "mid_block.attentions.0.to_q"
VALUES = "mid_block.attentions.0.processor.values"

LAYERS = [
    (nn.Linear(12, 5), (3, 2, 12)),
    (nn.Linear(12, 5), (12,)),
    (nn.Conv1d(12, 6, 3, stride=2, padding=1), (2, 12, 9)),
    (nn.Conv2d(12, 6, 3, padding=1, padding_mode="reflect"), (2, 12, 5, 4)),
    (nn.Conv2d(12, 6, (1, 3), padding="same", dilation=2, bias=False), (2, 12, 5, 7)),
]


def transform_of(layer: QuantizedLayer, *, scaled: bool = True, block: int | None = 4) -> InputTransform:
    scale = torch.linspace(0.5, 3, layer.in_features) if scaled else None
    return InputTransform(layer.in_features, layer.geometry.channel_axis, scale=scale, block=block)


def branch_of(layer: QuantizedLayer, rank: int = 2) -> LowRankBranch:
    like = layer.weight
    down = 0.1 * torch.randn(rank, *like.shape[1:], dtype=like.dtype)
    return LowRankBranch(layer.geometry, down, 0.1 * torch.randn(len(like), rank, dtype=like.dtype))


def rounded_(layer: QuantizedLayer, full_precision: Tensor) -> None:
    """Give a layer the folded weight, on a grid of its own."""
    quantizer = layer.weight_quantizer
    assert isinstance(quantizer, WeightQuantizer)
    layer.weight.data = layer.folded(full_precision)
    params = choose_qparams(*range_of(layer.weight, quantizer.spec), quantizer.spec)
    layer.weight_quantizer = WeightQuantizer(quantizer.spec, params)
    layer.on_grid = False
    layer.harden_()


def with_additions(unet: Any = None, **options: Any) -> Any:
    """A tiny quantized U-Net with everything that format version 2 has."""
    unet = tiny_unet() if unet is None else unet
    weights = {
        name: module.weight.detach().clone() for name, module in unet.named_modules() if hasattr(module, "weight")
    }
    quantize_(unet, **options)
    layers: dict[str, Any] = quantized_layers(unet)
    for name, scaled, block in ((CONV, True, 8), (LINEAR, False, 16)):
        layers[name].input_transform = transform_of(layers[name], scaled=scaled, block=block)
        layers[name].branch = branch_of(layers[name])
        rounded_(layers[name], weights[name])
    layers["conv_out"].input_transform = transform_of(layers["conv_out"], block=None)
    rounded_(layers["conv_out"], weights["conv_out"])
    layers[VALUES].input_quantizer = LogQuantizer(
        LOG,
        unet.stepquant_clock,
        torch.tensor([1.0, 0.05, 0.9]),
        torch.tensor([True, False, True]),
        torch.arange(5) % 3,
    )
    return unet.requires_grad_(False)


@pytest.mark.parametrize(("module", "shape"), LAYERS)
@pytest.mark.parametrize(("scaled", "block"), [(True, None), (False, 4), (True, 2)])
def test_transform_and_branch_leave_the_operator_as_it_was(
    module: Any, shape: tuple[int, ...], scaled: bool, block: int | None
) -> None:
    module, x = copy.deepcopy(module).double(), torch.randn(shape, dtype=torch.float64)
    layer = QuantizedLayer(geometry_of(module), module.weight.detach().clone(), module.bias)
    layer.input_transform = transform_of(layer, scaled=scaled, block=block)
    layer.branch = branch_of(layer)
    layer.weight.data = layer.folded(module.weight.detach())
    torch.testing.assert_close(layer(x), module(x))
    without = copy.deepcopy(layer)
    without.branch = None
    assert not torch.allclose(without(x), module(x))


def test_the_branch_sees_the_transformed_input_before_it_is_quantized() -> None:
    layer = QuantizedLayer(Geometry("linear"), torch.zeros(1, 2), None)
    layer.input_transform = InputTransform(2, -1, scale=torch.tensor([2.0, 0.5]))
    layer.branch = LowRankBranch(layer.geometry, torch.tensor([[1.0, 10.0]]), torch.tensor([[3.0]]))
    coarse = QParams(torch.tensor([100.0]), torch.zeros(1))
    layer.input_quantizer = InputQuantizer(QuantSpec(8), StepClock(torch.empty(0)), coarse)
    assert layer(torch.tensor([[1.0, 1.0]])).item() == 3 * (0.5 + 20)


def test_half_precision_keeps_the_channel_scales() -> None:
    layer = QuantizedLayer(Geometry("linear"), torch.randn(3, 4), None)
    layer.input_transform = InputTransform(4, -1, scale=torch.tensor([0.1, 1.0, 2.0, 3.0]), block=4)
    layer.branch = branch_of(layer)
    layer.half()
    assert layer.input_transform.scale is not None
    assert layer.input_transform.scale.dtype == torch.float32
    assert layer.branch.up.dtype == torch.float16
    assert layer(torch.randn(2, 4).half()).dtype == torch.float16


def test_parts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(SpecError, match="scales or rotates; found neither"):
        TransformSpec()
    with pytest.raises(SpecError, match="found 8"):
        InputTransform(12, -1, block=8)
    with pytest.raises(SpecError, match=r"12 input channels needs as many scales, found \[4\]"):
        InputTransform(12, -1, scale=torch.ones(4))
    with pytest.raises(SpecError, match="without groups, found 2"):
        LowRankBranch(Geometry("conv1d", (1,), (0,), (1,), 2), torch.ones(1, 2, 1), torch.ones(3, 1))
    with pytest.raises(SpecError, match=r"found \[2, 3\] and \[4, 1\]"):
        LowRankBranch(Geometry("linear"), torch.ones(2, 3), torch.ones(4, 1))
    clock = StepClock(torch.empty(0))
    with pytest.raises(SpecError, match="evenly spaced levels"):
        InputQuantizer(LOG, clock, QParams(torch.ones(1), torch.zeros(1)))
    with pytest.raises(SpecError, match="logarithmic=True"):
        LogQuantizer(QuantSpec(4, nonnegative=True), clock, torch.ones(1), torch.ones(1))
    with pytest.raises(SpecError, match=r"found shapes \[2\] and \[1\]"):
        LogQuantizer(LOG, clock, torch.ones(2), torch.ones(1))


def test_each_row_has_levels_of_its_own_kind() -> None:
    clock = StepClock(torch.tensor([500.0]))
    quantizer = LogQuantizer(LOG, clock, torch.tensor([1.0, 1 / 15]), torch.tensor([True, False]), torch.tensor([0, 1]))
    x = torch.full((2, 1), 0.1)
    clock.set(0)
    assert quantizer(x).tolist() == [[0.125], [0.125]]
    clock.set(999)
    torch.testing.assert_close(quantizer(x), torch.full((2, 1), 2 / 15))
    clock.set(torch.tensor([0, 999]))
    torch.testing.assert_close(quantizer(x), torch.tensor([[0.125], [2 / 15]]))
    torch.testing.assert_close(quantizer(x.repeat_interleave(2, 0)).flatten()[2:], torch.full((2,), 2 / 15))


def test_a_batch_of_mixed_timesteps_equals_one_by_one() -> None:
    unet = nn.Module.to(with_additions(), torch.float64)
    sample, timesteps = torch.randn(3, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 999, 300])
    with torch.no_grad():
        mixed = unet(sample, timesteps).sample
        single = torch.cat([unet(sample[i : i + 1], timesteps[i]).sample for i in range(3)])
    torch.testing.assert_close(mixed, single, rtol=0, atol=1e-9)


# ---- checkpoints


def save(folder: Path, denoiser: Any, name: str = "denoiser") -> Path:
    shape = (1, 8, 8)
    pipe = DenoiserPipeline(denoiser, DDIMScheduler(), sample_shape=shape)
    save_checkpoint(folder, pipe=pipe, denoiser_name=name, denoiser=denoiser, base_model="tiny", created="2026-01-01")
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_loaded_model_computes_the_same_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    quantized = with_additions(nn.Module.to(tiny_unet(), dtype))
    save(tmp_path / "q", quantized)
    loaded, manifest = load_checkpoint(tmp_path / "q")
    assert manifest.format_version == 2
    assert describe(loaded.denoiser) == describe(quantized)
    assert quantized.state_dict().keys() == loaded.denoiser.state_dict().keys()
    for key, value in quantized.state_dict().items():
        assert torch.equal(value, loaded.denoiser.state_dict()[key]), key
    sample = torch.randn(2, 1, 8, 8, dtype=dtype)
    for timestep in (0, 400, 999, torch.tensor([10, 900])):
        assert torch.equal(quantized(sample, timestep).sample, loaded.denoiser(sample, timestep).sample)
    save(tmp_path / "again", loaded.denoiser)
    for path in (path for path in (tmp_path / "q").rglob("*") if path.is_file()):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(tmp_path / "q")).read_bytes(), path


def test_what_version_1_has_is_written_as_version_1(tmp_path: Path) -> None:
    save(tmp_path / "q", quantize_(tiny_unet()))
    text = (tmp_path / "q" / "stepquant.json").read_text()
    assert json.loads(text)["format_version"] == 1
    assert not any(word in text for word in ("transform", "rank", "logarithmic"))


def test_inspection_counts_transforms_and_branches(tmp_path: Path) -> None:
    save(tmp_path / "q", with_additions())
    found = inspect_checkpoint(tmp_path / "q")
    assert found["bytes"] == sum(found["bytes_by_kind"].values())
    assert found["bytes_by_kind"]["transforms"] == 4 * (8 + 8)
    assert found["bytes_by_kind"]["branches"] == 4 * 2 * (8 * 9 + 8 + 16 + 16)
    assert found["float32_bytes"] == 4 * sum(parameter.numel() for parameter in tiny_unet().parameters())
    layers = {layer["name"]: layer for layer in found["layers"]}
    assert layers[CONV]["additions"] == ["a transform of the input", "a low-rank branch"]
    assert layers[VALUES]["additions"] == ["levels at powers of two"]
    assert layers["conv_in"]["additions"] == []
    assert not {"openvino", "int_mm"} & layers[CONV]["refusals"].keys()
    assert "powers of two" in layers[VALUES]["refusals"]["openvino"]
    # 8 * 8 * 9 levels of 4 bits, 8 scales and zero points, 8 biases, a table of 3 rows for 5 bins, and the additions
    assert layers[CONV]["bytes"] == 288 + 8 * 5 + 8 * 4 + 3 * 5 + 5 + 4 * 8 + 4 * 2 * (8 * 9 + 8)


def damaged(folder: Path, change: Any, tensors_change: Any = None) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "stepquant.json"
    data = json.loads(path.read_text())
    if tensors_change is not None:
        tensors = load_file(folder / "denoiser" / "stepquant.safetensors")
        tensors_change(tensors)
        save_file(tensors, folder / "denoiser" / "stepquant.safetensors")
        data["checksums"] = {name: checksum(value) for name, value in tensors.items()}
    if change is not None:
        change({name: group for group in data["layers"] for name in group["layers"]}, data)
    write_summed(path, json.dumps(data))


MANIFEST_DAMAGE: dict[str, tuple[Any, str]] = {
    "old version": (lambda _, data: data.update(format_version=1), r"has .*, which format version 1 does not have"),
    "huge rank": (lambda groups, _: groups[CONV].update(rank=10**12), "declares rank 1000000000000"),
    "no rank": (lambda groups, _: groups[CONV].update(rank=0), "declares rank 0"),
    "rank of a matmul": (lambda groups, _: groups[VALUES].update(rank=1), r"values\.branch\.down: shape None"),
    "transform of a matmul": (
        lambda groups, _: groups[VALUES].update(transform={"scaled": True}),
        "is a matmul, which has neither",
    ),
    "block": (lambda groups, _: groups[CONV]["transform"].update(block=3), r"divides the 8 channels .* found 3"),
    "nothing": (lambda groups, _: groups[CONV].update(transform={}), "scales or rotates; found neither"),
    "unknown": (lambda groups, _: groups[CONV]["transform"].update(surprise=1), r"transform\.surprise: unknown key"),
    "branch hidden": (lambda groups, _: groups[CONV].pop("rank"), r"tensor '.*branch\.(up|down)', which the model"),
    "scale hidden": (
        lambda groups, _: groups["conv_out"].pop("transform"),
        r"tensor 'conv_out\.input_transform\.scale', which the model does not",
    ),
    "log2 of a weight": (
        lambda groups, _: groups[CONV]["scheme"]["weight"].update(logarithmic=True),
        "Levels at powers of two are for",
    ),
}


@pytest.mark.parametrize("damage", MANIFEST_DAMAGE)
def test_manifest_damage_is_refused(tmp_path: Path, damage: str) -> None:
    change, message = MANIFEST_DAMAGE[damage]
    damaged(save(tmp_path / "q", with_additions()), change)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "q")


TENSOR_DAMAGE: dict[str, tuple[Any, str]] = {
    "negative scale": (
        lambda tensors: tensors[f"{CONV}.input_transform.scale"].neg_(),
        r"input_transform\.scale: a scale is -3\.0; scales are greater",
    ),
    "infinite scale": (
        lambda tensors: tensors[f"{CONV}.input_transform.scale"].fill_(float("inf")),
        "a scale is NaN or infinite",
    ),
    "choice": (lambda tensors: tensors[f"{VALUES}.input_quantizer.logarithmic"].fill_(2), "2 is no choice"),
    "choice missing": (
        lambda tensors: tensors.pop(f"{VALUES}.input_quantizer.logarithmic"),
        r"lacks tensor '.*logarithmic'",
    ),
    "branch shape": (
        lambda tensors: tensors.update({f"{CONV}.branch.up": torch.zeros(8, 3)}),
        r"branch\.up: shape \[8, 3\], expected \[8, 2\]",
    ),
    "row": (lambda tensors: tensors[f"{VALUES}.input_quantizer.row_of_bin"].fill_(3), "rows from 3 to 3"),
}


@pytest.mark.parametrize("damage", TENSOR_DAMAGE)
def test_tensor_damage_is_refused(tmp_path: Path, damage: str) -> None:
    change, message = TENSOR_DAMAGE[damage]
    damaged(save(tmp_path / "q", with_additions()), None, change)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "q")


def test_groups_have_neither_transform_nor_branch() -> None:
    net = nn.ModuleDict({"conv": nn.Conv1d(4, 4, 1, groups=2)})
    spec = LayerScheme(QuantSpec(4, "channel"))
    structure = describe(quantize_(TinyNet()))
    for extra in ({"transform": TransformSpec(scaled=True)}, {"rank": 1}):
        layers = {"conv": LayerStructure(spec, {}, **extra)}  # type: ignore[arg-type]
        with pytest.raises(ModelError, match="conv is a convolution of 2 groups"):
            assemble_(copy.deepcopy(net), Structure(structure.clock, layers, False))


# ---- engines


def test_the_reference_engine_gives_the_same_bits_and_graphs_take_the_layers() -> None:
    unet = with_additions()
    layers = quantized_layers(unet)
    refusals = choose(layers[CONV], torch.device("cpu")).refusals
    assert not {"openvino", "int_mm"} & refusals.keys()
    assert "powers of two" in choose(layers[VALUES], torch.device("cpu")).refusals["openvino"]
    packed = copy.deepcopy(unet)
    placed = pack_(packed, "reference")
    assert placed[CONV].engine == "reference"
    sample = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(packed(sample, 300).sample, unet(sample, 300).sample)


def test_the_graph_form_computes_them() -> None:
    unet = with_additions()
    lowered = lower(unet)
    assert set(lowered.refusals) == {VALUES}
    sample = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        wanted = unet(sample, 300).sample
        lowered.clock.bin = clock_of(unet).bin  # type: ignore[union-attr]
        found = lowered.module.forward(sample, 300).sample  # type: ignore[operator]
    assert float((found - wanted).norm() / wanted.norm()) < 0.05  # a level may flip


def test_they_are_exported(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    unet = with_additions()
    exported = export_onnx(unet, tmp_path / "unet.onnx")
    assert "powers of two" in exported.float_layers[VALUES]
    assert CONV not in exported.float_layers
    onnx.checker.check_model(str(exported.path))
