"""A setting of the C library's allocator that calibration on a CPU gains much from."""

from __future__ import annotations

import ctypes
import sys

__all__ = ["tune_allocator"]

# Parameter numbers of mallopt(3), glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3

_MMAP_BYTES = 1 << 30
_TRIM_BYTES = (1 << 31) - 1  # mallopt takes a C int


def tune_allocator() -> bool:
    """Keep freed tensors in the process instead of handing them back to the kernel; whether that could be done.

    glibc maps every large block afresh, and the kernel fills its pages with zeros on first touch. A denoiser allocates
    the same large activations in every call, so calibration is faster without that.
    Where there is no glibc nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    # The threshold for mapping must be raised first: while it is dynamic, setting the other one resets it.
    return bool(mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)) and bool(mallopt(_M_TRIM_THRESHOLD, _TRIM_BYTES))
