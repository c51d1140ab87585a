"""What of diffusers and torch works together with a quantized denoiser: the rows of docs/compatibility.md."""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import tiny
from stepquant.api import Quantized, load, quantize, sample
from stepquant.calibrate.trajectory import record, replay, seal
from stepquant.errors import ModelError, SpecError, UnsupportedPipeline
from stepquant.methods import METHODS
from stepquant.model.pipeline import DenoiserPipeline
from stepquant.model.quantizer import InputQuantizer
from stepquant.run import Run
from tiny_pipelines import FAMILIES

STEPS = 4
SEEDS = [1, 2]
DOCUMENT = Path(__file__).parents[2] / "docs" / "compatibility.md"


def by_windows(steps: int = STEPS, **options: Any) -> Any:
    """A recipe that gives each half of the schedule activation parameters of its own."""
    lengths = (steps // 2, steps - steps // 2)
    settings: dict[str, Any] = {"samples": 2, "batch": 2, "iterations": 2, "block_iterations": 0, **options}
    return METHODS["accuquant"](weights=4, windows=lengths, rows="window", **settings)


@pytest.fixture(scope="module")
def quantized() -> Quantized:
    torch.set_num_threads(1)
    made = quantize(DDIMPipeline(tiny.tiny_unet(), DDIMScheduler()), by_windows(), steps=STEPS)
    assert {module.rows for module in made.pipe.unet.modules() if isinstance(module, InputQuantizer)} == {2, STEPS}
    return made


@pytest.fixture(scope="module")
def images(quantized: Quantized) -> Tensor:
    return images_of(quantized.pipe)


@pytest.fixture(scope="module")
def prompted() -> tuple[Quantized, dict[str, Any]]:
    """Text to image, with guidance."""
    pytest.importorskip("transformers", reason="diffusers defines this pipeline only beside transformers")
    arguments = FAMILIES["sd15"].arguments()
    return quantize(FAMILIES["sd15"].build(), by_windows(), steps=STEPS, arguments=arguments), arguments


def images_of(pipe: Any, seeds: Any = (1, 2), **options: Any) -> Tensor:
    return sample(pipe, seeds=seeds, steps=STEPS, **options)


def with_unet(quantized: Quantized, unet: Any) -> Any:
    pipe = copy.copy(quantized.pipe)
    pipe.unet = unet
    return pipe


def test_compile(quantized: Quantized, images: Tensor) -> None:
    """All timesteps run through at most two graphs, and a second sampling compiles nothing."""
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(quantized.pipe.unet), backend=counter)
    pipe = with_unet(quantized, compiled)
    assert torch.equal(images_of(pipe), images)
    graphs = counter.frame_count
    assert 1 <= graphs <= 2
    images_of(pipe, seeds=[3, 4])
    assert counter.frame_count == graphs
    torch._dynamo.reset()


def test_deepcopy(quantized: Quantized, images: Tensor) -> None:
    copied = copy.deepcopy(quantized.pipe)
    assert torch.equal(images_of(copied), images)
    with torch.no_grad():
        copied.unet.conv_in.bias += 1
    assert not torch.equal(images_of(copied), images)
    assert torch.equal(images_of(quantized.pipe), images)
    with pytest.raises(SpecError, match="calibrated for 4 steps"):
        sample(copied, seeds=[1], steps=STEPS + 1)


@pytest.mark.slow
def test_pickle(quantized: Quantized, images: Tensor, tmp_path: Path) -> None:
    """In another process, which knows nothing but the file."""
    (tmp_path / "pipe.pickle").write_bytes(pickle.dumps(quantized.pipe))
    program = (
        "import pickle, sys, torch; torch.set_num_threads(1)\n"
        "from stepquant import sample\n"
        "pipe = pickle.load(open(sys.argv[1] + '/pipe.pickle', 'rb'))\n"
        f"torch.save(sample(pipe, seeds={SEEDS}, steps={STEPS}), sys.argv[1] + '/images.pt')\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", program, str(tmp_path)], check=True)
    assert torch.equal(torch.load(tmp_path / "images.pt"), images)


def test_seeds(quantized: Quantized, images: Tensor) -> None:
    """An image follows its seed through batches."""
    assert not torch.equal(images[0], images[1])
    assert torch.equal(images_of(quantized.pipe, seeds=[2, 1]), images.flip(0))
    alone = torch.cat([images_of(quantized.pipe, seeds=[seed]) for seed in SEEDS])
    assert float((alone - images).abs().mean()) < 0.01  # another batch size may round another way


def test_callback(prompted: tuple[Quantized, dict[str, Any]]) -> None:
    made, arguments = prompted
    expected = images_of(made.pipe, arguments=arguments)
    seen: list[int] = []

    def note(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(int(timestep))
        return {}

    found = images_of(made.pipe, arguments={**arguments, "callback_on_step_end": note})
    assert torch.equal(found, expected)
    assert seen == [int(timestep) for timestep in made.schedule.timesteps]


def test_guidance(prompted: tuple[Quantized, dict[str, Any]]) -> None:
    """Calibrated with guidance, sampled without and with another scale."""
    made, arguments = prompted
    found = [images_of(made.pipe, arguments={**arguments, "guidance_scale": scale}) for scale in (1.0, 3.0, 7.0)]
    assert all(one.isfinite().all() for one in found)
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])


def test_guidance_after_calibrating_without() -> None:
    pytest.importorskip("transformers", reason="diffusers defines this pipeline only beside transformers")
    arguments = FAMILIES["sd15"].arguments()
    made = quantize(
        FAMILIES["sd15"].build(),
        METHODS["rtn"](samples=2, batch=2),
        steps=STEPS,
        arguments={**arguments, "guidance_scale": 1.0},
    )
    assert made.schedule.guidance == "none"
    assert images_of(made.pipe, arguments=arguments).isfinite().all()


@pytest.mark.parametrize("call", ["fuse_qkv_projections", "set_attention_slice", "set_attn_processor"])
def test_what_would_undo_the_quantization_is_refused(call: str, prompted: tuple[Quantized, dict[str, Any]]) -> None:
    made, arguments = prompted
    expected = images_of(made.pipe, arguments=arguments)
    for unet in (made.pipe.unet, copy.deepcopy(made.pipe.unet)):
        with pytest.raises(ModelError, match=f"{call} .* not allowed on a quantized model"):
            getattr(unet, call)("max" if call == "set_attention_slice" else None)
    assert torch.equal(images_of(made.pipe, arguments=arguments), expected)


def test_refused_by_the_names_of_pipelines(prompted: tuple[Quantized, dict[str, Any]], tmp_path: Path) -> None:
    made, _ = prompted
    made.save(tmp_path / "q")
    for pipe in (made.pipe, load(tmp_path / "q")):
        with pytest.raises(ModelError, match="set_attention_slice"):
            pipe.enable_attention_slicing()
        with pytest.raises(ModelError, match="fuse_qkv_projections"):
            pipe.fuse_qkv_projections()


def test_fused_models_are_refused_before_anything_runs() -> None:
    pytest.importorskip("transformers", reason="diffusers defines this pipeline only beside transformers")
    pipe = FAMILIES["sd15"].build()
    pipe.fuse_qkv_projections()
    with pytest.raises(UnsupportedPipeline, match=r"fused projections.*unfuse_qkv_projections"):
        quantize(pipe, METHODS["rtn"](samples=2, batch=2), steps=2, arguments=FAMILIES["sd15"].arguments())


def test_slicing_before_quantizing() -> None:
    """The sliced attention is left in floating point, and the figures say so."""
    pytest.importorskip("transformers", reason="diffusers defines this pipeline only beside transformers")
    pipe = FAMILIES["sd15"].build()
    pipe.enable_attention_slicing(1)
    made = quantize(pipe, METHODS["rtn"](samples=2, batch=2), steps=2, arguments=FAMILIES["sd15"].arguments())
    placed = next(figures for figures in made.figures if figures["stage"] == "Place")
    assert placed["attention_left_in_float"]


def test_sequential_offload(quantized: Quantized, images: Tensor) -> None:
    """Weights wait outside of the model, and come for every layer's call. On the CPU, by accelerate's own function."""
    accelerate = pytest.importorskip("accelerate", reason="offloading is accelerate's")
    unet = copy.deepcopy(quantized.pipe.unet)
    accelerate.cpu_offload(unet, execution_device=torch.device("cpu"))
    assert unet.conv_in.weight.is_meta
    assert torch.equal(images_of(with_unet(quantized, unet)), images)


def test_group_offload(quantized: Quantized, images: Tensor) -> None:
    unet = copy.deepcopy(quantized.pipe.unet)
    cpu = torch.device("cpu")
    unet.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    assert torch.equal(images_of(with_unet(quantized, unet)), images)


def test_model_offload(quantized: Quantized, images: Tensor) -> None:
    pytest.importorskip("accelerate", reason="offloading is accelerate's")
    if not torch.cuda.is_available():
        pytest.skip("diffusers offloads whole models between the CPU and an accelerator, and there is none")
    pipe = copy.deepcopy(quantized.pipe)
    pipe.enable_model_cpu_offload()
    torch.testing.assert_close(images_of(pipe), images, atol=0.1, rtol=0.1)


SCHEDULERS: dict[str, Any] = {
    "DDIM": lambda: diffusers.DDIMScheduler(),
    "DDPM": lambda: diffusers.DDPMScheduler(),
    "PNDM": lambda: diffusers.PNDMScheduler(),
    "Euler": lambda: diffusers.EulerDiscreteScheduler(),
    "Euler ancestral": lambda: diffusers.EulerAncestralDiscreteScheduler(),
    "DPM-Solver++ (2M)": lambda: diffusers.DPMSolverMultistepScheduler(),
    "DPM-Solver++ (2M SDE)": lambda: diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
    "UniPC": lambda: diffusers.UniPCMultistepScheduler(),
    "Heun": lambda: diffusers.HeunDiscreteScheduler(),
    "LCM": lambda: diffusers.LCMScheduler(),
    "Flow matching, Euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(),
    "Flow matching, Heun": lambda: diffusers.FlowMatchHeunDiscreteScheduler(),
}


OTHERS = {
    "DEIS": "DEISMultistep",
    "DPM-Solver++ (singlestep)": "DPMSolverSinglestep",
    "EDM DPM-Solver++": "EDMDPMSolverMultistep",
    "EDM Euler": "EDMEuler",
    "Flow matching, LCM": "FlowMatchLCM",
    "iPNDM": "IPNDM",
    "KDPM2": "KDPM2Discrete",
    "KDPM2 ancestral": "KDPM2AncestralDiscrete",
    "LMS": "LMSDiscrete",
    "SA-Solver": "SASolver",
    "TCD": "TCD",
}
SCHEDULERS |= {name: getattr(diffusers, f"{kind}Scheduler") for name, kind in OTHERS.items()}


def with_scheduler(scheduler: Any) -> DenoiserPipeline:
    return DenoiserPipeline(tiny.tiny_unet(), scheduler, (1, 8, 8))


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # KDPM2 and a recent numpy
@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler(name: str, tmp_path: Path) -> None:
    """Record, replay to the last bit, quantize, save, load, sample."""
    pipe = with_scheduler(SCHEDULERS[name]())
    (trajectory,) = record(pipe, pipe.denoiser, seeds=SEEDS, steps=STEPS, batch_size=2, run=Run())
    sealed = seal(trajectory)
    with torch.no_grad():
        states = list(replay(pipe.denoiser, sealed, 0, len(sealed.steps)))
    for state, step in zip(states, sealed.steps, strict=True):
        assert torch.equal(state.sample, step.next_sample)
    made = quantize(pipe, METHODS["rtn"](samples=2, batch=2), steps=STEPS)
    expected = images_of(made.pipe)
    assert not torch.equal(expected, images_of(pipe))
    made.save(tmp_path / "q")
    assert torch.equal(images_of(load(tmp_path / "q", engine="simulated")), expected)


def test_schedulers_with_noise_of_their_own_are_refused_before_anything_runs() -> None:
    """Those of torchsde, which need not be there: they are told by their names, as here."""

    class DPMSolverSDEScheduler(diffusers.EulerDiscreteScheduler):  # type: ignore[misc]
        def step(self, *_: Any, **__: Any) -> Any:
            raise AssertionError("it was called")

    with pytest.raises(UnsupportedPipeline, match=r"Brownian tree of its own.*sde-dpmsolver\+\+"):
        quantize(with_scheduler(DPMSolverSDEScheduler()), METHODS["rtn"](samples=2, batch=2), steps=2)


def test_schedulers_of_torchsde_are_refused() -> None:
    pytest.importorskip("torchsde", reason="diffusers defines these schedulers only beside torchsde")
    for kind in (diffusers.DPMSolverSDEScheduler, diffusers.CosineDPMSolverMultistepScheduler):
        with pytest.raises(UnsupportedPipeline, match=f"{kind.__name__} draws noise from a Brownian tree"):
            quantize(with_scheduler(kind()), METHODS["rtn"](samples=2, batch=2), steps=2)


def table(heading: str) -> list[list[str]]:
    """Rows of the table under a heading of the page, without its first line, cells as text."""
    section = DOCUMENT.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def test_the_page_lists_these_families() -> None:
    works = {row[0]: row[2] for row in table("Families")}
    assert [name for name, answer in works.items() if answer == "yes"] == [*FAMILIES, "plain module"]
    assert {name: answer for name, answer in works.items() if answer != "yes"} == {
        "wan, two experts": "yes: one checkpoint each",
        "image restoration": "yes: saved in a `DenoiserPipeline`",
        "decoder": "yes: weights only",
    }
    needs = {row[0]: row[3] for row in table("Families")}
    for name, family in FAMILIES.items():
        assert needs[name] == ("transformers" if family.needs_transformers else "")


def test_the_page_names_the_pipelines() -> None:
    for name, pipeline, *_ in table("Families")[: len(FAMILIES)]:
        if FAMILIES[name].needs_transformers:
            pytest.importorskip("transformers", reason="diffusers defines this pipeline only beside transformers")
        assert f"`{type(FAMILIES[name].build()).__name__}`" in pipeline


def test_the_page_lists_these_schedulers() -> None:
    rows = [row[:2] for row in table("Schedulers")]
    assert [name for name, works in rows if works == "yes"] == [*SCHEDULERS]
    assert [name for name, works in rows if works != "yes"] == ["DPM-Solver SDE, cosine DPM-Solver++ (torchsde)"]


def named_tests(rows: list[list[str]]) -> set[str]:
    return {re.fullmatch(r"`(test_\w+)`", row[-1])[1] for row in rows}  # type: ignore[index]


def test_every_feature_of_the_page_has_its_test() -> None:
    rows = table("Features")
    there = {name for name in globals() if name.startswith("test_")}
    assert named_tests(rows) - there == set()
    # What is left are the other tables and the page itself.
    assert {name for name in there - named_tests(rows) if "page" not in name and "scheduler" not in name} == set()
    assert all(re.match(r"yes|no: |not tested: ", row[1]) for row in rows)


def test_every_trap_of_the_page_has_its_test() -> None:
    here = Path(__file__)
    loading, adapters = (
        set(re.findall(r"^def (test_\w+)", here.with_name(name).read_text(encoding="utf-8"), re.MULTILINE))
        for name in ("test_loading.py", "test_adapters.py")
    )
    section = DOCUMENT.read_text(encoding="utf-8").split("\n### Traps\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| ")][1:]
    assert [int(row[0].split(":")[0]) for row in rows] == [*range(1, 13)]
    named = {test for row in rows for test in re.findall(r"`(test_\w+)`", row[-1])}
    assert named <= loading | adapters
    assert {test for test in loading if "_trap" in test} <= named


def test_every_row_of_the_page_on_adapters_has_its_test() -> None:
    source = Path(__file__).with_name("test_adapters.py").read_text(encoding="utf-8")
    rows = table("Adapters (LoRA)")
    assert named_tests(rows) == set(re.findall(r"^def (test_\w+)", source, re.MULTILINE))
    assert all(re.match(r"yes|no: ", row[1]) for row in rows)
