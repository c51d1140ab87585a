"""`python -m stepquant` from a model folder to a report, in processes of their own.

A process takes about five seconds to import what it needs, so there are few: one run of quantize that is interrupted,
its continuation, and one of each command after it. What they leave is compared with the same run through the API, here
and undisturbed.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from safetensors.torch import load_file
from torch import Tensor

import tiny
from stepquant.api import open_model, quantize, sample
from stepquant.cli.main import main
from stepquant.config import load_config, resolve
from stepquant.engines.openvino import has_vnni
from stepquant.evaluate.images import save_png
from stepquant.run import Run

pytestmark = pytest.mark.slow

SETTINGS = """
method: accuquant
preset: quick
weights: 4
activations: 8
steps: 4
seed: 3
calibration_samples: 4
options: {batch: 2, window: 2, block_iterations: 1, iterations: 40}
"""
"""Forty iterations of 0.1 s. The state is kept after the twentieth, and weights are rounded for good after the 32nd."""

SEEDS = [7, 8]


def environment() -> dict[str, str]:
    """One thread, as in this process: sums of floats depend on how they are divided."""
    return os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}


@contextmanager
def ctrl_c_works() -> Iterator[None]:
    """A process inherits that SIGINT is ignored, as it is for jobs in the background of a script."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def started(folder: Path, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "stepquant", *map(str, arguments)]
    with ctrl_c_works():
        return subprocess.Popen(
            command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )


def command(folder: Path, *arguments: object) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of `stepquant ARGUMENTS`."""
    process = started(folder, *arguments)
    out, err = process.communicate(timeout=200)
    return process.returncode, out, err


def contents(checkpoint: Path) -> dict[str, Any]:
    """Every file's bytes; of the manifest all but the date."""
    found: dict[str, Any] = {
        str(path.relative_to(checkpoint)): path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()
    }
    manifest = json.loads(found["stepquant.json"])
    assert manifest.pop("created")
    found["stepquant.json"] = manifest
    return found


@dataclass(frozen=True)
class ByApi:
    """The run through the API: its checkpoint, and what was sampled from it before it was saved."""

    checkpoint: Path
    images: Tensor
    figures: tuple[dict[str, Any], ...]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds `model` (a diffusers folder) and `run.yaml`."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("command-line")
    unet = tiny.tiny_unet()
    unet.register_to_config(sample_size=16)  # SSIM has no place for its window in 8 x 8 pixels
    DDIMPipeline(unet, DDIMScheduler()).save_pretrained(folder / "model")
    (folder / "run.yaml").write_text(SETTINGS)
    return folder


@pytest.fixture(scope="module")
def by_api(folder: Path) -> ByApi:
    resolved = resolve(load_config(folder / "run.yaml"), flags={"model": "model"})
    pipe = open_model(str(folder / "model"))
    run = Run(seed=resolved.seed)
    quantized = quantize(pipe, resolved.recipe, steps=resolved.steps, run=run, base_model=resolved.model)
    images = sample(quantized.pipe, seeds=SEEDS, steps=4)
    quantized.save(folder / "by-api")
    return ByApi(folder / "by-api", images, quantized.figures)


@dataclass(frozen=True)
class Interrupted:
    """What a run of `quantize` left when Ctrl-C was pressed in its longest stage."""

    status: int
    output: str
    complaint: str
    left: tuple[str, ...]
    kept: tuple[str, ...]
    stages: list[dict[str, Any]]


@pytest.fixture(scope="module")
def interrupted(folder: Path) -> Interrupted:
    there = set(folder.iterdir())
    process = started(folder, "quantize", "model", "-o", "out", "--config", "run.yaml")
    deadline = time.monotonic() + 120
    while not list(folder.glob("out.work/partial-*-windows.safetensors")):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"The run never kept a state: {process.communicate()[1]}")
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    work = folder / "out.work"
    return Interrupted(
        process.returncode,
        out,
        err,
        tuple(sorted(path.name for path in set(folder.iterdir()) - there)),
        tuple(sorted(path.name for path in work.iterdir())) if work.exists() else (),
        json.loads((work / "stages.json").read_text()),
    )


@dataclass(frozen=True)
class Resumed:
    """The same command with --resume and --json, and the checkpoint it left."""

    status: int
    output: str
    complaint: str
    checkpoint: Path


@pytest.fixture(scope="module")
def resumed(folder: Path, interrupted: Interrupted) -> Resumed:
    arguments = ("quantize", "model", "-o", "out", "--config", "run.yaml", "--resume", "--json")
    return Resumed(*command(folder, *arguments), folder / "out")


def test_ctrl_c_leaves_a_run_to_resume(interrupted: Interrupted) -> None:
    assert interrupted.status == 130
    assert interrupted.output == ""
    assert "Interrupted" in interrupted.complaint
    assert "out.work" in interrupted.complaint
    assert "--resume" in interrupted.complaint
    assert "Traceback" not in interrupted.complaint
    assert interrupted.left == ("out.work",)
    assert {"run.yaml", "run.json", "stages.json", "trajectories", "model-07.json"} <= set(interrupted.kept)
    assert [name for name in interrupted.kept if "partial" in name] == ["partial-08-windows.safetensors"]
    assert [stage["stage"] for stage in interrupted.stages][-1] == "CorrectBiases"


def test_resume_ends_with_the_bytes_of_an_undisturbed_run(
    interrupted: Interrupted, resumed: Resumed, by_api: ByApi
) -> None:
    assert resumed.status == 0, resumed.complaint
    found, expected = contents(resumed.checkpoint), contents(by_api.checkpoint)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    told = json.loads(resumed.output)
    assert told["bytes"] == sum(path.stat().st_size for path in resumed.checkpoint.rglob("*") if path.is_file())
    # Stages that had finished were not repeated, and the one that had not learnt the same from where it was killed.
    assert told["figures"][:-1] == interrupted.stages
    assert told["figures"][-1]["losses"] == by_api.figures[-1]["losses"]
    assert not resumed.checkpoint.with_name("out.work").exists()
    assert "seed: 3" in resumed.checkpoint.with_name("out.run.yaml").read_text()


def test_a_new_process_samples_the_same_bits(folder: Path, by_api: ByApi) -> None:
    code = (
        "import stepquant\n"
        "from safetensors.torch import save_file\n"
        f"images = stepquant.sample(stepquant.load('by-api', engine='simulated'), seeds={SEEDS}, steps=4)\n"
        "save_file({'images': images}, 'images.safetensors')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    images = load_file(folder / "images.safetensors")["images"]
    assert images.dtype == by_api.images.dtype == torch.float32
    assert images.shape == (2, 1, 16, 16)
    assert torch.equal(images.view(torch.int32), by_api.images.view(torch.int32))
    assert float(images.std()) > 0.05


def in_process(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: object) -> int | str | None:
    """Like `command`, without the five seconds that a new process takes."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("stepquant.cli.work.tune_allocator", lambda: True)
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return stop.value.code


def test_sampling_twice_gives_the_same_files(
    folder: Path, resumed: Resumed, by_api: ByApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = ("--engine", "simulated")
    status, out, err = command(folder, "sample", "out", "-o", "one", "--seeds", "7-8", *exact)
    assert (status, err) == (0, "")
    assert "2 images of 4 steps" in out
    # The same batch: convolutions of another batch size add in another order, and a last bit may flip a level.
    assert in_process(monkeypatch, folder, "sample", "out", "-o", "two", "--seeds", "7,8", *exact) == 0
    for image, seed in zip(by_api.images, SEEDS, strict=True):
        save_png(image, folder / "three", seed=seed)
    files = {name: sorted((folder / name).iterdir()) for name in ("one", "two", "three")}
    assert [path.name for path in files["one"]] == ["000007.png", "000008.png"]
    first = [path.read_bytes() for path in files["one"]]
    assert first[0] != first[1]
    assert [path.read_bytes() for path in files["two"]] == first
    assert [path.read_bytes() for path in files["three"]] == first


def test_inspect_for_machines(
    folder: Path, resumed: Resumed, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert in_process(monkeypatch, folder, "inspect", "out", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["schema"], told["base_model"], told["schedule"]["steps"]) == (1, "model", 4)
    assert len(told["layers"]) > 20
    for layer in told["layers"]:
        assert {"name", "bits", "bytes", "engine", "refusals"} <= set(layer)
        assert layer["engine"] == ("openvino" if has_vnni() and layer["kind"] != "matmul" else "simulated")
        assert layer["bytes"] > 0
    bits = {layer["name"]: layer["bits"] for layer in told["layers"]}
    assert (bits["conv_in"]["weight"], bits["mid_block.resnets.0.conv1"]["weight"]) == (8, 4)
    assert told["bytes"] == sum(path.stat().st_size for path in resumed.checkpoint.rglob("*") if path.is_file())


def test_evaluate_then_report(folder: Path, resumed: Resumed, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = command(folder, "evaluate", "out", "--seeds", "1000-1003", "--json")
    assert (status, err) == (0, "")
    results = json.loads(out)
    assert json.loads((folder / "out.evaluation.json").read_text()) == results
    assert (results["schema"], results["candidate"], results["against"]) == (1, "out", "model")
    assert (results["n"], results["seeds"], results["steps"]) == (4, [1000, 1003], 4)
    metrics = results["metrics"]
    # No shipped features fit 16 x 16 pixels: there are no Frechet distances, and a note says so.
    assert set(metrics) >= {"psnr", "ssim", "mae", "drift_final"}
    assert not any("frechet" in name for name in metrics)
    assert all(isinstance(metric["value"], float) for metric in metrics.values())
    assert 10 < metrics["psnr"]["value"] < 60
    assert 0 < metrics["drift_final"]["value"] < 1
    assert results["features"] is None
    assert any("No Frechet distances" in note for note in results["notes"])
    assert len(results["drift"]["timesteps"]) == len(results["drift"]["accumulated"]) == 4
    assert results["command"] == "stepquant evaluate out --seeds 1000-1003 --json"
    assert {"stepquant", "torch", "diffusers"} <= set(results["versions"])

    status, out, err = command(folder, "report", "out", "-o", "report.html")
    assert (status, err) == (0, "")
    assert "report.html" in out
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") >= 3
    assert not re.search(r"(src|href)=[\"']?(https?:|//|file:)", page)
    assert results["command"] in page
    assert f"{metrics['psnr']['value']:.4g}" in page
    assert json.loads((folder / "out.evaluation.json").read_text()) == results, "a report repeats no evaluation"
    assert "Speed was not measured" in page

    status, out, err = command(folder, "report", "out", "-o", "report.html", "--speed", "--overwrite")
    assert (status, err) == (0, "")
    speed = json.loads((folder / "out.speed.json").read_text())["engines"]
    assert speed["simulated"]["ratio"] > 0
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert f"{speed['simulated']['ratio']:.2f} times" in page


def test_failures_and_wrong_usage(folder: Path) -> None:
    """Status 2 for what was typed and 1 for what went wrong, which is a traceback only if asked for."""
    status, out, err = command(folder, "quantise", "model", "-o", "x")
    assert (status, out) == (2, "")
    assert "No such command 'quantise'" in err
    assert "Traceback" not in err
    status, out, err = command(folder, "methods", "acuquant")
    assert (status, out) == (2, "")
    assert err.startswith("Error: There is no method 'acuquant'. Did you mean 'accuquant'?")
    assert "Traceback" not in err
    status, out, err = command(folder, "methods", "acuquant", "--debug")
    assert (status, out) == (2, "")
    assert "Traceback (most recent call last)" in err
    assert "SpecError: There is no method 'acuquant'" in err
    status, out, err = command(folder, "sample", "nothing", "-o", "y")
    assert (status, out) == (1, "")
    assert err.startswith("Error: There is no model 'nothing'")
