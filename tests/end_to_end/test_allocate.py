"""`stepquant allocate` through the whole program: a plan that `quantize` takes, and an allocation that goes on."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import DDIMPipeline, DDIMScheduler

import tiny
from stepquant.calibrate import allocation
from stepquant.cli.main import main

OPTIONS = (
    "model", "-o", "plan.yaml", "--target", "5bit", "--steps", 2, "--calibration-samples", 6, "--method", "rtn",
    "--set", "options.batch=2", "--set", "allocation.samples=4", "--set", "allocation.projections=1",
    "--set", "allocation.held_out=2", "--set", "allocation.refine=1",
)  # fmt: skip
Stepquant = Callable[..., tuple[int, str, str]]


@pytest.fixture
def stepquant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Stepquant:
    torch.set_num_threads(1)
    DDIMPipeline(tiny.tiny_unet(), DDIMScheduler()).save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("stepquant.cli.work.tune_allocator", lambda: True)

    def once(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main(["allocate", *map(str, arguments)])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        assert isinstance(stop.value.code, int)
        return stop.value.code, out, err.replace("\n", "")

    return once


def there(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "model")


def test_an_interrupted_allocation_goes_on(
    stepquant: Stepquant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, out, _ = stepquant(*OPTIONS)
    assert status == 0
    sizes = re.search(r"([\d,]+) bytes of layers \(about ([\d,]+) as a checkpoint\)", out)
    assert sizes is not None
    assert int(sizes[1].replace(",", "")) < int(sizes[2].replace(",", ""))
    assert there(tmp_path) == ["plan.yaml"]
    whole = (tmp_path / "plan.yaml").read_text()
    assert len(yaml.safe_load(whole)["rules"]) > 3
    (tmp_path / "plan.yaml").unlink()

    from stepquant.calibrate import sensitivity

    original: Any = sensitivity._products
    seen: list[int] = []

    def interrupted(*arguments: Any) -> Any:
        seen.append(len(seen))
        if len(seen) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(sensitivity, "_products", interrupted)
    status, _, err = stepquant(*OPTIONS)
    assert (status, there(tmp_path)) == (130, ["plan.yaml.work"])
    assert "plan.yaml.work" in err
    assert "--resume" in err
    status, _, err = stepquant(*OPTIONS)
    assert status == 2
    assert "plan.yaml.work holds a run that was interrupted" in err
    status, _, err = stepquant(*OPTIONS, "--resume", "--seed", 5)
    assert status == 2
    assert "another run: seed differ" in err
    assert there(tmp_path) == ["plan.yaml.work"]
    assert stepquant(*OPTIONS, "--resume")[0] == 0
    assert there(tmp_path) == ["plan.yaml"]
    assert (tmp_path / "plan.yaml").read_text() == whole
    assert len(seen) == 3, "the mini-batch that was finished is not differentiated again"


def test_what_is_refused_leaves_nothing(stepquant: Stepquant, tmp_path: Path) -> None:
    status, _, err = stepquant("model", "-o", "plan.yaml", "--target", "1bit", "--steps", 2)
    assert status == 2
    assert "is not possible" in err
    assert there(tmp_path) == []
    (tmp_path / "plan.yaml").write_text("mine")
    status, _, err = stepquant(*OPTIONS)
    assert status == 2
    assert "--overwrite" in err
    assert (tmp_path / "plan.yaml").read_text() == "mine"
    assert allocation.Allocate.gives == {"model", "plan"}, "nouns that a work folder keeps"
