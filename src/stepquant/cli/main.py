"""From arguments to an exit status: 0 done, 1 the work failed, 2 wrong usage, 3 a gate failed, 130 interrupted."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NoReturn

import typer

from stepquant.cli.commands import app
from stepquant.cli.console import Interrupted, Settings, stderr_console
from stepquant.cli.logs import logging_set_up
from stepquant.errors import SpecError, StepquantError

__all__ = ["main"]

logger = logging.getLogger(__name__)

_FOR_ALL = ("--debug", "--quiet", "-q")
_WITH_VALUE = ("--log-file",)

_SPLIT = ("quantize", "sample", "evaluate")
"""Commands that several processes can do together."""


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit. No traceback is shown unless `--debug` is among the arguments.

    Of several processes that a launcher has started, the first one shows and writes, and the first one that fails says
    why, and its status is that of the error; the others end, too.
    """
    given = list(sys.argv[1:] if args is None else args)
    arguments, debug = arranged(given)
    settings = Settings(command=shlex.join(["stepquant", *given]), debug=debug)
    command = typer.main.get_command(app)
    with logging_set_up(debug=debug):
        try:
            with _together(arguments) as own:
                command.main(own, prog_name="stepquant", obj=settings)
        except Interrupted as stop:
            logger.warning("%s", stop, extra={"told": True})
            if _tells():
                _complain(str(stop))
            sys.exit(130)
        except KeyboardInterrupt:
            _end_interrupted()
        except Exception as error:
            if _was_interrupted(error):
                _end_interrupted()
            logger.error("%s", _sentence(error), exc_info=True, extra={"told": True})
            # An option, a bit width or a key that makes no sense is wrong usage, whether the parser sees it or we do.
            status = 2 if isinstance(error, SpecError) else 1
            if not _tells():
                sys.exit(status)
            if debug and status == 1:
                raise
            if debug:
                traceback.print_exception(error)
            else:
                _complain(_sentence(error))
            sys.exit(status)
    sys.exit(0)


def _end_interrupted() -> NoReturn:
    logger.warning("Interrupted.", extra={"told": True})
    if _tells():
        _complain("Interrupted.")
    sys.exit(130)


def _was_interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind an error: Python 3.11 wraps what is raised while a class is made, so while importing."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def _launched() -> bool:
    """Whether a launcher (`accelerate launch`, `torchrun`) has started several processes; without importing torch."""
    count = os.environ.get("WORLD_SIZE", "1")
    return count.isdecimal() and int(count) > 1


@contextmanager
def _together(arguments: Sequence[str]) -> Iterator[list[str]]:
    """Inside, this process has joined the others, and shows nothing unless it is the first. Yields its arguments.

    Raises SpecError for a command that is not split, and as `processes.joined` does.
    """
    if not _launched():
        yield list(arguments)
        return
    from stepquant.processes import joined, leave

    processes = joined()
    name = _command_in(arguments)
    if name is not None and name not in _SPLIT:
        raise SpecError(
            f"`stepquant {name}` runs in one process: start it without a launcher. Several processes can "
            f"{', '.join(_SPLIT[:-1])} and {_SPLIT[-1]}."
        )
    try:
        if processes.first:
            yield list(arguments)
        else:
            logging.disable()
            with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
                yield _without_log_file(arguments)
    except SystemExit:  # how a command ends that was done, or used wrongly: all of them do
        processes.wait()
        leave()
        raise


def _command_in(arguments: Sequence[str]) -> str | None:
    """The command among arguments that `arranged` has put in order."""
    rest = [argument for argument in _without_log_file(arguments) if argument not in _FOR_ALL]
    return rest[0] if rest and not rest[0].startswith("-") else None


def _without_log_file(arguments: Sequence[str]) -> list[str]:
    """Arguments that `arranged` has put in order, without `--log-file FILE`: one process writes it."""
    found: list[str] = []
    skips = False
    for position, argument in enumerate(arguments):
        name, equals, _ = argument.partition("=")
        if not skips and name not in (*_FOR_ALL, *_WITH_VALUE):
            return [*found, *arguments[position:]]
        if not skips and name in _FOR_ALL:
            found.append(argument)
        skips = not skips and name in _WITH_VALUE and not equals
    return found


def _tells() -> bool:
    """Whether this process says why it ends: the first to fail of those of a launcher."""
    if not _launched():
        return True
    from stepquant.processes import first_to_tell

    return first_to_tell()


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
        if wants_value or argument in _FOR_ALL or argument.partition("=")[0] in _WITH_VALUE:
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
