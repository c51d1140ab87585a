"""Images in and out: checks, 8-bit values, grids and folders of PNG files."""

from __future__ import annotations

import glob
import json
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from stepquant.errors import EvaluationError

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "check_images",
    "check_png",
    "load_png_folder",
    "not_finite",
    "other_images",
    "paths_by_seed",
    "png_files",
    "read_png",
    "save_png",
    "to_grid",
    "to_uint8",
]

_SEED_NAME = re.compile(r"(?:[A-Za-z]+(?:[-_.][A-Za-z]+)*[-_.]?)?(\d+)", re.ASCII)
"""000017, seed17, sample-17, my_image_17: words, then the seed. Nothing with two numbers: which one would it be?"""

_GRID_NAME = "grid.png"
"""What `stepquant sample --grid` writes beside the images."""

_OTHER_KINDS = (".avif", ".bmp", ".gif", ".heic", ".jpeg", ".jpg", ".jxl", ".tif", ".tiff", ".webp")
"""Images that are not read: most of these formats may be lossy."""


def check_images(images: Tensor, *, what: str) -> None:
    """Refuse anything but float `[N, C, H, W]` with values in [0, 1].

    what: the name of the tensor in the message.

    Raises EvaluationError: another number of dimensions, no images, not floating point, NaN, or values outside [0, 1].
    """
    shape = tuple(images.shape)
    if images.ndim != 4 or 0 in shape:
        raise EvaluationError(f"{what} have shape {shape}, expected [N, C, H, W] with at least one pixel.")
    if not images.is_floating_point():
        raise EvaluationError(
            f"{what} have dtype {images.dtype}, expected floats in [0, 1]: divide 8-bit values by 255."
        )
    if broken := not_finite(images):
        raise EvaluationError(
            f"{what} hold NaN or infinite values ({broken} of {len(images)} images): `stepquant doctor` names the "
            "first layer that gives them."
        )
    low, high = (float(value) for value in images.aminmax())
    if low < 0 or high > 1:
        raise EvaluationError(f"{what} have values from {low:g} to {high:g}, expected [0, 1]: clamp or rescale them.")


def not_finite(images: Tensor) -> int:
    """How many of the images `[N, ...]` hold NaN or infinity."""
    return int((~torch.isfinite(images)).flatten(1).any(dim=1).sum())


def to_uint8(images: Tensor) -> Tensor:
    """uint8 of the same shape from float `[N, C, H, W]` in [0, 1], to the nearest of 256 levels.

    Truncating, which `ToPILImage` of torchvision does, would darken every image by half a level on average.

    Raises EvaluationError: as `check_images`.
    """
    check_images(images, what="Images")
    return (images.detach().float() * 255).round().to(torch.uint8)


def to_grid(images: Tensor, columns: int) -> Image.Image:
    """One RGB picture of images `[N, C, H, W]` in [0, 1], C = 1 or 3, row by row; free places are white.

    Raises EvaluationError: as `check_images`, another number of channels, or `columns` below 1.
    """
    from diffusers.utils import make_image_grid  # here, because importing it takes seconds
    from PIL import Image

    if columns < 1:
        raise EvaluationError(f"A grid needs at least 1 column, got {columns}.")
    pictures = [_to_pil(image) for image in to_uint8(images)]
    rows = -(-len(pictures) // columns)
    blank = Image.new("RGB", pictures[0].size, "white")
    pictures += [blank] * (rows * columns - len(pictures))
    grid: Image.Image = make_image_grid(pictures, rows=rows, cols=columns)
    return grid


def save_png(image: Tensor, folder: Path, *, seed: int) -> Path:
    """Write an image `[C, H, W]` in [0, 1], C = 1 or 3, as `folder/000017.png` for seed 17, and return that path.

    The file appears when it is complete, so a killed run leaves no half image.

    Raises EvaluationError: as `check_images`, another number of channels, or a negative seed.
    """
    if seed < 0:
        raise EvaluationError(f"A seed in a file name cannot be negative, got {seed}.")
    picture = _to_pil(to_uint8(image[None])[0])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{seed:06d}.png"
    temporary = folder / f".{path.name}.tmp"
    picture.save(temporary, format="PNG")
    return temporary.replace(path)


def load_png_folder(folder: Path) -> tuple[list[int], Tensor]:
    """Seeds, ascending, and their images, float32 `[N, C, H, W]` in [0, 1], of a folder of `000017.png` files.

    Files that do not end in `.png` or `.PNG` are passed over, and so is `grid.png`. Grey images have one channel, RGB
    images three.

    Raises EvaluationError: no such folder, no PNG files, a name that is not a seed, a seed that is there twice or that
    only an image of another kind has, a file that is not a readable 8-bit grey or RGB image, or images of different
    sizes or channels.
    """
    by_seed = paths_by_seed(folder)
    seeds = sorted(by_seed)
    images = [read_png(by_seed[seed]) for seed in seeds]
    for seed, image in zip(seeds, images, strict=True):
        if image.shape != images[0].shape:
            found, expected = tuple(image.shape), tuple(images[0].shape)
            raise EvaluationError(f"{by_seed[seed]} is {found}, but {by_seed[seeds[0]].name} is {expected} [C, H, W].")
    return seeds, torch.stack(images).float() / 255


def png_files(folder: Path) -> list[Path]:
    """What is named as a PNG file, in any case: cameras and Windows write `.PNG`."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() == ".png")


def _others(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in _OTHER_KINDS)


def other_images(folder: Path) -> str:
    """A sentence about images of other kinds in a folder, and how to convert them; empty if there are none."""
    found = _others(folder)
    if not found:
        return ""
    pattern = json.dumps(str(Path(glob.escape(str(folder))) / f"*{found[0].suffix}"), ensure_ascii=False)
    convert = (
        "import glob; from PIL import Image; "
        f'[Image.open(f).save(f.rsplit(".", 1)[0] + ".png") for f in glob.glob({pattern})]'
    )
    return (
        f" It has {len(found)} images of other kinds, such as {found[0].name}. Expected PNG: lossy formats (JPEG, most "
        "WebP) change pixels, and with them every figure. Sample again into PNG files if you can; else convert them, "
        f"which keeps what they have lost: python -c {shlex.quote(convert)}"
    )


def paths_by_seed(folder: Path) -> dict[int, Path]:
    """The images of a folder by the seed in their names: `000017.png`, `sample-17.png`.

    Raises EvaluationError: no such folder, no PNG files, a name without a seed or with several numbers, a seed twice,
    a seed that only an image of another kind has.
    """
    if not folder.is_dir():
        raise EvaluationError(f"{folder} is not a folder: expected one with images like 000017.png.")
    by_seed: dict[int, Path] = {}
    for path in png_files(folder):
        if path.name.startswith(".") or path.name.lower() == _GRID_NAME:
            continue
        named = _SEED_NAME.fullmatch(path.stem)
        if not named:
            raise EvaluationError(f"{path} is not named by its seed: expected a name like 000017.png or sample-17.png.")
        if not path.is_file():
            raise EvaluationError(f"{path} is no file: reading a pipe or a device might never end.")
        seed = int(named[1])
        if seed in by_seed:
            raise EvaluationError(f"Seed {seed} is there twice in {folder}: {by_seed[seed].name} and {path.name}.")
        by_seed[seed] = path
    if not by_seed:
        raise EvaluationError(f"{folder} has no PNG files: expected images like 000017.png.{other_images(folder)}")
    for path in _others(folder):
        named = _SEED_NAME.fullmatch(path.stem)
        if named and int(named[1]) not in by_seed:
            raise EvaluationError(
                f"{folder} has seed {int(named[1])} as {path.name} only, which would be passed over."
                f"{other_images(folder)}"
            )
    return by_seed


def check_png(path: Path) -> tuple[int, int, int]:
    """Shape `[C, H, W]` of an image whose header and checksums are right; its pixels are not decoded.

    Raises EvaluationError as `read_png`.
    """
    with _opened_png(path) as picture:
        width, height = picture.size
        channels = len(picture.getbands())
        picture.verify()
    return channels, height, width


def read_png(path: Path) -> Tensor:
    """uint8 `[C, H, W]`. Raises EvaluationError: not a readable 8-bit grey or RGB image."""
    with _opened_png(path) as picture:
        pixels = np.array(picture)
    return torch.from_numpy(np.atleast_3d(pixels)).permute(2, 0, 1)


def _to_pil(image: Tensor) -> Image.Image:
    """From uint8 `[C, H, W]`."""
    from PIL import Image

    channels = image.shape[0]
    if channels not in (1, 3):
        raise EvaluationError(f"Images have {channels} channels, expected 1 (grey) or 3 (RGB).")
    pixels = image.permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if channels == 1 else pixels))


@contextmanager
def _opened_png(path: Path) -> Iterator[Image.Image]:
    """Inside, Pillow's errors are EvaluationErrors that name the file."""
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as picture:
            if picture.mode not in ("L", "RGB"):
                raise EvaluationError(
                    f"{path} has mode {picture.mode}, expected 8-bit grey (L) or RGB: convert it first."
                )
            yield picture
    # Pillow raises SyntaxError and ValueError for some kinds of damage.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise EvaluationError(f"{path} cannot be read as a PNG image: {error}") from error
