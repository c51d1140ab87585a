"""Stages, recipes and the job that runs them.

A recipe is a value: a name and a tuple of stages, each a frozen dataclass. A stage says what it needs from the stages
before it and what it gives to those after it, and a recipe whose needs are not met cannot be built.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from stepquant.errors import SpecError, nearest
from stepquant.run import Run, Spill

__all__ = ["Checked", "Job", "Keeper", "Recipe", "Stage", "recipe_from_dict"]

Figures = dict[str, Any]
"""What a stage measured about itself, ready for JSON."""


class Keeper(Protocol):
    """Keeps what a long stage needs to go on after it was killed in the middle."""

    def save(self, name: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None: ...

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None: ...


@dataclass
class Job:
    """The only mutable thing of a run: what is being quantized and what the stages hand on.

    pipe: the user's pipeline, with the full-precision denoiser; never changed for longer than a recording.
    full_precision: the pipeline's denoiser.
    denoiser: the copy that is being quantized.
    arguments: what the pipeline is called with beside seeds and steps (prompts, guidance scale, class labels).
    keeper: where long stages keep their state; None keeps nothing.
    spill: where trajectories and large caches lie on disk; None keeps them in memory.
    handed: nouns of the stages' `gives` -> values ("trajectories", "calibration", "order", ...).
    stages: of the recipe, for checks before the first of them runs; empty where there is no recipe.
    """

    pipe: Any
    full_precision: nn.Module
    denoiser: nn.Module
    run: Run
    steps: int
    arguments: Mapping[str, Any] = field(default_factory=dict)
    handed: dict[str, Any] = field(default_factory=dict)
    keeper: Keeper | None = None
    spill: Spill | None = None
    stages: tuple[Stage, ...] = ()


@runtime_checkable
class Stage(Protocol):
    """One thing done to a job. A frozen dataclass whose fields are its settings.

    needs, gives: nouns. "model" stands for the quantized denoiser's own state.
    Two marks that a stage may have: `sets_row_bits`, it gives timesteps bits of their own, and
    `replaces_input_quantizers`, it makes the quantizers of activations anew with equal bits. And two of bits over time
    that a plan asks for: `plans_row_bits`, it makes such a plan, and `follows_planned_bits`, it does not drop them.
    """

    needs: ClassVar[frozenset[str]]
    gives: ClassVar[frozenset[str]]

    def run(self, job: Job) -> Figures: ...


@runtime_checkable
class Checked(Protocol):
    """A stage that can tell, before the first stage runs, that its settings do not fit the job."""

    def check(self, job: Job) -> None:
        """Raise SpecError or ModelError if `run` is bound to fail. Must not change the job."""
        ...


@dataclass(frozen=True)
class Recipe:
    """A name and the stages in order."""

    name: str
    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        have: set[str] = set()
        for number, stage in enumerate(self.stages):
            missing = stage.needs - have
            if missing:
                raise SpecError(
                    f"Stage {number + 1} of recipe {self.name!r}, {type(stage).__name__}, needs "
                    f"{', '.join(sorted(missing))}, which no stage before it gives."
                )
            if "correction" in stage.gives & have:
                raise SpecError(
                    f"Stage {number + 1} of recipe {self.name!r}, {type(stage).__name__}, fits a correction, and a "
                    "stage before it has fitted one already, which it would replace. Keep one of them."
                )
            if "correction" in have and {"model", "plan"} & stage.gives:
                raise SpecError(
                    f"Stage {number + 1} of recipe {self.name!r}, {type(stage).__name__}, changes the quantized model, "
                    "and a stage before it has fitted a correction to the model as it was. Put the correction last."
                )
            self._refuse_lost_bits(number)
            have |= stage.gives

    def _refuse_lost_bits(self, number: int) -> None:
        """Stages that make quantizers of activations anew know nothing of bits that earlier ones gave to rows."""
        stage, before = self.stages[number], self.stages[:number]
        planning = next((type(one).__name__ for one in before if getattr(one, "plans_row_bits", False)), None)
        replaces = getattr(stage, "replaces_input_quantizers", False)
        if planning is not None and replaces and not getattr(stage, "follows_planned_bits", False):
            raise SpecError(
                f"Stage {number + 1} of recipe {self.name!r}, {type(stage).__name__}, makes the quantizers of "
                f"activations in its own way, and would drop the bits over time that {planning} has planned. Give each "
                "layer one number of bits (no lists in rules, step_groups 1), or choose a method whose ranges come "
                "from FitInputRanges, such as rtn, layerwise or q_diffusion."
            )
        setting = next((type(one).__name__ for one in before if getattr(one, "sets_row_bits", False)), None)
        if setting is not None and getattr(stage, "replaces_input_quantizers", False):
            name = type(stage).__name__
            raise SpecError(
                f"Stage {number + 1} of recipe {self.name!r}, {name}, makes the quantizers of activations anew, and "
                f"would drop the bits of timesteps that {setting} has set before it. Put {name} before {setting}, or "
                "leave one of them out."
            )

    def then(self, *stages: Stage, name: str | None = None) -> Recipe:
        """This recipe with further stages after it."""
        return Recipe(name or self.name, (*self.stages, *stages))

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `recipe_from_dict` reads back: `{"name", "stages": [{"stage": class name, settings}]}`."""
        stages: list[dict[str, Any]] = []
        for stage in self.stages:
            settings: Any = TypeAdapter(type(stage)).dump_python(stage, mode="json")
            stages.append({"stage": type(stage).__name__, **settings})
        return {"name": self.name, "stages": stages}

    @property
    def hash(self) -> str:
        """Sixteen hex digits that change with any setting."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def recipe_from_dict(data: Mapping[str, Any], stages: Mapping[str, type[Any]]) -> Recipe:
    """Build a recipe from plain data. Unknown stages and settings are errors with the path and the nearest name."""
    unknown = set(data) - {"name", "stages"}
    if unknown or "stages" not in data:
        raise SpecError(f"A recipe has the keys name and stages, found {sorted(map(str, data))}.")
    if not isinstance(data["stages"], list):
        raise SpecError(f"stages: expected a list of stages, found {data['stages']!r:.60}.")
    built: list[Stage] = []
    for number, entry in enumerate(data["stages"]):
        where = f"stages[{number}]"
        if not isinstance(entry, Mapping):
            raise SpecError(f"{where}: expected settings such as {{stage: Record}}, found {entry!r:.60}.")
        settings = dict(entry)
        kind = settings.pop("stage", None)
        if not isinstance(kind, str) or kind not in stages:
            raise SpecError(f"{where}.stage: there is no stage {kind!r}.{nearest(str(kind), stages)}")
        known = [entry.name for entry in dataclasses.fields(stages[kind])]
        for key in settings:
            if key not in known:
                raise SpecError(f"{where}.{key}: {kind} has no setting {key!r}.{nearest(key, known)}")
        try:
            built.append(TypeAdapter(stages[kind]).validate_python(settings))
        except ValidationError as error:
            first = error.errors()[0]
            path = ".".join([where, *map(str, first["loc"])])
            raise SpecError(f"{path}: {first['msg']}, found {first['input']!r}.") from None
    return Recipe(str(data.get("name", "custom")), tuple(built))
