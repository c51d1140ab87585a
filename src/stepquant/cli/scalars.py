"""Figures of stages as scalars of TensorBoard, with `--tensorboard`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stepquant.errors import SpecError

__all__ = ["Scalars", "scalars_of"]


class Scalars:
    """Writes into a folder that `tensorboard --logdir` reads. Raises SpecError if the package is not installed."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter  # type: ignore[attr-defined, unused-ignore]
        except ImportError:
            raise SpecError("--tensorboard needs the package tensorboard: pip install tensorboard") from None
        self._writer: Any = SummaryWriter(str(folder))

    def add(self, number: int, figures: Mapping[str, Any]) -> None:
        """The figures of stage `number`: a number is a point, a list of numbers a curve, and so is a column of rows."""
        for tag, step, value in scalars_of(number, figures):
            self._writer.add_scalar(tag, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


def scalars_of(number: int, figures: Mapping[str, Any]) -> Iterator[tuple[str, int, float]]:
    """(tag, step, value) for every number in a stage's figures; words are left out."""
    stage = f"{number:02d}-{figures.get('stage', 'stage')}"
    yield from _scalars(stage, {key: value for key, value in figures.items() if key != "stage"})


def _scalars(tag: str, value: Any) -> Iterator[tuple[str, int, float]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _scalars(f"{tag}/{key}", part)
    elif _is_number(value):
        yield tag, 0, float(value)
    elif isinstance(value, list | tuple):
        for step, one in enumerate(value):
            if _is_number(one):
                yield tag, step, float(one)
            elif isinstance(one, list | tuple):
                yield from (
                    (f"{tag}/{column}", step, float(part)) for column, part in enumerate(one) if _is_number(part)
                )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
