"""`stepquant evaluate` through the whole program: whatever may stand on either side, gates, resuming, bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from PIL import Image

import tiny
from stepquant.api import quantize, sample
from stepquant.cli.main import main
from stepquant.errors import EvaluationError
from stepquant.evaluate.images import save_png
from stepquant.evaluate.source import ImageFolder, PipelineSource
from stepquant.methods import METHODS

STEPS = 2
Stepquant = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds `model`, `checkpoint`, and `images` of the model with seeds 5 to 8."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("evaluate")
    pipe = DDIMPipeline(tiny.tiny_unet(), DDIMScheduler())
    pipe.save_pretrained(folder / "model")
    recipe = METHODS["rtn"](samples=2, batch=2)
    quantize(pipe, recipe, steps=STEPS, base_model=str(folder / "model")).save(folder / "checkpoint")
    for image, seed in zip(sample(pipe, seeds=range(5, 9), steps=STEPS), range(5, 9), strict=True):
        save_png(image, folder / "images", seed=seed)
    return folder


@pytest.fixture
def here(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own with links to the models, so that what is written beside them goes away again."""
    for name in ("model", "checkpoint", "images"):
        (tmp_path / name).symlink_to(models / name, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("stepquant.cli.work.tune_allocator", lambda: True)
    return tmp_path


@pytest.fixture
def stepquant(here: Path, capsys: pytest.CaptureFixture[str]) -> Stepquant:
    """One command in this process: exit status, standard output and standard error."""

    def once(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main(["evaluate", *map(str, arguments)])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        assert isinstance(stop.value.code, int)
        return stop.value.code, out, err

    return once


def written(here: Path) -> list[str]:
    return sorted(path.name for path in here.iterdir() if path.name not in ("model", "checkpoint", "images"))


def test_a_checkpoint_beside_images_of_its_model(stepquant: Stepquant, here: Path) -> None:
    status, out, err = stepquant("checkpoint", "--against", "images", "--json")
    assert (status, err) == (0, "")
    results = json.loads(out)
    assert results == json.loads((here / "checkpoint.evaluation.json").read_text())
    assert (results["candidate"], results["against"]) == ("checkpoint", "images")
    assert (results["n"], results["seeds"], results["steps"]) == (4, [5, 8], STEPS)
    assert set(results["metrics"]) == {"psnr", "mae"}
    notes = " ".join(results["notes"])
    for words in ("No SSIM: its window is 11 x 11", "No Frechet distances", "No drift"):
        assert words in notes
    assert written(here) == ["checkpoint.evaluation.json"]


def test_a_model_beside_its_own_images(stepquant: Stepquant, here: Path) -> None:
    status, out, _ = stepquant("model", "--against", "images", "--steps", STEPS, "--json", "-")
    assert status == 0
    metrics = json.loads(out)["metrics"]
    assert (metrics["mae"]["value"], metrics["psnr"]["identical"]) == (0, 4)


def test_images_beside_images(stepquant: Stepquant, here: Path) -> None:
    status, out, _ = stepquant("images", "--against", "images")
    assert status == 0
    assert "images beside images: 4 images, seeds 5-8" in out
    assert "100 dB" in out
    assert written(here) == ["images.evaluation.json"]


def test_two_pipelines_have_drift(stepquant: Stepquant, here: Path) -> None:
    status, out, _ = stepquant("checkpoint", "--seeds", "0-2", "--json")
    assert status == 0
    results = json.loads(out)
    assert results["against"].endswith("model")
    assert {"drift_final", "cosine_final", "noise_level", "white_point_shift"} <= set(results["metrics"])
    assert 0 < results["metrics"]["drift_final"]["value"] < 1
    assert len(results["drift"]["flat_field"]["noise_level"]["candidate"]) == STEPS


@pytest.mark.parametrize(
    ("gates", "status", "complaints"),
    [
        (["psnr<1", "mae>0.9"], 0, []),
        (["psnr<1", "psnr>=2", "mae>0"], 3, ["psnr>=2 (it is ", "mae>0 (it is "]),
        (["ssim<0.1"], 3, ["ssim<0.1 (it was not measured)"]),
    ],
)
def test_gates(stepquant: Stepquant, here: Path, gates: list[str], status: int, complaints: list[str]) -> None:
    options = [part for gate in gates for part in ("--fail-if", gate)]
    found, out, err = stepquant("checkpoint", "--against", "images", "--json", *options)
    assert found == status
    assert [line.startswith("Failed: ") for line in err.splitlines()] == [True] * len(complaints)
    for complaint in complaints:
        assert complaint in err
    kept = json.loads((here / "checkpoint.evaluation.json").read_text())
    assert kept == json.loads(out)
    assert [gate["gate"] for gate in kept["gates"]] == gates
    assert sum(gate["failed"] for gate in kept["gates"]) == len(complaints)


def test_images_that_are_not_finite_fail_the_gates(stepquant: Stepquant, here: Path) -> None:
    unet = tiny.tiny_unet()
    unet.conv_norm_out.bias.data[0] = torch.inf
    DDIMPipeline(unet, DDIMScheduler()).save_pretrained(here / "sick")
    before = written(here)
    command = ["sick", "--against", "images", "--steps", STEPS, "--json"]
    words = "4 of 4 images of sick, seeds 5-8, hold NaN or infinite values. `stepquant doctor sick` names the layer"
    status, out, err = stepquant(*command)
    results = json.loads(out)
    assert (status, results["metrics"], results["candidate"]) == (1, {}, "sick")
    assert words in err
    assert words in results["notes"][-1]
    status, out, err = stepquant(*command, "--fail-if", "psnr<1")
    assert status == 3
    assert words in err
    assert "Failed: psnr<1 (it was not measured)" in err
    assert json.loads(out)["gates"] == [{"gate": "psnr<1", "value": None, "failed": True}]
    assert written(here) == before


def test_a_gate_on_nothing_is_refused_before_any_work(stepquant: Stepquant, here: Path) -> None:
    status, _, err = stepquant("checkpoint", "--fail-if", "pnsr<28")
    assert status == 2
    assert "there is no metric 'pnsr'" in err
    assert "Did you mean 'psnr'?" in err
    assert written(here) == []


def test_ctrl_c_and_resume(stepquant: Stepquant, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command: list[Any] = ["checkpoint", "--seeds", "0-5", "--batch-size", 2, "--json"]
    status, out, _ = stepquant(*command)
    assert status == 0
    whole = json.loads(out)
    (here / "checkpoint.evaluation.json").unlink()

    from stepquant.evaluate import compare

    original, batches = compare.paired_columns, []

    def interrupted(*arguments: Any) -> Any:
        batches.append(len(arguments[0]))
        if len(batches) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(compare, "paired_columns", interrupted)
    status, _, err = stepquant(*command)
    assert status == 130
    assert "checkpoint.evaluation.work" in err.replace("\n", "")
    assert "--resume" in err
    assert written(here) == ["checkpoint.evaluation.work"]
    status, _, err = stepquant(*command)
    assert status == 2
    assert "--resume" in err
    assert "--overwrite" in err
    status, _, err = stepquant(*command, "--resume", "--seeds", "0-4")
    assert status == 2
    assert "seeds differ" in err
    assert written(here) == ["checkpoint.evaluation.work"]
    status, out, _ = stepquant(*command, "--resume")
    assert status == 0
    resumed = json.loads(out)
    for key in ("metrics", "drift", "notes"):
        assert resumed[key] == whole[key]
    assert len(batches) == 4, "the two batches that were finished are not measured again"
    assert written(here) == ["checkpoint.evaluation.json"]


def test_overwrite_starts_anew(stepquant: Stepquant, here: Path) -> None:
    work = here / "images.evaluation.work"
    work.mkdir()
    (work / "evaluation.json").write_text("{}")
    assert stepquant("images", "--against", "images")[0] == 2
    assert stepquant("images", "--against", "images", "--overwrite", "--fail-if", "lpips>0.1")[0] == 2
    assert stepquant("images", "--against", "nowhere", "--overwrite")[0] != 0
    assert work.exists(), "what is refused costs nothing that was measured"
    assert stepquant("images", "--against", "images", "--overwrite")[0] == 0
    assert written(here) == ["images.evaluation.json"]


def test_nothing_is_left_of_a_shipped_model_that_was_evaluated(stepquant: Stepquant, here: Path) -> None:
    for _ in range(2):
        status, out, err = stepquant("digits-unet", "--against", "digits-unet", "--steps", 1, "--seeds", "0-1")
        assert status == 0, err
        assert "digits-unet beside digits-unet" in out
        assert written(here) == []


def test_bad_images_are_named_and_nothing_is_left(
    stepquant: Stepquant, here: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def folder(name: str) -> Path:
        copied = here / name
        copied.mkdir()
        for path in (models / "images").iterdir():
            (copied / path.name).write_bytes(path.read_bytes())
        return copied

    cut = folder("cut") / "000007.png"
    cut.write_bytes(cut.read_bytes()[:60])
    Image.new("L", (9, 8)).save(folder("wide") / "000006.png")
    (folder("fewer") / "000008.png").unlink()
    Image.new("RGB", (8, 8)).save(folder("stray") / "holiday.png")
    Image.new("RGB", (8, 8)).save(folder("mixed") / "000007.png")
    (folder("text") / "000006.png").write_text("no image")
    (folder("nothing") / "000008.png").write_bytes(b"")
    for seed in range(5, 9):
        Image.new("RGB", (8, 8)).save(here / f"coloured-{seed}.png")
    coloured = here / "coloured"
    coloured.mkdir()
    for seed in range(5, 9):
        (here / f"coloured-{seed}.png").rename(coloured / f"{seed}.png")
    (here / "large").mkdir()
    for seed in range(5, 9):
        Image.new("L", (9, 9)).save(here / "large" / f"{seed}.png")
    before = written(here)
    monkeypatch.setattr(ImageFolder, "images", lambda *_, **__: pytest.fail("images were read"))
    for name, words in (
        ("cut", "000007.png cannot be read as a PNG image"),
        ("wide", "000006.png is (1, 8, 9), but 000005.png is (1, 8, 8)"),
        ("mixed", "000007.png is (3, 8, 8), but 000005.png is (1, 8, 8)"),
        ("text", "000006.png cannot be read as a PNG image"),
        ("nothing", "000008.png cannot be read as a PNG image"),
        ("fewer", "fewer has no images of 1 of the 4 seeds, the first of them 8"),
        ("stray", "holiday.png is not named by its seed"),
        (
            "coloured",
            "images (000005.png) and coloured (5.png) give images of different shapes: [1, 8, 8] and [3, 8, 8] "
            "[C, H, W]. Convert the files of one folder (Pillow: convert('RGB') or convert('L'))",
        ),
        ("large", "images (000005.png) and large (5.png) give images of different shapes: [1, 8, 8] and [1, 9, 9]"),
    ):
        status, out, err = stepquant("images", "--against", name, "--batch-size", 1, "--json", "results.json")
        assert (status, out) == (1, "")
        assert words in err.replace("\n", " ")
        assert written(here) == before


def test_calibration_seeds_are_refused(stepquant: Stepquant, here: Path) -> None:
    command = ["checkpoint", "--seeds", "1000001-1000002"]
    status, _, err = stepquant(*command)
    assert status == 1
    assert "checkpoint was calibrated on 1 of these 2 seeds, the first of them 1000001" in err.replace("\n", " ")
    assert written(here) == []
    assert stepquant(*command, "--allow-calibration-seeds")[0] == 0
    status, _, err = stepquant("model", "--against", "checkpoint", "--seeds", "1000000")
    assert status == 1
    assert "checkpoint was calibrated on 1 of these 1 seeds" in err.replace("\n", " ")


def test_missing_weights_cost_only_their_own_figures(stepquant: Stepquant, here: Path) -> None:
    command = ["images", "--against", "images", "--features", "inception=no.pth", "--lpips", "alexnet.pth", "--json"]
    status, out, err = stepquant(*command)
    assert status == 0
    results = json.loads(out)
    assert set(results["metrics"]) == {"psnr", "mae"}
    distances, lpips = (line.removeprefix("Note: ") for line in err.splitlines())
    for line, words in (
        (
            distances,
            "No distances of distributions (FID and the like): no.pth is not there. Download weights-inception",
        ),
        (lpips, "No LPIPS: alexnet.pth is not there. Download https://"),
    ):
        assert line.startswith(words)
        note = line.removesuffix(" All other figures are computed.")
        assert note != line
        assert note in results["notes"]
    status, _, err = stepquant("images", "--against", "images", "--features", "incepton=no.pth")
    assert status == 2
    assert "Did you mean 'inception'?" in err


def test_missing_weights_are_told_before_anything_is_opened(
    stepquant: Stepquant, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise EvaluationError("far enough")

    monkeypatch.setattr("stepquant.cli.evaluate.open_source", stop)
    _, out, err = stepquant("checkpoint", "--against", "images", "--lpips", "alxnet.pth")
    assert out == ""
    assert err.index("Note: No LPIPS: alxnet.pth is not there.") < err.index("far enough")


@pytest.mark.parametrize(
    ("options", "gate", "words"),
    [
        (["--lpips", "alxnet.pth"], "lpips>0.1", "alxnet.pth is not there. Download https://"),
        ([], "lpips>0.1", "LPIPS needs --lpips FILE. Download https://"),
        (
            ["--features", "inception=no.pth"],
            "kid_to_fp>1",
            "no.pth is not there. Download weights-inception-2015-12-05",
        ),
        (["--features", "none"], "frechet_to_fp>2", "--features none leaves out the distances of distributions."),
        (["--clip", "no/clip"], "clip_score<20", "no/clip is no folder and not in the local cache. Get one with"),
        ([], "clip_score<20", "The CLIP score needs --clip MODEL and prompts."),
    ],
)
def test_a_gate_on_a_figure_without_its_network_is_refused_before_any_work(
    stepquant: Stepquant, here: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], gate: str, words: str
) -> None:
    monkeypatch.setattr("stepquant.cli.evaluate.open_source", lambda *_, **__: pytest.fail("something was opened"))
    status, out, err = stepquant(
        "checkpoint", "--against", "images", *options, "--fail-if", "psnr<1", "--fail-if", gate
    )
    assert (status, out) == (2, "")
    assert f"--fail-if {gate}: this figure cannot be measured. {words}" in err
    assert "psnr" not in err
    assert written(here) == []


def test_hub_ids(stepquant: Stepquant, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is sampled is the folder that the hub's name stands for, on either side."""
    opened: list[str] = []

    def downloaded(model: str) -> DDIMPipeline:
        opened.append(model)
        return DDIMPipeline.from_pretrained({"them/model": here / "model"}[model])

    monkeypatch.setattr("stepquant.api._from_hub", downloaded)
    status, out, err = stepquant("them/model", "--against", "images", "--steps", STEPS, "--json")
    assert status == 0, err
    results = json.loads(out)
    assert (results["candidate"], results["against"], results["engine"]) == ("them/model", "images", None)
    assert (results["metrics"]["psnr"]["identical"], results["seeds"]) == (4, [5, 8])
    assert written(here) == []

    status, out, err = stepquant("checkpoint", "--against", "them/model", "--seeds", "0-2", "--json")
    assert status == 0, err
    by_name = json.loads(out)
    assert (by_name["against"], by_name["reference_kind"]) == ("them/model", "model")
    assert opened == ["them/model"] * 2
    status, out, err = stepquant("checkpoint", "--against", "model", "--seeds", "0-2", "--json")
    assert status == 0, err
    assert by_name["metrics"] == json.loads(out)["metrics"]
    assert by_name["metrics"]["drift_final"]["value"] > 0


def test_a_folder_beside_a_pipeline_of_another_size_or_of_colours(
    stepquant: Stepquant, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found at the first mini-batch, with a file."""
    sampled: list[int] = []
    original = PipelineSource.images

    def counted(self: PipelineSource, seeds: Any, **options: Any) -> Any:
        sampled.extend(seeds)
        return original(self, seeds, **options)

    monkeypatch.setattr(PipelineSource, "images", counted)
    for name, mode, side in (("large", "L", 9), ("coloured", "RGB", 8)):
        (here / name).mkdir()
        for seed in range(5, 9):
            Image.new(mode, (side, side)).save(here / name / f"sample-{seed}.png")
    before = written(here)
    for name, shape in (("large", "[1, 9, 9]"), ("coloured", "[3, 8, 8]")):
        for pair in (("model", name), (name, "model")):
            sampled.clear()
            status, out, err = stepquant(
                pair[0], "--against", pair[1], "--steps", STEPS, "--seeds", "6-8", "--batch-size", 2
            )
            assert (status, out) == (1, "")
            shapes = ("[1, 8, 8]", shape) if pair[0] == "model" else (shape, "[1, 8, 8]")
            sides = " and ".join(f"{one} (sample-6.png)" if one == name else one for one in pair)
            assert f"{sides} give images of different shapes: {shapes[0]} and {shapes[1]} [C, H, W]." in err
            assert sampled == [6, 7]
            assert written(here) == before


def test_other_schedules_are_refused(stepquant: Stepquant, here: Path) -> None:
    DDIMPipeline(tiny.tiny_unet(), DDIMScheduler(beta_end=0.03)).save_pretrained(here / "other")
    status, _, err = stepquant("other", "--against", "model", "--steps", STEPS)
    assert status == 1
    assert "other and model do not sample on the same schedule" in err.replace("\n", " ")
    assert "beta_end is 0.03 instead of 0.02" in err.replace("\n", " ")


def test_other_sizes_are_refused(stepquant: Stepquant, here: Path) -> None:
    unet = tiny.tiny_unet()
    unet.register_to_config(sample_size=12)
    DDIMPipeline(unet, DDIMScheduler()).save_pretrained(here / "larger")
    before = written(here)
    status, out, err = stepquant("larger", "--against", "model", "--steps", STEPS, "--seeds", "0-3", "--batch-size", 2)
    assert (status, out) == (1, "")
    assert "larger and model give images of different shapes: [1, 12, 12] and [1, 8, 8]" in err.replace("\n", " ")
    assert written(here) == before


def test_a_single_image(stepquant: Stepquant, here: Path) -> None:
    """Too few for everything that is a distance of distributions; the rest is measured."""
    status, out, err = stepquant("checkpoint", "--seeds", "7", "--features", "digits", "--json")
    assert (status, out) == (1, "")
    assert "got images of shape (1, 1, 8, 8), expected [B, 1, 32, 32]" in err.replace("\n", " ")
    assert written(here) == []
    status, out, _ = stepquant("checkpoint", "--seeds", "7", "--json")
    assert status == 0
    assert {"psnr", "mae", "drift_final"} <= set(json.loads(out)["metrics"])


def test_a_candidate_that_names_no_reference(stepquant: Stepquant, here: Path) -> None:
    status, _, err = stepquant("images")
    assert status == 1
    assert "--against" in err


def test_only_what_report_takes_is_kept_for_it(stepquant: Stepquant, here: Path) -> None:
    _, out, _ = stepquant("images", "--against", "images")
    assert "Kept as images.evaluation.json." in out
    assert "stepquant report" not in out
    _, out, _ = stepquant("checkpoint", "--against", "images")
    assert "Kept as checkpoint.evaluation.json for `stepquant report`." in out
    kept = (here / "checkpoint.evaluation.json").read_text()
    status, out, err = stepquant("checkpoint", "--against", here / "checkpoint", "--seeds", "0-1")
    assert status == 0, err
    assert "Kept" not in out
    assert (here / "checkpoint.evaluation.json").read_text() == kept


def test_results_that_cannot_be_written_are_refused_before_any_work(stepquant: Stepquant, here: Path) -> None:
    (here / "file").write_text("")
    for target, words in (("file/e.json", "file is no folder"), ("model", "model is a folder, expected a file")):
        status, out, err = stepquant("images", "--against", "images", "--json", target)
        assert (status, out) == (2, "")
        assert words in err.replace("\n", " ")
        assert written(here) == ["file"]


def test_results_that_could_not_be_written_leave_nothing_in_the_way(
    stepquant: Stepquant, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stepquant.cli import evaluate

    original = evaluate.write_json

    def full(data: Any, target: str) -> None:
        if target == "e.json":
            raise OSError(28, "No space left on device", target)
        original(data, target)

    monkeypatch.setattr(evaluate, "write_json", full)
    assert stepquant("images", "--against", "images", "--json", "e.json")[0] == 1
    assert written(here) == ["images.evaluation.json"]
    assert stepquant("images", "--against", "images")[0] == 0
