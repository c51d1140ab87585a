"""Safetensors files, read with suspicion: every kind of damage is found before a tensor is built.

A file is eight bytes (header length n, little-endian), n bytes of JSON (`{"name": {"dtype", "shape",
"data_offsets": [begin, end]}}`), and the tensors' bytes, which offsets count from.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from stepquant.errors import CheckpointError
from stepquant.model.plain_json import parse_json

__all__ = [
    "Entry",
    "TensorFile",
    "check_sum",
    "checksum",
    "errors_name",
    "open_tensors",
    "parse_json",
    "read_header",
    "sum_path",
    "write_summed",
    "write_tensors",
]

# More than any model needs; a length field beyond it is damage, not a header to be read into memory.
MAX_HEADER_BYTES = 100_000_000

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file. begin, end: bytes from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def bytes(self) -> int:
        return self.end - self.begin


def checksum(tensor: Tensor) -> str:
    """SHA-256 of the tensor's bytes as they lie in the file (row-major, little-endian), in hexadecimal."""
    raw: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(raw).hexdigest()


@contextmanager
def errors_name(path: Path) -> Iterator[None]:
    """Inside, an error of the disk that names no file is raised again as an OSError that names `path`.

    A full disk is such an error: Python's `write` says only that there is no space, and safetensors says it in words.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
    except SafetensorError as error:
        code = re.search(r"\(os error (\d+)\)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a file. The same tensors give the same bytes."""
    # One entry of metadata: safetensors keeps it in a hash map, whose order would differ from run to run.
    path.write_bytes(
        save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, {"format": "pt"})
    )


def sum_path(path: Path) -> Path:
    """The file beside `path` that holds its SHA-256 as `sha256sum` writes it."""
    return path.with_name(f"{path.name}.sha256")


def write_summed(path: Path, text: str) -> None:
    """Write a file of text, and beside it its SHA-256. The sum is written first: without it, edits are not found."""
    data = text.encode()
    sum_path(path).write_text(f"{hashlib.sha256(data).hexdigest()}  {path.name}\n", encoding="ascii", newline="\n")
    path.write_bytes(data)


def check_sum(path: Path) -> None:
    """Raises CheckpointError if a file is not what its sum beside it says. Folders of before have no sums."""
    beside = sum_path(path)
    if not beside.is_file():
        return
    expected = beside.read_bytes()[:64].decode("ascii", "replace")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected:
        raise CheckpointError(
            f"{path} was edited or damaged after it was written: its SHA-256 is {found}, and {beside.name} has "
            f"{expected!r}. Take the folder from where it came, or, if the edit is yours and you know what it does, "
            f"remove {beside.name}."
        )


def read_header(path: Path) -> dict[str, Entry]:
    """Names, dtypes, shapes and places of all tensors. Raises CheckpointError if the file is damaged."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise CheckpointError(f"{path} is truncated: it has {size} bytes and a safetensors file begins with 8.")
        length = int.from_bytes(prefix, "little")
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(
                f"{path} is truncated or not a safetensors file: it declares a header of {length} bytes and has "
                f"{size - 8} bytes after the length."
            )
        text = file.read(length)
    try:
        header = parse_json(text)
    except ValueError as error:
        raise CheckpointError(f"{path}: the header is not JSON: {error}.") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is a {type(header).__name__}, expected an object of tensors.")
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, value, 8 + length) for name, value in header.items()}
    _check_places(path, entries, 8 + length, size)
    return entries


def _entry(path: Path, name: str, value: Any, start: int) -> Entry:
    where = f"{path}, tensor {name!r}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: expected dtype, shape and data_offsets in the header.")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if dtype not in DTYPES:
        raise CheckpointError(f"{where}: unknown dtype {dtype!r}, expected one of {', '.join(DTYPES)}.")
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: shape {shape!r} or data_offsets {offsets!r} are not whole numbers >= 0.")
    wanted = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != wanted:
        raise CheckpointError(
            f"{where}: shape {shape} of {dtype} takes {wanted} bytes, but its place in the file has "
            f"{offsets[1] - offsets[0]}."
        )
    return Entry(DTYPES[dtype], tuple(shape), start + offsets[0], start + offsets[1])


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 2**63 for number in value)


def _check_places(path: Path, entries: Mapping[str, Entry], start: int, size: int) -> None:
    """Tensors follow one another without gap or overlap and end where the file ends."""
    end = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.end > size:
            raise CheckpointError(
                f"{path} is truncated: tensor {name!r} ends at byte {entry.end} and the file has {size} bytes."
            )
        if entry.begin != end:
            raise CheckpointError(f"{path}, tensor {name!r}: begins at byte {entry.begin}, expected {end}.")
        end = entry.end
    if end != size:
        raise CheckpointError(f"{path}: {size - end} bytes follow the last tensor; expected none.")


class TensorFile:
    """An open file whose header has been checked. Reads one tensor at a time."""

    def __init__(self, path: Path, entries: Mapping[str, Entry], data: memoryview) -> None:
        self.path = path
        self.entries = entries
        self._data = data

    def checksum(self, name: str) -> str:
        """SHA-256 of a tensor's bytes in hexadecimal."""
        entry = self.entries[name]
        return hashlib.sha256(self._data[entry.begin : entry.end]).hexdigest()

    def read(self, name: str) -> Tensor:
        """A tensor with memory of its own."""
        entry = self.entries[name]
        if entry.bytes == 0:
            return torch.empty(entry.shape, dtype=entry.dtype)
        data = bytearray(self._data[entry.begin : entry.end])
        return torch.frombuffer(data, dtype=entry.dtype).reshape(entry.shape)


@contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """The file behind `path`, memory-mapped."""
    entries = read_header(path)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        data = memoryview(mapped)
        try:
            yield TensorFile(path, entries, data)
        finally:
            data.release()
