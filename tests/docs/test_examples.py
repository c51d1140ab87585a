"""The scripts and the notebook of examples/, run as they are with few steps, few images and a tiny model."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler

import tiny
from doc_blocks import ROOT
from stepquant.calibrate.stages import FitInputRanges
from stepquant.errors import SpecError
from stepquant.inspection import inspect_checkpoint
from stepquant.recipe import Recipe

EXAMPLES = ROOT / "examples"
FEW = ["--steps", "3", "--samples", "4"]


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look there for their module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A diffusers folder in place of the shipped model."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("examples") / "model"
    unet = tiny.tiny_unet()
    unet.register_to_config(sample_size=16)  # SSIM has no place for its window in 8 x 8 pixels
    DDIMPipeline(unet, DDIMScheduler()).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    return lambda: capsys.readouterr().out


def test_every_example_has_its_test_and_its_place_in_the_list() -> None:
    there = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")}
    assert there == set(re.findall(r"\]\(([\w.]+)\)", (EXAMPLES / "README.md").read_text(encoding="utf-8")))
    assert {f"test_{Path(name).stem}" for name in there} <= set(globals())


def test_quantize_shipped_model(model: str, tmp_path: Path, told: Callable[[], str]) -> None:
    out = tmp_path / "out"
    example("quantize_shipped_model").main(["--model", model, "--out", str(out), "--images", "2", *FEW])
    assert re.search(r"psnr +\d", told())
    description = inspect_checkpoint(out)
    assert (description["base_model"], description["schedule"]["steps"]) == (model, 3)


def test_own_denoiser(tmp_path: Path, told: Callable[[], str]) -> None:
    example("own_denoiser").main(
        ["--out", str(tmp_path / "own"), "--iterations", "4", "--steps", "4", "--samples", "4"]
    )
    assert told().strip() == "the loaded checkpoint samples the same bits: True"


def test_correct_foreign_model(model: str, told: Callable[[], str]) -> None:
    example("correct_foreign_model").main(["--model", model, "--images", "2", *FEW])
    assert re.search(r"chosen: .+\nas it came +PSNR [\d.]+ dB.*\ncorrected +PSNR [\d.]+ dB", told())


def test_the_foreign_software_rounds_to_its_levels() -> None:
    layer = torch.nn.Linear(5, 3)
    before = layer.weight.detach().clone()
    example("correct_foreign_model").round_weights_(layer, bits=4)
    scale = before.abs().amax(dim=1, keepdim=True) / 7
    levels = layer.weight.detach() / scale
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-5)
    assert ((layer.weight.detach() - before).abs() <= scale / 2 + 1e-7).all()


def test_bits_under_a_target(model: str, told: Callable[[], str]) -> None:
    example("bits_under_a_target").main(["--model", model, "--bits", "5", *FEW])
    text = told()
    found = re.match(r"([\d.]+) bits a weight", text)
    assert found
    assert float(found[1]) <= 5
    assert len(re.findall(r"^ +\d+ bits  \w", text, re.MULTILINE)) > 10


def test_evaluate_two_folders(model: str, tmp_path: Path, told: Callable[[], str]) -> None:
    module = example("evaluate_two_folders")
    assert module.main(["--model", model, "--images", "2", "--steps", "4"]) == 0
    assert re.search(r"psnr +\d", told())
    module.sample_into(tmp_path / "one", model=model, steps=2, seeds=[3, 4])
    module.sample_into(tmp_path / "other", model=model, steps=3, seeds=[3, 4])
    folders = [str(tmp_path / "one"), str(tmp_path / "other")]
    assert module.main([*folders, "--fail-if", "psnr<100"]) == 3
    assert "failed: psnr<100" in told()
    assert module.main([folders[0], folders[0], "--fail-if", "psnr<100"]) == 0


def test_write_a_method(model: str, told: Callable[[], str]) -> None:
    module = example("write_a_method")
    module.main(["--model", model, "--images", "2", *FEW])
    assert re.search(r"CorrectBiases +[\d.]+ s\nPSNR [\d.]+ dB", told())
    with pytest.raises(SpecError, match="needs"):
        Recipe("out of order", (module.CorrectBiases(), FitInputRanges("mse")))


def test_the_stage_of_its_own_takes_mean_errors_away() -> None:
    """The oracle: afterwards no layer has a mean error left at full-precision inputs."""
    from stepquant.api import quantize
    from stepquant.calibrate.select import inputs
    from stepquant.model.layer import QuantizedLayer
    from stepquant.model.surgery import quantized_layers
    from stepquant.recipe import Job

    module = example("write_a_method")
    jobs: list[Job] = []

    class Watched(module.CorrectBiases):  # type: ignore[misc, name-defined]
        def run(self, job: Job) -> Any:
            jobs.append(job)
            return super().run(job)

    def errors(job: Job) -> float:
        layers = {
            name: layer
            for name, layer in quantized_layers(job.denoiser).items()
            if isinstance(layer, QuantizedLayer) and layer.bias is not None
        }
        chosen = job.handed["calibration"]
        args, kwargs = inputs(job.handed["trajectories"], chosen, range(len(chosen)))
        found = module._mean_errors(job.full_precision, layers, args, kwargs)
        assert len(found) > 10
        return max(float(error.abs().max()) for error in found.values())

    stages = module.bias_corrected(samples=2).stages
    pipe = DDIMPipeline(tiny.tiny_unet(), DDIMScheduler())
    figures = quantize(pipe, Recipe("watched", (*stages[:-1], Watched())), steps=2).figures[-1]
    assert figures["largest_change"] > 1e-3
    assert errors(jobs[0]) < 1e-5


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::RuntimeWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_quickstart(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The notebook, in a kernel of its own."""
    nbformat = pytest.importorskip("nbformat", reason="the notebook needs nbformat, nbclient and ipykernel")
    nbclient = pytest.importorskip("nbclient", reason="the notebook needs nbformat, nbclient and ipykernel")
    pytest.importorskip("ipykernel", reason="the notebook needs nbformat, nbclient and ipykernel")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code), "clear the outputs first"
    (place,) = (n for n, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    small = f"MODEL, STEPS, SAMPLES, IMAGES = {model!r}, 3, 2, 2"
    assert set(re.findall(r"^([A-Z]+) =", notebook.cells[place].source, re.MULTILINE)) == set(
        small.split(" =")[0].split(", ")
    )
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(small))
    client = nbclient.NotebookClient(notebook, timeout=150, kernel_name="python3")
    client.execute(cwd=str(tmp_path))
    text = "".join(
        output.text for cell in notebook.cells for output in cell.get("outputs", []) if output.output_type == "stream"
    )
    assert "layers by their outputs" in text
    assert "the same bits: True" in text
    pictures = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 2
