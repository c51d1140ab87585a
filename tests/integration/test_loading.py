"""diffusers' own loading and saving on checkpoints of stepquant, trap by trap.

diffusers loads quantized models with accelerate only. Without it these tests are skipped, but for the ones that show
what is said then.
"""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoModel, DDIMPipeline, DDIMScheduler, DiffusionPipeline, UNet2DModel
from diffusers.quantizers import PipelineQuantizationConfig, auto
from torch import Tensor

import tiny
import tiny_pipelines
from stepquant.api import Quantized, calibrations_of, load, quantize, sample
from stepquant.checkpoint import save_checkpoint
from stepquant.engines.base import pack_
from stepquant.errors import CheckpointError, EvaluationError, SpecError
from stepquant.evaluate.compare import evaluate
from stepquant.evaluate.seeds import calibrated_on
from stepquant.methods import METHODS
from stepquant.model.quantizer import InputQuantizer, WeightQuantizer
from stepquant.model.surgery import quantized_layers
from stepquant.pretrained import METHOD, StepquantConfig, StepquantQuantizer, attach_

STEPS = 4


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    diffusers.utils.logging.disable_progress_bar()
    yield
    diffusers.utils.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def quantized() -> Quantized:
    """Two rows of activation parameters, so that the time axis is there."""
    torch.set_num_threads(1)
    pipe = DDIMPipeline(tiny.tiny_unet(), DDIMScheduler())
    recipe = METHODS["accuquant"](
        weights=4, samples=2, batch=2, windows=(2, 2), rows="window", iterations=2, block_iterations=0
    )
    return quantize(pipe, recipe, steps=STEPS)


@pytest.fixture(scope="module")
def folder(quantized: Quantized, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "q"
    quantized.save(path)
    return path


@pytest.fixture(scope="module")
def images(quantized: Quantized) -> Tensor:
    return images_of(quantized.pipe)


def images_of(pipe: Any) -> Tensor:
    return sample(pipe, seeds=[1, 2], steps=STEPS)


def accelerated() -> None:
    pytest.importorskip("accelerate", reason="diffusers loads quantized models with accelerate only")


def opened(path: Path, **options: Any) -> Any:
    accelerated()
    return DiffusionPipeline.from_pretrained(path, local_files_only=True, **options)


def same_tensors(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    mine, others = one.state_dict(), other.state_dict()
    return mine.keys() == others.keys() and all(torch.equal(mine[name], others[name]) for name in mine)


def test_pipeline(folder: Path, images: Tensor, quantized: Quantized) -> None:
    pipe = opened(folder)
    assert torch.equal(images_of(pipe), images)
    assert same_tensors(pipe.unet, quantized.pipe.unet)
    assert not any(tensor.is_meta for tensor in (*pipe.unet.parameters(), *pipe.unet.buffers()))
    assert not any(parameter.requires_grad for parameter in pipe.unet.parameters())


@pytest.mark.parametrize("kind", [UNet2DModel, AutoModel])
def test_denoiser_alone(kind: Any, folder: Path, quantized: Quantized) -> None:
    accelerated()
    unet = kind.from_pretrained(str(folder), subfolder="unet")  # AutoModel takes no other type
    assert type(unet) is UNet2DModel
    assert same_tensors(unet, quantized.pipe.unet)


def test_what_it_was_calibrated_on_is_known_while_the_folder_is_there(folder: Path, tmp_path: Path) -> None:
    accelerated()
    calibrated = calibrated_on(read_calibration := calibrations_of(load(folder))[0])
    assert calibrated
    shutil.copytree(folder, tmp_path / "q")
    pipe = opened(tmp_path / "q")
    assert calibrations_of(pipe) == (read_calibration,)
    alone = DDIMPipeline(UNet2DModel.from_pretrained(tmp_path / "q", subfolder="unet"), DDIMScheduler())
    assert calibrations_of(alone) == (read_calibration,)
    assert calibrations_of(DDIMPipeline(tiny.tiny_unet(), DDIMScheduler())) == ()
    with pytest.raises(EvaluationError, match="was calibrated on 1 of these 1 seeds"):
        evaluate(pipe, DDIMPipeline(tiny.tiny_unet(), DDIMScheduler()), seeds=[min(calibrated)], steps=STEPS)
    shutil.rmtree(tmp_path / "q")
    assert calibrations_of(pipe) == ()


def test_saving_again(folder: Path, images: Tensor, tmp_path: Path) -> None:
    opened(folder).save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / "stepquant.json").exists()
    twice = opened(tmp_path / "again")
    assert torch.equal(images_of(twice), images)
    saved = sum(path.stat().st_size for path in (tmp_path / "again" / "unet").glob("*.safetensors"))
    assert saved <= (folder / "unet" / "stepquant.safetensors").stat().st_size + 1024  # packed, not in float


def test_quantized_and_loaded_pipelines_save_as_diffusers_does(
    quantized: Quantized, folder: Path, images: Tensor, tmp_path: Path
) -> None:
    quantized.pipe.save_pretrained(tmp_path / "fresh")
    load(folder, engine="simulated").save_pretrained(tmp_path / "loaded")
    for name in ("fresh", "loaded"):
        assert torch.equal(images_of(opened(tmp_path / name)), images)


def test_a_pipeline_of_diffusers_saves_as_a_checkpoint(folder: Path, tmp_path: Path, quantized: Quantized) -> None:
    """The way back: what diffusers opened has the bytes that stepquant saved."""
    pipe = opened(folder)
    save_checkpoint(
        tmp_path / "q", pipe=pipe, denoiser_name="unet", denoiser=pipe.unet, base_model="", created="2026-01-01"
    )
    for name in ("stepquant.safetensors", "config.json"):
        assert (tmp_path / "q" / "unet" / name).read_bytes() == (folder / "unet" / name).read_bytes()
    assert same_tensors(load(tmp_path / "q", engine="simulated", schedule="nearest").unet, quantized.pipe.unet)


def test_shards_and_variant(folder: Path, images: Tensor, tmp_path: Path) -> None:
    opened(folder).save_pretrained(tmp_path / "v", variant="w4", max_shard_size="5KB")
    assert len(list((tmp_path / "v" / "unet").glob("*w4*-of-*.safetensors"))) > 3
    assert torch.equal(images_of(opened(tmp_path / "v", variant="w4")), images)
    with pytest.raises(ValueError, match=r"fp16.*no such modeling files"):
        opened(tmp_path / "v", variant="fp16")


@pytest.mark.parametrize("device_map", ["cpu", "balanced"])
def test_device_map(device_map: str, folder: Path, images: Tensor) -> None:
    accelerated()
    if device_map == "balanced" and not torch.cuda.is_available():
        pytest.skip("diffusers balances pipelines over accelerators only")
    assert torch.equal(images_of(opened(folder, device_map=device_map).to("cpu")), images)


def test_device_map_of_a_denoiser(folder: Path, quantized: Quantized) -> None:
    accelerated()
    unet = UNet2DModel.from_pretrained(folder, subfolder="unet", device_map={"": "cpu"})
    assert same_tensors(unet, quantized.pipe.unet)
    spread = {"down_blocks": "cpu", "": "meta"}
    with pytest.raises(CheckpointError, match=r"loaded onto one device.*enable_model_cpu_offload"):
        UNet2DModel.from_pretrained(folder, subfolder="unet", device_map=spread)


@pytest.mark.slow
def test_trap_1_registered_without_importing_diffusers(folder: Path) -> None:
    """`import stepquant` is quick, and enough: before diffusers, after it, and for a lone denoiser."""
    program = """
import sys
if {late}:
    import diffusers.quantizers.auto
import stepquant
assert {late} or not {{"torch", "diffusers"}} & set(sys.modules), "import stepquant has become slow"
from diffusers.quantizers import auto
assert "stepquant" in auto.AUTO_QUANTIZER_MAPPING
assert "stepquant" in auto.AUTO_QUANTIZATION_CONFIG_MAPPING
ours = [finder for finder in sys.meta_path if type(finder).__module__.startswith("stepquant")]
assert [finder.wanted for finder in ours] == ["peft.tuners.lora.model"], "the finder for diffusers is still there"
import importlib.util
assert importlib.util.find_spec("diffusers.quantizers.auto").loader.get_source("diffusers.quantizers.auto")
"""
    for late in (False, True):
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", program.format(late=late)], check=False)
        assert done.returncode == 0


def test_trap_1_unregistered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `import stepquant` diffusers refuses and names the method."""
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, METHOD)
    with pytest.raises(ValueError, match="Unknown quantization type, got stepquant"):
        UNet2DModel.from_pretrained(folder, subfolder="unet", low_cpu_mem_usage=None)


def test_traps_2_and_3_folders_name_no_code_of_ours(folder: Path) -> None:
    """diffusers imports no other library for a checkpoint, and nobody should need trust_remote_code."""
    index = json.loads((folder / "model_index.json").read_text())
    assert {index["unet"][0], index["scheduler"][0]} == {"diffusers"}
    assert not list(folder.rglob("*.py"))


def test_traps_4_to_6_the_configuration_is_what_diffusers_expects(quantized: Quantized) -> None:
    config = quantized.pipe.unet.config.quantization_config
    assert config.quant_method.value == "stepquant"
    written = json.loads(json.dumps(config.to_dict()))
    assert written["quant_method"] == "stepquant"
    again = StepquantConfig.from_dict(written)
    assert again.structure() == config.structure()
    assert again.to_dict() == config.to_diff_dict()
    assert "StepquantConfig(layers=" in f"{config!r}"
    assert "stepquant" in config.to_json_string()


def test_trap_7_scales_keep_their_precision(folder: Path, quantized: Quantized) -> None:
    pipe = opened(folder, dtype=torch.bfloat16)
    layers = quantized_layers(quantized.pipe.unet)
    assert pipe.unet.conv_in.weight.dtype == pipe.unet.conv_norm_out.weight.dtype == torch.bfloat16
    for name, layer in quantized_layers(pipe.unet).items():
        for attribute, module in layer.named_children():
            if isinstance(module, WeightQuantizer | InputQuantizer):
                expected = getattr(layers[name], attribute)
                assert module.scale.dtype == torch.float32
                assert torch.equal(module.scale, expected.scale)
        if hasattr(layer, "weight"):
            assert torch.equal(layer.weight, layers[name].weight.to(torch.bfloat16))
    sample = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    found = pipe.unet(sample.bfloat16(), 500).sample
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), quantized.pipe.unet(sample, 500).sample, atol=0.2, rtol=0.2)


def test_trap_7_the_same_with_the_old_name(folder: Path) -> None:
    accelerated()
    unet = UNet2DModel.from_pretrained(folder, subfolder="unet", torch_dtype=torch.float16)
    assert unet.dtype == torch.float16
    assert unet.conv_in.input_quantizer.scale.dtype == torch.float32


def test_trap_8_quantizing_while_loading_is_refused_with_the_way_to_do_it(quantized: Quantized, tmp_path: Path) -> None:
    tiny.tiny_unet().save_pretrained(tmp_path / "full")
    config = quantized.pipe.unet.config.quantization_config
    with pytest.raises(SpecError, match=r"call stepquant\.quantize"):
        UNet2DModel.from_pretrained(tmp_path / "full", quantization_config=config)


def test_trap_9_pipeline_configuration(quantized: Quantized, folder: Path, images: Tensor, tmp_path: Path) -> None:
    accelerated()
    config = PipelineQuantizationConfig(quant_mapping={"unet": quantized.pipe.unet.config.quantization_config})
    DDIMPipeline(tiny.tiny_unet(), DDIMScheduler()).save_pretrained(tmp_path / "full")
    with pytest.raises(SpecError, match=r"call stepquant\.quantize"):
        DiffusionPipeline.from_pretrained(tmp_path / "full", quantization_config=config)
    with pytest.warns(UserWarning, match="from the model will be used"):
        pipe = DiffusionPipeline.from_pretrained(folder, quantization_config=config)
    assert torch.equal(images_of(pipe), images)


@pytest.mark.parametrize("cast", ["to", "half", "float"])
def test_trap_10_casting_is_refused(cast: str, folder: Path) -> None:
    unet = load(folder).unet
    with pytest.raises(ValueError, match=r"quantized model"):
        unet.to(torch.float16) if cast == "to" else getattr(unet, cast)()
    assert unet.to("cpu") is unet


def test_trap_12_the_configuration_holds_no_provenance(tmp_path: Path) -> None:
    """diffusers sends short configurations to the hub: no paths, prompts or names of models."""
    pipe = DDIMPipeline(tiny.tiny_unet(), DDIMScheduler())
    secret = quantize(pipe, METHODS["rtn"](samples=2, batch=2), steps=2, base_model="secret-project")
    secret.save(tmp_path / "q")
    config = json.loads((tmp_path / "q" / "unet" / "config.json").read_text())
    assert set(config["quantization_config"]) == {
        "quant_method",
        "format_version",
        "clock",
        "explicit_attention",
        "layers",
    }
    assert "secret-project" in (tmp_path / "q" / "stepquant.json").read_text()
    assert "secret-project" not in json.dumps(config)


def test_no_accelerate(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusers.utils.is_accelerate_available", lambda: False)
    with pytest.raises(ImportError, match=r"pip install accelerate.*stepquant.load"):
        UNet2DModel.from_pretrained(folder, subfolder="unet", low_cpu_mem_usage=None)


def test_a_correction_is_not_dropped(tmp_path: Path) -> None:
    pipe = DDIMPipeline(tiny.tiny_unet(), DDIMScheduler())
    corrected = quantize(pipe, METHODS["cec"](samples=4, batch=2, held_out=2, weights=2), steps=2)
    if not hasattr(corrected.pipe.scheduler, "correction"):
        pytest.fail("the method found no correction, so this test shows nothing")
    corrected.save(tmp_path / "q")
    accelerated()
    with pytest.raises(CheckpointError, match=r"step correction.*stepquant\.load"):
        DiffusionPipeline.from_pretrained(tmp_path / "q")


def test_schedules_are_said_not_to_be_compared(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    opened(folder)
    assert "from_pretrained does not compare schedules" in caplog.text


def test_missing_tensors(folder: Path, tmp_path: Path) -> None:
    """diffusers would go on with a warning."""
    pipe = opened(folder)
    pipe.save_pretrained(tmp_path / "v", max_shard_size="5KB")
    unet = tmp_path / "v" / "unet"
    index = json.loads((unet / "diffusion_pytorch_model.safetensors.index.json").read_text())
    lost = index["weight_map"].pop("conv_in.weight_quantizer.scale")
    from safetensors.torch import load_file, save_file

    held = load_file(unet / lost)
    held.pop("conv_in.weight_quantizer.scale")
    save_file(held, unet / lost)
    (unet / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors.*conv_in\.weight_quantizer\.scale"):
        UNet2DModel.from_pretrained(unet)


def _edited(folder: Path, target: Path, **changes: Any) -> Path:
    import shutil

    shutil.copytree(folder / "unet", target)
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] |= changes
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 99}, "format version 99.*reads versions"),
        ({"nonsense": 1}, r"unknown keys \['nonsense'\]"),
        ({"clock": {"bins": "many", "argument": "timestep", "position": 1}}, "quantization_config of stepquant, bins"),
        (
            {
                "layers": [
                    {"scheme": {"input": {"bits": 8}}, "rows": {"input_quantizer": 1}, "layers": {"nowhere": [1]}}
                ]
            },
            "do not fit UNet2DModel.*nowhere",
        ),
        (
            {
                "layers": [
                    {"scheme": {"input": {"bits": 8}}, "rows": {"input_quantizer": 1}, "layers": {"conv_in": [1]}}
                ]
            },
            r"conv_in: quantization_config declares weight shape \[1\]",
        ),
    ],
)
def test_damaged_configurations(changes: dict[str, Any], message: str, folder: Path, tmp_path: Path) -> None:
    accelerated()
    with pytest.raises(CheckpointError, match=message):
        UNet2DModel.from_pretrained(_edited(folder, tmp_path / "unet", **changes))


def test_copies_save_their_own_tensors(quantized: Quantized, tmp_path: Path) -> None:
    accelerated()
    copied = copy.deepcopy(quantized.pipe.unet)
    assert isinstance(copied.hf_quantizer, StepquantQuantizer)
    assert copied.hf_quantizer.model is copied
    copied.conv_in.bias.data += 1
    copied.save_pretrained(tmp_path / "copy")
    again = UNet2DModel.from_pretrained(tmp_path / "copy")
    assert torch.equal(again.conv_in.bias, copied.conv_in.bias)
    assert not torch.equal(again.conv_in.bias, quantized.pipe.unet.conv_in.bias)


def test_packed_models_are_not_saved(quantized: Quantized, tmp_path: Path) -> None:
    packed = copy.deepcopy(quantized.pipe.unet)
    pack_(packed, "reference")
    with pytest.raises(CheckpointError, match=r"an engine has packed them|cannot be saved"):
        packed.save_pretrained(tmp_path / "packed")


def test_other_modules_are_left_alone() -> None:
    net = tiny.quantize_(tiny.TinyNet())
    attach_(net)
    assert not hasattr(net, "hf_quantizer")


@pytest.mark.parametrize("family", ["sd15", "flux", "sana", "wan"])
def test_families(family: str, tmp_path: Path) -> None:
    """Text to image with several components, transformers, a part in float32 whatever the dtype, video."""
    pytest.importorskip("transformers", reason="diffusers defines this pipeline only beside transformers")
    accelerated()
    known = tiny_pipelines.FAMILIES[family]
    made = quantize(known.build(), METHODS["rtn"](samples=2, batch=2), steps=2, arguments=known.arguments())
    expected = sample(made.pipe, seeds=[1, 2], steps=2, arguments=known.arguments())
    made.save(tmp_path / "q")
    # Pipelines that insist on a text encoder want to be told that there is none.
    absent = {name: None for name, part in made.pipe.components.items() if part is None}
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "q", **absent)
    assert torch.equal(sample(pipe, seeds=[1, 2], steps=2, arguments=known.arguments()), expected)
