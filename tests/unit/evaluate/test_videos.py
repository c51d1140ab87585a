"""Videos in an evaluation: figures of pairs by video, distances of distributions by frame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stepquant.errors import EvaluationError
from stepquant.evaluate.compare import evaluate
from stepquant.evaluate.features import ModuleFeatures
from stepquant.evaluate.paired import paired_columns
from stepquant.report.figures import levels

FRAMES = 3
SEEDS = [0, 1, 2, 3]


class Given:
    """Videos by seed, or each frame as an image: frame f of video s has the seed s * FRAMES + f."""

    seeds = None
    identity = "given"

    def __init__(self, name: str, videos: Tensor, *, frames: bool = False) -> None:
        self.name = name
        self._samples = videos.flatten(0, 1) if frames else videos

    def images(self, seeds: Sequence[int], *, steps: int | None, arguments: Mapping[str, Any]) -> Tensor:
        return self._samples[list(seeds)]


def videos() -> tuple[Tensor, Tensor]:
    """Candidates and references; the first pair is equal, of the second all frames but one."""
    generator = torch.Generator().manual_seed(0)
    reference = torch.rand(len(SEEDS), FRAMES, 3, 12, 12, generator=generator)
    noise = 0.1 * torch.rand(reference.shape, generator=generator)
    noise[0] = 0
    noise[1, 1:] = 0
    return (reference * 0.9 + noise).where(noise > 0, reference), reference


class Means(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([images.mean(dim=(2, 3)), images.amax(dim=(2, 3))], dim=1)


def measured(*, frames: bool, **options: Any) -> dict[str, Any]:
    seeds = range(len(SEEDS) * FRAMES) if frames else SEEDS
    ours, theirs = (Given(name, some, frames=frames) for name, some in zip("ab", videos(), strict=True))
    return evaluate(ours, theirs, seeds=list(seeds), steps=None, **{"batch_size": 2, **options})


def test_figures_of_pairs_are_means_over_the_frames_of_each_video() -> None:
    results = measured(frames=False, features="none")
    candidate, reference = videos()
    columns = paired_columns(candidate.flatten(0, 1), reference.flatten(0, 1))
    for name in ("psnr", "ssim", "mae"):
        each = columns[name].reshape(len(SEEDS), FRAMES).mean(dim=1)
        assert results["metrics"][name]["value"] == pytest.approx(float(each.mean()), rel=1e-12)
        assert float(each.min()) <= results["metrics"][name]["low"] < results["metrics"][name]["high"]
    assert results["n"] == len(SEEDS)
    assert results["metrics"]["psnr"]["identical"] == 1
    assert any("videos of 3 frames" in note for note in results["notes"])


def test_distances_take_every_frame_for_an_image() -> None:
    features = ModuleFeatures(Means().eval(), "means", dim=6)
    one, other = (measured(frames=frames, features=features)["metrics"] for frames in (False, True))
    for name in ("frechet_to_fp", "kid_to_fp", "precision", "recall"):
        assert one[name]["value"] == pytest.approx(other[name]["value"], rel=1e-9, abs=1e-12)
    assert one["frechet_to_fp"]["value"] > 0


def test_videos_of_other_lengths_are_refused() -> None:
    candidate, reference = videos()
    with pytest.raises(EvaluationError, match=r"different shapes: \[3, 3, 12, 12\] and \[2, 3, 12, 12\]"):
        evaluate(Given("a", candidate), Given("b", reference[:, :2]), seeds=SEEDS, steps=None, features="none")


def test_the_report_shows_first_frames() -> None:
    candidate, _ = videos()
    assert (levels(candidate) == levels(candidate[:, 0])).all()
    assert (levels(candidate) != levels(candidate[:, 1])).any()
