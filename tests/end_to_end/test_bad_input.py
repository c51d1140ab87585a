"""What a user gets wrong, through the whole program: the exit status, and the words that say what to do.

Only what no other test shows. Elsewhere are
- an unknown method, the settings of the command line and `check`: tests/unit/test_cli.py
- typos and values in run.yaml, with path and nearest name: tests/unit/test_config.py
- each kind of damage to a checkpoint: tests/hostile/test_checkpoint_damage.py
- which guidance can be replayed: tests/unit/calibrate/test_trajectory.py
- interruptions in every stage: tests/contract/test_methods.py, and by a real signal: test_command_line.py
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from safetensors.torch import load_file, save_file

import tiny
from stepquant.api import load, open_model, quantize, sample
from stepquant.calibrate.stages import LayerRule
from stepquant.cli.main import main
from stepquant.errors import ModelError, SpecError, UnsupportedPipeline
from stepquant.methods import METHODS
from stepquant.model.pipeline import DenoiserPipeline

STEPS = 4
QUICK = ("--method", "rtn", "--steps", STEPS, "--calibration-samples", 2, "--set", "batch=2")
TENSORS = "unet/stepquant.safetensors"

Stepquant = Callable[..., tuple[int, str]]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("stepquant.cli.work.tune_allocator", lambda: True)


@pytest.fixture
def stepquant(capsys: pytest.CaptureFixture[str]) -> Stepquant:
    """One command in this process: exit status, and what it said on standard error."""

    def once(*arguments: object) -> tuple[int, str]:
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        complaint = capsys.readouterr().err
        assert "Traceback" not in complaint
        assert isinstance(stop.value.code, int)
        return stop.value.code, complaint

    return once


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds `model` and `checkpoint`."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("models")
    pipe = DDIMPipeline(tiny.tiny_unet(), DDIMScheduler())
    pipe.save_pretrained(folder / "model")
    recipe = METHODS["rtn"](samples=2, batch=2)
    quantize(pipe, recipe, steps=STEPS, base_model=str(folder / "model")).save(folder / "checkpoint")
    return folder


@pytest.fixture
def model(models: Path) -> Path:
    return models / "model"


@pytest.fixture
def checkpoint(models: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(models / "checkpoint", tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", ["quantize", "sample"])
def test_an_unknown_model(stepquant: Stepquant, tmp_path: Path, command: str) -> None:
    status, complaint = stepquant(command, "digits-unte", "-o", "out")
    assert status == 1
    assert "There is no model 'digits-unte'" in complaint
    assert "a diffusers folder or a hub id" in complaint
    assert "Did you mean 'digits-unet'?" in complaint
    assert contents(tmp_path) == {}


def test_folders_that_are_no_model(stepquant: Stepquant, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    status, complaint = stepquant("quantize", "photos", "-o", "out")
    assert status == 1
    assert "photos exists but is no diffusers pipeline: it has no model_index.json." in complaint
    status, complaint = stepquant("quantize", checkpoint, "-o", "out")
    assert status == 1
    assert "is a stepquant checkpoint, not a full-precision model" in complaint
    status, complaint = stepquant("evaluate", "photos")
    assert status == 1
    assert "photos is not a stepquant checkpoint" in complaint
    assert not (tmp_path / "out.work").exists()


def test_a_hub_id_that_the_hub_does_not_know(stepquant: Stepquant, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: str, **options: Any) -> None:
        raise OSError(f"{model} is not a valid model identifier\nand five lines of advice")

    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", refuse)
    status, complaint = stepquant("quantize", "someone/nothing", "-o", "out")
    assert status == 1
    assert "'someone/nothing' is no folder here and could not be had from the hub" in complaint
    assert "Check the spelling and the connection" in complaint


def test_a_typo_in_the_file_of_settings(stepquant: Stepquant, model: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"model: {model}\nrules:\n- {{pattern: '*', wieghts: 8}}\n")
    status, complaint = stepquant("quantize", "--config", "run.yaml", "-o", "out")
    assert status == 2
    assert complaint == "Error: run.yaml: rules.0.wieghts: there is no such key. Did you mean 'weights'?\n"
    assert set(contents(tmp_path)) == {"run.yaml"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--weights", 9], "command line: weights: expected 2 to 8 bits, or 16 or 32 for floating point, found 9"),
        (["--activations", 1], "command line: activations: expected 2 to 8 bits"),
        (["--set", "softmax_bits=9"], "softmax_bits must be from 2 to 8, or null, found 9"),
        (["--set", "rules=[{pattern: '*', weights: 0}]"], "rules.0.weights: expected 2 to 8 bits"),
    ],
)
def test_bits_out_of_range(
    stepquant: Stepquant, model: Path, tmp_path: Path, options: list[object], message: str
) -> None:
    status, complaint = stepquant("quantize", model, "-o", "out", *options)
    assert status == 2
    assert message in complaint
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("rules=[{pattern: convin, weights: 8}]", r"The pattern 'convin' matches none of the 59 quantizable layers."),
        ("group_size=7", "Layer conv_in: group_size 7 does not divide the 9 weights of an output channel"),
    ],
)
def test_settings_that_fit_no_layer(
    stepquant: Stepquant, model: Path, tmp_path: Path, setting: str, message: str
) -> None:
    for options in (["--dry-run"], []):
        status, complaint = stepquant("quantize", model, "-o", "out", *QUICK, "--set", setting, *options)
        assert status == 2
        assert message in complaint
        assert not (tmp_path / "out").exists()


def test_bits_and_patterns_through_the_api(model: Path) -> None:
    with pytest.raises(SpecError, match="2 to 8"):
        METHODS["accuquant"](weights=9)
    recipe = METHODS["rtn"](samples=2, rules=(LayerRule("convin", 8, 8),))
    with pytest.raises(SpecError, match=r"'convin' matches none .* Did you mean 'conv_in'\?"):
        quantize(open_model(str(model)), recipe, steps=STEPS)


def test_steps_that_differ_from_the_checkpoints_schedule(
    stepquant: Stepquant, checkpoint: Path, tmp_path: Path
) -> None:
    status, complaint = stepquant("sample", checkpoint, "-o", "images", "--seeds", "0", "--steps", 5)
    assert status == 2
    assert "calibrated for 4 steps of DDIMScheduler" in complaint
    assert "set to [800, 600, 400, 200, 0] (5 values)" in complaint
    assert "num_inference_steps=4" in complaint
    assert 'schedule="nearest"' in complaint
    assert not (tmp_path / "images").exists()
    options = ("--seeds", "0", "--steps", 5, "--schedule", "nearest", "--engine", "simulated")
    status, _ = stepquant("sample", checkpoint, "-o", "images", *options)
    assert status == 0
    assert list(contents(tmp_path / "images")) == ["000000.png"]
    with pytest.raises(SpecError, match="calibrated for 4 steps"):
        sample(load(checkpoint), seeds=[0], steps=5)
    nearest = load(checkpoint, engine="simulated", schedule="nearest")
    assert sample(nearest, seeds=[0], steps=5).shape == (1, 1, 8, 8)


@pytest.mark.parametrize("command", [("sample", "-o", "images"), ("evaluate",), ("inspect",), ("report",)])
def test_a_truncated_checkpoint(stepquant: Stepquant, checkpoint: Path, command: tuple[str, ...]) -> None:
    data = (checkpoint / TENSORS).read_bytes()
    (checkpoint / TENSORS).write_bytes(data[: len(data) // 2])
    status, complaint = stepquant(command[0], checkpoint, *command[1:])
    assert status == 1
    assert "is truncated" in complaint
    assert TENSORS in complaint


def test_an_edited_checkpoint(stepquant: Stepquant, checkpoint: Path) -> None:
    tensors = load_file(checkpoint / TENSORS)
    tensors["conv_in.bias"][0] += 1
    save_file(tensors, checkpoint / TENSORS)
    status, complaint = stepquant("sample", checkpoint, "-o", "images", "--seeds", "0")
    assert status == 1
    assert "conv_in.bias: the checksum differs" in complaint


def test_an_edited_scheduler(stepquant: Stepquant, checkpoint: Path) -> None:
    """It would sample without complaint, and other images."""
    path = checkpoint / "scheduler" / "scheduler_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"beta_end": 0.05, "of_tomorrow": 1}))
    status, complaint = stepquant("sample", checkpoint, "-o", "images", "--seeds", "0")
    assert status == 1
    assert f"is not the one of the calibration: beta_end is 0.05 instead of {settings['beta_end']}." in complaint
    status, complaint = stepquant("compensate", checkpoint, "-o", "corrected")
    assert status == 1
    assert "is not the one of the calibration" in complaint
    assert stepquant("sample", checkpoint, "-o", "images", "--seeds", "0", "--schedule", "nearest")[0] == 0


def test_an_output_that_exists_stays_as_it_is(
    stepquant: Stepquant, model: Path, checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "000000.png").write_text("mine")
    (tmp_path / "report.html").write_text("mine")
    before = contents(tmp_path)
    for command in (
        ("quantize", model, "-o", checkpoint, *QUICK),
        ("quantize", model, "-o", checkpoint, "--resume", *QUICK),
        ("quantize", model, "-o", "images", *QUICK),
        ("sample", checkpoint, "-o", "images", "--seeds", "0"),
        ("report", checkpoint, "-o", "report.html"),
    ):
        status, complaint = stepquant(*command)
        assert status == 2
        assert "--overwrite" in complaint
        assert contents(tmp_path) == before
    assert stepquant("quantize", model, "-o", checkpoint, "--overwrite", *QUICK, "--weights", 8)[0] == 0
    assert contents(checkpoint)[TENSORS] != before[f"checkpoint/{TENSORS}"]


def test_nan_in_the_weights(stepquant: Stepquant, model: Path, tmp_path: Path) -> None:
    pipe = DDIMPipeline.from_pretrained(model, low_cpu_mem_usage=False)
    pipe.unet.mid_block.resnets[0].conv1.weight.data[1, 2, 0, 0] = torch.nan
    pipe.save_pretrained(tmp_path / "broken")
    status, complaint = stepquant("quantize", "broken", "-o", "out", *QUICK)
    assert status == 1
    assert "mid_block.resnets.0.conv1.weight of UNet2DModel holds 1 of 2304 values that are NaN" in complaint
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]
    with pytest.raises(ModelError, match=r"mid_block\.resnets\.0\.conv1\.weight"):
        quantize(pipe, METHODS["rtn"](samples=2), steps=STEPS)


class Saturated(DenoiserPipeline):
    """Guides with a nonlinear function of the prediction, which no known form explains."""

    def __call__(
        self,
        batch_size: int = 1,
        *,
        generator: list[torch.Generator],
        num_inference_steps: int,
        output_type: str = "np",
    ) -> Any:
        self.scheduler.set_timesteps(num_inference_steps)
        state = torch.cat([torch.randn(1, *self.sample_shape, generator=one) for one in generator])
        for timestep in self.scheduler.timesteps:
            prediction = self.denoiser(state, timestep)
            state = self.scheduler.step(torch.tanh(2 * prediction), timestep, state)[0]
        return SimpleNamespace(images=state.movedim(1, -1).numpy())


@pytest.mark.parametrize("method", ["rtn", "accuquant"])
def test_guidance_that_cannot_be_reproduced(method: str) -> None:
    pipe = Saturated(tiny.TinyNet(), DDIMScheduler(), (2, 4, 4))
    with pytest.raises(
        UnsupportedPipeline, match=r"cannot be replayed: .*differs by [\d.e+-]+ at step \d.*Calibrate without"
    ):
        quantize(pipe, METHODS[method](samples=2, batch=2), steps=STEPS)
    assert sample(pipe, seeds=[0], steps=STEPS).isfinite().all()


def test_guidance_that_cannot_be_reproduced_on_the_command_line(
    stepquant: Stepquant, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No pipeline of diffusers is known to do so, so a strange one takes the place of the folder's."""
    strange = Saturated(tiny.TinyNet(), DDIMScheduler(), (2, 4, 4))
    monkeypatch.setattr("stepquant.api.open_model", lambda *_, **__: strange)
    status, complaint = stepquant("quantize", model, "-o", "out", *QUICK)
    assert status == 1
    assert "cannot be replayed" in complaint
    assert "Calibrate without" in complaint
    assert not (tmp_path / "out").exists()
