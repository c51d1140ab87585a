"""Every block of code in README and docs is run, or marked with the reason why not; then it is checked at least.

The shipped model is replaced by a tiny one, and presets by short ones, so that what takes minutes for a reader takes a
second here. All else is what the page says.
"""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ConsistencyModelPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler

import doc_blocks
import stepquant
import tiny
from doc_blocks import ROOT, Block
from stepquant import api
from stepquant.cli import evaluate
from stepquant.cli.main import main
from stepquant.config import parse_yaml, resolve
from stepquant.engines.openvino import OpenVINOEngine
from stepquant.methods import METHODS, PRESETS

PAGES = doc_blocks.pages()
BLOCKS = [block for page in PAGES for block in doc_blocks.blocks_of(page)]
RUN = sorted({block.page for block in BLOCKS if block.runs})

SHORT: dict[str, dict[str, object]] = {
    "rtn": {"ranges": "minmax"},
    "accuquant": {"iterations": 2, "layer_rounding": True, "block_iterations": 0, "together": 8},
    "combined": {
        "sample_weights": False,
        "block_iterations": 0,
        "scale_iterations": 0,
        "window_iterations": 2,
        "balance": False,
        "together": 8,
    },
}
"""Presets of the methods that pages run, beside two samples."""

CHECKPOINTS = {
    "docs/faq.md": {"digits-w4a8": 16},
    "docs/evaluation.md": {"digits-w4a8": 16},
    "docs/engines.md": {"digits-w8a8": 32},
}
"""Checkpoints that a page takes to be there already, and the size of their samples."""

_RECIPE = METHODS["rtn"](weights=8, activations=8, samples=2, batch=2, ranges="minmax")


def small_model(size: int = 16) -> ConsistencyModelPipeline:
    """Stands for digits-unet: a fiftieth of its weights, all of them random, and a quarter of its pixels."""
    unet = tiny.tiny_unet(num_class_embeds=10)
    unet.register_to_config(sample_size=size)
    return ConsistencyModelPipeline(unet, DDIMScheduler())


NAMES: dict[str, Callable[[], dict[str, Any]]] = {
    "docs/doctor.md": lambda: {
        "pipe": stepquant.quantize(small_model(), _RECIPE, steps=20).pipe,
        "full_precision_pipe": small_model(),
    },
    "docs/engines.md": lambda: {"load": stepquant.load, "OpenVINOEngine": OpenVINOEngine},
    "docs/methods/beta_sampling.md": lambda: {
        "stepquant": stepquant,
        "pipe": DDPMPipeline(tiny.tiny_unet(), DDPMScheduler()),
        "recipe": _RECIPE,
    },
}
"""What the fragments of a page take to be defined. Pages that are not here are complete."""


@pytest.fixture
def shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = api.open_model

    def open_small(model: str, **options: Any) -> Any:
        return small_model() if model == "digits-unet" else opened(model, **options)

    monkeypatch.setattr(api, "open_model", open_small)
    monkeypatch.setattr(evaluate, "_EVALUATED", range(1000, 1004))
    for method, presets in PRESETS.items():
        for name in presets:
            monkeypatch.setitem(presets, name, {"samples": 2, "batch": 2, **SHORT.get(method, {})})


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """A checkpoint for samples of a size, made at the first call."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("checkpoints")

    def made(size: int) -> Path:
        if not (folder / str(size)).exists():
            quantized = stepquant.quantize(small_model(size), _RECIPE, steps=20, base_model="digits-unet")
            quantized.save(folder / str(size))
        return folder / str(size)

    return made


@pytest.mark.usefixtures("shortened")
@pytest.mark.parametrize("page", RUN)
def test_the_blocks_of_a_page_run_in_order(
    page: str, checkpoints: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, size in CHECKPOINTS.get(page, {}).items():
        shutil.copytree(checkpoints(size), name)
    names: dict[str, Any] = {"__name__": "__main__", **NAMES.get(page, dict)()}
    for block in doc_blocks.blocks_of(page):
        if block.runs and block.kind == "python":
            tree = ast.parse("\n" * (block.line - 1) + block.text, filename=str(ROOT / page))
            exec(compile(tree, str(ROOT / page), "exec"), names)
        elif block.runs:
            for words in doc_blocks.commands_of(block.text):
                assert words[0] == "stepquant", f"{block} runs {words[0]!r}: mark it, or show it as text"
                with pytest.raises(SystemExit) as stop:
                    main(words[1:])
                assert stop.value.code == 0 or (stop.value.code == 3 and "--fail-if" in words), f"{block}: {words}"


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.marker != "no code"], ids=str)
def test_every_block_could_work(block: Block) -> None:
    """What is run is checked here as well: the settings of the real presets are only seen here."""
    if block.kind == "python":
        compile(block.text, str(block), "exec")
    elif block.kind == "shell":
        for words in doc_blocks.commands_of(block.text):
            doc_blocks.check_command(words)
    elif block.kind == "yaml":
        settings = parse_yaml(block.text, source=str(block))
        assert resolve(settings, source=str(block), flags={"model": settings.get("model", "M")}).recipe.stages


def test_markers_stand_before_blocks_and_give_reasons() -> None:
    for page in PAGES:
        written = re.findall(r"<!-- *(?:not run|no code|run|skip)\b.*?-->", (ROOT / page).read_text(encoding="utf-8"))
        used = [block for block in BLOCKS if block.page == page and block.marker]
        assert len(written) == len(used), f"{page}: of the markers {written} only those before {used} have an effect"


def test_every_kind_of_block_is_found() -> None:
    """So that a page written in another way does not pass by not being seen."""
    counts = {kind: sum(block.kind == kind for block in BLOCKS) for kind in ("python", "shell", "yaml", "text")}
    assert min(counts.values()) > 0
    fences = sum(len(re.findall(r"^ *```", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)) for page in PAGES)
    assert sum(block.fenced for block in BLOCKS) == fences / 2
    assert {"README.md", "docs/index.md", "docs/quickstart.md", "docs/how_it_works.md"} <= set(RUN)


@pytest.mark.parametrize(
    "line",
    [
        "stepquant quantise digits-unet -o OUT",
        "stepquant quantize digits-unet -o OUT --wieghts 4",
        "stepquant quantize digits-unet -o OUT --method rnt",
        "stepquant quantize digits-unet -o OUT --set windw=2",
        "stepquant quantize digits-unet -o OUT --weights 9",
        "stepquant evaluate OUT --fail-if 'pnsr<28'",
        "stepquant methods no_method",
        "python benchmarks/nothing.py",
        "python benchmarks/results.py run --no-such-option",
        "make nothing",
    ],
)
def test_commands_that_cannot_work_are_seen(line: str) -> None:
    (words,) = doc_blocks.commands_of(line)
    with pytest.raises(Exception, match=r"quantise|wieghts|rnt|windw|9|pnsr|no_method|nothing|no-such"):
        doc_blocks.check_command(words)
