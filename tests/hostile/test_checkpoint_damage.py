"""Each kind of damage has an error of its own, and none takes long or executes anything."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepquant.checkpoint import load_checkpoint, save_checkpoint
from stepquant.errors import CheckpointError
from stepquant.inspection import inspect_checkpoint
from stepquant.storage import checksum, write_summed
from tiny import tiny_pipe

TENSORS = "unet/stepquant.safetensors"
CONV = "down_blocks.0.resnets.0.conv1"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine") / "q"
    pipe, quantized = tiny_pipe()
    save_checkpoint(folder, pipe=pipe, denoiser_name="unet", denoiser=quantized, base_model="tiny", created="today")
    return folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    shutil.copytree(pristine, tmp_path / "q")
    return tmp_path / "q"


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "stepquant.json"
    data = json.loads(path.read_text())
    change(data)
    write_summed(path, json.dumps(data))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any], *, sums: bool = True) -> None:
    """Change tensors and, as a careful attacker would, the checksums."""
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)
    if sums:
        edit_manifest(
            folder, lambda data: data.update(checksums={name: checksum(value) for name, value in tensors.items()})
        )


def edit_header(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = (folder / TENSORS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    (folder / TENSORS).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def refused(folder: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder)


def test_the_pristine_checkpoint_loads(folder: Path) -> None:
    load_checkpoint(folder)
    edit_tensors(folder, lambda tensors: None)
    load_checkpoint(folder)


MANIFEST_DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "future version": (
        lambda data: data.update(format_version=3, stepquant="9.9.0"),
        r"format version 3, written by stepquant 9\.9\.0; this stepquant reads versions 1 to 2",
    ),
    "version zero": (lambda data: data.update(format_version=0), "format version 0"),
    "no version": (lambda data: data.pop("format_version"), "format version None"),
    "version true": (lambda data: data.update(format_version=True), "format version True"),
    "missing field": (lambda data: data.pop("clock"), "clock: Field required"),
    "wrong type": (lambda data: data["clock"].update(bins="5"), r"clock\.bins: Input should be a valid integer"),
    "unknown field": (lambda data: data.update(surprise=1), "surprise: unknown key"),
    "unknown nested field": (
        lambda data: data["layers"][0]["scheme"]["input"].update(surprise=1),
        r"layers\.0\.scheme\.input\.surprise: unknown key",
    ),
    "bits": (lambda data: data["layers"][0]["scheme"]["weight"].update(bits=77), r"layers\.0\.scheme\.weight.*2 to 8"),
    "scheme of another width": (
        lambda data: data["layers"][0]["scheme"]["weight"].update(bits=2),
        r"shape \[\d+\], expected \[\d+\]",
    ),
    "folder trick": (lambda data: data["denoiser"].update(name="../unet"), "'../unet' is not a plain word"),
    "component trick": (
        lambda data: data["pipeline"]["components"].update({"/etc": None}),
        "'/etc' is not a plain word",
    ),
    "unknown layer": (
        lambda data: data["layers"][0]["layers"].update({"no.such.layer": [1, 1]}),
        r"no\.such\.layer",
    ),
    "layer twice": (
        lambda data: data["layers"][1]["layers"].update(data["layers"][0]["layers"]),
        "a layer is listed twice",
    ),
    "weight shape": (
        lambda data: data["layers"][0]["layers"].update(conv_in=[8, 9]),
        r"conv_in: the manifest declares weight shape \[8, 9\]",
    ),
    "bins": (lambda data: data["clock"].update(bins=10**12), "declares 1000000000000 timestep bins"),
    "rows": (
        lambda data: data["layers"][0].update(rows={"input_quantizer": 10**12}),
        "the manifest declares 1000000000000 rows",
    ),
    "edited configuration": (
        lambda data: data["denoiser"]["config"].update(norm_num_groups=2),
        "does not have the hash base_config_hash",
    ),
    "class": (lambda data: data["denoiser"].update(class_name="os.system"), "no ModelMixin named 'os.system'"),
    "class of another kind": (
        lambda data: data["denoiser"].update(class_name="DDIMScheduler"),
        "no ModelMixin named 'DDIMScheduler'",
    ),
    "pipeline class": (
        lambda data: data["pipeline"].update(class_name="UNet2DModel"),
        "no DiffusionPipeline named 'UNet2DModel'",
    ),
    "pipeline arguments": (
        lambda data: data["pipeline"].update(arguments={"surprise": 1}),
        "DDIMPipeline cannot be built",
    ),
    "library": (
        lambda data: data["pipeline"]["components"]["scheduler"].update(library="os"),
        r"pipeline\.components\.scheduler\.library",
    ),
    "dtype": (lambda data: data["denoiser"].update(dtype="load"), "there is no dtype 'load'"),
    "checksum": (
        lambda data: data["checksums"].update({"conv_in.bias": "0" * 64}),
        r"conv_in\.bias: the checksum differs",
    ),
    "tensor not listed": (
        lambda data: data["checksums"].pop("conv_in.bias"),
        r"has tensor 'conv_in\.bias', which the manifest does not list",
    ),
    "tensor listed only": (lambda data: data["checksums"].update(ghost="0"), "lacks tensor 'ghost'"),
    "correction declared": (lambda data: data.update(correction=[5, 1]), r"declares correction \(5, 1\), found \[\]"),
}


@pytest.mark.parametrize("damage", MANIFEST_DAMAGE)
def test_manifest_damage(folder: Path, damage: str) -> None:
    change, message = MANIFEST_DAMAGE[damage]
    edit_manifest(folder, change)
    refused(folder, message)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not JSON"), ("[]", "holds a list"), ("[" * 100_000, "is not JSON"), ("\xff", "format version|not JSON")],
)
def test_manifest_is_not_an_object(folder: Path, text: str, message: str) -> None:
    (folder / "stepquant.json").write_bytes(text.encode("latin-1"))
    refused(folder, message)
    with pytest.raises(CheckpointError):
        inspect_checkpoint(folder)


def test_a_configuration_of_a_billion_layers_is_stopped(folder: Path) -> None:
    from stepquant.manifest import config_hash

    def change(data: dict[str, Any]) -> None:
        data["denoiser"]["config"]["layers_per_block"] = 10**9
        data["base_config_hash"] = config_hash(data["denoiser"]["config"])

    edit_manifest(folder, change)
    refused(folder, "asks for more than .* modules")


def test_a_configuration_of_huge_layers_takes_no_memory(folder: Path) -> None:
    from stepquant.manifest import config_hash

    def change(data: dict[str, Any]) -> None:
        data["denoiser"]["config"]["block_out_channels"] = [8 * 2**15, 16 * 2**15]
        data["base_config_hash"] = config_hash(data["denoiser"]["config"])

    edit_manifest(folder, change)
    refused(folder, r"conv_in: the manifest declares weight shape \[8, 1, 3, 3\], the model has")


TENSOR_DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing": (lambda tensors: tensors.pop("conv_in.bias"), r"lacks tensor 'conv_in\.bias'"),
    "extra": (lambda tensors: tensors.update(ghost=torch.zeros(1)), "has tensor 'ghost', which the model does not"),
    "shape": (
        lambda tensors: tensors.update({"conv_in.bias": torch.zeros(9)}),
        r"conv_in\.bias: shape \[9\], expected \[8\]",
    ),
    "dtype": (
        lambda tensors: tensors.update({"conv_in.bias": torch.zeros(8, dtype=torch.int32)}),
        r"conv_in\.bias: dtype torch\.int32, expected",
    ),
    "NaN scale": (lambda tensors: tensors[f"{CONV}.weight_quantizer.scale"].fill_(float("nan")), "a scale is NaN"),
    "infinite scale": (
        lambda tensors: tensors[f"{CONV}.input_quantizer.scale"].fill_(float("inf")),
        "a scale is NaN or infinite",
    ),
    "zero scale": (
        lambda tensors: tensors[f"{CONV}.weight_quantizer.scale"].zero_(),
        r"a scale is 0\.0; scales are greater",
    ),
    "zero point out of range": (
        lambda tensors: tensors[f"{CONV}.weight_quantizer.zero_point"].fill_(16),
        "zero point 16 is out of range, the last level is 15",
    ),
    "zero point not whole": (
        lambda tensors: tensors.update({f"{CONV}.input_quantizer.zero_point": torch.full((3,), 0.5)}),
        r"zero_point: dtype torch\.float32, expected torch\.uint8",
    ),
    "row out of range": (
        lambda tensors: tensors[f"{CONV}.input_quantizer.row_of_bin"].fill_(3),
        "rows from 3 to 3, but the quantizer has 3 rows",
    ),
    "edges descend": (
        lambda tensors: tensors.update({"stepquant_clock.edges": tensors["stepquant_clock.edges"].flip(0)}),
        "not finite and ascending",
    ),
    "edges NaN": (lambda tensors: tensors["stepquant_clock.edges"].fill_(float("nan")), "not finite and ascending"),
    "levels too few": (
        lambda tensors: tensors.update({f"{CONV}.weight": tensors[f"{CONV}.weight"][:-1].clone()}),
        r"conv1\.weight: shape \[287\], expected \[288\]",
    ),
    "no clock": (lambda tensors: tensors.pop("stepquant_clock.edges"), r"lacks tensor 'stepquant_clock\.edges'"),
    "rows missing": (
        lambda tensors: tensors.pop(f"{CONV}.input_quantizer.scale"),
        r"input_quantizer\.scale: shape None, but the manifest declares 3 rows",
    ),
}


@pytest.mark.parametrize("damage", TENSOR_DAMAGE)
def test_tensor_damage(folder: Path, damage: str) -> None:
    change, message = TENSOR_DAMAGE[damage]
    edit_tensors(folder, change)
    refused(folder, message)


def test_an_edited_tensor_is_found_by_its_checksum(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors[f"{CONV}.weight"].add_(1), sums=False)
    refused(folder, r"conv1\.weight: the checksum differs")


def test_the_file_is_truncated(folder: Path) -> None:
    data = (folder / TENSORS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    for cut, message in (
        (0, "is truncated: it has 0 bytes"),
        (5, "is truncated: it has 5 bytes"),
        (100, "is truncated or not a safetensors file"),
        (8 + length, "is truncated: tensor"),
        (len(data) - 1, "is truncated: tensor"),
    ):
        (folder / TENSORS).write_bytes(data[:cut])
        refused(folder, message)
    (folder / TENSORS).write_bytes(data + b"\0")
    refused(folder, "1 bytes follow the last tensor")


def test_the_header_is_damaged(folder: Path) -> None:
    data = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes((2**62).to_bytes(8, "little") + data[8:])
    refused(folder, "declares a header of 4611686018427387904 bytes")
    (folder / TENSORS).write_bytes(data[:8] + b"x" + data[9:])
    refused(folder, "the header is not JSON")


HEADER_DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "larger than the file": (
        lambda header: header["conv_in.bias"].update(shape=[2**40], data_offsets=[0, 2**42]),
        "truncated: tensor|begins at byte",
    ),
    "size and shape": (lambda header: header["conv_in.bias"].update(shape=[2**40]), "takes .* bytes, but its place"),
    "negative": (lambda header: header["conv_in.bias"].update(shape=[-1]), "not whole numbers"),
    "dtype": (lambda header: header["conv_in.bias"].update(dtype="PICKLE"), "unknown dtype 'PICKLE'"),
    "fields": (lambda header: header["conv_in.bias"].pop("dtype"), "expected dtype, shape and data_offsets"),
    "overlap": (
        lambda header: header["conv_in.bias"].update(
            data_offsets=header["conv_out.weight_quantizer.scale"]["data_offsets"]
        ),
        "begins at byte|takes",
    ),
}


@pytest.mark.parametrize("damage", HEADER_DAMAGE)
def test_header_entries_are_damaged(folder: Path, damage: str) -> None:
    change, message = HEADER_DAMAGE[damage]
    edit_header(folder, change)
    refused(folder, message)


def test_files_and_folders_are_missing(folder: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "There is no folder")
    shutil.rmtree(folder / "scheduler")
    refused(folder, "lacks the folder scheduler")
    (folder / TENSORS).unlink()
    refused(folder, r"lacks the file unet/stepquant\.safetensors")
    (folder / "stepquant.json").unlink()
    refused(folder, r"is not a stepquant checkpoint: it has no stepquant\.json")


def test_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    (folder / "scheduler" / "scheduler_config.json").unlink()
    (folder / "scheduler" / "scheduler_config.json").symlink_to(tmp_path / "secret")
    refused(folder, "is a link that leads out of the checkpoint")


def test_a_component_that_is_damaged(folder: Path) -> None:
    (folder / "scheduler" / "scheduler_config.json").write_text("[1")
    refused(folder, "scheduler cannot be loaded as diffusers's DDIMScheduler")


def test_pickles_and_code_in_the_folder_are_not_touched(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    bomb = b"cposix\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR."
    for name in ("unet/diffusion_pytorch_model.bin", "pytorch_model.bin", "unet/stepquant.bin"):
        (folder / name).write_bytes(bomb)
    for name in ("pipeline.py", "unet/unet.py", "scheduler/scheduler.py"):
        (folder / name).write_text(f"open({str(marker)!r}, 'w')")
    load_checkpoint(folder)
    assert not marker.exists()
