"""The model card: the metadata that the hub reads, the figures of the evaluation, and nothing of this machine."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from huggingface_hub import ModelCard

import tiny
from stepquant.api import load, quantize, sample
from stepquant.cli.card import CardRequest, card
from stepquant.cli.console import Settings
from stepquant.errors import SpecError
from stepquant.inspection import inspect_checkpoint
from stepquant.methods import METHODS
from stepquant.report.card import card_of, hub_id

QUIET = Settings(quiet=True)
RESULTS = {
    "schema": 1,
    "candidate": "/home/somebody/work/q",
    "against": "/home/somebody/models/digits",
    "n": 256,
    "seeds": [1000, 1255],
    "steps": 4,
    "scheduler": "DDIMScheduler",
    "features": "digit-classifier (abc)",
    "metrics": {
        "psnr": {"value": 29.38812, "low": 28.5, "high": 30.25, "unit": "dB"},
        "frechet_to_data": {"value": 361.1371, "reference_value": 341.42, "features": "digit-classifier"},
    },
    "notes": ["A note."],
    "command": "stepquant evaluate /home/somebody/work/q --lpips=/home/somebody/alex.pth --argument prompt=@~/p.txt",
    "versions": {"torch": "2.13"},
    "machine": "x86_64, 1 threads",
    "date": "2026-01-01",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("card") / "tiny-w4a8"
    made = quantize(
        DDIMPipeline(tiny.tiny_unet(), DDIMScheduler()),
        METHODS["rtn"](samples=2, batch=2),
        steps=4,
        base_model="/home/somebody/models/digits",
    )
    made.save(folder)
    return folder


def described(checkpoint: Path, **changes: Any) -> dict[str, Any]:
    return inspect_checkpoint(checkpoint) | changes


def text_of(checkpoint: Path, **options: Any) -> str:
    given = {"name": "tiny", "identity": "f00", **options}
    return card_of(given.pop("description", None) or described(checkpoint), **given)


def test_a_figure_that_was_not_finite_and_a_reference_that_is_a_checkpoint(checkpoint: Path) -> None:
    metrics = {**RESULTS["metrics"], "drift_final": {"value": None}}  # type: ignore[dict-item]
    text = text_of(checkpoint, results={**RESULTS, "metrics": metrics, "reference_kind": "checkpoint"})
    assert "last sample" not in text
    assert "Against digits at equal seeds" in text
    assert "the reference 341.4" in text


def test_the_hub_reads_the_metadata(checkpoint: Path) -> None:
    found = ModelCard(text_of(checkpoint, license="apache-2.0", base_model="owner/digits")).data.to_dict()
    assert found == {
        "base_model": "owner/digits",
        "base_model_relation": "quantized",
        "library_name": "diffusers",
        "license": "apache-2.0",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["stepquant", "quantized", "post-training-quantization", "diffusers"],
    }
    bare = ModelCard(text_of(checkpoint)).data.to_dict()
    assert {"base_model", "license", "base_model_relation"}.isdisjoint(bare)


def test_figures_stand_with_all_that_they_depend_on(checkpoint: Path) -> None:
    text = text_of(checkpoint, results=RESULTS)
    assert "| PSNR | 29.39 dB | 28.5 to 30.25 |  |" in text
    assert "| Fréchet distance to real data | 361.1 |  | full precision 341.4, features digit-classifier |" in text
    assert "256 images, seeds 1000 to 1255, 4 steps of DDIMScheduler" in text
    assert "`stepquant evaluate q --lpips=alex.pth --argument prompt=p.txt`, 2026-01-01, torch 2.13, x86_64" in text
    assert "A note." in text
    assert "`f00`" in text
    assert "Nothing has been measured yet" in text_of(checkpoint)


def test_a_card_tells_no_folders_of_this_machine(checkpoint: Path) -> None:
    text = text_of(checkpoint, results=RESULTS)
    assert "somebody" not in text
    assert "of digits with its unet quantized" in text


def test_what_is_published_is_what_was_quantized(checkpoint: Path) -> None:
    """With the card in its folder the checkpoint loads, and the card's own code samples the same images."""
    before = sample(load(checkpoint, engine="simulated"), seeds=[1], steps=4)
    request = CardRequest(checkpoint, license="mit")
    card(request, QUIET)
    text = (checkpoint / "README.md").read_text(encoding="utf-8")
    assert hashlib.sha256((checkpoint / "stepquant.json").read_bytes()).hexdigest() in text
    assert torch.equal(sample(load(checkpoint, engine="simulated"), seeds=[1], steps=4), before)
    with pytest.raises(SpecError, match="exists already"):
        card(request, QUIET)
    pytest.importorskip("accelerate", reason="diffusers loads quantized models with accelerate only")
    code = text.split("```python\n")[1].split("```")[0].replace("OWNER/NAME", str(checkpoint))
    names: dict[str, Any] = {}
    exec(
        code.replace("num_inference_steps=", "generator=seeded(), output_type='np', num_inference_steps="),
        names | {"seeded": lambda: torch.Generator().manual_seed(1)},
        names,
    )
    assert names["images"].images.shape == (1, 8, 8, 1)
    assert torch.equal(torch.from_numpy(names["images"].images).movedim(-1, 1), before)


def test_the_card_takes_what_lies_beside_the_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    beside = checkpoint.with_name(checkpoint.name + ".evaluation.json")
    beside.write_text(json.dumps(RESULTS))
    card(CardRequest(checkpoint, name="A title", overwrite=True), QUIET)
    text = (checkpoint / "README.md").read_text(encoding="utf-8")
    assert "# A title\n" in text
    assert "29.39 dB" in text
    assert "- method: rtn" in text
    beside.unlink()
    with pytest.raises(SpecError, match=r"owner/name, found '/tmp/x'"):
        card(CardRequest(checkpoint, base_model="/tmp/x", overwrite=True), QUIET)


def test_checkpoints_that_only_stepquant_opens_say_so(checkpoint: Path) -> None:
    plain = described(checkpoint)
    corrected = {**plain, "manifest": {**plain["manifest"], "correction": [4, 1]}}
    assert "stepquant.load(snapshot_download(" in text_of(checkpoint, description=corrected)
    assert "correction of the sampling steps" in text_of(checkpoint, description=corrected)
    assert "pipe(num_inference_steps=4)" in text_of(checkpoint)
    config = plain["manifest"]["denoiser"]["config"] | {"num_class_embeds": 10}
    told = {**plain["manifest"], "denoiser": {**plain["manifest"]["denoiser"], "config": config}}
    assert "pipe(class_labels=[0], num_inference_steps=4)" in text_of(
        checkpoint, description=plain | {"manifest": told}
    )
    pipeline = {**plain["manifest"]["pipeline"], "library": "stepquant", "class_name": "DenoiserPipeline"}
    own = text_of(checkpoint, description={**plain, "manifest": {**plain["manifest"], "pipeline": pipeline}})
    assert "denoiser=..." in own
    assert ModelCard(own).data.to_dict()["library_name"] == "stepquant"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("owner/name", "owner/name"),
        ("digits-unet", None),
        ("/a/b", None),
        ("./a/b", None),
        ("../x", None),
        (None, None),
    ],
)
def test_hub_ids(text: Any, expected: str | None) -> None:
    assert hub_id(text) == expected
