"""One candidate for every item, at the least sum of an objective, within budgets: an integer program (HiGHS)."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from stepquant.errors import CalibrationError

__all__ = ["solve"]

_RESCALINGS, _REPAIRS = 4, 4
"""How often the integer program is solved again in better units, and with less room."""


def solve(objective: Sequence[Sequence[float]], limits: Sequence[tuple[Sequence[Sequence[float]], float]]) -> list[int]:
    """Which candidate each item gets: the least sum of `objective`, with sum of costs <= budget for every limit.

    objective: a value for each candidate of each item. limits: (costs in the same form, budget).
    The best choice that is found within a minute; a few hundred items take about a second.
    Raises CalibrationError if there is no solution or none is found.
    """
    budgets = [budget for _, budget in limits]
    for _ in range(_REPAIRS):
        chosen = _solved(objective, [(costs, budget) for (costs, _), budget in zip(limits, budgets, strict=True)])
        over = [sum(row[place] for row, place in zip(costs, chosen, strict=True)) - budget for costs, budget in limits]
        if all(excess <= 1e-9 * abs(budget) for excess, (_, budget) in zip(over, limits, strict=True)):
            return chosen
        # Within the solver's tolerance of the budget is not within the budget.
        budgets = [budget - 2 * max(excess, 0.0) for budget, excess in zip(budgets, over, strict=True)]
    raise CalibrationError(f"The solver's choices stay above the budget by up to {max(over):g}: allow that much less.")


def _solved(
    objective: Sequence[Sequence[float]], limits: Sequence[tuple[Sequence[Sequence[float]], float]]
) -> list[int]:
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    counts = [len(row) for row in objective]
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    values = np.array([value for row in objective for value in row], dtype=float)
    owner = np.repeat(np.arange(len(counts)), counts)
    one_each = csr_array((np.ones(len(values)), (owner, np.arange(len(values)))), shape=(len(counts), len(values)))
    constraints = [LinearConstraint(one_each, 1, 1)]
    for costs, budget in limits:
        row = np.array([cost for part in costs for cost in part], dtype=float)
        unit = max(abs(budget), 1e-300)  # the solver's tolerances are absolute
        # What is far beyond the budget is beyond it: huge coefficients would cost the others their digits.
        constraints.append(LinearConstraint(np.minimum(row / unit, 1e3).reshape(1, -1), -np.inf, budget / unit))
    chosen: list[int] = []
    scale = max(float(values.max(initial=0.0)), 1e-300)
    for _ in range(_RESCALINGS):  # values span many orders: the next time in units of the solution
        with _output_to_errors():
            found = milp(
                np.minimum(values / scale, 1e6),
                integrality=np.ones(len(values)),
                bounds=Bounds(0, 1),
                constraints=constraints,
                options={"mip_rel_gap": 1e-6, "time_limit": 60.0},
            )
        if found.x is None:
            raise CalibrationError(f"No choice of bits keeps within the budget (the solver says: {found.message}).")
        chosen = [int(np.argmax(found.x[start : start + count])) for start, count in zip(starts, counts, strict=True)]
        best = sum(row[place] for row, place in zip(objective, chosen, strict=True))
        if not 0 < best < scale / 10:
            break
        scale = best
    return chosen


@contextmanager
def _output_to_errors() -> Iterator[None]:
    """Inside, what C code writes to standard output goes to standard error.

    HiGHS writes lines of its own there whatever `disp` says, and they would end up in the middle of `--json`.
    """
    if os.name != "posix":
        yield
        return
    flush = ctypes.CDLL(None).fflush
    try:
        flush(None)
        kept = os.dup(1)
    except OSError:  # there is no standard output
        yield
        return
    try:
        os.dup2(2, 1)
        yield
    finally:
        flush(None)
        os.dup2(kept, 1)
        os.close(kept)
