"""Damage to the bits of rows, `row_bits` of the manifest, and to zero points that depend on them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file, save_file

from mixed_bits import mixed_
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
    mixed_(quantized, (4, 10, 3))
    save_checkpoint(folder, pipe=pipe, denoiser_name="unet", denoiser=quantized, base_model="tiny", created="today")
    return folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    shutil.copytree(pristine, tmp_path / "q")
    return tmp_path / "q"


def group_of(layers: list[dict[str, Any]]) -> dict[str, Any]:
    return next(group for group in layers if CONV in group["layers"])


def set_bits(bits: Any, attribute: str = "input_quantizer") -> Callable[[list[dict[str, Any]]], None]:
    def change(layers: list[dict[str, Any]]) -> None:
        group_of(layers)["row_bits"] = {attribute: bits}

    return change


def without_static_input(layers: list[dict[str, Any]]) -> None:
    group = group_of(layers)
    group["scheme"]["input"] = {"bits": 8, "dynamic": True}


def without_bits(layers: list[dict[str, Any]]) -> None:
    del group_of(layers)["row_bits"]


DAMAGE: dict[str, tuple[Callable[[list[dict[str, Any]]], None], str]] = {
    "too few": (set_bits([4, 10]), "one for each of the 3 rows, found 2"),
    "too many": (set_bits([4, 10, 3, 3]), "one for each of the 3 rows, found 4"),
    "none": (set_bits([]), "one for each of the 3 rows, found 0"),
    "seventeen": (set_bits([4, 17, 3]), "bits must be a whole number from 2 to 16, found 17"),
    "one": (set_bits([4, 1, 3]), "bits must be a whole number from 2 to 16, found 1"),
    "huge": (set_bits([4, 10**18, 3]), "bits must be a whole number from 2 to 16"),
    "true": (set_bits([4, True, 3]), "row_bits"),
    "broken": (set_bits([4, 9.5, 3]), "row_bits"),
    "text": (set_bits([4, "8", 3]), "row_bits"),
    "a number": (set_bits(8), "row_bits"),
    "all the same": (set_bits([4, 4, 4]), "All 3 rows of .* have 4 bits"),
    "of nothing": (set_bits([4, 10, 3], "second_quantizer"), "bits for the rows of second_quantizer, which its scheme"),
    "of an unknown operand": (set_bits([4, 10, 3], "third"), "bits for the rows of third"),
    "of a dynamic quantizer": (without_static_input, "bits for each row of a quantizer without such rows"),
    # Without row_bits all rows have 8 bits, whose zero points are bytes.
    "gone": (without_bits, r"zero_point: dtype torch\.int32, expected torch\.uint8"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_bits_are_refused(folder: Path, damage: str) -> None:
    change, message = DAMAGE[damage]
    manifest = folder / "stepquant.json"
    data = json.loads(manifest.read_text())
    change(data["layers"])
    write_summed(manifest, json.dumps(data))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder)


def test_version_1_does_not_have_them(folder: Path) -> None:
    manifest = folder / "stepquant.json"
    data = json.loads(manifest.read_text())
    assert data["format_version"] == 2
    write_summed(manifest, json.dumps({**data, "format_version": 1}))
    for read in (load_checkpoint, inspect_checkpoint):
        with pytest.raises(CheckpointError, match="has activation bits that change over time, which format version 1"):
            read(folder)


@pytest.mark.parametrize(("row", "value", "last"), [(0, 16, 15), (1, 1024, 1023), (2, 8, 7), (2, -1, 7)])
def test_zero_points_beyond_the_levels_of_their_row(folder: Path, row: int, value: int, last: int) -> None:
    """Row 0 has levels to 15, row 1 to 1023, row 2 to 7."""
    tensors = load_file(folder / TENSORS)
    name = f"{CONV}.input_quantizer.zero_point"
    tensors[name][row] = value
    save_file(tensors, folder / TENSORS)
    data = json.loads((folder / "stepquant.json").read_text())
    data["checksums"] = {key: checksum(tensor) for key, tensor in tensors.items()}
    write_summed(folder / "stepquant.json", json.dumps(data))
    with pytest.raises(CheckpointError, match=f"zero point {value} is out of range, the last level is {last}"):
        load_checkpoint(folder)


def test_diffusers_opens_them_and_refuses_damage(folder: Path) -> None:
    pytest.importorskip("accelerate")
    loaded, _ = load_checkpoint(folder)
    unet = UNet2DModel.from_pretrained(folder / "unet")
    x = torch.randn(1, 1, 8, 8)
    for timestep in (0, 300, 999):
        assert torch.equal(unet(x, timestep).sample, loaded.unet(x, timestep).sample)
    path = folder / "unet" / "config.json"
    config = json.loads(path.read_text())
    group_of(config["quantization_config"]["layers"])["row_bits"]["input_quantizer"] = [4, 17, 3]
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="from 2 to 16, found 17"):
        UNet2DModel.from_pretrained(folder / "unet")
