from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from stepquant.errors import EvaluationError
from stepquant.evaluate.images import load_png_folder, paths_by_seed, save_png, to_grid, to_uint8
from stepquant.evaluate.source import open_source


def images(n: int, *, channels: int = 3) -> Tensor:
    """8-bit values, not square, so that swapped axes show."""
    values = torch.randint(0, 256, (n, channels, 4, 6), generator=torch.Generator().manual_seed(n))
    return values.float() / 255


def test_uint8_takes_the_nearest_level() -> None:
    levels = torch.tensor([0.0, 0.4, 0.6, 127.4, 127.6, 254.6, 255.0]).view(1, 1, 1, -1) / 255
    assert to_uint8(levels).flatten().tolist() == [0, 0, 1, 127, 128, 255, 255]
    every = torch.arange(256).view(1, 1, 16, 16)
    for dtype in (torch.float32, torch.float64, torch.float16):
        assert torch.equal(to_uint8((every / 255).to(dtype)), every.byte())


def test_uint8_of_half_precision_is_rounded_once() -> None:
    fine = torch.linspace(0, 1, 4096).view(1, 1, 64, 64).half()
    assert torch.equal(to_uint8(fine), to_uint8(fine.double()))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.full((1, 1, 2, 2), 1.01), "from 1.01 to 1.01"),
        (torch.full((1, 1, 2, 2), -0.5), "from -0.5"),
        (torch.tensor([0.0, torch.nan]).view(1, 1, 1, 2), r"hold NaN or infinite values \(1 of 1 images\)"),
        (torch.zeros(3, 2, 2), r"\(3, 2, 2\)"),
        (torch.zeros(1, 1, 2, 2).int(), "int32"),
    ],
)
def test_uint8_refuses(given: Tensor, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        to_uint8(given)


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_goes_row_by_row_and_ends_white(channels: int) -> None:
    given = images(5, channels=channels)
    grid = to_grid(given, columns=3)
    assert grid.size == (3 * 6, 2 * 4)
    pixels = torch.from_numpy(np.array(grid)).permute(2, 0, 1)
    for index in range(5):
        top, left = 4 * (index // 3), 6 * (index % 3)
        expected = to_uint8(given)[index].expand(3, 4, 6)
        assert torch.equal(pixels[:, top : top + 4, left : left + 6], expected)
    assert bool((pixels[:, 4:, 12:] == 255).all())


def test_grid_refuses() -> None:
    with pytest.raises(EvaluationError, match="got 0"):
        to_grid(images(2), columns=0)
    with pytest.raises(EvaluationError, match="2 channels"):
        to_grid(images(2, channels=2), columns=1)


@pytest.mark.parametrize("channels", [1, 3])
def test_png_there_and_back(channels: int, tmp_path: Path) -> None:
    given = images(3, channels=channels)
    folder = tmp_path / "made" / "here"
    paths = [save_png(image, folder, seed=seed) for image, seed in zip(given, [17, 10_000_000, 2_000_000], strict=True)]
    assert [path.name for path in paths] == ["000017.png", "10000000.png", "2000000.png"]
    (folder / "notes.txt").write_text("passed over")
    seeds, read = load_png_folder(folder)
    assert seeds == [17, 2_000_000, 10_000_000]
    assert read.dtype == torch.float32
    assert torch.equal(read, given[[0, 2, 1]])
    assert sorted(path.name for path in folder.iterdir() if path.suffix != ".txt") == sorted(p.name for p in paths)


def test_save_refuses(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="negative, got -1"):
        save_png(images(1)[0], tmp_path, seed=-1)
    with pytest.raises(EvaluationError, match="4 channels"):
        save_png(images(1, channels=4)[0], tmp_path, seed=1)
    assert list(tmp_path.iterdir()) == []


def save(folder: Path, name: str, mode: str = "RGB", size: tuple[int, int] = (4, 4)) -> None:
    Image.new(mode, size).save(folder / name, format="PNG")


def test_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="not a folder"):
        load_png_folder(tmp_path / "nowhere")
    with pytest.raises(EvaluationError, match="no PNG files"):
        load_png_folder(tmp_path)


@pytest.mark.parametrize("name", ["cat.png", "1e3.png", "-1.png", "1 copy.png", "١٧.png", "17-2.png", "a1b2.png"])
def test_name_that_is_not_a_seed(name: str, tmp_path: Path) -> None:
    save(tmp_path, name)
    with pytest.raises(EvaluationError, match="not named by its seed"):
        load_png_folder(tmp_path)


def test_words_before_the_seed(tmp_path: Path) -> None:
    names = {"seed17.png": 17, "sample-3.png": 3, "my_image_0004.png": 4, "000005.png": 5}
    for name in (*names, "grid.png"):
        save(tmp_path, name, size=(4, 4) if name in names else (8, 8))
    assert {path.name: seed for seed, path in paths_by_seed(tmp_path).items()} == names
    assert load_png_folder(tmp_path)[0] == [3, 4, 5, 17]


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".webp"])
def test_a_folder_of_images_of_other_kinds(suffix: str, tmp_path: Path) -> None:
    """The line that converts is run: afterwards the folder can be read."""
    folder = tmp_path / "it's [here]"
    folder.mkdir()
    for seed in (3, 17):
        Image.new("RGB", (4, 4), (90, 100, 110)).save(folder / f"{seed:06d}{suffix}")
    (folder / "notes.txt").write_text("none of them")
    with pytest.raises(
        EvaluationError, match=rf"has 2 images of other kinds, such as 000003\{suffix}\. Expected PNG"
    ) as no:
        paths_by_seed(folder)
    assert "lossy formats" in str(no.value)
    with pytest.raises(EvaluationError, match=r"is not a stepquant checkpoint.* has 2 images of other kinds"):
        open_source(str(folder))
    command = shlex.split(str(no.value)[str(no.value).index("python -c") :])
    subprocess.run([sys.executable, *command[1:]], check=True)
    seeds, found = load_png_folder(folder)
    assert (seeds, tuple(found.shape)) == ([3, 17], (2, 3, 4, 4))
    (folder / "000017.png").unlink()
    with pytest.raises(EvaluationError, match=rf"has seed 17 as 000017\{suffix} only.* Expected PNG"):
        load_png_folder(folder)


def test_a_folder_with_nothing_but_the_grid(tmp_path: Path) -> None:
    save(tmp_path, "grid.png")
    with pytest.raises(EvaluationError, match="no PNG files"):
        paths_by_seed(tmp_path)


def test_seed_twice(tmp_path: Path) -> None:
    save(tmp_path, "17.png")
    save(tmp_path, "000017.png")
    with pytest.raises(EvaluationError, match="Seed 17 is there twice"):
        load_png_folder(tmp_path)


def test_images_that_differ_in_size_or_channels(tmp_path: Path) -> None:
    save(tmp_path, "1.png")
    save(tmp_path, "2.png", size=(4, 5))
    with pytest.raises(EvaluationError, match=r"2.png is \(3, 5, 4\), but 1.png is \(3, 4, 4\)"):
        load_png_folder(tmp_path)
    save(tmp_path, "2.png", mode="L")
    with pytest.raises(EvaluationError, match=r"2.png is \(1, 4, 4\)"):
        load_png_folder(tmp_path)


@pytest.mark.parametrize("mode", ["RGBA", "P", "I;16", "1", "LA"])
def test_modes_that_are_not_8_bit_grey_or_rgb(mode: str, tmp_path: Path) -> None:
    save(tmp_path, "1.png", mode=mode)
    with pytest.raises(EvaluationError, match="expected 8-bit grey"):
        load_png_folder(tmp_path)


@pytest.mark.parametrize("cut", [0, 20, 40, -30])
def test_damaged_file(cut: int, tmp_path: Path) -> None:
    path = save_png(images(1)[0], tmp_path, seed=1)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(EvaluationError, match="cannot be read"):
        load_png_folder(tmp_path)


def test_names_in_upper_case(tmp_path: Path) -> None:
    for name in ("3.png", "4.PNG", "Grid.PNG", ".5.PNG", "4.jpg"):
        save(tmp_path, "x.png")
        (tmp_path / "x.png").rename(tmp_path / name)
    assert list(paths_by_seed(tmp_path)) == [3, 4]
