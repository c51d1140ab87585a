"""`stepquant doctor` from a broken checkpoint to settings that `stepquant check` accepts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import DDIMPipeline, DDIMScheduler

import tiny
from stepquant.api import quantize
from stepquant.calibrate.allocation import allocated
from stepquant.calibrate.stages import LayerRule
from stepquant.cli.doctor import patched, settings_of
from stepquant.cli.main import main
from stepquant.cli.outputs import settings_path
from stepquant.config import dump, load_config, resolve
from stepquant.doctor import Diagnosis, Finding, Thresholds
from stepquant.errors import SpecError
from stepquant.methods import METHODS
from stepquant.run import Run

OPTIONS = ("--seeds", "7-8", "--batch-size", "2", "--device", "cpu")
SICK = "mid_block.resnets.0.conv1"
HEALTHY = Diagnosis((), (), (), None, None, None, (), (7, 8), 3, Thresholds(), ())

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs one command as a user does; exit status, standard output and standard error."""

    def once(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        code = stopped.value.code
        return (code if isinstance(code, int) else 0), out, err

    return once


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model folder, and a W8A8 checkpoint of it with one activation scale a hundredth of what it should be."""
    folder = tmp_path_factory.mktemp("doctor")
    model, checkpoint = folder / "model", folder / "sick"
    pipe = DDIMPipeline(tiny.tiny_unet(), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(model)
    settings = {"model": str(model), "method": "rtn", "weights": 8, "activations": 8, "steps": 3}
    settings |= {"calibration_samples": 2, "options": {"batch": 2}, "device": "cpu"}
    resolved = resolve(settings)
    quantized = quantize(pipe, resolved.recipe, steps=3, run=Run(), base_model=str(model))
    quantized.pipe.unet.get_submodule(SICK).input_quantizer.scale *= 0.01
    quantized.save(checkpoint)
    dump(resolved, settings_path(checkpoint))
    return model, checkpoint


def test_a_broken_checkpoint_is_diagnosed_and_the_patch_is_accepted_by_check(
    call: Call, made: tuple[Path, Path], tmp_path: Path
) -> None:
    _, checkpoint = made
    patch, results = tmp_path / "mended.yaml", tmp_path / "doctor.json"
    status, text, err = call("doctor", checkpoint, *OPTIONS, "--top", "1", "--patch", patch, "--json", results)
    assert status == 0, err
    assert "saturation" in text
    assert SICK in text
    assert f"stepquant quantize --config {patch} -o sick-mended" in text
    data = json.loads(results.read_text())
    assert (data["schema"], data["source"], data["steps"], data["seeds"]) == (1, str(checkpoint), 3, [7, 8])
    found = [(finding["kind"], finding["layer"], finding["step"]) for finding in data["findings"]]
    assert ("saturation", SICK, 0) in found
    rules = load_config(patch)["rules"]
    assert SICK in [rule["pattern"] for rule in rules]
    status, plan, err = call("check", patch, "--json")
    assert status == 0, err
    layers = json.loads(plan)["layers"]
    rule = next(rule for rule in rules if rule["pattern"] == SICK)
    assert layers.get(SICK, {}).get("input") == rule["activations"]
    assert layers["conv_in"] == {"weight": 8, "input": 8, "second": None}
    assert load_config(patch)["calibration_samples"] == 2


def test_without_the_file_beside_it_the_checkpoints_own_recipe_is_patched(
    call: Call, made: tuple[Path, Path], tmp_path: Path
) -> None:
    model, checkpoint = made
    beside = settings_path(checkpoint)
    hidden = beside.rename(tmp_path / "away.yaml")
    try:
        settings = settings_of(str(checkpoint))
    finally:
        hidden.rename(beside)
    assert (settings["model"], settings["steps"], settings["seed"]) == (str(model), 3, 0)
    changed = patched(settings, [LayerRule(SICK, 8, None)])
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(changed))
    status, plan, err = call("check", path, "--json")
    assert status == 0, err
    assert json.loads(plan)["layers"][SICK] == {"weight": 8, "input": None, "second": None}


def test_rules_come_behind_those_that_are_there() -> None:
    settings = {"model": "digits-unet", "rules": [{"pattern": "*", "weights": 8}], "weights": 4}
    changed = patched(settings, [LayerRule("conv_in", 8, None)])
    assert changed["rules"] == [
        {"pattern": "*", "weights": 8},
        {"pattern": "conv_in", "weights": 8, "activations": None},
    ]
    assert settings["rules"] == [{"pattern": "*", "weights": 8}]
    with pytest.raises(SpecError, match="the patched settings: nonsense"):
        patched({"model": "digits-unet", "nonsense": 1}, [])
    assert settings_of("digits-unet") == {"model": "digits-unet"}


def test_bits_over_time_stay_unless_the_activations_get_more() -> None:
    over_time = [{"bits": 8, "until": 500}, {"bits": 4}]
    settings = {"model": "m", "method": "rtn", "rules": [{"pattern": "*", "weights": 3, "activations": over_time}]}
    changed = patched(settings, [LayerRule("conv_in", 8, 4), LayerRule("conv_out", 3, 8)])
    assert [rule["activations"] for rule in changed["rules"]] == [over_time, over_time, 8]


def test_a_recipe_that_allocates_gets_the_rules_too() -> None:
    recipe = allocated(METHODS["rtn"](), weight_bits=4.5).to_dict()
    changed = patched({"model": "m", "recipe": recipe}, [LayerRule("conv_in", 8, None)])
    (stage,) = [stage for stage in changed["recipe"]["stages"] if stage["stage"] == "Allocate"]
    assert [rule["pattern"] for rule in stage["place"]["rules"]] == ["conv_in"]
    assert not any(stage.get("place", {}).get("rules") for stage in recipe["stages"])


class Asked:
    """Stands for `examine`: what it was asked, and what it shall answer."""

    def __init__(self, answer: Diagnosis) -> None:
        self.answer = answer
        self.given: dict[str, Any] = {}

    def __call__(self, pipe: Any, against: Any, **options: Any) -> Diagnosis:
        self.given = {"pipe": pipe, "against": against, **options}
        return self.answer


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    fake = Asked(HEALTHY)
    monkeypatch.setattr("stepquant.cli.doctor.examine", fake)
    return fake


def test_options_reach_the_examination(call: Call, asked: Asked, made: tuple[Path, Path]) -> None:
    model, checkpoint = made
    status, text, _ = call("doctor", checkpoint, *OPTIONS, "--threshold", "cosine=0.5", "--top", "0")
    assert (status, text.strip()) == (0, f"{checkpoint}: nothing was found (2 images of 3 steps)")
    assert asked.given["against"] is not None
    assert (asked.given["seeds"], asked.given["steps"], asked.given["batch_size"]) == ([7, 8], 3, 2)
    assert (asked.given["thresholds"], asked.given["top"]) == (Thresholds(cosine=0.5), 0)
    call("doctor", checkpoint, *OPTIONS, "--against", "none")
    assert asked.given["against"] is None
    call("doctor", model, *OPTIONS, "--steps", "2")
    assert (asked.given["against"], asked.given["steps"]) == (None, 2)
    call("doctor", model, *OPTIONS)
    assert asked.given["steps"] == 20


def test_advice_ends_with_rules_and_commands(call: Call, asked: Asked, made: tuple[Path, Path]) -> None:
    findings = [
        Finding.of("clipping", "Much is cut off.", layer=f"layer.{n}", step=n, value=0.25, threshold=0.01)
        for n in range(10)
    ]
    rules = (LayerRule("layer.0", 4, 8),)
    notes = ("Nothing else.",)
    asked.answer = Diagnosis(tuple(findings), (), (), None, None, None, rules, (7, 8), 3, Thresholds(), notes)
    _, text, _ = call("doctor", made[0], *OPTIONS)
    assert "0 errors, 10 warnings" in text
    assert "and 2 more layers" in text
    assert "layer.9" not in text
    assert "Note: Nothing else." in text
    after = text[text.index("What to do:") :]
    assert "- pattern: layer.0\n  weights: 4\n  activations: 8\n" in after
    assert after.rstrip().endswith("stepquant quantize --config mended.yaml -o model-mended")
    assert f"stepquant doctor {made[0]}" in after
    assert "--patch mended.yaml" in after
    status, out, _ = call("doctor", made[0], *OPTIONS, "--json")
    assert (status, len(json.loads(out)["findings"])) == (0, 10)


def test_the_drift_is_said_whatever_was_found(call: Call, asked: Asked, made: tuple[Path, Path]) -> None:
    asked.answer = Diagnosis((), (), (), 0.25, 0.125, None, (), (7, 8), 3, Thresholds(), ())
    _, text, _ = call("doctor", made[1], *OPTIONS)
    assert "Final drift 0.25, 12.5 % of the sample." in text


def test_mistakes_are_told_before_anything_is_sampled(call: Call, asked: Asked, tmp_path: Path) -> None:
    there = tmp_path / "there.yaml"
    there.write_text("model: mine\n")
    for arguments, message, expected in (
        (["digits-unet", "--threshold", "cosin=1"], "Did you mean 'cosine'", 2),
        (["digits-unet", "--patch", there], "exists already", 2),
        ([tmp_path], "neither a checkpoint", 1),
        (["digits-unte"], "Did you mean 'digits-unet'", 1),
    ):
        status, _, err = call("doctor", *arguments)
        assert (status, message in err.replace("\n", " ")) == (expected, True), err
        assert asked.given == {}
    assert there.read_text() == "model: mine\n"
    assert call("doctor", "digits-unet", "--seeds", "3-1")[0] == 2


def test_a_healthy_model_writes_no_patch(call: Call, asked: Asked, made: tuple[Path, Path], tmp_path: Path) -> None:
    patch = tmp_path / "mended.yaml"
    status, _, _ = call("doctor", made[1], *OPTIONS, "--patch", patch)
    assert (status, patch.exists()) == (0, False)


def test_help_explains_itself(call: Call) -> None:
    status, text, _ = call("doctor", "--help")
    assert status == 0
    assert "which layer" in text
    assert torch.get_num_threads() == 1


def test_no_patch_is_said_and_leaves_no_old_one(
    call: Call, asked: Asked, made: tuple[Path, Path], tmp_path: Path
) -> None:
    patch = tmp_path / "mended.yaml"
    patch.write_text("model: of yesterday\n")
    status, text, _ = call("doctor", made[1], *OPTIONS, "--patch", patch, "--overwrite")
    assert (status, patch.exists()) == (0, False)
    assert "No patch was written: no rule would help." in text


def test_a_patch_goes_into_a_new_folder(call: Call, asked: Asked, made: tuple[Path, Path], tmp_path: Path) -> None:
    patch = tmp_path / "new" / "mended.yaml"
    rules = (LayerRule(SICK, 8, None),)
    finding = Finding.of("saturation", "Much.", layer=SICK)
    asked.answer = Diagnosis((finding,), (), (), None, None, None, rules, (7, 8), 3, Thresholds(), ())
    status, text, err = call("doctor", made[1], *OPTIONS, "--patch", patch)
    assert status == 0, err
    assert "No patch" not in text
    assert load_config(patch)["rules"][-1]["pattern"] == SICK


@pytest.mark.parametrize("option", ["--patch", "--json"])
def test_what_cannot_be_written_is_refused_before_anything_is_sampled(
    call: Call, asked: Asked, tmp_path: Path, option: str
) -> None:
    (tmp_path / "file").write_text("")
    status, _, err = call("doctor", "digits-unet", option, tmp_path / "file" / "out")
    assert (status, asked.given) == (2, {})
    assert "is no folder" in err.replace("\n", " ")
