from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stepquant.errors import EvaluationError, SpecError
from stepquant.evaluate.folder import discard, evaluation_folder

IDENTITY = {"seeds": [1, 2], "steps": 4}


def test_what_is_kept_is_there_again(tmp_path: Path) -> None:
    work = tmp_path / "work"
    with evaluation_folder(work, IDENTITY) as folder:
        folder.save("one", {"a.x": torch.arange(3), "b.x": torch.ones(2), "b.y": torch.zeros(1)})
        assert "one" in folder
        assert "two" not in folder
    with evaluation_folder(work, IDENTITY, resume=True) as folder:
        assert folder.load("one")["a.x"].tolist() == [0, 1, 2]
        assert sorted(folder.load("one", ".x")) == ["a.x", "b.x"]
        assert sorted(folder.load("one", "b.y", "a.x")) == ["a.x", "b.y"]
    assert not list(work.glob("*.partial"))
    discard(work)
    assert not work.exists()
    discard(work)


def test_what_is_refused(tmp_path: Path) -> None:
    work = tmp_path / "work"
    with evaluation_folder(work, IDENTITY):
        pass
    with pytest.raises(SpecError, match="was interrupted"), evaluation_folder(work, IDENTITY):
        pass
    with (
        pytest.raises(SpecError, match="another evaluation: steps differ"),
        evaluation_folder(work, {**IDENTITY, "steps": 5}, resume=True),
    ):
        pass
    (work / "evaluation.json").write_text("{")
    with pytest.raises(EvaluationError, match="is damaged"), evaluation_folder(work, IDENTITY, resume=True):
        pass
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.png").write_text("cat")
    with pytest.raises(SpecError, match="no work folder"), evaluation_folder(other, IDENTITY, resume=True):
        pass
    with pytest.raises(SpecError, match="no work folder"):
        discard(other)
    assert (other / "cat.png").exists()


@pytest.mark.parametrize("cut", [0, 5, -3])
def test_a_damaged_batch_is_named(tmp_path: Path, cut: int) -> None:
    with evaluation_folder(tmp_path / "work", IDENTITY) as folder:
        folder.save("one", {"x": torch.ones(8)})
        path = tmp_path / "work" / "one.safetensors"
        path.write_bytes(path.read_bytes()[:cut])
        with pytest.raises(EvaluationError, match=r"one\.safetensors is damaged .* start anew"):
            folder.load("one")


def test_without_a_folder_nothing_stays() -> None:
    with evaluation_folder(None, IDENTITY) as folder:
        folder.save("one", {"x": torch.ones(1)})
        place = folder.folder
        assert place.is_dir()
    assert not place.exists()
