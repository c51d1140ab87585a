"""CLIP score: how well an image fits the prompt that it was made from (Hessel et al. 2021).

    score(image, prompt) = 100 max(0, cos(E_image, E_prompt))

E are the projected embeddings of a CLIP model in the format of transformers, from a folder or from the local cache of
the hub; nothing is downloaded. Images are rounded to 8 bits and prepared as the model's own preprocessor_config.json
says, by Pillow: the figure does not depend on whether torchvision is installed, whose resize differs. Prompts are cut
to the length that the model takes (77 tokens, start and end included, for the published ones).

Differs from the paper: the factor is 100 instead of 2.5, as is usual for text-to-image models, and prompts get no
"A photo depicts" in front. torchmetrics' CLIPScore takes the maximum with 0 of the mean over images; here it is taken
of every image, as in the paper. The two differ only where an image's cosine is negative.

Not torchmetrics' implementation: up to its version 1.9 it does not work with transformers 5.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from stepquant.errors import EvaluationError, SpecError
from stepquant.evaluate.features import three_channels, weights_identity
from stepquant.evaluate.images import to_uint8
from stepquant.evaluate.weights import MissingWeights

__all__ = ["ClipScore", "prompts_for"]

EXAMPLE = "openai/clip-vit-base-patch16"
"""Named in messages; any CLIP model will do, and figures of different ones cannot be compared."""


@final
class ClipScore:
    """Callable on images `[B, 1 or 3, H, W]` in [0, 1] and B prompts -> `[B]` float32, from 0 to 100."""

    def __init__(
        self, model: Any, image_processor: Any, tokenizer: Any, name: str, *, device: torch.device | str = "cpu"
    ) -> None:
        """model: a transformers CLIPModel; it is put into evaluation mode. name: what stands beside the figure."""
        self._model = model.eval().requires_grad_(False).to(device)
        self._image_processor = image_processor
        self._tokenizer = tokenizer
        self._device = device
        self._longest = int(model.config.text_config.max_position_embeddings)
        self.name = name
        self.identity = weights_identity(model)

    @classmethod
    def from_pretrained(cls, model: str | Path, *, device: torch.device | str = "cpu") -> ClipScore:
        """model: a folder, or the hub id of a model that is in the local cache already.

        Raises MissingWeights if it is not there, EvaluationError for another kind of model or a damaged one, and
        without transformers.
        """
        try:
            import transformers
        except ImportError as error:
            raise EvaluationError("The CLIP score needs transformers: pip install transformers") from error
        found = _find(str(model), transformers)
        # transformers 5 has two preprocessors; the one of before, which needs no torchvision, has another name there.
        pillow = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
        options = {"local_files_only": True}
        with _quiet(transformers):
            try:
                network, loading = transformers.CLIPModel.from_pretrained(found, output_loading_info=True, **options)
                tokenizer = transformers.AutoTokenizer.from_pretrained(found, **options)
                image_processor = pillow.from_pretrained(found, **options)
            except Exception as error:  # transformers hands on whatever a damaged file made its parts raise
                reason = (str(error).splitlines() or [""])[0]
                raise EvaluationError(
                    f"{model} cannot be read as a CLIP model ({type(error).__name__}: {reason}). {_how_to_get(model)}"
                ) from error
        wrong = sorted(map(str, (*loading["missing_keys"], *loading["mismatched_keys"])))
        if wrong:
            raise EvaluationError(
                f"{model} does not hold all weights of a CLIP model: {len(wrong)} tensors are missing or have another "
                f"shape, for example {wrong[0]}. {_how_to_get(model)}"
            )
        name = Path(model).resolve().name if Path(model).is_dir() else str(model)
        return cls(network.float(), image_processor, tokenizer, name, device=device)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Raises EvaluationError: another number of prompts, other channels, or values outside [0, 1]."""
        if len(images) != len(prompts):
            raise EvaluationError(
                f"A CLIP score needs one prompt for each image, got {len(images)} images and {len(prompts)} prompts."
            )
        pixels = to_uint8(three_channels(images)).movedim(1, -1).cpu().numpy()
        inputs = self._tokenizer(
            list(prompts), padding=True, truncation=True, max_length=self._longest, return_tensors="pt"
        )
        prepared = self._image_processor(images=list(pixels), input_data_format="channels_last", return_tensors="pt")
        # The whole model, not its parts: what those return changed with transformers 5.
        found = self._model(
            input_ids=inputs["input_ids"].to(self._device),
            attention_mask=inputs["attention_mask"].to(self._device),
            pixel_values=prepared["pixel_values"].to(self._device),
        )
        cosine: Tensor = torch.nn.functional.cosine_similarity(found.image_embeds, found.text_embeds, dim=1)
        return 100 * cosine.clamp_min(0)


def prompts_for(arguments: Mapping[str, Any], seeds: int) -> list[str] | None:
    """The prompt of every seed, from the arguments of the pipelines' call; None if they hold none as text.

    Raises SpecError for a list that does not have one prompt for each of the `seeds` seeds.
    """
    found = arguments.get("prompt")
    if isinstance(found, str):
        return [found] * seeds
    if not isinstance(found, list | tuple) or not found or not all(isinstance(one, str) for one in found):
        return None
    if len(found) != seeds:
        raise SpecError(f"prompt has {len(found)} entries for {seeds} seeds: a CLIP score needs one for each, or one.")
    return list(found)


def _find(model: str, transformers: Any) -> str:
    """`model`, after a look at its configuration."""
    folder = Path(model)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise MissingWeights(f"{model} holds no CLIP model: it has no config.json. {_how_to_get(model)}")
    try:
        config, _ = transformers.CLIPConfig.get_config_dict(model, local_files_only=True)
    except (OSError, ValueError) as error:
        if folder.is_dir():
            reason = (str(error).splitlines() or [""])[0]
            raise EvaluationError(f"{folder / 'config.json'} cannot be read: {reason}") from error
        raise MissingWeights(f"{model} is no folder and not in the local cache. {_how_to_get(model)}") from None
    if config.get("model_type") != "clip":
        raise EvaluationError(
            f"{model} is a model of type {config.get('model_type')!r}, expected 'clip'. {_how_to_get(model)}"
        )
    return model


def _how_to_get(model: str | Path) -> str:
    wanted = EXAMPLE if Path(model).exists() or str(model).count("/") != 1 else str(model)
    return (
        f"Get one with `hf download {wanted}`, which puts it where it is found by this id, or give a folder with its "
        "config.json, model.safetensors, preprocessor_config.json and the files of its tokenizer."
    )


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Inside, transformers draws no bars and gives no advice."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
