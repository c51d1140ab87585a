"""What is done to images before features are computed, and how distributions are cut: the presets.

FID tools disagree because they round, resize and split differently, so a figure means nothing without its protocol.

    as-sampled      values as the pipeline gave them, no rounding and no resizing: for features of the images' own size
    clean           8-bit values, PIL's antialiased bicubic resize of each channel in float, as clean-fid does it
                    (Parmar et al. 2022)
    torch-fidelity  8-bit values, the bilinear resize of TensorFlow 1 (no antialiasing, corners not aligned)
    adm             as torch-fidelity, but the Inception score takes consecutive splits of 5 000 images instead of 10
                    shuffled ones (Dhariwal and Nichol 2021, their evaluator.py)

Features are computed in float32, distances in float64. In all of them KID takes 100 subsets of 1 000 images, and
precision and recall the third neighbour. Resizing happens only for features that name a size.

Differs from the originals: ADM's evaluator computes the distances of precision and recall in float16 where they are
finite; here they are float64. It has no KID; here it is that of the others. Random subsets and shuffles come from
numpy's RandomState(2020), as in torch-fidelity; clean-fid draws them from numpy's global generator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from stepquant.errors import SpecError, nearest
from stepquant.evaluate.images import to_uint8

__all__ = ["PROTOCOLS", "Protocol", "protocol_named", "resize_tensorflow1"]

Resize = Literal["none", "pil-bicubic", "tensorflow1-bilinear"]


@dataclass(frozen=True)
class Protocol:
    """One preset.

    rounded: to the nearest of 256 levels before anything else.
    splits: of the Inception score; 0 for consecutive splits of `split_size`.
    shuffled: the order of images before they are split.
    subsets, subset_size: of KID. neighbours: k of precision and recall. seed: of shuffles and subsets.
    """

    name: str
    rounded: bool
    resize: Resize
    splits: int = 10
    split_size: int = 5000
    shuffled: bool = True
    subsets: int = 100
    subset_size: int = 1000
    neighbours: int = 3
    seed: int = 2020

    def prepare(self, images: Tensor, size: int | None) -> Tensor:
        """Float32 `[B, C, size, size]` in [0, 1] from float `[B, C, H, W]` in [0, 1].

        size: side of the squares that the features want; None leaves the size alone.
        Raises SpecError if the features want another size and this protocol does not resize.
        """
        if self.rounded:
            images = to_uint8(images).float() / 255
        if size is None or tuple(images.shape[2:]) == (size, size):
            return images
        if self.resize == "none":
            raise SpecError(
                f"The features want {size} x {size} pixels and protocol {self.name!r} does not resize: use one of "
                f"{', '.join(name for name, known in PROTOCOLS.items() if known.resize != 'none')}."
            )
        if self.resize == "pil-bicubic":
            return _resize_pil(images, size)
        return resize_tensorflow1(images * 255, size) / 255

    def rng(self) -> np.random.RandomState:
        """The generator of one figure."""
        return np.random.RandomState(self.seed)


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("as-sampled", rounded=False, resize="none"),
        Protocol("clean", rounded=True, resize="pil-bicubic"),
        Protocol("torch-fidelity", rounded=True, resize="tensorflow1-bilinear"),
        Protocol("adm", rounded=True, resize="tensorflow1-bilinear", splits=0, shuffled=False),
    )
}


def protocol_named(name: str | None, size: int | None) -> Protocol:
    """A preset by name. None: "as-sampled" for features that take images as they are, otherwise "clean".

    Raises SpecError for an unknown name.
    """
    if name is None:
        name = "as-sampled" if size is None else "clean"
    if name not in PROTOCOLS:
        raise SpecError(
            f"There is no protocol {name!r}: expected one of {', '.join(PROTOCOLS)}.{nearest(name, PROTOCOLS)}"
        )
    return PROTOCOLS[name]


def _resize_pil(images: Tensor, size: int) -> Tensor:
    from PIL import Image

    levels = (images.float() * 255).cpu().numpy()
    resized = [
        [np.asarray(Image.fromarray(channel).resize((size, size), Image.Resampling.BICUBIC)) for channel in image]
        for image in levels
    ]
    # Bicubic interpolation overshoots at edges.
    found: Tensor = torch.from_numpy(np.stack([np.stack(image) for image in resized])).clamp(0, 255) / 255
    return found.to(images.device)


def resize_tensorflow1(images: Tensor, size: int) -> Tensor:
    """Bilinear, `[B, C, H, W]` -> `[B, C, size, size]`, as TensorFlow 1's `resize_bilinear` does it.

    Output pixel i lies at input coordinate i * H / size, without the half pixel that later versions add, and nothing
    is averaged where the picture becomes smaller.
    """
    found = images.float()
    for dim in (2, 3):
        length = images.shape[dim]
        scale = torch.tensor(length / size, dtype=torch.float32, device=images.device)
        place = torch.arange(size, dtype=torch.float32, device=images.device) * scale
        low = place.long()
        high = (low + 1).clamp_max(length - 1)
        shape = [1, 1, 1, 1]
        shape[dim] = size
        start = found.index_select(dim, low)
        found = start + (found.index_select(dim, high) - start) * (place - low).view(shape)
    return found
