"""From arguments to an exit status: 0 done, 1 the work failed, 2 wrong usage, 130 interrupted."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Sequence
from typing import NoReturn

import typer

from stepquant.cli.commands import app
from stepquant.cli.console import Interrupted, Settings, stderr_console
from stepquant.cli.logs import logging_set_up
from stepquant.errors import StepquantError

__all__ = ["main"]

logger = logging.getLogger(__name__)

_WITH_VALUE = ("--log-file",)


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit. No traceback is shown unless `--debug` is among the arguments."""
    given = list(sys.argv[1:] if args is None else args)
    arguments, debug = arranged(given)
    settings = Settings(command=shlex.join(["stepquant", *given]), debug=debug)
    command = typer.main.get_command(app)
    with logging_set_up(debug=debug):
        try:
            command.main(arguments, prog_name="stepquant", obj=settings)
        except Interrupted as stop:
            logger.warning("%s", stop, extra={"told": True})
            _complain(str(stop))
            sys.exit(130)
        except KeyboardInterrupt:
            logger.warning("Interrupted.", extra={"told": True})
            _complain("Interrupted.")
            sys.exit(130)
        except Exception as error:
            logger.error("%s", _sentence(error), exc_info=True, extra={"told": True})
            if debug:
                raise
            _complain(_sentence(error))
            sys.exit(1)
    sys.exit(0)


def arranged(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """Arguments with what belongs to every command put first, and whether `--debug` is among them.

    `--debug`, `--quiet`, `-q` and `--log-file FILE` may stand anywhere. `--json` with nothing after it, or an option,
    means `--json -`.
    """
    first: list[str] = []
    rest: list[str] = []
    end = arguments.index("--") if "--" in arguments else len(arguments)
    wants_value = False
    for position, argument in enumerate(arguments[:end]):
        if wants_value or argument in ("--debug", "--quiet", "-q") or argument.partition("=")[0] in _WITH_VALUE:
            wants_value = not wants_value and argument in _WITH_VALUE
            first.append(argument)
            continue
        rest.append(argument)
        following = arguments[position + 1] if position + 1 < end else "--"
        if argument == "--json" and following.startswith("-") and following != "-":
            rest.append("-")
    return [*first, *rest, *arguments[end:]], "--debug" in first


def _sentence(error: Exception) -> str:
    """What to tell a user. Errors raised on purpose already say it; of the others only the first line is shown."""
    if isinstance(error, StepquantError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}."
    lines = str(error).strip().splitlines()
    what = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return f"{what} (unexpected; run again with --debug to see where it came from)"


def _complain(message: str) -> None:
    stderr_console().print(f"Error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
