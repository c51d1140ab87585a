"""`stepquant export` of a checkpoint to ComfyUI's format, and `--onto` and `--denoiser` where they make no sense."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import tiny
import tiny_pipelines
from stepquant.checkpoint import save_checkpoint
from stepquant.cli.main import main

pytest.importorskip("transformers", reason="diffusers defines these pipelines only beside transformers")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return int(stop.value.code or 0), said.out, said.err


def checkpoint(folder: Path, family: str) -> Path:
    pipe: Any = tiny_pipelines.FAMILIES[family].build()
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    denoiser = tiny.quantize_(copy.deepcopy(getattr(pipe, name)))
    save_checkpoint(
        folder, pipe=pipe, denoiser_name=name, denoiser=denoiser, base_model="digits-unet", created="2026-01-01"
    )
    return folder


def test_a_checkpoint_for_comfyui(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = checkpoint(tmp_path / "q", "sd15"), tmp_path / "out" / "net.safetensors"
    status, shown, _ = run(capsys, "export", source, "-o", target, "--format", "comfyui", "--json", tmp_path / "j")
    assert status == 0
    assert "no text encoders, VAE or scheduler" in " ".join(shown.split())
    said = json.loads((tmp_path / "j").read_text())
    with safe_open(target, framework="pt") as file:
        layers = json.loads(file.metadata()["_quantization_metadata"])["layers"]
    assert sorted(said["int8"]) == sorted(layers)
    status, _, complaint = run(capsys, "export", source, "-o", target, "--format", "comfyui")
    assert status == 2
    assert "exists already" in complaint


def test_a_model_that_comfyui_would_not_recognise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = checkpoint(tmp_path / "q", "pixart")
    status, _, complaint = run(capsys, "export", source, "-o", tmp_path / "n.safetensors", "--format", "comfyui")
    assert status == 1
    assert "found PixArtTransformer2DModel" in " ".join(complaint.split())
    assert not (tmp_path / "n.safetensors").exists()


@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_onto_joins_two_checkpoints(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = checkpoint(tmp_path / "q", "sd15")
    where = ["-o", tmp_path / "images"] if command == "sample" else []
    status, _, complaint = run(capsys, command, "digits-unet", *where, "--onto", source)
    assert status == 2
    assert "--onto goes with a checkpoint of the other denoiser, and digits-unet is none" in " ".join(complaint.split())
    other = checkpoint(tmp_path / "other", "sdxl")
    status, _, complaint = run(capsys, command, other, *where, "--onto", source)
    assert status == 2
    assert "onto= is a StableDiffusionPipeline" in " ".join(complaint.split())


def test_a_denoiser_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, complaint = run(capsys, "quantize", "digits-unet", "-o", tmp_path / "q", "--denoiser", "unett")
    assert status == 1
    assert "no denoiser 'unett'. Did you mean 'unet'" in " ".join(complaint.split())
    assert not list(tmp_path.iterdir())
