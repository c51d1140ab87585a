"""Evaluations of the smallest pipelines. Oracles: the same figures computed at once from all images."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from scipy.linalg import sqrtm
from torch import Tensor, nn

import tiny
from stepquant.api import sample
from stepquant.calibrate.trajectory import record, seal
from stepquant.errors import CalibrationError, EvaluationError, SpecError
from stepquant.evaluate.arguments import plain_arguments
from stepquant.evaluate.compare import METRICS, NotFiniteImages, evaluate
from stepquant.evaluate.distributions import inception_score, kernel_distance, precision_recall
from stepquant.evaluate.drift import measure_drift
from stepquant.evaluate.features import Extracted, ModuleFeatures
from stepquant.evaluate.flat_field import noise_level, white_point
from stepquant.evaluate.images import save_png, to_uint8
from stepquant.evaluate.paired import PairedMetrics
from stepquant.evaluate.protocol import PROTOCOLS
from stepquant.model.correction import CorrectedScheduler, StepCorrection
from stepquant.model.pipeline import DenoiserPipeline
from stepquant.run import Run

SEEDS = list(range(40, 53))
STEPS = 3


class Pixels:
    """Four features, five logits and six spatial values of images [B, 2, 4, 4]."""

    name = "pixels"
    identity = "0123456789abcdef"
    dim = 4

    def __call__(self, images: Tensor) -> Tensor:
        return self.extract(images).features

    def extract(self, images: Tensor) -> Extracted:
        flat = images.flatten(1)
        return Extracted(flat[:, :4], 9 * flat[:, 4:9], flat[:, 10:16])


class Given:
    """Images that are there already; remembers which were asked for, and whether they are still alive."""

    def __init__(self, images: Mapping[int, Tensor], name: str = "given", stop_at: int | None = None) -> None:
        self._images = dict(images)
        self.name = self.identity = name
        self.seeds = sorted(images)
        self.stop_at = stop_at
        self.asked: list[int] = []
        self.alive: list[weakref.ref[Tensor]] = []
        self.most_alive = 0

    def images(self, seeds: Sequence[int], *, steps: int | None, arguments: Mapping[str, Any]) -> Tensor:
        if self.stop_at in seeds:
            raise KeyboardInterrupt
        self.asked += seeds
        found = torch.stack([self._images[seed] for seed in seeds])
        self.alive = [*(one for one in self.alive if one() is not None), weakref.ref(found)]
        self.most_alive = max(self.most_alive, len(self.alive))
        return found


def pipes() -> tuple[DenoiserPipeline, DenoiserPipeline]:
    """Candidate, with slightly other weights, and reference."""
    torch.manual_seed(1)
    reference = DenoiserPipeline(tiny.TinyNet(), DDIMScheduler(), (2, 4, 4))
    candidate = copy.deepcopy(reference)
    for parameter in candidate.denoiser.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return candidate, reference


def given(n: int = 13, *, shape: tuple[int, ...] = (1, 12, 12), noise: float = 0.1) -> tuple[Given, Given]:
    generator = torch.Generator().manual_seed(n)
    theirs = torch.rand(n, *shape, generator=generator)
    ours = (theirs + noise * torch.randn(theirs.shape, generator=generator)).clamp(0, 1)
    seeds = range(40, 40 + n)
    return Given(dict(zip(seeds, ours, strict=True)), "ours"), Given(dict(zip(seeds, theirs, strict=True)), "theirs")


def values(results: Mapping[str, Any]) -> dict[str, Any]:
    """All that was measured."""
    return {key: results[key] for key in ("metrics", "drift", "notes")}


def frechet(a: Tensor, b: Tensor) -> float:
    """By scipy's matrix square root, all at once."""
    one, other = a.double().numpy(), b.double().numpy()
    cov_a, cov_b = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    cross = np.trace(sqrtm(cov_a @ cov_b)).real
    return float(np.square(one.mean(0) - other.mean(0)).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


@pytest.fixture
def products() -> Iterator[list[Any]]:
    """torch's settings of products on a GPU, with TensorFloat-32."""
    if not hasattr(torch.backends.cudnn, "conv"):
        pytest.skip("torch before 2.9 has other settings")
    places: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn.conv]
    before = [place.fp32_precision for place in places]
    for place in places:
        place.fp32_precision = "tf32"
    yield places
    for place, value in zip(places, before, strict=True):
        place.fp32_precision = value


def test_networks_of_figures_do_without_tensorfloat(products: list[Any]) -> None:
    """Seen on a CPU: the settings are those of the whole process. Not run on a GPU."""
    seen: list[list[str]] = []

    class Watched(Pixels):
        def extract(self, images: Tensor) -> Extracted:
            seen.append([place.fp32_precision for place in products])
            return super().extract(images)

    candidate, reference = pipes()
    evaluate(candidate, reference, seeds=SEEDS[:4], steps=STEPS, features=Watched())
    assert seen
    assert all(one == ["ieee", "ieee"] for one in seen)
    assert [place.fp32_precision for place in products] == ["tf32", "tf32"]


def test_figures_are_those_of_all_images_at_once() -> None:
    candidate, reference = pipes()
    results = evaluate(candidate, reference, seeds=SEEDS, steps=STEPS, batch_size=5, features=Pixels())
    metrics = results["metrics"]
    ours, theirs = (sample(pipe, seeds=SEEDS, steps=STEPS, batch_size=5) for pipe in (candidate, reference))
    paired = PairedMetrics()
    paired.update(ours, theirs)
    assert metrics["psnr"]["value"] == pytest.approx(paired.result().psnr.mean, rel=1e-6)
    assert metrics["mae"]["low"] == pytest.approx(paired.result().mae.low, rel=1e-6)
    rules = PROTOCOLS["as-sampled"]
    one, other = Pixels().extract(ours), Pixels().extract(theirs)
    assert metrics["frechet_to_fp"]["value"] == pytest.approx(frechet(one.features, other.features), rel=1e-4)
    assert one.spatial is not None
    assert other.spatial is not None
    assert metrics["sfid_to_fp"]["value"] == pytest.approx(frechet(one.spatial, other.spatial), rel=1e-4)
    assert metrics["sfid_to_fp"]["spatial_features"] == 6
    kid = kernel_distance(one.features, other.features, rules, paired=True)
    assert metrics["kid_to_fp"]["value"] == pytest.approx(kid.mean, rel=1e-9)
    found = precision_recall(one.features, other.features, rules)
    assert (metrics["precision"]["value"], metrics["recall"]["value"]) == (found.precision, found.recall)
    assert one.logits is not None
    assert other.logits is not None
    assert metrics["inception_score"]["value"] == pytest.approx(inception_score(one.logits, rules).mean, rel=1e-9)
    assert metrics["inception_score"]["reference_value"] == pytest.approx(
        inception_score(other.logits, rules).mean, rel=1e-9
    )
    assert set(metrics) == set(METRICS) - {"ssim", "lpips", "clip_score", "frechet_to_data"}
    json.dumps(results, allow_nan=False)


def test_drift_is_that_of_all_trajectories_at_once() -> None:
    candidate, reference = pipes()
    results = evaluate(candidate, reference, seeds=SEEDS, steps=STEPS, batch_size=5, features="none")
    recorded = record(reference, reference.denoiser, seeds=SEEDS, steps=STEPS, batch_size=5, run=Run())
    expected = measure_drift(candidate.denoiser, [seal(one) for one in recorded])
    for name, curve in expected.to_dict().items():
        assert results["drift"][name] == pytest.approx(curve)
    assert results["drift"]["timesteps"] == [float(step.timestep) for step in recorded[0].steps]
    metrics = results["metrics"]
    assert metrics["drift_final"]["value"] == pytest.approx(expected.accumulated[-1])
    assert metrics["cosine_final"]["value"] == pytest.approx(expected.cosine[-1])
    assert metrics["cosine_final"]["low"] < metrics["cosine_final"]["value"] < metrics["cosine_final"]["high"]
    latents = {
        side: torch.cat(
            [
                pipe(
                    generator=[torch.Generator().manual_seed(seed) for seed in batch],
                    batch_size=len(batch),
                    num_inference_steps=STEPS,
                    output_type="latent",
                ).images
                for batch in (SEEDS[:5], SEEDS[5:10], SEEDS[10:])
            ]
        )
        for side, pipe in (("candidate", candidate), ("reference", reference))
    }
    flat = results["drift"]["flat_field"]
    for side, final in latents.items():
        assert flat["noise_level"][side][-1] == pytest.approx(float(noise_level(final).mean()), rel=1e-5)
        assert flat["white_point"][side][-1] == pytest.approx(white_point(final).mean(dim=0).tolist(), rel=1e-5)
        assert len(flat["noise_level"][side]) == len(flat["white_point"][side]) == STEPS
    means = [white_point(latents[side]).mean(dim=0) for side in ("candidate", "reference")]
    assert metrics["white_point_shift"]["value"] == pytest.approx(float((means[0] - means[1]).abs().max()), rel=1e-4)
    assert metrics["noise_level"]["reference_value"] == flat["noise_level"]["reference"][-1]


def test_every_figure_says_where_it_comes_from() -> None:
    candidate, reference = pipes()
    results = evaluate(candidate, reference, seeds=[1, 2, 3, 7], steps=STEPS, features=Pixels(), protocol="adm")
    for name, metric in results["metrics"].items():
        assert (metric["n"], metric["seeds"]) == (4, "1-3,7"), name
        assert len(metric["reference"]) == 64
        assert metric["reference"] != metric["candidate"]
    for name in ("frechet_to_fp", "kid_to_fp", "precision", "sfid_to_fp"):
        beside = results["metrics"][name]
        assert (beside["features"], beside["feature_identity"]) == ("pixels", Pixels.identity)
        assert beside["protocol"] == "adm"
    again = evaluate(reference, reference, seeds=[1, 2], steps=STEPS, features="none")
    assert again["metrics"]["psnr"]["reference"] == results["metrics"]["psnr"]["reference"]


def test_batches_are_dropped() -> None:
    ours, theirs = given(40)
    evaluate(ours, theirs, seeds=ours.seeds, steps=None, batch_size=4, features="none")
    assert ours.asked == theirs.asked == ours.seeds
    assert max(ours.most_alive, theirs.most_alive) <= 2


@pytest.mark.parametrize("stop_at", [40, 47, 52])
def test_a_resumed_evaluation_ends_with_the_same_figures(tmp_path: Path, stop_at: int) -> None:
    common: dict[str, Any] = {"seeds": SEEDS, "steps": None, "batch_size": 3, "features": Pixels()}
    whole = evaluate(*given(), **common)
    run = Run(work=tmp_path / "work")
    ours, theirs = given()
    theirs.stop_at = stop_at
    with pytest.raises(KeyboardInterrupt):
        evaluate(ours, theirs, run=run, **common)
    with pytest.raises(SpecError, match="was interrupted"):
        evaluate(*given(), run=run, **common)
    ours, theirs = given()
    resumed = evaluate(ours, theirs, run=run, resume=True, **common)
    assert values(resumed) == values(whole)
    first = 40 + (stop_at - 40) // 3 * 3
    assert ours.asked == list(range(first, 53)), "what is finished is not sampled again"
    with pytest.raises(SpecError, match="another evaluation: batch_size, protocol differ"):
        evaluate(*given(), run=run, resume=True, **(common | {"batch_size": 4, "protocol": "clean"}))


def test_drift_is_resumed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stepquant.evaluate import compare

    candidate, reference = pipes()
    common: dict[str, Any] = {"seeds": SEEDS, "steps": STEPS, "batch_size": 5, "features": "none"}
    whole = evaluate(candidate, reference, **common)
    calls: list[int] = []
    original = compare.drift_curves

    def interrupted(*args: Any) -> Any:
        calls.append(len(calls))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(compare, "drift_curves", interrupted)
    run = Run(work=tmp_path / "work")
    with pytest.raises(KeyboardInterrupt):
        evaluate(candidate, reference, run=run, **common)
    assert values(evaluate(candidate, reference, run=run, resume=True, **common)) == values(whole)
    assert len(calls) == 4


def test_a_folder_on_one_side(tmp_path: Path) -> None:
    from stepquant.evaluate.source import ImageFolder

    torch.manual_seed(1)
    reference = DenoiserPipeline(nn.Sequential(), DDIMScheduler(), (1, 12, 12))
    reference.denoiser = Shrinking()
    images = sample(reference, seeds=SEEDS, steps=STEPS)
    for image, seed in zip(images, SEEDS, strict=True):
        save_png(image, tmp_path, seed=seed)
    folder = ImageFolder(tmp_path)
    results = evaluate(folder, reference, seeds=SEEDS, steps=STEPS, batch_size=4)
    metrics = results["metrics"]
    assert set(metrics) == {"psnr", "ssim", "mae"}
    # Both sides are rounded to 8 bits: a model is identical to its own images.
    assert (metrics["mae"]["value"], metrics["psnr"]["identical"]) == (0, len(SEEDS))
    turned = evaluate(reference, folder, seeds=SEEDS, steps=STEPS, batch_size=4)
    assert turned["metrics"]["psnr"]["identical"] == len(SEEDS)
    assert any(note.startswith("Both sides are rounded to 8 bits") for note in results["notes"])
    candidate = copy.deepcopy(reference)
    candidate.denoiser = Shrinking(0.69)
    rounded = [to_uint8(sample(pipe, seeds=SEEDS, steps=STEPS)).float() / 255 for pipe in (candidate, reference)]
    error = (rounded[0] - rounded[1]).abs().flatten(1).mean(1)
    found = evaluate(candidate, folder, seeds=SEEDS, steps=STEPS)["metrics"]["mae"]["value"]
    assert found == pytest.approx(float(error.mean()), rel=1e-6)
    assert any("No drift: it needs two pipelines" in note for note in results["notes"])
    assert results["drift"] == {}
    assert results["scheduler"] == "DDIMScheduler"
    both = evaluate(folder, folder, seeds=SEEDS, steps=None)
    assert (both["steps"], both["scheduler"]) == (None, None)
    assert both["metrics"]["psnr"]["identical"] == len(SEEDS)
    assert not any("8 bits" in note for note in both["notes"])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:60]), "000052.png cannot be read as a PNG image"),
        (
            lambda path: save_png(torch.rand(1, 12, 11), path.parent, seed=52),
            r"000052.png is \(1, 12, 11\), but 000040",
        ),
        (
            lambda path: save_png(torch.rand(3, 12, 12), path.parent, seed=52),
            r"000052.png is \(3, 12, 12\), but 000040",
        ),
    ],
)
def test_a_damaged_file_is_named_before_anything_is_sampled(
    tmp_path: Path, damage: Callable[[Path], Any], words: str
) -> None:
    from stepquant.evaluate.source import ImageFolder

    ours, theirs = given()
    for image, seed in zip(theirs.images(theirs.seeds, steps=None, arguments={}), theirs.seeds, strict=True):
        save_png(image, tmp_path, seed=seed)
    damage(tmp_path / "000052.png")
    folder = ImageFolder(tmp_path)
    with pytest.raises(EvaluationError, match=words):
        evaluate(ours, folder, seeds=ours.seeds, steps=None, batch_size=4)
    assert ours.asked == []
    assert evaluate(ours, folder, seeds=ours.seeds[:-1], steps=None)["n"] == 12  # a seed that is not wanted


class Shrinking(nn.Module):
    """The noise is a part of the sample."""

    def __init__(self, part: float = 0.7) -> None:
        super().__init__()
        self.part = part

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        return self.part * sample


def test_two_sides_that_do_not_go_together() -> None:
    ours, theirs = given()
    narrow = Given({seed: torch.rand(1, 12, 10) for seed in ours.seeds}, "narrow")
    with pytest.raises(EvaluationError, match=r"ours and narrow .* \[1, 12, 12\] and \[1, 12, 10\]"):
        evaluate(ours, narrow, seeds=SEEDS, steps=None)
    coloured = Given({seed: torch.rand(3, 12, 12) for seed in ours.seeds}, "coloured")
    with pytest.raises(EvaluationError, match=r"coloured and theirs .* \[3, 12, 12\] and \[1, 12, 12\]"):
        evaluate(coloured, theirs, seeds=SEEDS, steps=None)
    candidate, reference = pipes()
    candidate.scheduler = DDIMScheduler(beta_end=0.03)
    with pytest.raises(EvaluationError, match="beta_end"):
        evaluate(candidate, reference, seeds=SEEDS, steps=STEPS)
    with pytest.raises(
        EvaluationError, match=r"ours has no images of 1 of the 2 seeds, the first of them 7\. .* 40-52"
    ):
        evaluate(ours, theirs, seeds=[40, 7], steps=None)
    with pytest.raises(EvaluationError, match="say with how many steps"):
        evaluate(ours, reference, seeds=SEEDS, steps=None)
    broken = Given({seed: torch.full((1, 12, 12), torch.nan if seed > 41 else 0.5) for seed in ours.seeds}, "broken")
    with pytest.raises(
        NotFiniteImages, match=r"2 of 4 images of broken, seeds 40-43, hold NaN .*`stepquant doctor"
    ) as no:
        evaluate(broken, theirs, seeds=SEEDS, steps=None, batch_size=4)
    assert (no.value.results["metrics"], no.value.results["drift"]) == ({}, {})
    assert no.value.results["notes"] == [f"No figures: {no.value}"]


def test_settings_that_make_no_sense() -> None:
    ours, theirs = given()
    with pytest.raises(SpecError, match="at least one seed"):
        evaluate(ours, theirs, seeds=[], steps=None)
    with pytest.raises(SpecError, match="Did you mean 'adm'"):
        evaluate(ours, theirs, seeds=SEEDS, steps=None, protocol="adn")
    with pytest.raises(SpecError, match="features must be"):
        evaluate(ours, theirs, seeds=SEEDS, steps=None, features="digits")


@pytest.mark.parametrize(
    ("n", "missing"),
    [(1, {"frechet_to_fp", "kid_to_fp", "precision", "inception_score"}), (3, {"precision", "inception_score"}),
     (4, {"inception_score"}), (10, set())],
)  # fmt: skip
def test_few_images(n: int, missing: set[str]) -> None:
    ours, theirs = given(n)
    results = evaluate(ours, theirs, seeds=ours.seeds, steps=None, features=Pixels())
    asked = {"frechet_to_fp", "kid_to_fp", "precision", "inception_score"}
    assert asked - set(results["metrics"]) == missing
    said = " ".join(results["notes"])
    for name, words in (("precision", "No precision and recall"), ("inception_score", "No Inception score")):
        assert (words in said) == (name in missing and n > 1)
    assert ("No Frechet distances" in said) == (n == 1)


@pytest.mark.parametrize("place", [0, 1])
def test_a_white_point_that_is_not_finite_stays_so(monkeypatch: pytest.MonkeyPatch, place: int) -> None:
    """Whichever channel it is: Python's maximum would lose a NaN that is not the first."""
    from stepquant.evaluate import compare

    whole = compare.flat_field

    def broken(curves: Any) -> Any:
        found = whole(curves)
        found["white_point"]["candidate"][-1][place] = math.nan
        return found

    monkeypatch.setattr(compare, "flat_field", broken)
    candidate, reference = pipes()
    results = evaluate(candidate, reference, seeds=[1, 2], steps=STEPS, features="none")
    assert math.isnan(results["metrics"]["white_point_shift"]["value"])


def test_small_images_lose_ssim_and_nothing_else() -> None:
    ours, theirs = given(shape=(1, 10, 12))
    results = evaluate(ours, theirs, seeds=SEEDS, steps=None, features="none", remarks=["No LPIPS: no file."])
    assert set(results["metrics"]) == {"psnr", "mae"}
    assert "No SSIM: its window is 11 x 11 pixels, the images are 10 x 12." in results["notes"]
    assert results["notes"][0] == "No LPIPS: no file."


def test_shipped_features_of_grey_digits() -> None:
    ours, theirs = given(12, shape=(1, 32, 32))
    results = evaluate(ours, theirs, seeds=ours.seeds, steps=None)
    assert {"frechet_to_fp", "frechet_to_data", "sfid_to_fp", "inception_score"} <= set(results["metrics"])
    assert results["features"].startswith("digit-classifier (")
    assert results["protocol"] == "as-sampled"
    assert any("badly biased" in note for note in results["notes"])


def test_a_protocol_rounds() -> None:
    ours, theirs = given(20)
    exact = evaluate(ours, theirs, seeds=ours.seeds, steps=None, features=Pixels())
    rounded = evaluate(ours, theirs, seeds=ours.seeds, steps=None, features=Pixels(), protocol="clean")
    a, b = (found["metrics"]["frechet_to_fp"]["value"] for found in (exact, rounded))
    assert a != b
    assert a == pytest.approx(b, rel=0.05)
    assert exact["metrics"]["psnr"]["value"] == rounded["metrics"]["psnr"]["value"]


def test_features_that_want_another_size() -> None:
    class Sized(Pixels):
        size = 8

        def extract(self, images: Tensor) -> Extracted:
            assert images.shape[2:] == (8, 8)
            return super().extract(images)

    ours, theirs = given()
    results = evaluate(ours, theirs, seeds=SEEDS, steps=None, features=Sized())
    assert results["protocol"] == "clean"
    assert any("grey" in note for note in results["notes"])
    with pytest.raises(SpecError, match="want 8 x 8"):
        evaluate(ours, theirs, seeds=SEEDS, steps=None, features=Sized(), protocol="as-sampled")


def test_arguments_are_cut_with_the_seeds() -> None:
    class Labelled(DenoiserPipeline):
        def __call__(
            self, *, labels: list[float], batch_size: int, generator: Any, num_inference_steps: int, output_type: Any
        ) -> Any:
            found = super().__call__(
                batch_size=batch_size, generator=generator, num_inference_steps=num_inference_steps
            )
            assert len(labels) == len(found.images)
            shifted = found.images * 0 + np.array(labels, dtype=np.float32).reshape(-1, 1, 1, 1)
            return type(found)(shifted)

    pipe = Labelled(tiny.TinyNet(), DDIMScheduler(), (2, 4, 4))
    labels = [index / 20 for index in range(len(SEEDS))]
    other = Given({seed: torch.zeros(2, 4, 4) for seed in SEEDS})
    results = evaluate(pipe, other, seeds=SEEDS, steps=STEPS, batch_size=4, arguments={"labels": labels})
    assert results["metrics"]["mae"]["value"] == pytest.approx(np.mean(labels), rel=1e-5)


def test_a_result_says_what_the_pipelines_were_called_with() -> None:
    ours, theirs = given(4)
    common: dict[str, Any] = {"seeds": ours.seeds, "steps": None, "features": "none"}
    embeddings = torch.arange(8.0).view(4, 2)
    arguments = {"prompt": list("abcd"), "guidance_scale": 7.5, "class_labels": [1, 2, 3, 4], "eta": float("nan"),
                 "prompt_embeds": embeddings, "size": (8, 8), "kwargs": {"scale": None}}  # fmt: skip
    kept = evaluate(ours, theirs, arguments=arguments, **common)["arguments"]
    json.dumps(kept, allow_nan=False)
    assert (kept["prompt"], kept["guidance_scale"], kept["class_labels"]) == (list("abcd"), 7.5, [1, 2, 3, 4])
    assert (kept["eta"], kept["size"], kept["kwargs"]) == ("nan", [8, 8], {"scale": None})
    digest = hashlib.sha256(np.arange(8, dtype="<f4").tobytes()).hexdigest()
    assert kept["prompt_embeds"] == {"dtype": "float32", "shape": [4, 2], "sha256": digest}
    assert evaluate(ours, theirs, **common)["arguments"] == {}
    # One picture for all images is a view that would fill the memory if it were written out.
    wide = plain_arguments({"image": torch.ones(3, 4, 4).expand(10**9, 3, 4, 4), "mask": Image.new("L", (3, 2), 7)})
    assert wide["image"]["shape"] == [10**9, 3, 4, 4]
    assert wide["image"]["sha256"] == hashlib.sha256(np.ones(48, dtype="<f4").tobytes()).hexdigest()
    assert wide["mask"] == {"dtype": "L", "shape": [3, 2], "sha256": hashlib.sha256(bytes([7] * 6)).hexdigest()}


def test_other_embeddings_are_another_evaluation(tmp_path: Path) -> None:
    """Also where their difference is in the part that a tensor's repr leaves out."""
    run = Run(work=tmp_path / "work")
    common: dict[str, Any] = {"seeds": SEEDS, "steps": None, "features": "none", "run": run}
    embeddings = torch.zeros(13, 2000)
    evaluate(*given(), arguments={"prompt_embeds": embeddings}, **common)
    other = embeddings.clone()
    other[6, 1000] = 1
    assert repr(other) == repr(embeddings)
    with pytest.raises(SpecError, match="another evaluation: arguments differ"):
        evaluate(*given(), arguments={"prompt_embeds": other}, resume=True, **common)


def test_seconds_of_sampling_and_of_measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that only sampling one side and computing features move on."""
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    class Slow(Given):
        def images(self, seeds: Sequence[int], *, steps: int | None, arguments: Mapping[str, Any]) -> Tensor:
            clock[0] += 50
            return super().images(seeds, steps=steps, arguments=arguments)

    class SlowPixels(Pixels):
        def extract(self, images: Tensor) -> Extracted:
            clock[0] += 2
            return super().extract(images)

    ours, theirs = given()
    slow = Slow(ours._images, "ours", stop_at=50)
    common: dict[str, Any] = {"seeds": SEEDS, "steps": None, "batch_size": 5, "features": SlowPixels()}
    run = Run(work=tmp_path / "work")
    with pytest.raises(KeyboardInterrupt):
        evaluate(slow, theirs, run=run, **common)
    slow.stop_at = None
    seconds = evaluate(slow, theirs, run=run, resume=True, **common)["seconds"]
    # Three batches, the first two of them in the run before; features of two sides each.
    assert seconds == {"sampling": 150.0, "metrics": 12.0, "drift": 0.0}


def test_seconds_of_drift() -> None:
    candidate, reference = pipes()
    seconds = evaluate(candidate, reference, seeds=[1], steps=STEPS, features="none")["seconds"]
    assert min(seconds["sampling"], seconds["drift"]) > 0


def test_drift_that_cannot_be_measured_costs_no_other_figure() -> None:
    candidate, reference = pipes()
    results = evaluate(candidate, Hidden(reference), seeds=SEEDS[:4], steps=STEPS)
    assert set(results["metrics"]) == {"psnr", "mae"}
    assert any(note.startswith("No drift: ") for note in results["notes"])


class Hidden:
    """A pipeline whose network nobody finds."""

    def __init__(self, inside: DenoiserPipeline) -> None:
        self._inside, self.scheduler = inside, inside.scheduler

    def __call__(self, *, batch_size: int, generator: Any, num_inference_steps: int, output_type: Any) -> Any:
        return self._inside(batch_size=batch_size, generator=generator, num_inference_steps=num_inference_steps)


def test_a_corrected_reference_has_no_drift() -> None:
    candidate, reference = pipes()
    reference.scheduler.set_timesteps(STEPS)
    correction = StepCorrection.identity(reference.scheduler.timesteps.float(), 2)
    reference.scheduler = CorrectedScheduler(reference.scheduler, correction)
    results = evaluate(candidate, reference, seeds=SEEDS[:4], steps=STEPS)
    assert "drift_final" not in results["metrics"]
    assert any("corrects its own predictions" in note for note in results["notes"])


def test_any_torch_module() -> None:
    ours, theirs = given()
    module = nn.Sequential(nn.Flatten(), nn.Linear(144, 3)).eval()
    results = evaluate(ours, theirs, seeds=SEEDS, steps=None, features=ModuleFeatures(module, "mine", dim=3))
    flat = [torch.stack([side._images[seed] for seed in SEEDS]).flatten(1) for side in (ours, theirs)]
    expected = frechet(*(module[1](rows).detach() for rows in flat))
    assert results["metrics"]["frechet_to_fp"]["value"] == pytest.approx(expected, rel=1e-4)
    assert "inception_score" not in results["metrics"]
    assert "sfid_to_fp" not in results["metrics"]


def test_drift_of_a_candidate_in_another_dtype() -> None:
    candidate, reference = pipes()
    same = evaluate(candidate, reference, seeds=[1, 2], steps=STEPS, features="none")
    candidate.denoiser.double()
    other = evaluate(candidate, reference, seeds=[1, 2], steps=STEPS, features="none")
    assert other["drift"]["accumulated"] == pytest.approx(same["drift"]["accumulated"], rel=1e-4)


def test_a_trajectory_that_cannot_be_recorded_costs_only_the_drift(monkeypatch: pytest.MonkeyPatch) -> None:
    from stepquant.evaluate import compare

    def failing(*_arguments: Any, **_options: Any) -> Any:
        raise CalibrationError("The prediction is not finite.")

    monkeypatch.setattr(compare, "record", failing)
    results = evaluate(*pipes(), seeds=[1, 2], steps=STEPS, features="none")
    assert "psnr" in results["metrics"]
    assert "No drift: The prediction is not finite." in results["notes"]


def test_one_image_has_no_interval() -> None:
    metrics = evaluate(*pipes(), seeds=[1], steps=STEPS, features="none")["metrics"]
    for name in ("psnr", "mae", "cosine_final"):
        assert not {"low", "high"} & set(metrics[name]), name
