"""Folders of images from someone who means harm: an EvaluationError, little memory, little time."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from stepquant.errors import EvaluationError
from stepquant.evaluate.images import load_png_folder, save_png


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG file with its checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, data: bytes, *, extra: bytes = b"") -> bytes:
    """An 8-bit grey PNG whose header and pixels need not agree. data: before compression."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + extra
        + chunk(b"IDAT", zlib.compress(data))
        + chunk(b"IEND", b"")
    )


def picture(**options: object) -> bytes:
    """A real 8 by 8 image."""
    file = io.BytesIO()
    Image.new("L", (8, 8), 100).save(file, format="PNG", **options)
    return file.getvalue()


def test_the_real_one_is_read(tmp_path: Path) -> None:
    save_png(torch.full((1, 8, 8), 0.5), tmp_path, seed=3)
    assert load_png_folder(tmp_path)[0] == [3]


DAMAGE = {
    "empty": b"",
    "text": b"not an image",
    "only a head": picture()[:8],
    "half": picture()[: len(picture()) // 2],
    "declares a terapixel": png(2**20, 2**20, b"\0" * 100),
    "declares more than there is": png(9_000, 9_000, b"\0" * 100),
    "no pixels": png(0, 0, b""),
    "negative size": png(2**32 - 1, 1, b"\0\0"),
    # A megabyte is what Pillow allows.
    "a text that unfolds": png(8, 8, (b"\0" * 9) * 8, extra=chunk(b"zTXt", b"k\0\0" + zlib.compress(b"x" * 10**7))),
    "a JPEG by another name": b"\xff\xd8\xff\xe0" + b"\0" * 100,
    "a pickle": b"cos\nsystem\n(S'false'\ntR.",
    "four channels": (lambda file: (Image.new("RGBA", (8, 8)).save(file, "PNG"), file.getvalue())[1])(io.BytesIO()),
}


@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_damaged_images(tmp_path: Path, name: str) -> None:
    (tmp_path / "000001.png").write_bytes(DAMAGE[name])
    with pytest.raises(EvaluationError, match=r"000001\.png"):
        load_png_folder(tmp_path)


@pytest.mark.parametrize("name", ["x.png", "1 2.png", "-1.png", "1e5.png", "٣.png", "0x10.png", "1.png.png"])
def test_names_that_are_no_seeds(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(picture())
    with pytest.raises(EvaluationError, match="is not named by its seed"):
        load_png_folder(tmp_path)


@pytest.mark.parametrize("kind", ["pipe", "folder", "link to nowhere", "link to itself", "device"])
def test_names_of_images_that_are_no_files(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "000001.png"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        target = {"link to nowhere": "nowhere", "link to itself": path, "device": "/dev/zero"}[kind]
        path.symlink_to(target)
    with pytest.raises(EvaluationError, match=r"000001\.png"):
        load_png_folder(tmp_path)


@settings(max_examples=150, deadline=5_000, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    flips=st.lists(st.tuples(st.integers(0, len(picture()) - 1), st.integers(0, 7)), max_size=3),
    cut=st.integers(1, len(picture())),
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_flipped_bits_and_cuts(tmp_path: Path, flips: list[tuple[int, int]], cut: int) -> None:
    data = bytearray(picture())
    for place, bit in flips:
        data[place] ^= 1 << bit
    (tmp_path / "000001.png").write_bytes(data[:cut])
    try:
        _, images = load_png_folder(tmp_path)
    except EvaluationError:
        return
    assert images.shape[0] == 1
