"""A scheduler by name: which ones a model takes, and that checkpoint and full-precision model sample alike with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import stepquant
import tiny
import tiny_pipelines
from stepquant.api import open_base
from stepquant.calibrate.trajectory import record, seal
from stepquant.calibrate.trajectory_files import load_trajectories, save_trajectories
from stepquant.cli import main
from stepquant.cli.doctor import settings_of
from stepquant.config import resolve
from stepquant.errors import ModelError, SpecError
from stepquant.methods import METHODS
from stepquant.model.beta_schedule import beta_timesteps
from stepquant.model.correction import CorrectedScheduler, StepCorrection
from stepquant.model.pipeline import DenoiserPipeline
from stepquant.model.schedule import ScheduleFingerprint, config_of, walk_timesteps
from stepquant.model.scheduler_choice import compatible_schedulers, take_scheduler_, use_scheduler_
from stepquant.run import Run

Cli = Callable[..., tuple[int, str]]


@pytest.fixture
def model(tmp_path: Path) -> str:
    unet = tiny_pipelines.plain_unet(num_class_embeds=4)
    pipe = diffusers.ConsistencyModelPipeline(unet, diffusers.DDIMScheduler(timestep_spacing="trailing"))
    pipe.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    def run(*words: Any) -> tuple[int, str]:
        with pytest.raises(SystemExit) as done:
            main([str(word) for word in words])
        return int(done.value.code or 0), " ".join(capsys.readouterr().err.split())

    return run


def timesteps_of(scheduler: Any, steps: int) -> list[float]:
    scheduler.set_timesteps(steps)
    return [float(timestep) for timestep in scheduler.timesteps]


def test_names_that_people_use() -> None:
    for name, kind in {
        "euler": "EulerDiscreteScheduler",
        "Euler-A": "EulerAncestralDiscreteScheduler",
        "dpm++": "DPMSolverMultistepScheduler",
        "DPMSolverMultistepScheduler": "DPMSolverMultistepScheduler",
        "unipc": "UniPCMultistepScheduler",
        "lcm": "LCMScheduler",
        "ddim": "DDIMScheduler",
    }.items():
        pipe = DenoiserPipeline(tiny.TinyNet(), diffusers.DDIMScheduler(beta_end=0.03), (2, 4, 4))
        use_scheduler_(pipe, name)
        assert type(pipe.scheduler).__name__ == kind
        assert pipe.scheduler.config.beta_end == 0.03  # the noise schedule is the model's


def test_schedulers_of_another_kind_of_model_are_refused_with_those_that_fit() -> None:
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert "DDIMScheduler" not in compatible_schedulers(flow)
    pipe = DenoiserPipeline(tiny.TinyNet(), flow, (2, 4, 4))
    with pytest.raises(SpecError, match=r"no scheduler 'ddim' for this DenoiserPipeline.*FlowMatchHeunDiscrete"):
        use_scheduler_(pipe, "ddim")
    use_scheduler_(pipe, "flow-match-heun")
    assert (type(pipe.scheduler).__name__, pipe.scheduler.config.shift) == ("FlowMatchHeunDiscreteScheduler", 3.0)
    found = compatible_schedulers(diffusers.DDIMScheduler())
    assert not [name for name in found if name.startswith(("FlowMatch", "EDM", "CogVideoX", "DDIMInverse"))]
    flows = compatible_schedulers(diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction"))
    assert "DPMSolverMultistepScheduler" in flows
    assert "EulerDiscreteScheduler" not in flows  # knows no flows by this name
    pipe.scheduler = diffusers.DDIMScheduler()
    with pytest.raises(SpecError, match=r"Did you mean 'dpm\+\+'"):
        use_scheduler_(pipe, "dpm+")


def test_settings_are_checked() -> None:
    pipe = DenoiserPipeline(tiny.TinyNet(), diffusers.DDIMScheduler(), (2, 4, 4))
    own = pipe.scheduler
    with pytest.raises(SpecError, match=r"has no setting 'use_karas_sigmas'. Did you mean 'use_karras_sigmas'"):
        use_scheduler_(pipe, "euler", {"use_karas_sigmas": True})
    with pytest.raises(SpecError, match=r"EulerDiscreteScheduler does not take beta_schedule='round'"):
        use_scheduler_(pipe, "euler", {"beta_schedule": "round"})
    with pytest.raises(SpecError, match="none named 'gamma', only beta"):
        use_scheduler_(pipe, "euler", {"timesteps": "gamma"})
    with pytest.raises(SpecError, match="DDIMScheduler takes no custom timesteps"):
        use_scheduler_(pipe, None, {"timesteps": "beta"})
    assert pipe.scheduler is own  # as it was
    use_scheduler_(pipe, None, {"timestep_spacing": "trailing"})
    assert (type(pipe.scheduler), pipe.scheduler.config.timestep_spacing) == (diffusers.DDIMScheduler, "trailing")


def test_pipelines_that_would_not_keep_it_or_have_a_correction_for_theirs_are_refused() -> None:
    pipe, _ = tiny.tiny_pipe()
    with pytest.raises(SpecError, match="DDIMPipeline samples with DDIMScheduler only"):
        use_scheduler_(pipe, "euler")
    unscaled = diffusers.DDPMPipeline(pipe.unet, diffusers.DDPMScheduler())
    with pytest.raises(SpecError, match="DDPMPipeline does not scale its samples as EulerDiscreteScheduler needs it"):
        use_scheduler_(unscaled, "euler")
    use_scheduler_(unscaled, "dpm++")
    transformer = tiny_pipelines.FAMILIES["dit"].build()
    with pytest.raises(SpecError, match="DiTPipeline does not scale its samples"):  # of the noise that it starts from
        use_scheduler_(transformer, "euler")
    corrected = DenoiserPipeline(tiny.TinyNet(), diffusers.DDIMScheduler(), (2, 4, 4))
    scheduler = CorrectedScheduler(corrected.scheduler, StepCorrection.identity(torch.tensor([500.0, 0.0]), 2))
    corrected.scheduler = scheduler
    with pytest.raises(SpecError, match="a correction that was fitted with its DDIMScheduler"):
        use_scheduler_(corrected, "euler")
    take_scheduler_(corrected, diffusers.EulerDiscreteScheduler())
    assert corrected.scheduler is scheduler


@pytest.mark.parametrize("kind", [diffusers.DPMSolverMultistepScheduler, diffusers.HeunDiscreteScheduler])
def test_timesteps_from_outside_are_walked_for_their_number_of_steps_only(kind: Any) -> None:
    pipe = DenoiserPipeline(tiny.TinyNet(), kind(), (2, 4, 4))
    use_scheduler_(pipe, None, {"timesteps": "beta"})
    pipe.scheduler.set_timesteps(6)
    fingerprint = ScheduleFingerprint.of(pipe.scheduler, steps=6, guidance="none")
    fresh = kind()
    own = timesteps_of(kind(), 5)
    walk_timesteps(fresh, fingerprint)
    assert tuple(timesteps_of(fresh, 6)) == fingerprint.timesteps != tuple(timesteps_of(kind(), 6))
    assert timesteps_of(fresh, 5) == own
    if kind is not diffusers.HeunDiscreteScheduler:
        fresh.set_timesteps(timesteps=[900, 10])
        assert fresh.timesteps.tolist() == [900, 10]


def test_timesteps_that_the_scheduler_chooses_itself_or_cannot_be_given_leave_it_alone() -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler()
    scheduler.set_timesteps(6)
    walk_timesteps(scheduler, ScheduleFingerprint.of(scheduler, steps=6, guidance="none"))
    other = diffusers.DDIMScheduler()  # takes none
    walk_timesteps(other, ScheduleFingerprint("DDIMScheduler", {}, 3, (900.0, 500.0, 1.0), "none"))
    karras = diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True)  # refuses them
    walk_timesteps(karras, ScheduleFingerprint("DPMSolverMultistepScheduler", {}, 3, (900.0, 500.0, 1.0), "none"))
    assert not any("set_timesteps" in vars(each) for each in (scheduler, other, karras))


def test_recordings_on_timesteps_from_outside_come_back_from_disk(tmp_path: Path) -> None:
    """They could not be: a fresh scheduler chose its own timesteps, and did not repeat the steps."""
    pipe = DenoiserPipeline(tiny.TinyNet(), diffusers.DPMSolverMultistepScheduler(), (2, 4, 4))
    use_scheduler_(pipe, None, {"timesteps": "beta"})
    (recorded,) = record(pipe, pipe.denoiser, seeds=[1], steps=4, batch_size=1, run=Run())
    save_trajectories(tmp_path / "trajectories", [seal(recorded)])
    (loaded,) = load_trajectories(tmp_path / "trajectories", pipe.scheduler)
    assert loaded.fingerprint.timesteps == tuple(map(float, beta_timesteps(4)))
    assert torch.equal(loaded.steps[-1].next_sample, recorded.steps[-1].next_sample)


QUANTIZE = ("--method", "rtn", "--steps", 4, "--calibration-samples", 2, "-q")


def test_quantize_sample_and_evaluate_with_another_scheduler(model: str, cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "w8a8"
    assert cli("quantize", model, "-o", out, "--weights", 8, *QUANTIZE, "--scheduler", "dpm++,timesteps=beta")[0] == 0
    kept = json.loads((out / "stepquant.json").read_text())["schedule"]
    assert kept["scheduler"] == "DPMSolverMultistepScheduler"
    assert kept["timesteps"] == list(map(float, beta_timesteps(4)))
    settings = (tmp_path / "w8a8.run.yaml").read_text()
    assert "name: dpm++" in settings

    pipe = stepquant.load(out, engine="simulated")  # nobody says again what the timesteps are
    images = stepquant.sample(pipe, seeds=[1000, 1001], steps=4)
    base = open_base(model, out)
    assert timesteps_of(base.scheduler, 4) == list(map(float, beta_timesteps(4)))
    error_of_weights = float((images - stepquant.sample(base, seeds=[1000, 1001], steps=4)).abs().mean())
    other = stepquant.sample(stepquant.open_model(model), seeds=[1000, 1001], steps=4)
    assert 0 < 3 * error_of_weights < float((images - other).abs().mean())
    with pytest.raises(SpecError, match="calibrated for 4 steps"):
        stepquant.sample(pipe, seeds=[7], steps=5)

    status, error = cli("evaluate", out, "--seeds", "1000-1001", "--features", "none", "-q")
    assert (status, error) == (0, "")
    found = json.loads((tmp_path / "w8a8.evaluation.json").read_text())
    assert found["scheduler"] == "DPMSolverMultistepScheduler"
    assert found["metrics"]["mae"]["value"] == pytest.approx(error_of_weights, rel=1e-3)
    assert cli("report", out, "-o", tmp_path / "report.html", "-q")[0] == 0
    patch = tmp_path / "mended.yaml"
    assert cli("doctor", out, "--seeds", "0-1", "-q", "--patch", patch)[0] == 0
    assert cli("compensate", out, "-o", tmp_path / "corrected", "--calibration-samples", 4, "-q")[0] == 0
    assert cli("evaluate", tmp_path / "corrected", "--seeds", "1000-1001", "--features", "none", "-q")[0] == 0

    (tmp_path / "w8a8.run.yaml").unlink()  # what the checkpoint itself says of its scheduler
    (chosen := settings_of(str(out))["scheduler"]).pop("name")
    again = resolve({"model": model, "scheduler": {"name": "dpm++", **chosen}}).scheduler
    rebuilt = stepquant.open_model(model, scheduler=again).scheduler
    assert config_of(rebuilt) == config_of(stepquant.load(out).scheduler)
    assert timesteps_of(rebuilt, 4) == kept["timesteps"]

    for words, message in [
        (("sample", out, "-o", tmp_path / "images", "--scheduler", "euler"), "is a checkpoint, and samples with the"),
        (("evaluate", out, "--against", out, "--scheduler", "euler"), "--scheduler is for models, and neither"),
        (("quantize", model, "-o", tmp_path / "b", "--scheduler", "eulr"), "Did you mean 'euler'?"),
        (("quantize", model, "-o", tmp_path / "b", "--scheduler", "euler,karras"), "expected NAME or NAME,KEY=VALUE"),
    ]:
        status, error = cli(*words)
        assert status == 2
        assert message in error
    assert not (tmp_path / "b").exists()


def test_models_are_sampled_and_compared_with_another_scheduler(model: str, cli: Cli, tmp_path: Path) -> None:
    status, error = cli("evaluate", "digits-unte", "--scheduler", "euler")
    assert status == 1
    assert "Did you mean 'digits-unet'" in error
    common = ("--seeds", "1-2", "--steps", 4, "-q")
    assert cli("sample", model, "-o", tmp_path / "own", *common)[0] == 0
    assert cli("sample", model, "-o", tmp_path / "euler", "--scheduler", "euler", *common)[0] == 0
    same = (tmp_path / "own" / "000001.png").read_bytes() == (tmp_path / "euler" / "000001.png").read_bytes()
    assert not same
    target = ("--json", tmp_path / "found.json")
    plain = ("evaluate", model, "--features", "none", *common, *target)
    assert cli(*plain, "--against", tmp_path / "euler", "--scheduler", "euler")[0] == 0
    assert json.loads((tmp_path / "found.json").read_text())["metrics"]["mae"]["value"] < 0.01  # rounding of the files
    assert cli(*plain, "--against", tmp_path / "euler")[0] == 0
    assert json.loads((tmp_path / "found.json").read_text())["metrics"]["mae"]["value"] > 0.01


def test_run_yaml_and_the_command_line(model: str, cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {model}\nscheduler: {{name: euler, use_karras_sigmas: true}}\n")
    target = tmp_path / "plan.json"

    def scheduler(*words: Any) -> Any:
        assert cli("check", file, *words, "--json", target)[0] == 0
        return json.loads(target.read_text())["settings"].get("scheduler")

    assert scheduler() == {"name": "euler", "use_karras_sigmas": True}
    assert scheduler("--set", "scheduler.use_karras_sigmas=false") == {"name": "euler", "use_karras_sigmas": False}
    assert scheduler("--set", "scheduler=ddim") == {"name": "ddim"}
    file.write_text(f"model: {model}\nscheduler: timestep_spacing=leading\n")
    assert scheduler() == {"timestep_spacing": "leading"}
    file.write_text(f"model: {model}\nscheduler: 3\n")
    status, error = cli("check", file)
    assert status == 2
    assert f"{file}: scheduler: expected a name such as euler" in error
    plan = ("quantize", model, "-o", tmp_path / "b", "--dry-run", "--json", target, "--set", "scheduler.timesteps=beta")
    assert cli(*plan, "--scheduler", "dpm++", "--method", "rtn", "--steps", 4)[0] == 0
    assert json.loads(target.read_text())["settings"]["scheduler"] == {"timesteps": "beta", "name": "dpm++"}


def test_python_takes_the_same(model: str) -> None:
    pipe = stepquant.open_model(model, scheduler={"name": "euler", "use_karras_sigmas": True})
    assert pipe.scheduler.config.use_karras_sigmas is True
    with pytest.raises(ModelError):
        stepquant.open_model("digits-unte", scheduler="euler")
    quantized = stepquant.quantize(
        stepquant.open_model(model, scheduler="euler"), METHODS["rtn"](weights=8, activations=8, samples=2), steps=2
    )
    assert quantized.schedule.scheduler == "EulerDiscreteScheduler"
