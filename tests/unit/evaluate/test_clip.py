"""CLIP score with a tiny CLIP model of random weights. Oracles: the parts of the model by hand, and torchmetrics."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from stepquant.cli.main import main
from stepquant.errors import EvaluationError, SpecError
from stepquant.evaluate.clip import ClipScore, prompts_for
from stepquant.evaluate.compare import evaluate
from stepquant.evaluate.images import save_png, to_uint8
from stepquant.evaluate.weights import MissingWeights

transformers = pytest.importorskip("transformers")

SIDE = 16
LENGTH = 12
PROMPTS = ["a cat", "two dogs in the rain", "b", "a very long sentence about nothing at all"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP model in the format of transformers whose tokens are letters."""
    place = tmp_path_factory.mktemp("clip") / "tiny-clip"
    place.mkdir()
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    for letter in "abcdefghijklmnopqrstuvwxyz":
        vocabulary |= {letter: len(vocabulary), f"{letter}</w>": len(vocabulary) + 1}
    (place / "vocab.json").write_text(json.dumps(vocabulary))
    (place / "merges.txt").write_text("#version: 0.2\n")
    ends = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (place / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", **ends}))
    preparation = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": SIDE},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": SIDE, "width": SIDE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.2, 0.3, 0.4],
        "do_convert_rgb": True,
    }
    (place / "preprocessor_config.json").write_text(json.dumps(preparation))
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": len(vocabulary), "max_position_embeddings": LENGTH, "bos_token_id": 0}
    config = transformers.CLIPConfig(
        text_config={**text, "eos_token_id": 1},
        vision_config={**small, "image_size": SIDE, "patch_size": 8},
        projection_dim=8,
    )
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = transformers.CLIPModel(config)
        for parameter in model.parameters():  # the usual ones are so small that all images look alike
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def clip(folder: Path) -> ClipScore:
    return ClipScore.from_pretrained(folder)


def some_images(n: int = 4, *, channels: int = 3, rows: int = 24, columns: int = 20) -> Tensor:
    return torch.rand(n, channels, rows, columns, generator=torch.Generator().manual_seed(n))


def by_hand(clip: ClipScore, images: Tensor, prompts: Sequence[str]) -> list[float]:
    """One image at a time: Pillow, the normalisation written out, letters as tokens, and the two towers."""
    model = clip._model
    scores = []
    for image, prompt in zip(to_uint8(images), prompts, strict=True):
        picture = Image.fromarray(image.movedim(0, -1).numpy())
        width, height = picture.size
        short = min(width, height)
        size = (int(width * SIDE / short), int(height * SIDE / short))
        pixels = np.asarray(picture.resize(size, Image.Resampling.BICUBIC)).astype(np.float64) / 255
        top, left = (size[1] - SIDE) // 2, (size[0] - SIDE) // 2
        pixels = (pixels[top : top + SIDE, left : left + SIDE] - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4]
        tokens = [0]
        for word in prompt.split():
            numbers = [2 * (ord(letter) - ord("a")) + 2 for letter in word]
            tokens += [*numbers[:-1], numbers[-1] + 1]
        tokens = [*tokens[: LENGTH - 1], 1]
        with torch.no_grad():
            seen = model.vision_model(torch.tensor(pixels).movedim(-1, 0).float()[None]).pooler_output
            # The text's embedding is what stands at its end.
            read = model.text_model(torch.tensor([tokens])).last_hidden_state[:, -1]
            one, other = model.visual_projection(seen)[0].numpy(), model.text_projection(read)[0].numpy()
        scores.append(max(0.0, 100 * float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))))
    return scores


def test_score_is_the_formula(clip: ClipScore) -> None:
    images = some_images()
    found = clip(images, PROMPTS)
    expected = by_hand(clip, images, PROMPTS)
    assert found.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert max(expected) - min(expected) > 1


def test_a_negative_cosine_counts_as_0(clip: ClipScore) -> None:
    turned = copy.deepcopy(clip._model)
    turned.text_projection.weight.data *= -1
    opposite = ClipScore(turned, clip._image_processor, clip._tokenizer, "opposite")
    assert float(clip(some_images(), PROMPTS).min()) > 0
    assert opposite(some_images(), PROMPTS).tolist() == [0.0] * 4


def test_score_is_that_of_torchmetrics(clip: ClipScore) -> None:
    """Which cannot use transformers 5 by itself: its parts return objects there."""
    from torchmetrics.functional.multimodal.clip_score import _clip_score_update

    class Parts(nn.Module):
        config = clip._model.config

        def get_image_features(self, pixel_values: Tensor) -> Tensor:
            return clip._model.visual_projection(clip._model.vision_model(pixel_values).pooler_output)

        def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            found = clip._model.text_model(input_ids, attention_mask=attention_mask)
            return clip._model.text_projection(found.pooler_output)

    def processor(*, images: Any = None, text: Any = None, **options: Any) -> Any:
        if images is not None:
            return clip._image_processor(images=images, return_tensors="pt")
        return clip._tokenizer(text, **options)

    images, short = some_images(), ["a cat", "two", "b", "a sun"]  # theirs cuts the end off long ones
    theirs, n = _clip_score_update(to_uint8(images), short, Parts(), processor)  # type: ignore[arg-type]
    assert n == 4
    found = clip(images, short)
    assert found.tolist() == pytest.approx(theirs.detach().clamp_min(0).tolist(), rel=1e-4, abs=1e-4)


def test_grey_images_count_as_rgb(clip: ClipScore) -> None:
    grey = some_images(channels=1)
    assert torch.equal(clip(grey, PROMPTS), clip(grey.expand(4, 3, 24, 20), PROMPTS))
    with pytest.raises(EvaluationError, match="expected \\[B, 1, H, W\\] or \\[B, 3, H, W\\]"):
        clip(some_images(channels=2), PROMPTS)
    with pytest.raises(EvaluationError, match="got 4 images and 1 prompts"):
        clip(grey, ["a cat"])


def test_name_and_identity_tell_the_backbone(clip: ClipScore, folder: Path, tmp_path: Path) -> None:
    assert clip.name == "tiny-clip"
    assert clip.identity == ClipScore.from_pretrained(str(folder)).identity
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    network = transformers.CLIPModel.from_pretrained(folder)
    network.logit_scale.data += 1
    network.save_pretrained(other)
    assert ClipScore.from_pretrained(other).identity != clip.identity


@pytest.mark.parametrize("name", ["nowhere/at-all", "tiny-clip", "/no/such/folder"])
def test_a_model_that_is_not_there(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    wanted = "nowhere/at-all" if name == "nowhere/at-all" else "openai/clip-vit-base-patch16"
    with pytest.raises(MissingWeights, match=f"{name} is no folder .* `hf download {wanted}`.* give a folder with"):
        ClipScore.from_pretrained(name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingWeights, match=r"empty holds no CLIP model: it has no config\.json"):
        ClipScore.from_pretrained("empty")


def damaged(folder: Path, how: str) -> None:
    weights = folder / "model.safetensors"
    config = json.loads((folder / "config.json").read_text())
    if how == "cut":
        weights.write_bytes(weights.read_bytes()[:500])
    elif how == "none":
        weights.unlink()
    elif how == "part":
        from safetensors.torch import load_file, save_file

        tensors = load_file(weights)
        del tensors["visual_projection.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})
    elif how == "json":
        (folder / "config.json").write_text("{")
    elif how == "type":
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "siglip"}))
    else:
        (folder / "preprocessor_config.json").unlink()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("cut", "cannot be read as a CLIP model"),
        ("none", "cannot be read as a CLIP model"),
        ("part", "1 tensors are missing .* for example visual_projection.weight"),
        ("json", "config.json cannot be read"),
        ("type", "of type 'siglip', expected 'clip'"),
        ("preparation", "cannot be read as a CLIP model"),
    ],
)
def test_a_damaged_model(how: str, words: str, folder: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(folder, copied)
    damaged(copied, how)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own, about the type
        with pytest.raises(EvaluationError, match=words) as raised:
            ClipScore.from_pretrained(copied)
    assert not isinstance(raised.value, MissingWeights)
    assert "copied" in str(raised.value)


def test_prompts() -> None:
    assert prompts_for({"prompt": "a cat"}, 3) == ["a cat"] * 3
    assert prompts_for({"prompt": ["a", "b"]}, 2) == ["a", "b"]
    for arguments in ({}, {"prompt": None}, {"prompt": []}, {"prompt": [1, 2]}, {"prompt_embeds": torch.ones(2)}):
        assert prompts_for(arguments, 2) is None
    with pytest.raises(SpecError, match="prompt has 3 entries for 2 seeds"):
        prompts_for({"prompt": ["a", "b", "c"]}, 2)


class Given:
    """Images that are there already."""

    def __init__(self, images: Tensor, name: str) -> None:
        self._images, self.name, self.identity = images, name, name
        self.seeds = list(range(len(images)))

    def images(self, seeds: Sequence[int], *, steps: int | None, arguments: Any) -> Tensor:
        return self._images[list(seeds)]


def test_in_an_evaluation(clip: ClipScore) -> None:
    ours, theirs = some_images(), some_images().flip(0)
    sources = Given(ours, "ours"), Given(theirs, "theirs")
    common: dict[str, Any] = {"seeds": range(4), "steps": None, "features": "none", "batch_size": 3, "clip": clip}
    results = evaluate(*sources, arguments={"prompt": PROMPTS}, **common)
    figure = results["metrics"]["clip_score"]
    expected = by_hand(clip, ours, PROMPTS)
    assert figure["value"] == pytest.approx(np.mean(expected), rel=1e-4)
    assert figure["low"] < figure["value"] < figure["high"]
    assert figure["reference_value"] == pytest.approx(np.mean(by_hand(clip, theirs, PROMPTS)), rel=1e-4)
    assert (figure["features"], figure["feature_identity"]) == ("tiny-clip", clip.identity)
    without = evaluate(*sources, **common)
    assert "clip_score" not in without["metrics"]
    assert any(note.startswith("No CLIP score: it needs the prompts") for note in without["notes"])
    with pytest.raises(SpecError, match="prompt has 1 entries for 4 seeds"):
        evaluate(*sources, arguments={"prompt": ["a"]}, **common)


def test_by_the_command(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("stepquant.cli.work.tune_allocator", lambda: True)
    for seed, image in enumerate(some_images(2)):
        save_png(image, tmp_path / "images", seed=seed)

    def once(*options: str) -> dict[str, Any]:
        with pytest.raises(SystemExit) as stop:
            main(["evaluate", "images", "--against", "images", "--features", "none", "--json", *options])
        assert stop.value.code == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    results = once("--clip", str(folder), "--argument", "prompt=a cat", "--fail-if", "clip_score<0")
    assert results["metrics"]["clip_score"]["features"] == "tiny-clip"
    assert results["gates"] == [
        {"gate": "clip_score<0", "value": results["metrics"]["clip_score"]["value"], "failed": False}
    ]
    results = once("--clip", "nowhere", "--argument", "prompt=a cat")
    assert set(results["metrics"]) == {"psnr", "ssim", "mae"}
    assert any(note.startswith("No CLIP score: nowhere is no folder") for note in results["notes"])
