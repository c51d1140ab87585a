"""`run.yaml` and the command line's settings: read safely, checked strictly, resolved to one recipe.

    preset < run.yaml < command line

A message about a setting names where it came from, its full path, what was found and what was expected.
"""

from __future__ import annotations

import inspect
import json
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from stepquant.errors import SpecError, nearest

if typing.TYPE_CHECKING:
    from stepquant.recipe import Recipe

__all__ = [
    "COMMAND_LINE",
    "MOST_SEED",
    "Resolved",
    "RuleConfig",
    "RunConfig",
    "apply_overrides",
    "dump",
    "load_config",
    "parse_yaml",
    "resolve",
    "scheduler_choice",
]

COMMAND_LINE = "command line"

DEFAULT_METHOD = "combined"
"""The least drift at the size of plain 4-bit weights, of those in docs/results.md."""

MOST_SEED = 9 * 10**14
"""Seeds of calibration images follow from a run's, 10 000 times as far apart, and have 63 bits."""

_MAX_BYTES = 256 * 1024
_MAX_NODES = 20_000
"""Values in a file after all its aliases have been written out. A run needs a few dozen."""

_MAX_DIGITS = 100

_KEYWORD_OF = {
    "weights": "weights",
    "activations": "activations",
    "calibration_samples": "samples",
    "ends": "ends",
    "softmax_bits": "softmax_bits",
    "rules": "rules",
}
"""Keys of run.yaml that every method may take -> keyword argument of the method's function."""

_BIT_KEYS = ("weights", "activations", "softmax_bits")
"""Where null is a value of its own: floating point, or for softmax_bits as every other activation."""


_BUDGET_KEYS = ("target", "max_bytes", "max_drift")
"""Keys of run.yaml that ask for bits to be allocated; one at a time. `allocation` holds what goes with them."""

_NO_ALLOCATION_OPTIONS = ("place", "ranges", "weight_bits", "max_bytes", "max_drift")
"""Settings of `Allocate` that come from the recipe and from the budget."""


class RuleConfig(BaseModel):
    """Layers whose name matches `pattern` get these bits; 16, 32 or null leave them in floating point.

    activations: bits, or a list of bits from noise to image, `[{bits: 8, until: 700}, {bits: 4}]`: 8 bits until
        timestep 700, inclusive, and then 4.
    group_size: that many consecutive weights share a scale; null for one scale a channel.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    pattern: str
    weights: int | None = None
    activations: Any = None  # checked by `_activations`: of a union, pydantic's messages name its members
    group_size: int | None = None


class RunConfig(BaseModel):
    """The keys of `run.yaml`. A key that is not there takes the preset's or the method's own value."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    denoiser: str | None = None
    scheduler: Any = None  # checked by `scheduler_choice`
    method: str | None = None
    preset: str | None = None
    weights: int | None = None
    activations: int | None = None
    steps: int | None = None
    calibration_samples: int | None = None
    seed: int | None = None
    device: str | None = None
    ends: Literal["8bit", "same", "full"] | None = None
    softmax_bits: int | None = None
    rules: list[RuleConfig] | None = None
    target: str | float | None = None
    max_bytes: int | None = None
    max_drift: float | None = None
    allocation: dict[str, Any] | None = None
    arguments: dict[str, Any] | None = None
    options: dict[str, Any] | None = None
    recipe: dict[str, Any] | list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Resolved:
    """Everything that a run needs to know, with nothing left to defaults.

    method, preset: None where the recipe was written out by hand.
    keywords: what the method's function was called with, bits and rules in the form of `run.yaml`.
    budget: the keys of `run.yaml` that have bits allocated, empty if none has.
    arguments: what the pipeline is called with beside seeds and steps.
    denoiser: which one is quantized, of a pipeline that switches between several; None for the only one.
    scheduler: what the model samples with, as for `api.open_model`; empty for its own.
    """

    model: str
    method: str | None
    preset: str | None
    recipe: Recipe
    steps: int
    seed: int
    device: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    keywords: Mapping[str, Any] = field(default_factory=dict)
    budget: Mapping[str, Any] = field(default_factory=dict)
    denoiser: str | None = None
    scheduler: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data in the form of `run.yaml`: resolving it again gives the same recipe."""
        data: dict[str, Any] = {"model": self.model}
        if self.denoiser is not None:
            data["denoiser"] = self.denoiser
        if self.scheduler:
            data["scheduler"] = dict(self.scheduler)
        if self.method is None:
            data["recipe"] = self.recipe.to_dict()
        else:
            key_of = {keyword: key for key, keyword in _KEYWORD_OF.items()}
            data |= {"method": self.method, "preset": self.preset}
            data |= {key_of[name]: value for name, value in self.keywords.items() if name in key_of}
            data["options"] = {name: value for name, value in self.keywords.items() if name not in key_of}
            data |= self.budget
        tail = {"steps": self.steps, "seed": self.seed, "device": self.device, "arguments": dict(self.arguments)}
        plain: dict[str, Any] = json.loads(json.dumps(data | tail, default=str))
        return plain


def load_config(path: str | Path) -> dict[str, Any]:
    """Read a `run.yaml` as plain data; `resolve` checks what it says.

    Raises SpecError: not readable, too large, not YAML, a key twice, not a mapping, or aliases that unfold to
    more than a run can need.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            raw = file.read(_MAX_BYTES + 1)  # a device has no size and no end
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}.") from None
    if len(raw) > _MAX_BYTES:
        raise SpecError(f"{path}: has {max(size, len(raw))} bytes; a run's settings have at most {_MAX_BYTES}.")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: is not text in UTF-8 (byte {error.start}).") from None
    data = parse_yaml(text, source=str(path))
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise SpecError(f"{path}: expected keys and values such as 'method: accuquant', found {_described(data)}.")
    return data


def parse_yaml(text: str, *, source: str) -> Any:
    """YAML -> plain data, with bounds on what it may unfold to. Raises SpecError."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None:
            _check_size(node, source)
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SpecError(f"{source}: is not valid YAML: {_yaml_problem(error)}.") from None
    except RecursionError:
        raise SpecError(f"{source}: is nested too deeply.") from None
    except ValueError as error:
        if isinstance(error, SpecError):
            raise
        # PyYAML builds dates and numbers with Python's own constructors, which refuse e.g. the 99th of a month.
        raise SpecError(f"{source}: holds a value that YAML cannot read: {error}.") from None


def _check_size(root: yaml.Node, source: str) -> None:
    """Refuse documents that outgrow `_MAX_NODES` with aliases written out, refer to themselves, or repeat a key."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: yaml.Node) -> int:
        if id(node) in open_nodes:
            raise SpecError(f"{source}: line {node.start_mark.line + 1} refers to itself through an alias.")
        if id(node) not in sizes:
            _refuse_endless_number(node, source)
            open_nodes.add(id(node))
            sizes[id(node)] = 1 + sum(size(child) for child in _children(node, source))
            open_nodes.remove(id(node))
        return sizes[id(node)]

    if size(root) > _MAX_NODES:
        raise SpecError(f"{source}: holds more than {_MAX_NODES} values when its aliases are written out.")


def _refuse_endless_number(node: yaml.Node, source: str) -> None:
    """Python reads no more than 4300 digits, but YAML also writes numbers in base 60, and those it multiplies."""
    number = node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
    if number and isinstance(node, yaml.ScalarNode) and len(node.value) > _MAX_DIGITS:
        raise SpecError(
            f"{source}: line {node.start_mark.line + 1} has a number of {len(node.value)} characters; expected at most "
            f"{_MAX_DIGITS}."
        )


def _children(node: yaml.Node, source: str) -> list[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        return list(node.value)
    if not isinstance(node, yaml.MappingNode):
        return []
    seen: set[str] = set()
    for key, _value in node.value:
        where = f"{source}: line {key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode) or key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
            found = key.value if isinstance(key, yaml.ScalarNode) else "a list or mapping"
            raise SpecError(f"{where}: a key must be text, found {found!r}; put it in quotes if it is meant.")
        if key.value in seen:
            raise SpecError(f"{where}: the key {key.value!r} is there twice.")
        seen.add(key.value)
    return [part for pair in node.value for part in pair]


def _yaml_problem(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{error.problem} in line {mark.line + 1}, column {mark.column + 1}"
    return str(error).splitlines()[0]


def apply_overrides(data: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of `data` with each `path=value` put in.

    The path goes through mappings by key and through lists by number, `rules.0.weights=8`. A bare name that is no key
    of `run.yaml` is an option of the method: `window=2` is `options.window=2`. Values are read as YAML.
    """
    result: dict[str, Any] = _plain_copy(data)
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not all(path.split(".")):
            raise SpecError(f"--set takes key=value, such as --set options.window=2, found {override!r}.")
        keys = path.strip().split(".")
        if keys[0] not in RunConfig.model_fields:
            keys = ["options", *keys]
        _put_(result, keys, parse_yaml(text, source=f"--set {path}"), path)
    return result


def _plain_copy(value: Any) -> Any:
    """Mappings and lists copied, so that two places that shared one through an alias no longer do."""
    if isinstance(value, Mapping):
        return {key: _plain_copy(part) for key, part in value.items()}
    return [_plain_copy(part) for part in value] if isinstance(value, list) else value


def _put_(data: dict[str, Any], keys: list[str], value: Any, path: str) -> None:
    """Set the value at the end of `keys`, making mappings on the way."""
    place: Any = data
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(place, list):
            if not key.isdecimal() or int(key) >= len(place):
                raise SpecError(
                    f"--set {path}: {'.'.join(keys[:depth])} is a list of {len(place)}, so {key!r} is none of it."
                )
            index = int(key)
            place[index] = value if last else place[index]
            place = place[index]
        elif isinstance(place, dict):
            if last:
                place[key] = value
            elif place.get(key) is None:
                place[key] = {}
            place = place[key]
        else:
            raise SpecError(f"--set {path}: {'.'.join(keys[:depth])} is {_described(place)} and has no keys.")


@dataclass(frozen=True)
class _Layer:
    """One source of settings after its types have been checked."""

    source: str
    given: Mapping[str, Any]
    keywords: Mapping[str, Any]
    paths: Mapping[str, str]


def resolve(data: Mapping[str, Any], *, source: str = "run.yaml", flags: Mapping[str, Any] | None = None) -> Resolved:
    """Check settings and build the recipe that they stand for.

    data: what `load_config` read.
    source: what to call it in messages.
    flags: settings of the command line in the same form; they win over `data`.

    Raises SpecError.
    """
    layers = [_checked(data, source), _checked(flags or {}, COMMAND_LINE)]
    merged: dict[str, Any] = {}
    for layer in layers:
        merged |= {key: value for key, value in layer.given.items() if value is not None}
    if not merged.get("model"):
        raise SpecError("There is no model to quantize: give a name or folder, or the key 'model' in the YAML file.")
    common = {
        "model": merged["model"],
        "steps": _at_least(merged.get("steps", 20), 1, "steps"),
        "seed": _at_most(_at_least(merged.get("seed", 0), 0, "seed"), MOST_SEED, "seed"),
        "device": merged.get("device", "auto"),
        "arguments": merged.get("arguments", {}),
        "denoiser": merged.get("denoiser"),
        "scheduler": _scheduler(layers),
    }
    budget = _budget(layers)
    if "recipe" in merged:
        if budget:
            raise SpecError(
                f"{next(iter(budget))}: goes with a method, but the recipe is written out stage by stage: write the "
                "stage Allocate in the place of Place."
            )
        return Resolved(method=None, preset=None, recipe=_written_recipe(layers), **common)
    method, preset = merged.get("method", DEFAULT_METHOD), merged.get("preset", "standard")
    keywords, recipe = _method_recipe(method, preset, layers)
    if budget:
        recipe, budget = _allocated(recipe, budget, source)
    return Resolved(method=method, preset=preset, recipe=recipe, keywords=keywords, budget=budget, **common)


def scheduler_choice(value: Any, where: str) -> dict[str, Any]:
    """A scheduler's name and settings from `euler`, `euler,use_karras_sigmas=true` or a mapping with or without a name.

    Values are read as YAML. Raises SpecError.
    """
    if isinstance(value, str):
        name, *settings = value.split(",")
        if "=" in name:
            name, settings = "", [name, *settings]
        value = {"name": name.strip()} if name.strip() else {}
        for setting in settings:
            key, equals, text = setting.partition("=")
            if not equals or not key.strip() or key.strip() in value:
                raise SpecError(f"{where}: expected NAME or NAME,KEY=VALUE with each key once, found {setting!r}.")
            value[key.strip()] = parse_yaml(text, source=f"{where}.{key.strip()}")
    if not isinstance(value, dict) or not isinstance(value.get("name", ""), str):
        raise SpecError(
            f"{where}: expected a name such as euler, or a name and settings such as {{name: euler, "
            f"use_karras_sigmas: true}}, found {_described(value)}."
        )
    return value


def _scheduler(layers: Iterable[_Layer]) -> dict[str, Any]:
    """The last source's. Settings that an earlier one gives without a name, as with --set, go with any name."""
    found: dict[str, Any] = {}
    for layer in layers:
        if layer.given.get("scheduler") is not None:
            given = scheduler_choice(layer.given["scheduler"], f"{layer.source}: scheduler")
            found = given if "name" in found and "name" in given else found | given
    return found


def _budget(layers: Iterable[_Layer]) -> dict[str, Any]:
    """The budget of the last source that gives one, and `allocation` from all of them."""
    found: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for layer in layers:
        own = {key: layer.given[key] for key in _BUDGET_KEYS if layer.given.get(key) is not None}
        if len(own) > 1:
            raise SpecError(f"{layer.source}: {' and '.join(own)} are budgets of the same bits: keep one of them.")
        found = own or found
        options |= layer.given.get("allocation") or {}
    if options and not found:
        raise SpecError(f"allocation: goes with a budget: give one of {', '.join(_BUDGET_KEYS)} too.")
    return found | ({"allocation": options} if options else {})


def _allocated(recipe: Recipe, budget: Mapping[str, Any], source: str) -> tuple[Recipe, dict[str, Any]]:
    """The method's recipe with bits to be allocated, and the budget with every option spelled out."""
    from stepquant.calibrate.allocation import Allocate, allocated, parse_target

    settings: dict[str, Any] = {key: budget[key] for key in ("max_bytes", "max_drift") if key in budget}
    if "target" in budget:
        settings["weight_bits"], settings["activation_bits"] = parse_target(budget["target"])
    hints = typing.get_type_hints(Allocate)
    known = [name for name in inspect.signature(Allocate).parameters if name not in _NO_ALLOCATION_OPTIONS]
    for name, value in budget.get("allocation", {}).items():
        where = f"{source}: allocation.{name}"
        if name not in known:
            raise SpecError(f"{where}: there is no such option.{nearest(name, known)}")
        settings[name] = _fitting(value, hints[name], where)
    recipe = allocated(recipe, **settings)
    stage = next(stage for stage in recipe.stages if isinstance(stage, Allocate))
    return recipe, {**budget, "allocation": _spelled({name: getattr(stage, name) for name in known})}


def _checked(data: Mapping[str, Any], source: str) -> _Layer:
    for key in data:
        if key not in RunConfig.model_fields:
            hint = nearest(str(key), RunConfig.model_fields)
            raise SpecError(f"{source}: {key}: there is no such key.{hint}")
    try:
        # Strict JSON mode takes a list for a tuple and 1 for 1.0, but neither "4" nor true for 4.
        config = RunConfig.model_validate_json(json.dumps(dict(data), default=str))
    except ValidationError as error:
        raise SpecError(f"{source}: {_first_problem(error)}") from None
    given = {name: getattr(config, name) for name in config.model_fields_set}
    keywords: dict[str, Any] = {}
    paths: dict[str, str] = {}
    for name, value in (given.get("options") or {}).items():
        keywords[name], paths[name] = value, f"options.{name}"
    for key, keyword in _KEYWORD_OF.items():
        # null says floating point where bits are meant; elsewhere it says nothing.
        if key not in given or (given[key] is None and key not in _BIT_KEYS):
            continue
        if keyword in keywords:
            raise SpecError(f"{source}: {key} and options.{keyword} are the same setting: keep one of them.")
        keywords[keyword], paths[keyword] = given[key], key
    for keyword in ("weights", "activations"):
        if keyword in keywords:
            keywords[keyword] = _bits(keywords[keyword], f"{source}: {paths[keyword]}")
    if "rules" in keywords:
        keywords["rules"] = [_plain_rule(rule, f"{source}: rules.{n}") for n, rule in enumerate(keywords["rules"])]
    return _Layer(source, given, keywords, paths)


def _first_problem(error: ValidationError, prefix: str = "") -> str:
    """`path: expected ..., found ...` for the first thing that pydantic found."""
    first = error.errors()[0]
    path = ".".join([*([prefix] if prefix else []), *map(str, first["loc"])])
    if first["type"] == "extra_forbidden":
        hint = nearest(str(first["loc"][-1]), RuleConfig.model_fields)
        return f"{path}: there is no such key.{hint}"
    if first["type"] == "missing":
        return f"{path}: is missing."
    expected = first["msg"].removeprefix("Input should be ")
    return f"{path}: expected {expected}, found {_described(first['input'])}."


def _described(value: Any) -> str:
    text = repr(value)
    short = text if len(text) <= 60 else text[:57] + "..."
    return f"{short} ({type(value).__name__})"


def _bits(value: Any, where: str, expected: str = "2 to 8 bits") -> int | None:
    """Bits as the core wants them: 2 to 8, or None for floating point, which people also write as 16 or 32."""
    if value is None or (type(value) is int and value in (16, 32)):
        return None
    if type(value) is not int or not 2 <= value <= 8:
        raise SpecError(f"{where}: expected {expected}, or 16 or 32 for floating point, found {_described(value)}.")
    return value


def _activations(value: Any, where: str) -> int | list[dict[str, Any]] | None:
    """Bits of a rule's activations, or bits over time, each entry with all its keys."""
    from stepquant.calibrate.step_groups import BitsUntil, check_over_time

    where = f"{where}.activations"
    if not isinstance(value, list):
        return _bits(value, where, "2 to 8 bits, a list such as [{bits: 8, until: 700}, {bits: 4}]")
    entries: list[BitsUntil] = []
    for number, entry in enumerate(value):
        at = f"{where}.{number}"
        if not isinstance(entry, dict) or "bits" not in entry:
            raise SpecError(
                f"{at}: expected bits and until, such as {{bits: 8, until: 700}}, found {_described(entry)}."
            )
        for key in entry:
            if key not in ("bits", "until"):
                raise SpecError(f"{at}.{key}: there is no such key.{nearest(str(key), ('bits', 'until'))}")
        bits, until = entry["bits"], entry.get("until")
        if type(bits) is not int or not 2 <= bits <= 8:
            raise SpecError(f"{at}.bits: expected 2 to 8 bits, found {_described(bits)}.")
        if until is not None and type(until) not in (int, float):
            raise SpecError(f"{at}.until: expected a timestep, found {_described(until)}.")
        entries.append(BitsUntil(bits, until))
    try:
        check_over_time(entries)
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from None
    return [{"bits": entry.bits, "until": entry.until} for entry in entries]


def _plain_rule(rule: Any, where: str) -> Any:
    """A rule of `run.yaml` with its bits as the core wants them; a rule among `options` stays as it is."""
    if not isinstance(rule, RuleConfig):
        return rule
    weights, activations = _bits(rule.weights, f"{where}.weights"), _activations(rule.activations, where)
    return rule.model_dump(exclude_none=True) | {"weights": weights, "activations": activations}


def _at_least(value: int, low: int, what: str) -> int:
    if value < low:
        raise SpecError(f"{what}: expected {low} or more, found {value}.")
    return value


def _at_most(value: int, high: int, what: str) -> int:
    if value > high:
        raise SpecError(f"{what}: expected {high} or less, found {value}.")
    return value


def _written_recipe(layers: list[_Layer]) -> Recipe:
    """The recipe that is spelled out stage by stage."""
    from stepquant.methods import STAGES
    from stepquant.recipe import recipe_from_dict

    for layer in layers:
        for key in ("method", "preset", *layer.paths.values()):
            if key in layer.paths.values() or layer.given.get(key) is not None:
                raise SpecError(
                    f"{layer.source}: {key}: goes with a method, but the recipe is written out stage by stage. "
                    "Keep either 'recipe' or the method's settings."
                )
    layer = next(layer for layer in reversed(layers) if layer.given.get("recipe") is not None)
    recipe = layer.given["recipe"]
    try:
        return recipe_from_dict({"stages": recipe} if isinstance(recipe, list) else recipe, STAGES)
    except SpecError as error:
        raise SpecError(f"{layer.source}: recipe: {error}") from None


def _method_recipe(method: str, preset: str, layers: list[_Layer]) -> tuple[dict[str, Any], Recipe]:
    """Keyword arguments of the method after preset, file and flags, and what the method makes of them.

    `base+extra` is the recipe of `base` with the stages of `extra` after it; the extra's settings are a mapping under
    its name among the options.
    """
    from stepquant.methods import ADD_ONS, METHODS, PRESETS

    base, *extras = method.split("+")
    if base not in METHODS:
        raise SpecError(f"There is no method {base!r}.{nearest(base, METHODS)} `stepquant methods` lists them.")
    for extra in extras:
        if extra not in ADD_ONS or extras.count(extra) > 1:
            raise SpecError(
                f"{method}: {extra!r} cannot follow another method, only {', '.join(ADD_ONS)} can, once each."
                f"{nearest(extra, ADD_ONS)}"
            )
    presets = PRESETS.get(base, {})
    if preset not in presets and not (preset == "standard" and not presets):
        raise SpecError(
            f"{base} has no preset {preset!r}, only {', '.join(presets) or 'standard'}.{nearest(preset, presets)}"
        )
    given = [
        (name, value, f"{layer.source}: {layer.paths[name]}")
        for layer in layers
        for name, value in layer.keywords.items()
    ]
    own = [entry for entry in given if entry[0] not in extras]
    keywords = _keywords(base, METHODS[base], presets.get(preset, {}), own)
    recipe = METHODS[base](**keywords)
    for extra in extras:
        settings: list[tuple[str, Any, str]] = []
        for name, value, where in given:
            if name == extra:
                if not isinstance(value, Mapping):
                    raise SpecError(f"{where}: expected the settings of {extra}, found {_described(value)}.")
                settings += [(key, part, f"{where}.{key}") for key, part in value.items()]
        known = inspect.signature(ADD_ONS[extra]).parameters
        of_preset = {key: value for key, value in PRESETS[extra].get(preset, {}).items() if key in known}
        keywords[extra] = _keywords(extra, ADD_ONS[extra], of_preset, settings)
        recipe = recipe.then(*ADD_ONS[extra](**keywords[extra]), name=method)
    return _spelled(keywords), recipe


def _keywords(
    method: str, function: Callable[..., Any], preset: Mapping[str, Any], given: Iterable[tuple[str, Any, str]]
) -> dict[str, Any]:
    """The function's defaults, then the preset, then what was given as (name, value, where it was given)."""
    parameters, hints = inspect.signature(function).parameters, typing.get_type_hints(function)
    keywords = {
        name: entry.default for name, entry in parameters.items() if entry.default is not inspect.Parameter.empty
    }
    keywords |= preset
    for name, value, where in given:
        if name not in parameters:
            raise SpecError(f"{where}: {method} has no option {name!r}.{nearest(name, parameters)}")
        keywords[name] = _fitting(value, hints.get(name, Any), where)
    return keywords


def _fitting(value: Any, hint: Any, where: str) -> Any:
    """The value as the method's annotation wants it."""
    try:
        return TypeAdapter(hint).validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError as error:
        raise SpecError(_first_problem(error, where)) from None


def _spelled(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments as plain data."""
    return {name: json.loads(TypeAdapter(Any).dump_json(value)) for name, value in keywords.items()}


def dump(resolved: Resolved, path: str | Path) -> None:
    """Write the resolved settings as YAML that `load_config` reads back; the file is replaced at once."""
    text = yaml.safe_dump(resolved.to_dict(), sort_keys=False, allow_unicode=True)
    head = "# Every setting of this run, defaults included. `stepquant quantize --config` takes it as it is.\n"
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(head + text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
