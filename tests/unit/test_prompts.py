"""Prompts from files and arguments of pipelines, as the command line takes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stepquant.calibrate.prompts import NEUTRAL, prompts_from
from stepquant.cli.arguments import parsed, ready, recorded_images, with_prompts
from stepquant.cli.work import QuantizeRequest, Sampling
from stepquant.config import resolve
from stepquant.errors import SpecError


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("# a list\n  a cat  \n\na dog\na tree\n", encoding="utf-8")
    return path


def test_lines_are_prompts(prompts: Path) -> None:
    assert prompts_from(prompts, 2) == ["a cat", "a dog"]
    assert prompts_from(prompts, 5) == ["a cat", "a dog", "a tree", "a cat", "a dog"]


def test_the_shipped_list_has_a_source_and_no_prompt_twice() -> None:
    found = prompts_from(NEUTRAL, 64)
    assert len(set(found)) == 64
    assert prompts_from(NEUTRAL, 65)[64] == found[0], "the list is longer than it says"
    import importlib.resources

    head = (importlib.resources.files("stepquant") / "assets" / "prompts" / "neutral.txt").read_text("utf-8")
    assert "# Source: " in head
    assert not any("#" in prompt for prompt in found)


def test_files_that_hold_no_prompts_are_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"nothing\.txt cannot be read: No such file.*'neutral'"):
        prompts_from(tmp_path / "nothing.txt", 1)
    (tmp_path / "empty.txt").write_text("# only this\n\n")
    with pytest.raises(SpecError, match=r"empty\.txt has no line with a prompt"):
        prompts_from(tmp_path / "empty.txt", 1)
    (tmp_path / "binary.txt").write_bytes(b"a\xff")
    with pytest.raises(SpecError, match=r"binary\.txt is not text in UTF-8 \(byte 1\)"):
        prompts_from(tmp_path / "binary.txt", 1)


def test_arguments(prompts: Path) -> None:
    given = parsed(["guidance_scale=5", f"prompt=@{prompts}", "negative_prompt=blurred, grey", "labels=[1, 2]"])
    assert given == {
        "guidance_scale": 5,
        "prompt": f"@{prompts}",
        "negative_prompt": "blurred, grey",
        "labels": [1, 2],
    }
    found = ready(given, 2)
    assert found["prompt"] == ["a cat", "a dog"]
    assert {key: found[key] for key in given if key != "prompt"} == {
        key: given[key] for key in given if key != "prompt"
    }
    with pytest.raises(SpecError, match="prompt was given twice"):
        parsed(["prompt=a", "prompt=b"])
    with pytest.raises(SpecError, match="takes key=value"):
        parsed(["a cat"])
    with pytest.raises(SpecError, match="prompt: @ stands before the name of a file"):
        ready({"prompt": "@"}, 1)


def test_pictures(tmp_path: Path) -> None:
    pixels = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    Image.fromarray(pixels).save(tmp_path / "p.png")
    found = ready({"image": f"@{tmp_path / 'p.png'}", "mask_image": f"@{tmp_path / 'p.png'}"}, 3)
    expected = torch.from_numpy(pixels).movedim(-1, 0) / 255
    assert found["image"].shape == (3, 3, 4, 5)
    assert all(torch.equal(one, expected) for one in found["image"])
    assert found["mask_image"].shape == (3, 1, 4, 5)
    (tmp_path / "no.png").write_text("text")
    with pytest.raises(SpecError, match=r"image: .*no\.png is no picture"):
        ready({"image": f"@{tmp_path / 'no.png'}"}, 1)
    with pytest.raises(SpecError, match=r"image: .*gone\.png cannot be read"):
        ready({"image": f"@{tmp_path / 'gone.png'}"}, 1)


def test_a_run_writes_its_prompts_out(prompts: Path, tmp_path: Path) -> None:
    """One for each recorded image, in the settings; from the file and the command line, argument by argument."""
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: m\nmethod: rtn\ncalibration_samples: 4\narguments:\n  prompt: '@{prompts}'\n  guidance_scale: 2\n"
    )
    flags = {"arguments": {"guidance_scale": 7}}
    resolved = QuantizeRequest(None, config, (), flags).resolved()
    assert recorded_images(resolved) == 4
    assert resolved.to_dict()["arguments"] == {
        "prompt": ["a cat", "a dog", "a tree", "a cat"],
        "guidance_scale": 7,
    }
    again = resolve(resolved.to_dict())
    assert again.to_dict() == resolved.to_dict()
    assert with_prompts(again) == again


def test_sampling_takes_a_prompt_for_each_seed(prompts: Path) -> None:
    sampling = Sampling([5, 6], arguments=(f"prompt=@{prompts}",))
    assert sampling.pipeline_arguments() == {"prompt": ["a cat", "a dog"]}
    assert sampling.pipeline_arguments(1) == {"prompt": ["a cat"]}
