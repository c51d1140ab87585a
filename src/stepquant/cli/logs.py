"""Log messages: warnings on standard error, and with `--log-file` everything as one JSON object a line."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stepquant.cli.console import json_text

__all__ = ["JsonLines", "log_to", "logging_set_up"]


class JsonLines(logging.Formatter):
    """`{"time", "level", "logger", "message"}`, with `data` where a record carries some and `traceback` for errors.

    time: UTC in ISO 8601.
    """

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        entry = {
            "time": datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        data = getattr(record, "data", None)
        if data is not None:
            entry["data"] = data
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json_text(entry)


@contextmanager
def logging_set_up(*, debug: bool) -> Iterator[None]:
    """Inside, messages go to standard error from warnings on, with `debug` all of them. Afterwards all is as before.

    A record with `told` true has been shown to the user by other means, so only a log file gets it.
    """
    root, ours = logging.getLogger(), logging.getLogger("stepquant")
    before, levels = list(root.handlers), (root.level, ours.level)
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING, format="%(name)s: %(message)s")
    for handler in [handler for handler in root.handlers if handler not in before]:
        handler.addFilter(lambda record: not getattr(record, "told", False))
    try:
        yield
    finally:
        for handler in [handler for handler in root.handlers if handler not in before]:
            root.removeHandler(handler)
            handler.close()
        root.setLevel(levels[0])
        ours.setLevel(levels[1])


def log_to(path: Path) -> None:
    """From now on also append messages to a file as JSON lines; of stepquant from INFO on, of others warnings.

    Raises OSError that names the file if it cannot be written.
    """
    root = logging.getLogger()
    for handler in root.handlers:
        # What the file wants beyond warnings is not for the screen.
        if handler.level == logging.NOTSET:
            handler.setLevel(root.level)
    written = logging.FileHandler(path, encoding="utf-8")
    written.setFormatter(JsonLines())
    root.addHandler(written)
    logging.getLogger("stepquant").setLevel(min(root.level, logging.INFO))
