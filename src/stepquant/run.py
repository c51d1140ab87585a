"""What one run of stepquant carries along: its seed, work folder, progress, and the processes that do it together."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from stepquant.processes import ALONE, Processes

__all__ = ["Progress", "Run", "SilentProgress", "Spill"]


class Progress(Protocol):
    """Shows how far long work has come. The command line shows bars; the library shows nothing unless asked."""

    def track(self, what: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """A context whose value is called with the number of units that have just been done."""
        ...


class SilentProgress:
    """Shows nothing."""

    @contextmanager
    def track(self, what: str, total: int) -> Iterator[Callable[[int], None]]:  # noqa: ARG002
        yield lambda _done: None


@dataclass(frozen=True)
class Spill:
    """Where a run puts what is too large for main memory.

    folder: on disk; empty at the start, removed at the end. memory: bytes of cached data that may stay in memory.
    """

    folder: Path
    memory: int


def _tell_nobody(number: int, figures: Mapping[str, Any]) -> None:
    """The default of `Run.finished`."""


@dataclass(frozen=True)
class Run:
    """Seed, work folder, progress and processes of one run.

    seed: root of every random stream of the run.
    work: folder for what a killed run needs to go on; None keeps nothing on disk.
    finished: called with the number and the figures of every stage that has finished.
    processes: that share the work, `processes.joined()`. All of them must be given the same run; the first one alone
        uses the work folder.
    max_memory: bytes of what calibration records and caches that may be in main memory at a time; what is beyond, and
        all trajectories, lies on disk: in the work folder, or without one among the system's temporary files. None
        keeps everything in memory. Results are the same.
    offload: the device that a calibration computes on with the denoiser's blocks in main memory, brought there in turn.
        None computes where the pipeline is. With it the pipeline must be in main memory, and it is there again
        afterwards. One process only.
    """

    seed: int = 0
    work: Path | None = None
    progress: Progress = field(default_factory=SilentProgress)
    finished: Callable[[int, Mapping[str, Any]], None] = _tell_nobody
    processes: Processes = ALONE
    max_memory: int | None = None
    offload: torch.device | None = None

    def generator(self, *name: object) -> torch.Generator:
        """A CPU generator of its own for each name.

        The stream is derived by hashing seed and name, so a draw added under one name changes no other stream.
        It lives on the CPU so that the numbers do not depend on the device.
        """
        text = "/".join([str(self.seed), *map(str, name)])
        digest = hashlib.sha256(text.encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") & (2**63 - 1))
