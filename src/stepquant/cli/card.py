"""`stepquant card`: the model card of a checkpoint, in its folder, ready for publishing."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepquant.cli.console import Settings, replace_text, stdout_console
from stepquant.cli.outputs import card_path, read_evaluation, refuse_existing
from stepquant.errors import SpecError
from stepquant.inspection import inspect_checkpoint
from stepquant.manifest import MANIFEST_NAME
from stepquant.report.card import card_of, hub_id

__all__ = ["CardRequest", "card"]


@dataclass(frozen=True)
class CardRequest:
    """What the user asked `card` for. name: title, None for the folder's. license, base_model: for the metadata."""

    checkpoint: Path
    name: str | None = None
    license: str | None = None
    base_model: str | None = None
    overwrite: bool = False


def card(request: CardRequest, settings: Settings) -> None:
    """Write the card into the checkpoint's folder."""
    path = card_path(request.checkpoint)
    description = inspect_checkpoint(request.checkpoint)
    refuse_existing(path, overwrite=request.overwrite)
    if request.base_model is not None and hub_id(request.base_model) is None:
        raise SpecError(f"--base-model is the id of a model on the hub, owner/name, found {request.base_model!r}.")
    results = read_evaluation(request.checkpoint)
    text = card_of(
        description,
        name=request.name or request.checkpoint.resolve().name,
        identity=hashlib.sha256((request.checkpoint / MANIFEST_NAME).read_bytes()).hexdigest(),
        results=results,
        license=request.license or _license_of(description.get("base_model")),
        base_model=request.base_model or _base_on_hub(description.get("base_model")),
        bibtex=_bibtex(description),
    )
    replace_text(path, text)
    if settings.quiet:
        return
    console = stdout_console()
    console.print(f"The card is {path}.")
    if results is None:
        console.print(f"It has no figures yet: stepquant evaluate {request.checkpoint}, then card --overwrite.")
    console.print(f"Publish the folder with: hf upload OWNER/NAME {request.checkpoint}")


def _base_on_hub(base: Any) -> str | None:
    """What was quantized if it came from the hub: a folder of this machine may have a name of the same form."""
    return None if Path(str(base)).exists() else hub_id(base)


def _license_of(base: Any) -> str | None:
    """The license that the card of a local base model names."""
    path = card_path(Path(str(base)))
    if not base or not path.is_file():
        return None
    from huggingface_hub import ModelCard

    try:
        found = ModelCard.load(path).data.to_dict().get("license")
    except ValueError:  # no metadata, or none that could be read
        return None
    return found if isinstance(found, str) else None


def _bibtex(description: dict[str, Any]) -> str:
    """Of the first method in the recipe's name; nothing for a recipe of the user's own."""
    from stepquant.methods import METHODS

    name = str((description["manifest"].get("recipe") or {}).get("name", "")).partition("+")[0]
    if name not in METHODS:
        return ""
    return str(getattr(sys.modules[METHODS[name].__module__], "BIBTEX", ""))
