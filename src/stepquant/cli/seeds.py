"""Lists of seeds as people write them."""

from __future__ import annotations

import re
from collections.abc import Sequence

import typer

__all__ = ["format_seeds", "parse_seeds"]

_PART = re.compile(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", re.ASCII)
_MOST = 1_000_000
_LARGEST = 2**63 - 1


def parse_seeds(text: str) -> list[int]:
    """`"0-3,20"` -> [0, 1, 2, 3, 20]; ranges include both ends. A mistake is one of usage."""
    seeds: list[int] = []
    for part in text.split(","):
        found = _PART.fullmatch(part)
        if not found:
            raise typer.BadParameter(f"Seeds look like 0-15,20, found {part.strip()!r} in {text!r}.")
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first or last > _LARGEST:
            raise typer.BadParameter(f"The range {part.strip()!r} goes from {first} to {last}.")
        if last - first + len(seeds) >= _MOST:
            raise typer.BadParameter(f"{text!r} stands for more than {_MOST} seeds.")
        seeds += range(first, last + 1)
    if len(set(seeds)) < len(seeds):
        raise typer.BadParameter(f"A seed is there twice in {text!r}.")
    return seeds


def format_seeds(seeds: Sequence[int]) -> str:
    """[0, 1, 2, 3, 20] -> "0-3, 20"."""
    parts: list[list[int]] = []
    for seed in seeds:
        if parts and seed == parts[-1][-1] + 1:
            parts[-1][1:] = [seed]
        else:
            parts.append([seed])
    return ", ".join("-".join(map(str, part)) for part in parts)
