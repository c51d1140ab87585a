"""Lists of prompts for calibration and evaluation: from a file, or the small neutral one that is shipped."""

from __future__ import annotations

import importlib.resources
import itertools
from pathlib import Path

from stepquant.errors import SpecError

__all__ = ["NEUTRAL", "prompts_from"]

NEUTRAL = "neutral"
"""Name of the shipped list. Written for stepquant, public domain; its head says what is in it."""


def prompts_from(source: str | Path, count: int) -> list[str]:
    """`count` prompts, the first ones of a list; a shorter list is repeated from its beginning.

    source: `NEUTRAL`, or a text file in UTF-8 with one prompt a line. Empty lines and lines that begin with # are left
        out.
    Raises SpecError for a file that cannot be read or has no prompt in it.
    """
    if source == NEUTRAL:
        text = (importlib.resources.files("stepquant") / "assets" / "prompts" / "neutral.txt").read_text("utf-8")
    else:
        try:
            text = Path(source).read_text(encoding="utf-8")
        except OSError as error:
            raise SpecError(
                f"Prompts: {source} cannot be read: {error.strerror}. Give a text file with one prompt a line, or "
                f"{NEUTRAL!r} for the shipped list."
            ) from None
        except UnicodeDecodeError as error:
            raise SpecError(f"Prompts: {source} is not text in UTF-8 (byte {error.start}).") from None
    lines = [line.strip() for line in text.splitlines()]
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise SpecError(f"Prompts: {source} has no line with a prompt in it.")
    return list(itertools.islice(itertools.cycle(found), count))
