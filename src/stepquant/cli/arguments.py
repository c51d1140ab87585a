"""Arguments of a pipeline's call as the command line and `run.yaml` have them.

--argument KEY=VALUE        a value in YAML, the same for all images
--argument KEY=@FILE.txt    a line of the file for each image (prompts)
--argument KEY=@FILE.png    a picture, the same for all images
--prompts FILE              short for --argument prompt=@FILE
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from stepquant.calibrate.prompts import prompts_from
from stepquant.calibrate.stages import Record
from stepquant.config import Resolved, parse_yaml
from stepquant.errors import SpecError

__all__ = ["parsed", "ready", "recorded_images", "with_prompts"]

_PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def parsed(texts: Iterable[str]) -> dict[str, Any]:
    """KEY=VALUE as keyword arguments, values read as YAML; those that begin with @ name files and stay as they are."""
    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise SpecError(f"--argument takes key=value, such as prompt='a cat', found {text!r}.")
        if key in found:
            raise SpecError(f"--argument {key} was given twice; --prompts gives prompt.")
        found[key] = value if value.startswith("@") else parse_yaml(value, source=f"--argument {key}")
    return found


_UNITS: dict[str, int] = {"": 1, "B": 1} | {f"{letter}B": 1000**n for n, letter in enumerate("KMGT", start=1)}
_UNITS |= {f"{letter}IB": 1024**n for n, letter in enumerate("KMGT", start=1)}


def bytes_named(text: str) -> int:
    """A size that a user means: 8GB, 500 MB, 1.5GiB, or a number of bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", text.strip())
    if found is None or found[2].upper() not in _UNITS:
        raise SpecError(f"Expected a size such as 8GB, 500MB or 1.5GiB, found {text!r}.")
    return round(float(found[1]) * _UNITS[found[2].upper()])


def ready(arguments: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The arguments for `count` images, with what files hold in the place of their names."""
    return {
        key: _from_file(key, value[1:], count) if isinstance(value, str) and value.startswith("@") else value
        for key, value in arguments.items()
    }


def with_prompts(resolved: Resolved) -> Resolved:
    """Settings of a run whose lists of prompts are written out, one for each image that is recorded.

    So `run.yaml` says what was calibrated on, also when the file has changed. Pictures stay files.
    """
    named = {key for key, value in resolved.arguments.items() if isinstance(value, str) and value.startswith("@")}
    texts = {key: resolved.arguments[key] for key in named if not _is_picture(resolved.arguments[key][1:])}
    if not texts:
        return resolved
    count = recorded_images(resolved)
    if count is None:
        raise SpecError(
            f"{next(iter(texts))}: a list of prompts has one for each recorded image, but the recipe records none."
        )
    return replace(resolved, arguments={**resolved.arguments, **ready(texts, count)})


def recorded_images(resolved: Resolved) -> int | None:
    """How many images the recipe records; None if it records none."""
    return next((stage.samples for stage in resolved.recipe.stages if isinstance(stage, Record)), None)


def _is_picture(name: str) -> bool:
    return Path(name).suffix.lower() in _PICTURES


def _from_file(key: str, name: str, count: int) -> Any:
    """Lines, or a picture as a tensor `[count, C, H, W]` in [0, 1]: C is 1 for masks, otherwise 3."""
    if not name:
        raise SpecError(f"{key}: @ stands before the name of a file, and there is none.")
    if not _is_picture(name):
        return prompts_from(name, count)
    import numpy as np
    import torch
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(name) as image:
            array = np.array(image.convert("L" if key.startswith("mask") else "RGB"), dtype=np.float32)
    except UnidentifiedImageError:
        raise SpecError(f"{key}: {name} is no picture that can be read.") from None
    except OSError as error:
        raise SpecError(f"{key}: {name} cannot be read: {error.strerror or error}.") from None
    pixels = torch.from_numpy(array.reshape(*array.shape[:2], -1) / 255).movedim(-1, 0)
    return pixels.expand(count, *pixels.shape)
