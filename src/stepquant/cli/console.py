"""What goes to the terminal: consoles, progress and machine-readable output."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from stepquant.run import Progress as ProgressProtocol

__all__ = [
    "BarProgress",
    "Interrupted",
    "LineProgress",
    "NoProgress",
    "Settings",
    "duration",
    "interruptible",
    "progress_for",
    "stderr_console",
    "stdout_console",
    "write_json",
]

_SECONDS_BETWEEN_LINES = 30.0


@dataclass(frozen=True)
class Settings:
    """What holds for every command: the command line as typed, and the two options that go with all of them."""

    command: str = "stepquant"
    debug: bool = False
    quiet: bool = False


class Interrupted(Exception):  # noqa: N818 - not an error of the work
    """The user pressed Ctrl-C; the message says how to go on."""


@contextmanager
def interruptible(how_to_go_on: str) -> Iterator[None]:
    """Turn Ctrl-C into `Interrupted` with a message that says what is left and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"Interrupted. {how_to_go_on}") from None


def stdout_console() -> Console:
    """For results. File names and layer names may hold brackets, so nothing is read as markup."""
    return Console(markup=False, highlight=False, soft_wrap=True)


def stderr_console() -> Console:
    """For progress and complaints."""
    return Console(stderr=True, markup=False, highlight=False)


def write_json(data: Any, target: str) -> None:
    """Write JSON to a file, or to standard output if `target` is "-"."""
    text = json.dumps(data, indent=2, ensure_ascii=False, default=_plain)
    if target == "-":
        sys.stdout.write(text + "\n")
    else:
        Path(target).write_text(text + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else str(value)


def duration(seconds: float) -> str:
    """`75` -> "1 min 15 s"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def progress_for(settings: Settings) -> ProgressProtocol:
    """Bars on a terminal, a line now and then elsewhere, nothing with `--quiet`."""
    if settings.quiet:
        return NoProgress()
    console = stderr_console()
    return BarProgress(console) if console.is_terminal else LineProgress()


class NoProgress:
    """Shows nothing."""

    @contextmanager
    def track(self, what: str, total: int) -> Iterator[Callable[[int], None]]:  # noqa: ARG002
        """See `stepquant.run.Progress`."""
        yield lambda _done: None


class BarProgress:
    """Bars with the time left, one for each kind of work that is under way."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._under_way = 0
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            # One unit may take a minute: the default of 30 seconds would forget every unit before the last.
            speed_estimate_period=600.0,
        )

    @contextmanager
    def track(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """See `stepquant.run.Progress`."""
        if self._under_way == 0:
            self._bars.start()
        self._under_way += 1
        task = self._bars.add_task(what, total=total)
        started = time.monotonic()
        try:
            yield lambda done: self._bars.advance(task, done)
            if self._under_way == 1:
                self._console.print(f"{what}: done in {duration(time.monotonic() - started)}")
        finally:
            self._under_way -= 1
            self._bars.remove_task(task)
            if self._under_way == 0:
                self._bars.stop()


class LineProgress:
    """One plain line at most every 30 seconds: for log files and continuous integration."""

    def __init__(
        self,
        write: Callable[[str], object] | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._write = write or _line_to_stderr
        self._clock = clock
        self._last = clock()

    @contextmanager
    def track(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """See `stepquant.run.Progress`."""
        started, count = self._clock(), 0

        def advance(done: int) -> None:
            nonlocal count
            count += done
            now = self._clock()
            if now - self._last < _SECONDS_BETWEEN_LINES:
                return
            self._last = now
            left = (now - started) * (total - count) / max(count, 1)
            self._write(f"{what}: {count} of {total}, {duration(left)} left")

        yield advance


def _line_to_stderr(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
