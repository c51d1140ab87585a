"""Features by the name that a user types: "digits", "inception", "inception=FILE", "mobilenetv2=FILE"."""

from __future__ import annotations

import torch

from stepquant.errors import SpecError, nearest
from stepquant.evaluate.features import DigitFeatures, Features
from stepquant.evaluate.inception import InceptionFeatures
from stepquant.evaluate.mobilenet import DOWNLOAD, MobileNetFeatures

__all__ = ["FEATURE_NAMES", "features_named"]

FEATURE_NAMES = ("digits", "inception", "mobilenetv2")


def features_named(text: str, *, device: torch.device | str = "cpu") -> Features:
    """Features by name, or by name and file.

    "inception" without a file is the one in torch's cache.

    Raises SpecError for a name that there is not or that lacks its file, MissingWeights for a file that is not there.
    """
    name, _, file = text.partition("=")
    if name not in FEATURE_NAMES:
        raise SpecError(
            f"There are no features {name!r}: expected one of {', '.join(FEATURE_NAMES)}.{nearest(name, FEATURE_NAMES)}"
        )
    if name == "digits":
        if file:
            raise SpecError("The features 'digits' come with stepquant and take no file.")
        return DigitFeatures(device=device)
    if name == "inception":
        return InceptionFeatures.from_file(file or None, device=device)
    if not file:
        raise SpecError(f"The features {name!r} need their weights: give {name}=FILE. Download {DOWNLOAD}.")
    return MobileNetFeatures.from_file(file, device=device)
