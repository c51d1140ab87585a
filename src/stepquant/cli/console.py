"""What goes to the terminal: consoles, progress and machine-readable output."""

from __future__ import annotations

import json
import logging
import math
import os
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
    "LoggedProgress",
    "NoProgress",
    "Settings",
    "duration",
    "interruptible",
    "json_text",
    "progress_for",
    "replace_text",
    "stderr_console",
    "stdout_console",
    "write_json",
]

logger = logging.getLogger(__name__)

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
    """Write JSON to a file, or to standard output if `target` is "-". A file is replaced when the new one is whole.

    Numbers that are not finite are null.
    """
    text = json_text(data, indent=2) + "\n"
    path = Path(target)
    if target == "-":
        sys.stdout.write(text)
    elif path.exists() and not path.is_file():  # a pipe or a device
        path.write_text(text, encoding="utf-8")
    else:
        replace_text(path, text)


def json_text(data: Any, *, indent: int | None = None) -> str:
    """JSON that every parser reads: numbers that are not finite are null. What JSON does not know is its `str`."""
    return json.dumps(_finite(data), indent=indent, ensure_ascii=False, default=str, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, list | tuple) else value


def replace_text(path: Path, text: str) -> None:
    """Write beside the file and rename. An OSError names the file, also where the disk is full."""
    path = path.resolve()
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # as for checkpoints: hours of work must not end at a folder
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


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
    """Bars on a terminal, a line now and then elsewhere, nothing with `--quiet`; and log messages in any case."""
    if settings.quiet:
        return LoggedProgress(NoProgress())
    console = stderr_console()
    return LoggedProgress(BarProgress(console) if _moves_its_cursor(console) else LineProgress())


def _moves_its_cursor(console: Console) -> bool:
    """Whether bars can be drawn anew. A notebook's `!stepquant ...` looks like a terminal, but only adds lines."""
    return console.is_terminal and not console.is_dumb_terminal and "JPY_PARENT_PID" not in os.environ


class LoggedProgress:
    """Shows what another one shows, and logs when work begins, now and then how far it is, and when it ends."""

    def __init__(self, shown: ProgressProtocol) -> None:
        self._shown = shown
        self._lines = LineProgress(logger.info)

    @contextmanager
    def track(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """See `stepquant.run.Progress`."""
        started = time.monotonic()
        logger.info("%s: %d to do", what, total)
        with self._shown.track(what, total) as show, self._lines.track(what, total) as log:

            def advance(done: int) -> None:
                show(done)
                log(done)

            yield advance
        logger.info("%s: done in %s", what, duration(time.monotonic() - started))


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
