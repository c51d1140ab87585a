"""Every family of the compatibility page through the command line, from a folder, in a new process.

One process for all of them: importing takes longer than all the commands together.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import tiny_pipelines
import tiny_texts
from stepquant.evaluate.compare import SCHEMA
from tiny_pipelines import FAMILIES

PROMPTS = "# two prompts\na photo of a cat\n\na red house on the river\n"

# Family -> arguments of its pipeline's call, as a user types them. Prompts come from a file.
SIZED = ["height=16", "width=16"]
ARGUMENTS: dict[str, list[str]] = {
    "dit": ["class_labels=[1, 2]", "guidance_scale=3.0"],
    "sd15": [*SIZED, "guidance_scale=3.0", "negative_prompt=blue tree"],
    "img2img": ["image=@picture.png", "strength=0.6"],
    "inpaint": ["image=@picture.png", "mask_image=@mask.png", "strength=1.0", *SIZED],
    "inpaint-unet": ["image=@picture.png", "mask_image=@mask.png", "strength=1.0", *SIZED],
    "controlnet": ["image=@picture.png"],
    "lcm": SIZED,
    "turbo": [*SIZED, "guidance_scale=0.0"],
    "sdxl": SIZED,
    "sd3": [*SIZED, "negative_prompt=blue", "max_sequence_length=8"],
    "flux": [*SIZED, "max_sequence_length=8"],
    "pixart": [*SIZED, "use_resolution_binning=false", "clean_caption=false", "max_sequence_length=8"],
    "sana": [
        "height=32",
        "width=32",
        "use_resolution_binning=false",
        "clean_caption=false",
        "complex_human_instruction=null",
        "max_sequence_length=8",
    ],
    "wan": ["height=32", "width=32", "num_frames=5", "max_sequence_length=8"],
}

DRIVER = """
import json, os, sys
import torch
torch.set_num_threads(1)
from stepquant.cli import main

os.chdir(sys.argv[1])
statuses = {}
for name, commands in json.load(open("commands.json")).items():
    for command in commands:
        try:
            main(command)
        except SystemExit as done:
            if done.code:
                statuses[name] = [command[0], done.code]
                break
json.dump(statuses, open("failed.json", "w"))
"""


def commands_for(family: str) -> list[list[str]]:
    given = [word for argument in ARGUMENTS.get(family, []) for word in ("--argument", argument)]
    if FAMILIES[family].needs_transformers:
        given += ["--prompts", "prompts.txt"]
    settings = ["--method", "rtn", "--preset", "quick", "--weights", "4", "--steps", "2", "--calibration-samples", "2"]
    simulated = ["--engine", "simulated", "-q"]  # making a graph of every family would take longer than all the rest
    return [
        ["quantize", family, "-o", f"{family}-w4a8", *settings, *given, "-q"],
        ["sample", f"{family}-w4a8", "-o", f"{family}-images", "--seeds", "1-2", *given, *simulated],
        ["evaluate", f"{family}-w4a8", "--seeds", "1000-1001", "--features", "none", *given, "-q"],
    ]


EXPERTS = ("transformer", "transformer_2")


def commands_for_experts() -> list[list[str]]:
    """One checkpoint each, sampled and evaluated together; a second evaluation of the one alone."""
    given = [word for argument in ARGUMENTS["wan"] for word in ("--argument", argument)]
    given += ["--prompts", "prompts.txt", "-q"]
    settings = ["--method", "rtn", "--preset", "quick", "--weights", "4", "--steps", "4", "--calibration-samples", "2"]
    both = ["experts-transformer_2", "--onto", "experts-transformer"]
    evaluated = ["--seeds", "1000-1001", "--features", "none", *given]
    return [
        *(["quantize", "experts", "-o", f"experts-{name}", "--denoiser", name, *settings, *given] for name in EXPERTS),
        ["sample", *both, "-o", "experts-images", "--seeds", "1-2", *given],
        ["evaluate", *both, *evaluated],
        ["evaluate", "experts-transformer", *evaluated],
    ]


# What the fingerprint of the schedule says about guidance: what was asked for, or the pipeline's own default.
GUIDANCE = {
    **dict.fromkeys(("ddim", "ddpm", "consistency", "ldm", "lcm", "turbo", "flux"), "none"),
    "dit": "cfg(3, doubled latents)",
    "sd15": "cfg(3)",
    "img2img": "cfg(7.5)",
    "inpaint": "cfg(7.5)",
    "inpaint-unet": "cfg(7.5)",
    "controlnet": "cfg(7.5)",
    "sdxl": "cfg(5)",
    "sd3": "cfg(7)",
    "pixart": "cfg(4.5)",
    "sana": "cfg(4.5)",
    "wan": "cfg(5)",
}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_family_through_the_command_line(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="most pipelines are there only beside transformers")
    (tmp_path / "prompts.txt").write_text(PROMPTS, encoding="utf-8")
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    Image.fromarray(np.where(np.arange(16) < 8, 0, 255).astype(np.uint8)[None].repeat(16, 0)).save(
        tmp_path / "mask.png"
    )
    for family in FAMILIES:
        tiny_texts.with_texts(family).save_pretrained(tmp_path / family)
    tiny_texts.with_texts("wan", tiny_pipelines.wan(experts=2)).save_pretrained(tmp_path / "experts")
    commands = {family: commands_for(family) for family in FAMILIES} | {"experts": commands_for_experts()}
    (tmp_path / "commands.json").write_text(json.dumps(commands))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", DRIVER, str(tmp_path)], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    failed = json.loads((tmp_path / "failed.json").read_text())
    assert failed == {}, done.stderr[-4000:]
    for family in FAMILIES:
        assert_measured(tmp_path, family)
    assert_experts_measured(tmp_path)


VIDEOS = {"wan": 5}
"""Families that sample videos, and their frames."""


def assert_measured(folder: Path, family: str) -> None:
    """Two images, an evaluation that has found a difference, and what was asked for in the settings."""
    suffix = "" if family in VIDEOS else ".png"
    found = sorted((folder / f"{family}-images").iterdir())
    assert [path.name for path in found] == [f"000001{suffix}", f"000002{suffix}"]
    if family in VIDEOS:
        assert sorted(path.name for path in found[0].iterdir()) == [f"{k:06d}.png" for k in range(VIDEOS[family])]
    results: dict[str, Any] = json.loads((folder / f"{family}-w4a8.evaluation.json").read_text())
    assert results["schema"] == SCHEMA
    assert results["n"] == 2
    psnr = results["metrics"]["psnr"]["value"]
    assert 0 < psnr < 100, f"{family}: {psnr} dB; the quantized model computes what full precision does"
    settings = (folder / f"{family}-w4a8.run.yaml").read_text()
    if FAMILIES[family].needs_transformers:
        assert "a red house on the river" in settings, "the prompts are not in the settings of the run"
    manifest = json.loads((folder / f"{family}-w4a8" / "stepquant.json").read_text())
    assert manifest["schedule"]["guidance"] == GUIDANCE[family]


def assert_experts_measured(folder: Path) -> None:
    """A checkpoint for each, and the two together further from full precision than one alone."""
    for name in EXPERTS:
        assert f"denoiser: {name}\n" in (folder / f"experts-{name}.run.yaml").read_text()
        manifest = json.loads((folder / f"experts-{name}" / "stepquant.json").read_text())
        assert manifest["denoiser"]["name"] == name
    assert sorted(path.name for path in (folder / "experts-images").iterdir()) == ["000001", "000002"]
    both, alone = (json.loads((folder / f"experts-{name}.evaluation.json").read_text()) for name in EXPERTS[::-1])
    assert both["onto"] == "experts-transformer"
    assert 0 < both["metrics"]["psnr"]["value"] != alone["metrics"]["psnr"]["value"]
