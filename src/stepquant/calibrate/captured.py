"""Values of many calls put together row by row, in memory or on disk."""

from __future__ import annotations

import math
import mmap
import tempfile
import weakref
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from stepquant.storage import errors_name

__all__ = ["Column", "Rows", "RowsOnDisk", "taken"]


class RowsOnDisk:
    """A tensor `[N, ...]` in a file without a name, memory-mapped. Indexed like a tensor, by positions `[n]` int64.

    What an index reads is copied into memory and mapped no longer: the pages stay with the operating system, which
    may take them back at any time.
    """

    def __init__(self, file: IO[bytes], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        """file: holds the rows; it may be closed afterwards."""
        file.flush()
        self.shape, self.device = shape, device
        self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # torch wants what it may write to
        self._rows = torch.frombuffer(self._mapped, dtype=dtype).reshape(shape)
        self._row_bytes = math.prod(shape[1:]) * dtype.itemsize

    @property
    def bytes(self) -> int:
        """On disk."""
        return self.shape[0] * self._row_bytes

    def __getitem__(self, chosen: Tensor) -> Tensor:
        found = self._rows[chosen.cpu()]
        self._mapped.madvise(mmap.MADV_DONTNEED)
        return found.to(self.device)

    def expect(self, chosen: Tensor) -> None:
        """Have the operating system read these rows, which are wanted soon."""
        for row in chosen.tolist():
            begin = row * self._row_bytes
            first = begin - begin % mmap.PAGESIZE
            self._mapped.madvise(mmap.MADV_WILLNEED, first, begin + self._row_bytes - first)


Rows = Tensor | RowsOnDisk
"""`[N, ...]`, wherever it lies."""


def taken(rows: Rows, chosen: Tensor) -> Tensor:
    """Some rows, by positions `[n]` int64."""
    if isinstance(rows, RowsOnDisk):
        return rows[chosen]
    return rows.index_select(0, chosen.to(rows.device))  # copies whole rows, which indexing does not


class Column:
    """One value of several calls: rows put one after the other where there is one for each sample.

    Anything else must be the same in all calls. Where a first axis has as many entries as the call has samples, they
    are taken for rows; if a later call says otherwise, the value counts as one and the same.
    """

    def __init__(self, folder: Path | None) -> None:
        """folder: for rows on disk; None keeps them in memory."""
        self._folder = folder
        self._file: IO[bytes] | None = None
        self._parts: list[Any] = []
        self._sizes: list[int] = []
        self._first: Any = None
        self._by_row = True

    @property
    def sizes(self) -> list[int]:
        """Samples of each call so far."""
        return list(self._sizes)

    def add(self, value: Any, rows: int) -> None:
        """Of one more call, of so many samples."""
        first, own = not self._sizes, isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == rows
        self._sizes.append(rows)
        if first:
            self._first = value
        self._by_row = self._by_row and own
        if not self._by_row:
            self._parts.clear()
            self._file = None
        elif self._folder is None or value[0].numel() == 0:
            self._parts.append(value)
        else:
            self._write(value)

    def _write(self, value: Tensor) -> None:
        assert self._folder is not None
        with errors_name(self._folder):
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115 - outlives this call
                weakref.finalize(self, self._file.close)
            bytes_: Any = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            raw = memoryview(bytes_)
            while raw:
                raw = raw[self._file.write(raw) :]

    def joined(self) -> Any:
        """Rows of all calls, or the value of the first call. The column is empty afterwards."""
        parts, self._parts = self._parts, []
        if not self._by_row:
            return self._first
        if self._file is None:
            return torch.cat(parts)
        first, file = self._first, self._file
        self._first = self._file = None
        with file:
            return RowsOnDisk(file, (sum(self._sizes), *first.shape[1:]), first.dtype, first.device)
