"""What an attacker would try beyond damage: keys twice, files that are no files, sizes that nothing backs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from stepquant.checkpoint import load_checkpoint, save_checkpoint
from stepquant.errors import CheckpointError
from stepquant.inspection import inspect_checkpoint
from stepquant.manifest import read_manifest
from stepquant.model.components import load_component
from stepquant.storage import checksum, read_header, write_summed
from tiny import TinyNet, quantize_, tiny_pipe

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


def refused(folder: Path, message: str = ".") -> None:
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder)


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads(path.read_text())
    change(data)
    write_summed(path, json.dumps(data))


def test_a_key_twice_in_the_manifest(folder: Path) -> None:
    text = (folder / "stepquant.json").read_text()
    (folder / "stepquant.json").write_text(text.replace('"clock":', '"base_model":"other","clock":', 1))
    refused(folder, "the key 'base_model' is there twice")


@pytest.mark.parametrize(
    ("before", "after"),
    [('"nonnegative":true', '"nonnegative":false'), ('"position":1', '"position":0')],
    ids=["softmax", "clock"],
)
def test_an_edit_that_means_something_is_found(folder: Path, before: str, after: str) -> None:
    """All tensors fit what it says then, and the model computes something else; the sum beside the manifest tells."""
    path = folder / "stepquant.json"
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))
    message = r"stepquant\.json was edited or damaged after it was written.* or, if the edit is yours"
    refused(folder, message)
    with pytest.raises(CheckpointError, match=message):
        inspect_checkpoint(folder)
    path.with_name("stepquant.json.sha256").unlink()
    load_checkpoint(folder)


def test_the_sum_is_one_that_sha256sum_checks(folder: Path) -> None:
    digest = hashlib.sha256((folder / "stepquant.json").read_bytes()).hexdigest()
    assert (folder / "stepquant.json.sha256").read_bytes() == f"{digest}  stepquant.json\n".encode()
    (folder / "stepquant.json.sha256").write_bytes(b"\xff")
    refused(folder, "stepquant.json.sha256 has '\ufffd'")


def test_a_tensor_twice_in_the_header(folder: Path) -> None:
    data = (folder / TENSORS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].rstrip()
    entry = json.dumps({"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}).encode()
    header = header[:-1] + b',"conv_in.bias":' + entry + b"}"
    (folder / TENSORS).write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    refused(folder, r"the key 'conv_in\.bias' is there twice")


def test_negative_zero_points(folder: Path) -> None:
    """Zero points are unsigned in the file, so a negative one needs another dtype, also with right checksums."""
    tensors = load_file(folder / TENSORS)
    name = f"{CONV}.input_quantizer.zero_point"
    tensors[name] = torch.full_like(tensors[name], -1, dtype=torch.int8)
    save_file(tensors, folder / TENSORS)
    sums = {key: checksum(value) for key, value in tensors.items()}
    edit_json(folder / "stepquant.json", lambda data: data.update(checksums=sums))
    refused(folder, r"zero_point: dtype torch\.int8, expected torch\.uint8")


@pytest.mark.parametrize("name", ["../../outside", "/etc/passwd", "..", "a/../../b", "\x00", "con_in.bias\n"])
def test_tensor_names_are_names_and_no_paths(folder: Path, name: str) -> None:
    tensors = load_file(folder / TENSORS)
    tensors[name] = torch.zeros(1)
    save_file(tensors, folder / TENSORS)
    refused(folder, "which the manifest does not list")
    edit_json(folder / "stepquant.json", lambda data: data["checksums"].update({name: checksum(torch.zeros(1))}))
    refused(folder, "which the model does not have|has tensor")
    assert sorted(path.name for path in folder.parent.iterdir()) == ["q"]


@pytest.mark.parametrize("name", ["stepquant.json", TENSORS, "scheduler/scheduler_config.json", "surprise"])
def test_a_pipe_is_not_waited_for(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    refused(folder, "neither a file nor a folder")
    with pytest.raises(CheckpointError):
        inspect_checkpoint(folder)


def test_links_that_go_nowhere_or_round_in_circles(folder: Path) -> None:
    (folder / "loop").symlink_to(folder / "loop")
    refused(folder, "neither a file nor a folder|a link that leads to itself")
    (folder / "loop").unlink()
    (folder / "up").symlink_to(folder)
    load_checkpoint(folder)


@pytest.mark.parametrize("key", ["num_train_timesteps", "surprise"])
def test_a_schedule_of_a_trillion_timesteps_takes_no_memory(folder: Path, key: str) -> None:
    edit_json(folder / "scheduler" / "scheduler_config.json", lambda data: data.update({key: 10**12}))
    refused(folder, f"{key} is 1000000000000; no schedule needs more than")


@pytest.mark.parametrize("config", ["[1]", "null", '"text"', "{", '{"num_train_timesteps": "many"}', '{"a":1,"a":2}'])
def test_a_scheduler_that_is_something_else(folder: Path, config: str) -> None:
    (folder / "scheduler" / "scheduler_config.json").write_text(config)
    refused(folder, "scheduler cannot be loaded as diffusers's DDIMScheduler")


def test_a_component_larger_than_its_weights_takes_no_memory(tmp_path: Path) -> None:
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=8)
    vae.save_pretrained(tmp_path / "vae")
    load_component(tmp_path / "vae", "diffusers", "AutoencoderKL")
    edit_json(tmp_path / "vae" / "config.json", lambda data: data.update(block_out_channels=[2**20]))
    with pytest.raises(CheckpointError, match=r"asks for \d+ values, and the weight files have \d+ bytes"):
        load_component(tmp_path / "vae", "diffusers", "AutoencoderKL")


def test_tables_that_no_file_backs_take_no_memory(tmp_path: Path) -> None:
    """Positions of a transformer are computed and not stored, so no tensor of the file says how many there are."""
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=1, attention_head_dim=8, in_channels=1, num_layers=1, sample_size=8, norm_num_groups=1
    )
    assert "pos_embed.pos_embed" in dict(model.named_buffers())
    assert "pos_embed.pos_embed" not in model.state_dict()
    pipe = diffusers.DiTPipeline(model, None, diffusers.DDIMScheduler())
    folder = tmp_path / "q"
    save_checkpoint(
        folder, pipe=pipe, denoiser_name="transformer", denoiser=quantize_(model), base_model="", created=""
    )
    load_checkpoint(folder)

    def grow(data: dict[str, Any]) -> None:
        from stepquant.manifest import config_hash

        data["denoiser"]["config"]["sample_size"] = 2**20
        data["base_config_hash"] = config_hash(data["denoiser"]["config"])

    edit_json(folder / "stepquant.json", grow)
    refused(folder, r"the configuration asks for a model of \d+ bytes; the file has \d+")


def bit_flipped(data: bytes, places: list[tuple[float, int]]) -> bytes:
    """place: as a part of the length, so that one list serves all files; and a bit."""
    changed = bytearray(data)
    for place, bit in places:
        changed[int(place * len(changed))] ^= 1 << bit
    return bytes(changed)


PLACES = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7)), min_size=1, max_size=3, unique_by=lambda x: x
)
ONE_FOLDER = settings(
    max_examples=40, deadline=10_000, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
)


@ONE_FOLDER
@given(places=PLACES)
def test_bits_flip_in_the_tensors(folder: Path, pristine: Path, places: list[tuple[float, int]]) -> None:
    """Header or body: every byte is covered by a checksum, so that no flip goes unnoticed."""
    data = (pristine / TENSORS).read_bytes()
    changed = bit_flipped(data, places)
    (folder / TENSORS).write_bytes(changed)
    if equal_up_to_metadata(data, changed):
        load_checkpoint(folder)
    else:
        refused(folder)


def equal_up_to_metadata(data: bytes, changed: bytes) -> bool:
    """Nothing but the header's metadata or white space differs, which mean nothing."""
    try:
        length = int.from_bytes(changed[:8], "little")
        one, other = (json.loads(file[8 : 8 + length]) for file in (data, changed))
    except ValueError:
        return False
    for header in (one, other):
        header.pop("__metadata__", None)
    return data[:8] == changed[:8] and bool(one == other) and data[8 + length :] == changed[8 + length :]


@ONE_FOLDER
@given(places=PLACES)
def test_bits_flip_in_the_manifest(folder: Path, pristine: Path, places: list[tuple[float, int]]) -> None:
    """Words may change where there is no sum (a date, a recipe), and it is still a manifest; all else is refused."""
    (folder / "stepquant.json.sha256").unlink(missing_ok=True)
    (folder / "stepquant.json").write_bytes(bit_flipped((pristine / "stepquant.json").read_bytes(), places))
    try:
        load_checkpoint(folder)
    except CheckpointError:
        return
    read_manifest(folder)


@ONE_FOLDER
@given(cut=st.floats(0, 1, exclude_max=True), name=st.sampled_from(["stepquant.json", TENSORS]))
def test_files_are_cut_short(folder: Path, pristine: Path, cut: float, name: str) -> None:
    for other in ("stepquant.json", TENSORS):
        shutil.copyfile(pristine / other, folder / other)
    data = (pristine / name).read_bytes()
    (folder / name).write_bytes(data[: int(cut * len(data.rstrip()))])
    refused(folder)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@ONE_FOLDER
@given(data=st.data())
def test_any_value_anywhere_in_the_manifest(folder: Path, pristine: Path, data: st.DataObject) -> None:
    """One value of the real manifest, at any depth, becomes something else: it is refused, or it means nothing."""
    manifest = json.loads((pristine / "stepquant.json").read_text())
    place: Any = manifest
    key: Any = data.draw(st.sampled_from(sorted(place)))
    while isinstance(place[key], dict | list) and place[key] and data.draw(st.booleans()):
        place = place[key]
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
    place[key] = data.draw(JSON_VALUES)
    write_summed(folder / "stepquant.json", json.dumps(manifest))
    try:
        load_checkpoint(folder)
    except CheckpointError:
        return
    read_manifest(folder)


@settings(max_examples=100, deadline=5_000, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None)
@given(data=st.binary(max_size=200) | JSON_VALUES.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_as_header_and_as_manifest(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "stepquant.json").write_bytes(data)
    with pytest.raises(CheckpointError):
        read_manifest(tmp_path)
    path = tmp_path / "file.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError):
        read_header(path)
    path.write_bytes(len(data).to_bytes(8, "little") + data)
    try:
        assert set(read_header(path)) == set(json.loads(data)) - {"__metadata__"}
    except CheckpointError:
        return


def test_a_denoiser_of_the_callers_own_is_checked_the_same(tmp_path: Path) -> None:
    from stepquant.model.pipeline import DenoiserPipeline

    net = TinyNet()
    pipe = DenoiserPipeline(net, diffusers.DDIMScheduler(), (2, 4, 4))
    save_checkpoint(
        tmp_path / "q", pipe=pipe, denoiser_name="denoiser", denoiser=quantize_(TinyNet()), base_model="", created=""
    )
    load_checkpoint(tmp_path / "q", denoiser=net)
    net.conv = torch.nn.Conv2d(2, 5, 3, padding=1)
    with pytest.raises(CheckpointError, match=r"conv: the manifest declares weight shape \[4, 2, 3, 3\]"):
        load_checkpoint(tmp_path / "q", denoiser=net)
