"""Blocks of code in Markdown pages: found, told apart, and commands of the shell taken to pieces.

A comment in the line before a block says what is not done with it:

    <!-- not run: why -->     checked (compiled, or its commands parsed), but not run
    <!-- no code: why -->     nothing is done; for what only looks like commands

Python between fences is run, and so is Python that is indented by four spaces. Commands of the shell between fences are
run; those that are indented are examples in passing, and parsed.
"""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import typer

from stepquant.cli.commands import app
from stepquant.cli.console import Settings
from stepquant.cli.main import arranged
from stepquant.cli.work import QuantizeRequest
from stepquant.evaluate.compare import METRICS
from stepquant.evaluate.gates import parse_gates
from stepquant.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]

Kind = Literal["python", "shell", "yaml", "text"]

_FENCE = re.compile(r"( *)(```+|~~~+) *([\w.+-]*)")
_MARKER = re.compile(r"\s*<!-- (not run|no code): (\S.*?) -->\s*")
_COMMAND = re.compile(r"(\w+=\S+ )*(stepquant|python[\d.]*|accelerate|torchrun|pip|make|cd|\.|export|git|curl)(\s|$)")
_IMPORT = re.compile(r"(from [\w.]+ import|import [\w.]+)\b")


@dataclass(frozen=True)
class Block:
    """Some lines of a page.

    line: the first of them, from 1. marker: "not run", "no code", or empty.
    """

    page: str
    line: int
    kind: Kind
    text: str
    fenced: bool
    marker: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def runs(self) -> bool:
        return not self.marker and (self.kind == "python" or (self.kind == "shell" and self.fenced))


def pages() -> list[str]:
    """Every page that people read, relative to the root."""
    found = [ROOT / "README.md", ROOT / "examples" / "README.md"]
    return [str(path.relative_to(ROOT)) for path in [*found, *sorted((ROOT / "docs").rglob("*.md"))]]


def blocks_of(page: str) -> list[Block]:
    """Fenced and indented blocks, in order."""
    return list(_blocks(page, (ROOT / page).read_text(encoding="utf-8").splitlines()))


def _blocks(page: str, lines: list[str]) -> Iterator[Block]:
    number = 0
    while number < len(lines):
        fence = _FENCE.fullmatch(lines[number].rstrip())
        if fence:
            end = next(n for n in range(number + 1, len(lines)) if lines[n].strip() == fence[2])
            text = textwrap.dedent("\n".join(lines[number + 1 : end]))
            yield _block(page, number + 2, text, fence[3], lines, number, fenced=True)
            number = end + 1
        elif lines[number].startswith("    ") and _begins_indented(lines, number):
            end = number
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            text = textwrap.dedent("\n".join(lines[number:end])).rstrip()
            yield _block(page, number + 1, text, "", lines, number, fenced=False)
            number = end
        else:
            number += 1


def _begins_indented(lines: list[str], number: int) -> bool:
    """After an empty line or a marker. Text that belongs to an item of a list is found too, and is no code by kind."""
    return number == 0 or not lines[number - 1].strip() or _MARKER.fullmatch(lines[number - 1]) is not None


def _block(page: str, line: int, text: str, name: str, lines: list[str], start: int, *, fenced: bool) -> Block:
    marker = _MARKER.fullmatch(lines[start - 1]) if start else None
    return Block(page, line, _kind(name, text), text, fenced, marker[1] if marker else "")


def _kind(name: str, text: str) -> Kind:
    known: Mapping[str, Kind] = {"python": "python", "py": "python", "yaml": "yaml", "bash": "shell", "sh": "shell"}
    if name:
        return known.get(name, "text")
    lines = [line for line in text.splitlines() if line.strip()]
    if any(_COMMAND.match(line) for line in lines):
        return "shell"
    return "python" if any(_IMPORT.match(line) for line in lines) else "text"


def commands_of(text: str) -> list[list[str]]:
    """The words of every command, comments left out, lines that end in a backslash joined."""
    joined = re.sub(r"\\\n\s*", " ", text)
    found = [shlex.split(line, comments=True) for line in joined.splitlines()]
    return [words for words in found if words]


def check_command(words: list[str]) -> None:
    """Raise if a command cannot work: unknown commands, options, methods, settings, scripts, make targets."""
    while words and re.fullmatch(r"\w+=.*", words[0]):
        words = words[1:]
    if words[0] in ("accelerate", "torchrun") or words[1:3] == ["-m", "stepquant"]:
        words = words[words.index("stepquant") :]
    if words[0] == "stepquant":
        _check_stepquant(words[1:])
    elif re.fullmatch(r"(.*/)?python[\d.]*", words[0]) and words[1].endswith(".py"):
        source = (ROOT / words[1]).read_text(encoding="utf-8")
        unknown = [word for word in words[2:] if word.startswith("--") and f'"{word.partition("=")[0]}"' not in source]
        assert not unknown, f"{words[1]} has no option {unknown}"
    elif words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert set(words[1:]) <= set(targets), f"the Makefile has no target {set(words[1:]) - set(targets)}"


def _check_stepquant(arguments: list[str]) -> None:
    name, given = parsed(arguments)
    if name in ("quantize", "allocate") and given["config"] is None:
        keys = ("model", "method", "weights", "activations", "steps", "preset", "seed", "target")
        flags = {key: given[key] for key in (*keys, "calibration_samples", "max_bytes", "max_drift") if given.get(key)}
        resolved = QuantizeRequest(None, None, tuple(given["set_"] or ()), flags).resolved()
        assert resolved.recipe.stages
    if name == "methods" and given["name"] is not None:
        assert given["name"] in (*METHODS, "NAME"), given["name"]
    if name == "evaluate":
        parse_gates(given["fail_if"] or (), METRICS)


def parsed(arguments: list[str]) -> tuple[str, dict[str, Any]]:
    """The command's name and its options, by the parser of the command line; raises what that raises."""
    group: Any = typer.main.get_command(app)
    group.callback = lambda **_options: None
    found: dict[str, dict[str, Any]] = {}
    for name, command in group.commands.items():
        command.callback = lambda _name=name, **options: found.update({_name: options})
    group.main(arranged(arguments)[0], prog_name="stepquant", obj=Settings(), standalone_mode=False)
    ((name, options),) = found.items()
    return name, options
