"""LoRA adapters on quantized models, through peft's and diffusers' own calls: the rows of docs/compatibility.md."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tiny
import tiny_pipelines
from stepquant.api import Quantized, load, quantize, sample
from stepquant.engines.base import pack_
from stepquant.engines.openvino import has_vnni
from stepquant.errors import CheckpointError, EngineError, ModelError, UnsupportedPipeline
from stepquant.methods import METHODS
from stepquant.model.layer import Geometry, QuantizedLayer
from stepquant.model.quantizer import WeightQuantizer
from stepquant.model.transform import InputTransform
from stepquant.numerics.affine import choose_qparams, fake_quantize, grouped, range_of
from stepquant.numerics.spec import scheme_for
from tiny_pipelines import FAMILIES

STEPS = 4
SEEDS = [1, 2]
TARGETS = ["to_q", "to_v", "conv1", "conv_in", "proj_in"]


def lora_config(**options: Any) -> Any:
    peft = pytest.importorskip("peft", reason="diffusers loads adapters with peft only")
    settings = {"r": 2, "lora_alpha": 3, "target_modules": TARGETS, "init_lora_weights": False, **options}
    return peft.LoraConfig(**settings)


def quantized_unet(weights: int = 8) -> Any:
    return tiny.quantize_(tiny_pipelines.text_unet(), scheme_for(weights, 8))


def inputs() -> tuple[Any, ...]:
    sample_ = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    return sample_, torch.tensor(500.0), tiny_pipelines.tokens(5, 16)


@torch.no_grad()
def prediction(unet: Any) -> Tensor:
    found: Tensor = unet(*inputs()).sample
    return found


def adapted(unet: Any) -> dict[str, Any]:
    """Layers with adapters, by name."""
    return {name: module for name, module in unet.named_modules() if hasattr(module, "base_layer")}


def snapshot(unet: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in unet.state_dict().items()}


def same(before: dict[str, Tensor], unet: Any) -> bool:
    after = unet.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


@pytest.fixture(scope="module")
def prompted() -> tuple[Quantized, dict[str, Any]]:
    """Text to image, with guidance, eight bits."""
    pytest.importorskip("transformers", reason="diffusers defines this pipeline only beside transformers")
    torch.set_num_threads(1)
    arguments = FAMILIES["sd15"].arguments()
    recipe = METHODS["rtn"](weights=8, activations=8, samples=2, batch=2)
    return quantize(FAMILIES["sd15"].build(), recipe, steps=STEPS, arguments=arguments), arguments


def images_of(pipe: Any, arguments: dict[str, Any]) -> Tensor:
    return sample(pipe, seeds=SEEDS, steps=STEPS, arguments=arguments)


def product(layer: Any, name: str) -> Tensor:
    """s B A as a weight, by unfolding: the kernel of the composed operators is the response to unit impulses."""
    a, b, s = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
    return s * torch.einsum("or,ri...->oi...", b.flatten(1), a)


def test_attached_adapters_add_their_product() -> None:
    """Every layer: its quantized output plus s B A of its own, unquantized input."""
    unet = quantized_unet()
    before = prediction(unet)
    unet.add_adapter(lora_config())
    seen: list[str] = []

    def check(name: str) -> Any:
        def hook(module: Any, args: Any, output: Tensor) -> None:
            layer, x = module.base_layer, args[0]
            assert isinstance(layer, QuantizedLayer)
            weight = product(module, "default")
            if layer.geometry.kind == "linear":
                change = F.linear(x, weight)
            else:
                change = F.conv2d(x, weight, None, layer.geometry.stride, layer.geometry.padding)
            torch.testing.assert_close(output, layer(x) + change, atol=1e-5, rtol=1e-5)
            assert float(change.abs().max()) > 1e-3
            seen.append(layer.geometry.kind)

        return hook

    layers = adapted(unet)
    hooks = [module.register_forward_hook(check(name)) for name, module in layers.items()]
    after = prediction(unet)
    for hook in hooks:
        hook.remove()
    assert len(layers) > 10
    assert {"linear", "conv2d"} == {*seen}
    assert not torch.equal(after, before)
    unet.disable_adapters()
    assert torch.equal(prediction(unet), before)
    unet.unload_lora()
    assert torch.equal(prediction(unet), before)
    assert not adapted(unet)


def test_adapter_files_are_loaded_and_saved_again(prompted: tuple[Quantized, dict[str, Any]], tmp_path: Path) -> None:
    """`pipe.load_lora_weights` of a file that was made for the full-precision pipeline; scaled, removed, saved."""
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import load_file

    made, arguments = prompted
    donor = FAMILIES["sd15"].build()
    donor.unet.add_adapter(lora_config())
    layers = get_peft_model_state_dict(donor.unet)
    type(donor).save_lora_weights(tmp_path / "donor", unet_lora_layers=layers)
    made.save(tmp_path / "q")
    pipe = load(tmp_path / "q", engine="simulated")
    without = images_of(pipe, arguments)
    pipe.load_lora_weights(tmp_path / "donor", adapter_name="style", weight_name="pytorch_lora_weights.safetensors")
    found, expected = adapted(pipe.unet), adapted(donor.unet)
    assert found.keys() == expected.keys()
    for name, module in found.items():
        assert torch.equal(module.lora_A["style"].weight, expected[name].lora_A["default"].weight)
        assert torch.equal(module.lora_B["style"].weight, expected[name].lora_B["default"].weight)
    styled = images_of(pipe, arguments)
    assert not torch.equal(styled, without)
    pipe.set_adapters(["style"], [0.0])
    assert torch.equal(images_of(pipe, arguments), without)
    pipe.set_adapters(["style"], [1.0])
    assert torch.equal(images_of(pipe, arguments), styled)
    with pytest.raises(ValueError, match="Casting a quantized model"):  # diffusers casts every model first
        pipe.unet.save_lora_adapter(tmp_path / "again", adapter_name="style")
    layers = get_peft_model_state_dict(pipe.unet, adapter_name="style")
    type(pipe).save_lora_weights(tmp_path / "again", unet_lora_layers=layers)
    again, there = (load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("again", "donor"))
    assert again.keys() == there.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in there.items())
    pipe.unload_lora_weights()
    assert torch.equal(images_of(pipe, arguments), without)


def test_fusing_quantizes_the_layers_again() -> None:
    """Weights: no grid that was tried is nearer to the sum, unfusing is exact. Activations: as calibrated."""
    unet = quantized_unet()
    base = prediction(unet)
    unet.add_adapter(lora_config())
    attached, before = prediction(unet), snapshot(unet)
    old = {name: module.base_layer.weight.clone() for name, module in adapted(unet).items()}
    unet.fuse_lora()
    fused = prediction(unet)
    assert float((fused - attached).norm()) < 0.5 * float((base - attached).norm())
    moved = 0
    for name, module in adapted(unet).items():
        layer, quantizer = module.base_layer, module.base_layer.weight_quantizer
        spec = quantizer.spec
        target = grouped(old[name] + product(module, "default"), spec)
        now = grouped(layer.weight, spec)
        stored = WeightQuantizer(spec, choose_qparams(*range_of(old[name], spec), spec))
        error = (now - target).square().sum(-1)
        for params in (
            WeightQuantizer(spec, choose_qparams(target.amin(-1, keepdim=True), target.amax(-1, keepdim=True), spec)),
            stored,
        ):
            tried = fake_quantize(target, params.params, spec)
            assert bool((error <= (tried - target).square().sum(-1) * (1 + 1e-4) + 1e-12).all()), name
        assert torch.equal(quantizer(layer.weight), layer.weight), "not on its grid"
        moved += int(not torch.equal(quantizer.scale, before[f"{name}.base_layer.weight_quantizer.scale"]))
        for key in ("scale", "zero_point", "row_of_bin"):
            expected = before[f"{name}.base_layer.input_quantizer.{key}"]
            assert torch.equal(getattr(layer.input_quantizer, key), expected)
    assert moved > 0, "no scale was adapted to the sum"
    unet.unfuse_lora()
    assert same(before, unet)
    assert torch.equal(prediction(unet), attached)


def test_fusing_nothing_changes_nothing() -> None:
    unet = quantized_unet(4)
    base = prediction(unet)
    unet.add_adapter(lora_config(init_lora_weights=True))  # B is zero
    unet.fuse_lora()
    assert torch.equal(prediction(unet), base)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_fusing_one_after_another_is_fusing_both() -> None:
    """The second starts from the sum before it was rounded."""
    together = quantized_unet()
    together.add_adapter(lora_config(), "a")
    together.add_adapter(lora_config(), "b")
    together.set_adapter(["a", "b"])
    one_by_one = copy.deepcopy(together)
    together.fuse_lora()
    one_by_one.fuse_lora(adapter_names=["a"])
    with pytest.warns(UserWarning, match="Already following adapters were merged a"):
        one_by_one.fuse_lora(adapter_names=["b"])
    for name, module in adapted(together).items():
        other = adapted(one_by_one)[name].base_layer
        torch.testing.assert_close(module.base_layer.weight, other.weight, atol=1e-6, rtol=0)


def test_fusing_what_a_coarse_grid_would_swallow_is_refused() -> None:
    unet = quantized_unet(2)
    unet.add_adapter(lora_config(target_modules=["to_q", "to_v"]))
    for module in adapted(unet).values():
        module.lora_B["default"].weight.data *= 1e-3
    before, attached = snapshot(unet), prediction(unet)
    with pytest.raises(ModelError, match=r"to_.: its 2-bit grid would swallow (9\d|100)% of the adapter"):
        unet.fuse_lora()
    assert same(before, unet), "the first layer was refused, and something has changed"
    assert torch.equal(prediction(unet), attached)


def test_fused_and_unloaded_models_are_saved(prompted: tuple[Quantized, dict[str, Any]], tmp_path: Path) -> None:
    """With adapters attached a model is not saved, by either way; with adapters fused and gone it is."""
    made, arguments = prompted
    pipe = copy.deepcopy(made.pipe)
    without = images_of(pipe, arguments)
    pipe.unet.add_adapter(lora_config())
    quantized = Quantized(
        pipe, made.denoiser_name, made.schedule, made.recipe, made.seed, made.base_model, made.figures
    )
    with pytest.raises(CheckpointError, match=r"layers have adapters.*unload_lora_weights"):
        pipe.save_pretrained(tmp_path / "stock")
    with pytest.raises(CheckpointError, match=r"layers have adapters.*unload_lora_weights"):
        quantized.save(tmp_path / "q")
    assert not (tmp_path / "q").exists()
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    fused = images_of(pipe, arguments)
    assert not torch.equal(fused, without)
    quantized.save(tmp_path / "q")
    assert torch.equal(images_of(load(tmp_path / "q", engine="simulated"), arguments), fused)


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_fusing_goes_through_the_transform(kind: str) -> None:
    """A layer whose input is scaled and rotated, in floating point: fused is what attached is."""
    pytest.importorskip("peft")
    from stepquant.integrations.adapters import _KINDS

    shape = (6, 8) if kind == "linear" else (6, 8, 3, 3)
    geometry = Geometry("linear") if kind == "linear" else Geometry("conv2d", (2, 2), (1, 1), (1, 1))
    layer = QuantizedLayer(geometry, torch.randn(shape), torch.randn(6))
    layer.input_transform = InputTransform(8, geometry.channel_axis, scale=torch.rand(8) + 0.5, block=4)
    module = _KINDS[kind](layer, "default", config=lora_config(), r=2, lora_alpha=3)
    x = torch.randn(5, 8) if kind == "linear" else torch.randn(2, 8, 7, 7)
    with torch.no_grad():
        alone, attached = layer(x), module(x)
        module.merge()
        fused = module(x)
    assert float((attached - alone).abs().max()) > 1e-2
    torch.testing.assert_close(fused, attached, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "geometry",
    [
        Geometry("conv2d", (1, 1), (1, 1), (1, 1), groups=2),
        Geometry("conv2d", (1, 1), (2, 2), (2, 2)),
        Geometry("conv2d", (1, 1), (1, 1), (1, 1), padding_mode="circular"),
    ],
    ids=["groups", "dilation", "padding"],
)
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_fusing_is_refused_where_an_adapter_is_no_change_of_the_weight(geometry: Geometry) -> None:
    pytest.importorskip("peft")
    from stepquant.integrations.adapters import _KINDS

    layer = QuantizedLayer(geometry, torch.randn(4, 4 // geometry.groups, 3, 3), None)
    module = _KINDS["conv2d"](layer, "default", config=lora_config(), r=2, lora_alpha=3, target_name="here")
    with pytest.raises(ModelError, match="here is a convolution with groups, dilation or padding"):
        module.merge()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"use_dora": True}, ModelError, "only plain LoRA goes onto quantized layers"),
        ({"init_lora_weights": "pissa"}, ModelError, "takes a part out of the weight"),
        (None, TypeError, r"Target module of type .*QuantizedLayer.* not supported"),
    ],
    ids=["dora", "pissa", "lokr"],
)
def test_other_adapters_are_refused(options: dict[str, Any] | None, error: type[Exception], message: str) -> None:
    """By name, and without leaving a trace."""
    peft = pytest.importorskip("peft")
    unet = quantized_unet()
    before = prediction(unet)
    config = peft.LoKrConfig(r=2, target_modules=["to_q"]) if options is None else lora_config(**options)
    with pytest.raises(error, match=message):
        unet.add_adapter(config)
    assert torch.equal(prediction(unet), before)
    assert not adapted(unet)


def test_adapters_on_layers_packed_by_an_engine_are_refused() -> None:
    unet = quantized_unet()
    placed = pack_(unet, "int_mm")
    packed = [name for name, one in placed.items() if one.engine == "int_mm" and name.endswith(("to_q", "to_v"))]
    assert packed
    before = prediction(unet)
    with pytest.raises(ValueError, match=r"(?s)Target module .* is not supported"):
        unet.add_adapter(lora_config(target_modules=["to_q"]))
    assert torch.equal(prediction(unet), before)


def test_adapters_on_a_pipeline_that_runs_as_a_graph_are_refused(
    prompted: tuple[Quantized, dict[str, Any]], tmp_path: Path
) -> None:
    """As `load` makes it where it can. diffusers would load them, and then not switch or fuse them, without a word."""
    from peft.utils import get_peft_model_state_dict

    if not has_vnni():
        pytest.skip("the processor has no VNNI, so pipelines run as simulated arithmetic, which takes adapters")
    made, _ = prompted
    donor = FAMILIES["sd15"].build()
    donor.unet.add_adapter(lora_config())
    layers = get_peft_model_state_dict(donor.unet)
    type(donor).save_lora_weights(tmp_path / "donor", unet_lora_layers=layers)
    made.save(tmp_path / "q")
    pipe = load(tmp_path / "q")
    with pytest.raises(EngineError, match=r"Adapters do not go .* engine='simulated'"):
        pipe.load_lora_weights(tmp_path / "donor", weight_name="pytorch_lora_weights.safetensors")
    with pytest.raises(EngineError, match=r"Adapters do not go .* engine='simulated'"):
        pipe.unet.add_adapter(lora_config())


def test_adapters_without_peft_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    unet = tiny.quantize_(tiny_pipelines.text_unet())
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    adapter = {f"{layer}.lora_A.weight": torch.ones(2, 16), f"{layer}.lora_B.weight": torch.ones(16, 2)}
    before = snapshot(unet)
    with pytest.raises((ImportError, ValueError), match=r"(?i)peft"):
        unet.load_lora_adapter(adapter, prefix=None)
    assert same(before, unet)


def test_fused_adapters_are_quantized_with_the_weights(tmp_path: Path) -> None:
    """The way for few bits: make the adapter part of the full-precision weights, then quantize."""
    pytest.importorskip("transformers", reason="diffusers defines this pipeline only beside transformers")
    arguments, pipe = FAMILIES["sd15"].arguments(), FAMILIES["sd15"].build()
    without = images_of(pipe, arguments)
    pipe.unet.add_adapter(lora_config(lora_alpha=2, target_modules=["to_q", "to_v"]))
    with_it = images_of(pipe, arguments)
    recipe = METHODS["rtn"](weights=8, activations=None, samples=2, batch=2)
    with pytest.raises(UnsupportedPipeline, match=r"have adapters.*fuse_lora\(\).*unload_lora_weights"):
        quantize(pipe, recipe, steps=STEPS, arguments=arguments)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    made = quantize(pipe, recipe, steps=STEPS, arguments=arguments)
    made.save(tmp_path / "q")
    found = images_of(load(tmp_path / "q"), arguments)
    near, far = float((found - with_it).abs().mean()), float((found - without).abs().mean())
    assert near < 0.3 * far, "the adapter is not in the quantized weights"


def test_layers_of_others_are_left_to_peft() -> None:
    """Registering twice wraps once, and float layers get peft's own class."""
    pytest.importorskip("peft")
    from peft.tuners.lora.layer import Linear
    from peft.tuners.lora.model import LoraModel

    from stepquant.integrations.adapters import register_with_peft

    before = LoraModel._create_new_module
    register_with_peft()
    assert LoraModel._create_new_module is before
    made = LoraModel._create_new_module(lora_config(), "default", nn.Linear(4, 4), r=2, lora_alpha=2)
    assert type(made) is Linear
