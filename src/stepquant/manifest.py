"""What a checkpoint says about itself: `stepquant.json`, as a value that checks itself."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError

from stepquant.errors import CheckpointError
from stepquant.model.assembly import ClockStructure, LayerStructure, Structure
from stepquant.model.plain_json import parse_json
from stepquant.model.transform import TransformSpec
from stepquant.numerics.spec import LayerScheme
from stepquant.storage import check_sum, write_summed

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST_NAME",
    "ComponentIdentity",
    "DenoiserIdentity",
    "LayerGroup",
    "Manifest",
    "PipelineIdentity",
    "config_hash",
    "group_layers",
    "manifest_json",
    "needed_version",
    "read_checked",
    "read_manifest",
    "structure_of",
    "write_manifest",
]

FORMAT_VERSION = 2
"""Newest version that this stepquant reads. It writes the oldest that has all that a model needs."""

MANIFEST_NAME = "stepquant.json"

# Far above any real manifest (a hundred thousand layers), and small enough to be read at once.
MAX_MANIFEST_BYTES = 64_000_000

T = TypeVar("T")

Library = Literal["diffusers", "transformers", "plain"]
"""Where a class comes from. "plain" is anything else: never imported, the caller passes the object."""


@dataclass(frozen=True)
class DenoiserIdentity:
    """name: the pipeline's attribute for the denoiser, and its folder.
    class_name: class in diffusers' namespace, or `module.Class` for a plain one.
    config: diffusers' configuration; empty for a plain module.
    dtype: of the model. dtypes: of the tensors that differ from it, by name.
    """

    name: str
    library: Literal["diffusers", "plain"]
    class_name: str
    config: dict[str, Any]
    dtype: str
    dtypes: dict[str, str]


@dataclass(frozen=True)
class ComponentIdentity:
    """Another component of the pipeline. dtype: of a component that is a module."""

    library: Library
    class_name: str
    dtype: str | None = None


@dataclass(frozen=True)
class PipelineIdentity:
    """library "stepquant" is `DenoiserPipeline`. arguments: those of the constructor that are not components."""

    library: Literal["diffusers", "stepquant"]
    class_name: str
    arguments: dict[str, Any]
    components: dict[str, ComponentIdentity | None]


@dataclass(frozen=True)
class LayerGroup:
    """Layers that share all but their shape. layers: full name -> shape of the weight, empty for a matmul.

    transform, rank, row_bits, first_token, split: as in `LayerStructure`; since format version 2.
    """

    scheme: LayerScheme
    rows: dict[str, int]
    layers: dict[str, tuple[int, ...]]
    transform: TransformSpec | None = None
    rank: int | None = None
    row_bits: dict[str, tuple[int, ...]] = field(default_factory=dict)
    first_token: bool = False
    split: int | None = None

    @property
    def additions(self) -> list[str]:
        """What these layers have that format version 1 does not know."""
        specs = (self.scheme.weight, self.scheme.input, self.scheme.second)
        found = {
            "levels at powers of two": any(spec is not None and spec.logarithmic for spec in specs),
            "ranges of channels and tokens at run time": any(
                spec is not None and spec.granularity == "channel_token" for spec in specs
            ),
            "a transform of the input": self.transform is not None,
            "a low-rank branch": self.rank is not None,
            "activation bits that change over time": bool(self.row_bits),
            "a first token of its own": self.first_token,
            "an input in two parts": self.split is not None,
        }
        return [words for words, there in found.items() if there]


@dataclass(frozen=True)
class Manifest:
    """Everything but the tensors. docs/format.md describes each field.

    created: date in the words of the caller; nothing reads the clock, so that equal inputs give equal bytes.
    correction: `[S, C]` of the step correction, None without one.
    schedule: `ScheduleFingerprint.to_dict()`.
    recipe, run, quality: provenance. Loading never needs them.
    checksums: tensor -> SHA-256 of its bytes.
    """

    format_version: Literal[1, 2]
    stepquant: str
    torch: str
    diffusers: str
    created: str
    base_model: str
    base_config_hash: str
    denoiser: DenoiserIdentity
    pipeline: PipelineIdentity
    clock: ClockStructure
    explicit_attention: bool
    layers: tuple[LayerGroup, ...]
    correction: tuple[int, int] | None
    schedule: dict[str, Any] | None
    recipe: dict[str, Any]
    run: dict[str, Any]
    quality: dict[str, Any]
    checksums: dict[str, str]

    @property
    def structure(self) -> Structure:
        """What `assemble_` needs."""
        return structure_of(self.clock, self.layers, explicit_attention=self.explicit_attention)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Weight shape of every quantized layer."""
        return {name: shape for group in self.layers for name, shape in group.layers.items()}


_ADAPTER = TypeAdapter(Manifest)


def config_hash(config: Mapping[str, Any]) -> str:
    """SHA-256 of a configuration as JSON with sorted keys, in hexadecimal."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def group_layers(structure: Structure, shapes: Mapping[str, tuple[int, ...]]) -> tuple[LayerGroup, ...]:
    """Put layers that share everything but their shape together, in the order in which they are met."""
    groups: dict[tuple[Any, ...], dict[str, tuple[int, ...]]] = {}
    for name, layer in structure.layers.items():
        rows, bits = (tuple(sorted(table.items())) for table in (layer.rows, layer.row_bits))
        key = (layer.scheme, rows, layer.transform, layer.rank, bits, layer.first_token, layer.split)
        groups.setdefault(key, {})[name] = shapes[name]
    return tuple(
        LayerGroup(scheme, dict(rows), layers, transform, rank, dict(bits), first_token, split)
        for (scheme, rows, transform, rank, bits, first_token, split), layers in groups.items()
    )


def structure_of(clock: ClockStructure, groups: Iterable[LayerGroup], *, explicit_attention: bool) -> Structure:
    """The inverse of `group_layers`, up to the shapes."""
    layers = {
        name: LayerStructure(
            group.scheme,
            dict(group.rows),
            group.transform,
            group.rank,
            dict(group.row_bits),
            group.first_token,
            group.split,
        )
        for group in groups
        for name in group.layers
    }
    return Structure(clock, layers, explicit_attention)


def needed_version(layers: Iterable[LayerGroup]) -> Literal[1, 2]:
    """The oldest format version that has all that these layers need."""
    return 2 if any(group.additions for group in layers) else 1


def manifest_json(manifest: Manifest) -> dict[str, Any]:
    """The manifest as JSON values. Fields at their default are left out."""
    data: dict[str, Any] = _ADAPTER.dump_python(manifest, mode="json", exclude_defaults=True)
    return data


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write JSON with one field, layer group or checksum a line, and its sum. Fields at their default are left out."""
    for key in ("schedule", "recipe", "run", "quality"):
        _check_json(key, getattr(manifest, key))
    data = manifest_json(manifest)
    lines = [f" {json.dumps(key)}: {_field_text(key, value)}" for key, value in data.items()]
    write_summed(path, "{\n" + ",\n".join(lines) + "\n}\n")


def _field_text(key: str, value: Any) -> str:
    if key == "layers":
        return "[" + ",".join(f"\n  {_json_text(item)}" for item in value) + "]"
    if key == "checksums":
        return "{" + ",".join(f"\n  {json.dumps(name)}:{json.dumps(value[name])}" for name in sorted(value)) + "}"
    return _json_text(value)


def _json_text(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _check_json(key: str, value: Any) -> None:
    """The caller's own values must come back as they were; pydantic would write NaN as null."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{key} of the manifest is not JSON: {error}.") from None


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a checkpoint folder. Raises CheckpointError naming the field."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise CheckpointError(f"{folder} is not a stepquant checkpoint: it has no {MANIFEST_NAME}.")
    manifest = read_checked(path, _ADAPTER, FORMAT_VERSION)
    _check_names(path, manifest)
    _check_version(path, manifest)
    check_sum(path)  # last: what says the field and what is wrong with it is of more use
    return manifest


def read_checked(path: Path, adapter: TypeAdapter[T], newest: int) -> T:
    """The value in one of our JSON files, all of it understood. Raises CheckpointError naming the field.

    newest: format versions up to this one are read; the file has its own in `format_version`.
    """
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes; a manifest has at most {MAX_MANIFEST_BYTES}.")
    text = path.read_bytes()
    try:
        data = parse_json(text)
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}. The file is damaged.") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a {type(data).__name__}, expected an object.")
    version = data.get("format_version")
    if type(version) is not int or not 1 <= version <= newest:
        writer = data.get("stepquant", "of unknown version")
        raise CheckpointError(
            f"{path} has format version {version!r}, written by stepquant {writer}; "
            f"this stepquant reads versions 1 to {newest}. Install the version that wrote it."
        )
    value = _validated(path, text, adapter)
    _refuse_unknown_keys(path, data, adapter.dump_python(value, mode="json"))
    return value


def _check_version(path: Path, manifest: Manifest) -> None:
    """A file says which version it needs: a reader of that version must understand all of it."""
    if manifest.format_version < needed_version(manifest.layers):
        group = next(group for group in manifest.layers if group.additions)
        raise CheckpointError(
            f"{path}: {next(iter(group.layers), 'a layer')} has {group.additions[0]}, which format version "
            f"{manifest.format_version} does not have; the manifest has been edited."
        )


def _validated(path: Path, text: bytes, adapter: TypeAdapter[T]) -> T:
    try:
        return adapter.validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        found = "" if first["type"] == "missing" else f", found {str(first['input'])[:200]!r}"
        raise CheckpointError(f"{path}, {where}: {first['msg']}{found}.") from None


def _refuse_unknown_keys(path: Path, given: Any, understood: Any, where: str = "") -> None:
    """Everything in the file must have been understood: what a newer version added must not be dropped in silence."""
    if isinstance(given, dict) and isinstance(understood, dict):
        for key, value in given.items():
            if key not in understood:
                raise CheckpointError(f"{path}, {where}{key}: unknown key.")
            _refuse_unknown_keys(path, value, understood[key], f"{where}{key}.")
    elif isinstance(given, list) and isinstance(understood, list):
        for index, (one, other) in enumerate(zip(given, understood, strict=True)):
            _refuse_unknown_keys(path, one, other, f"{where}{index}.")


def _check_names(path: Path, manifest: Manifest) -> None:
    """Component names become folder names, so they must be plain words."""
    names: Iterable[str] = (manifest.denoiser.name, *manifest.pipeline.components)
    for name in names:
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,63}", name):
            raise CheckpointError(f"{path}: component name {name!r} is not a plain word and cannot name a folder.")
    if sum(len(group.layers) for group in manifest.layers) != len(manifest.shapes):
        raise CheckpointError(f"{path}, layers: a layer is listed twice.")
    if config_hash(manifest.denoiser.config) != manifest.base_config_hash:
        raise CheckpointError(f"{path}, denoiser.config: does not have the hash base_config_hash; it has been edited.")
