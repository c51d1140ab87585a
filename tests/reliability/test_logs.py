"""What is told beside the results: a log file of JSON lines, scalars, and progress where no bar can be drawn."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from stepquant.cli import console as consoles
from stepquant.cli.console import BarProgress, LineProgress, LoggedProgress, Settings, progress_for
from stepquant.cli.logs import JsonLines, log_to, logging_set_up
from stepquant.cli.main import arranged, main
from stepquant.cli.scalars import Scalars, scalars_of
from stepquant.errors import SpecError


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_log_file_has_one_object_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log"
    logger, foreign = logging.getLogger("stepquant.test"), logging.getLogger("elsewhere")
    with logging_set_up(debug=False):
        log_to(path)
        logger.debug("too fine")
        logger.info("two\nlines %d, ü", 3, extra={"data": {"loss": 0.5}})
        foreign.info("not ours")
        foreign.warning("theirs")
    logger.info("afterwards")
    first, second = lines(path)
    assert (first["level"], first["logger"], first["message"]) == ("INFO", "stepquant.test", "two\nlines 3, ü")
    assert first["data"] == {"loss": 0.5}
    assert first["time"].endswith("+00:00")
    assert (second["level"], second["message"]) == ("WARNING", "theirs")
    assert "data" not in second
    assert "two" not in capsys.readouterr().err, "what the file wants beyond warnings is not for the screen"


def test_every_record_can_be_written() -> None:
    record = logging.LogRecord("x", logging.ERROR, "f", 1, "%s", (object(),), None)
    record.data = {1: {2, 3}, "x": float("inf")}
    assert "object object" in json.loads(JsonLines().format(record))["message"]


def test_a_failed_command_leaves_its_traceback_in_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log"
    with pytest.raises(SystemExit) as stop:
        main(["methods", "acuquant", "--log-file", str(path)])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.count("There is no method 'acuquant'") == 1
    assert "Traceback" not in err
    begun, failed = lines(path)
    assert begun["message"].endswith(f"stepquant methods acuquant --log-file {path}")
    assert failed["level"] == "ERROR"
    assert "There is no method 'acuquant'" in failed["message"]
    assert "SpecError" in failed["traceback"]
    assert logging.getLogger("stepquant").level == logging.NOTSET


def test_the_log_file_may_be_named_anywhere() -> None:
    assert arranged(["demo", "--log-file", "f", "-q"]) == (["--log-file", "f", "-q", "demo"], False)
    assert arranged(["demo", "--log-file=f", "x"]) == (["--log-file=f", "demo", "x"], False)
    assert arranged(["demo", "--", "--log-file", "f"]) == (["demo", "--", "--log-file", "f"], False)


def test_progress_goes_to_the_log_too(caplog: pytest.LogCaptureFixture) -> None:
    shown: list[str] = []
    now = iter(range(0, 1000, 20))
    with caplog.at_level(logging.INFO, logger="stepquant"):
        progress = LoggedProgress(LineProgress(shown.append, clock=lambda: next(now)))
        with progress.track("Sampling", 4) as advance:
            for _ in range(4):
                advance(1)
    said = [record.message for record in caplog.records]
    assert said[0] == "Sampling: 4 to do"
    assert said[-1].startswith("Sampling: done in ")
    assert shown
    assert all(line.startswith("Sampling: ") for line in shown)


@pytest.mark.parametrize(
    ("environment", "bars"),
    [({}, True), ({"TERM": "dumb"}, False), ({"JPY_PARENT_PID": "1"}, False), ({"TTY_COMPATIBLE": "0"}, False)],
)
def test_bars_only_where_they_can_be_drawn_anew(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], bars: bool
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("JPY_PARENT_PID", raising=False)
    for key, value in ({"TERM": "xterm"} | environment).items():
        monkeypatch.setenv(key, value)
    console = Console(file=Terminal(), _environ={"TERM": "xterm", **environment})
    monkeypatch.setattr(consoles, "stderr_console", lambda: console)
    shown = progress_for(Settings())._shown  # type: ignore[attr-defined]
    assert isinstance(shown, BarProgress if bars else LineProgress)


def test_without_a_terminal_there_are_no_control_characters() -> None:
    code = (
        "from stepquant.cli import console\n"
        "console._SECONDS_BETWEEN_LINES = 0\n"
        "with console.progress_for(console.Settings()).track('Work', 2) as advance: advance(1); advance(1)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [line.rpartition(",")[0] for line in done.stderr.splitlines()] == ["Work: 1 of 2", "Work: 2 of 2"]
    assert done.stderr.isprintable() or set(done.stderr) - set("\n") == {c for c in done.stderr if c.isprintable()}


def test_figures_as_scalars() -> None:
    figures = {
        "stage": "Fit",
        "seconds": 2,
        "ok": True,
        "losses": [3.0, 1.0],
        "by": {"a": 1, "b": "x"},
        "rows": [[0, 0.5], ["x", 2]],
    }
    assert list(scalars_of(7, figures)) == [
        ("07-Fit/seconds", 0, 2.0),
        ("07-Fit/losses", 0, 3.0),
        ("07-Fit/losses", 1, 1.0),
        ("07-Fit/by/a", 0, 1.0),
        ("07-Fit/rows/0", 0, 0.0),
        ("07-Fit/rows/1", 0, 0.5),
        ("07-Fit/rows/1", 1, 2.0),
    ]


def test_scalars_reach_the_writer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    written: list[tuple[Any, ...]] = []

    class Writer:
        def __init__(self, folder: str) -> None:
            written.append((folder,))

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            written.append((tag, value, step))

        def flush(self) -> None:
            written.append(("flush",))

        def close(self) -> None:
            written.append(("close",))

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    scalars = Scalars(tmp_path)
    scalars.add(0, {"stage": "Fit", "loss": 0.5})
    scalars.close()
    assert written == [(str(tmp_path),), ("00-Fit/loss", 0.5, 0), ("flush",), ("close",)]


def test_without_tensorboard_there_is_a_command_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(SpecError, match="pip install tensorboard"):
        Scalars(tmp_path)
    with pytest.raises(SystemExit):
        main(["quantize", "digits-unet", "-o", str(tmp_path / "out"), "--tensorboard", str(tmp_path / "tb")])
    assert "pip install tensorboard" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [], "it is found out before any work"
