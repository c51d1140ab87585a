"""Conditions under which an evaluation has failed: "psnr<28", "frechet_to_fp>2"."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stepquant.errors import SpecError, nearest

__all__ = ["Gate", "check_gates", "parse_gates"]

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_GATE = re.compile(r"\s*(\w+)\s*(<=|>=|<|>)\s*(\S+)\s*", re.ASCII)


@dataclass(frozen=True)
class Gate:
    """Fails where `metric sign bound` is true."""

    metric: str
    sign: str
    bound: float

    def __str__(self) -> str:
        return f"{self.metric}{self.sign}{repr(self.bound).removesuffix('.0')}"


def parse_gates(texts: Iterable[str], known: Sequence[str]) -> tuple[Gate, ...]:
    """Gates from what a user typed. known: metrics that there are.

    Raises SpecError for another form, a bound that is no finite number, or an unknown metric, with the nearest name.
    """
    gates = []
    for text in texts:
        found = _GATE.fullmatch(text)
        if not found:
            raise SpecError(f"A gate looks like psnr<28, with one of < <= > >=, found {text!r}.")
        metric, sign, bound = found.groups()
        if metric not in known:
            raise SpecError(
                f"Gate {text!r}: there is no metric {metric!r}. Expected one of {', '.join(known)}."
                f"{nearest(metric, known)}"
            )
        try:
            value = float(bound)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise SpecError(f"Gate {text!r}: {bound!r} is not a number.")
        gates.append(Gate(metric, sign, value))
    return tuple(gates)


def check_gates(gates: Iterable[Gate], metrics: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What became of each gate, as JSON values: gate, value (None if it was not measured), failed.

    A metric that was not measured, or is not a number, fails: nobody has seen that it is good.
    """
    found = []
    for gate in gates:
        value = float(metrics.get(gate.metric, {}).get("value", math.nan))
        failed = math.isnan(value) or _OPERATORS[gate.sign](value, gate.bound)
        found.append({"gate": str(gate), "value": None if math.isnan(value) else value, "failed": failed})
    return found
