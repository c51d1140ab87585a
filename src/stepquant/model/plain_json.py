"""JSON from files that nobody has checked."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

__all__ = ["parse_json"]


def parse_json(text: bytes) -> Any:
    """JSON with each key of an object once: of two, one reader would take the first and another the last.

    Raises ValueError for everything else.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_repetition)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice[:200]!r} is there twice")
    return found
