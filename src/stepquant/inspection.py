"""What a checkpoint holds, layer by layer, from its manifest and tensor header: no tensor is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from stepquant.checkpoint import CORRECTION_PREFIX, TENSORS_NAME, check_folder, skeleton
from stepquant.engines.base import automatic, choose, with_precision
from stepquant.errors import CheckpointError
from stepquant.manifest import MANIFEST_NAME, LayerGroup, Manifest, manifest_json, read_manifest
from stepquant.model.clock import CLOCK_NAME
from stepquant.model.layer import QuantizedLayer, QuantizedMatmul
from stepquant.model.surgery import quantized_layers
from stepquant.storage import Entry, read_header, sum_path

__all__ = ["inspect_checkpoint"]

# The manifest and its sum.
MANIFEST_FILES = (MANIFEST_NAME, sum_path(Path(MANIFEST_NAME)).name)

PARTS = ("weight_quantizer", "input_quantizer", "second_quantizer", "input_transform", "branch", "first_token")
"""Modules inside of a quantized layer."""

KINDS = {0: "matmul", 2: "linear", 3: "conv1d", 4: "conv2d"}


def inspect_checkpoint(folder: Path | str) -> dict[str, Any]:
    """A checkpoint as JSON values, of schema 1.

    manifest: the manifest as it is in the file. base_model, created, stepquant, torch, diffusers, schedule: from it.
    layers: name, kind, shape, bits (`{"weight", "input", "second"}`, None for floating point; also `weight_bits`,
        `input_bits`, `second_bits`; where they change over time the most), row_bits (operand -> bits of each parameter
        set, where they do), rows (the most parameter sets of an activation quantizer), additions (transform,
        branch and other things that format version 1 does not know, in words), bytes in the file,
        engine that runs it on this machine's CPU if the checkpoint is loaded with "auto", refusals (engine -> reason),
        remarks (engine that takes the layer -> which of its calls it runs otherwise; "auto" -> why it is simulated
        though "openvino" would take it).
        Where that is "openvino", a layer that it refuses runs inside the same graph, as simulated arithmetic, and has
        "simulated" here. engine is None for a denoiser that diffusers does not know.
    default_engine: what "auto" takes on this machine, by name, with "openvino-bf16" where its processor multiplies
        bfloat16; None for a denoiser that diffusers does not know.
    bytes: of all files. bytes_by_kind: levels, weight_scales, activation_tables, transforms, branches, first_tokens,
        corrections, unquantized, tensor_header, manifest and other_files, which add up to bytes.
    float32_bytes: of the full-precision denoiser's tensors in float32. ratio: bytes of manifest and denoiser folder to
        these.

    Raises CheckpointError if manifest or header are damaged. Checksums are not computed: loading does that.
    """
    root = Path(folder)
    check_folder(root)
    manifest = read_manifest(root)
    path = root / manifest.denoiser.name / TENSORS_NAME
    if not path.is_file():
        raise CheckpointError(f"{root} lacks the file {manifest.denoiser.name}/{TENSORS_NAME}.")
    entries = read_header(path)
    files = {file.relative_to(root): file.stat().st_size for file in root.rglob("*") if file.is_file()}
    own = (*MANIFEST_FILES, manifest.denoiser.name)
    ours = sum(size for file, size in files.items() if file.parts[0] in own)
    float32_bytes = _float32_bytes(manifest, entries)
    layers, default_engine = _layers(manifest, entries)
    return {
        "schema": 1,
        "base_model": manifest.base_model,
        "created": manifest.created,
        "stepquant": manifest.stepquant,
        "torch": manifest.torch,
        "diffusers": manifest.diffusers,
        "schedule": manifest.schedule,
        "manifest": manifest_json(manifest),
        "layers": layers,
        "default_engine": default_engine,
        "bytes": sum(files.values()),
        "bytes_by_kind": _bytes_by_kind(manifest, entries, path, files),
        "float32_bytes": float32_bytes,
        "ratio": ours / float32_bytes if float32_bytes else math.inf,
    }


def _layers(manifest: Manifest, entries: Mapping[str, Entry]) -> tuple[list[dict[str, Any]], str | None]:
    """Every layer, and the engine that `auto` takes, by name; None if the model is not known here."""
    model = skeleton(manifest, tensors=len(entries))
    modules = {} if model is None else quantized_layers(model)
    for layer in modules.values():
        if isinstance(layer, QuantizedLayer):
            layer.on_grid = layer.weight_quantizer is not None  # as it will be once it is loaded
    default, reason = automatic(modules)
    if _switches(manifest):
        default, reason = "simulated", "The pipeline switches between two denoisers, and such pipelines are simulated."
    sizes: dict[str, int] = {}
    for tensor, entry in entries.items():
        owner = _owner(tensor)
        sizes[owner] = sizes.get(owner, 0) + entry.bytes
    layers = [
        {**_layer(name, shape, group), "bytes": sizes.get(name, 0), **_engine(modules.get(name), default, reason)}
        for group in manifest.layers
        for name, shape in group.layers.items()
    ]
    return layers, with_precision(default, modules) if modules else None


def _switches(manifest: Manifest) -> bool:
    """Whether the pipeline has another denoiser, which takes turns with this one: such pipelines are simulated."""
    kind = manifest.denoiser.class_name
    return any(part is not None and part.class_name == kind for part in manifest.pipeline.components.values())


def _owner(tensor: str) -> str:
    """The layer that a tensor belongs to: `conv.weight_quantizer.scale` and `conv.bias` both belong to `conv`."""
    parts = tensor.split(".")
    return ".".join(parts[: -2 if len(parts) > 2 and parts[-2] in PARTS else -1])


def _layer(name: str, shape: tuple[int, ...], group: LayerGroup) -> dict[str, Any]:
    specs = {"weight": group.scheme.weight, "input": group.scheme.input, "second": group.scheme.second}
    changing = {attribute.removesuffix("_quantizer"): list(bits) for attribute, bits in group.row_bits.items()}
    bits = {
        operand: None if spec is None else max(changing.get(operand, [spec.bits])) for operand, spec in specs.items()
    }
    return {
        "name": name,
        "kind": KINDS.get(len(shape), "unknown"),
        "shape": list(shape),
        "bits": bits,
        **{f"{operand}_bits": value for operand, value in bits.items()},
        "row_bits": changing,
        "rows": max(group.rows.values(), default=0),
        "additions": group.additions,
    }


def _engine(layer: QuantizedLayer | QuantizedMatmul | None, default: str, reason: str) -> dict[str, Any]:
    """default: what `auto` takes for the denoiser; reason: why."""
    if layer is None:
        return {"engine": None, "refusals": {}, "remarks": {}}
    placement = choose(layer, torch.device("cpu"), default)
    simulated_for_others = default == "simulated" and "openvino" not in placement.refusals
    return {
        "engine": placement.engine,
        "refusals": dict(placement.refusals),
        "remarks": {**placement.remarks, **({"auto": reason} if simulated_for_others else {})},
    }


def _quantized_weights(manifest: Manifest) -> dict[str, int]:
    """Tensor names of the quantized weights, and how many weights each holds."""
    return {
        f"{name}.weight": math.prod(shape)
        for group in manifest.layers
        if group.scheme.weight is not None
        for name, shape in group.layers.items()
    }


def _kind(tensor: str, manifest: Manifest, weights: Mapping[str, int]) -> str:
    if tensor in weights:
        return "levels"
    parts = ((".input_transform.", "transforms"), (".branch.", "branches"), (".first_token.", "first_tokens"))
    for part, kind in parts:
        # The model may have modules of that name itself.
        if part in tensor and tensor.split(part)[0] in manifest.shapes:
            return kind
    if tensor.startswith(CORRECTION_PREFIX + "."):
        return "corrections"
    if ".weight_quantizer." in tensor:
        return "weight_scales"
    tables = (".input_quantizer.", ".second_quantizer.")
    if tensor.startswith(CLOCK_NAME + ".") or any(part in tensor for part in tables):
        return "activation_tables"
    return "unquantized"


def _float32_bytes(manifest: Manifest, entries: Mapping[str, Entry]) -> int:
    weights = _quantized_weights(manifest)
    plain = sum(
        math.prod(entry.shape) for name, entry in entries.items() if _kind(name, manifest, weights) == "unquantized"
    )
    return 4 * (plain + sum(weights.values()))


def _bytes_by_kind(
    manifest: Manifest, entries: Mapping[str, Entry], path: Path, files: Mapping[Path, int]
) -> dict[str, int]:
    kinds = ("levels", "weight_scales", "activation_tables", "transforms", "branches", "first_tokens", "corrections")
    found = dict.fromkeys((*kinds, "unquantized"), 0)
    weights = _quantized_weights(manifest)
    for name, entry in entries.items():
        found[_kind(name, manifest, weights)] += entry.bytes
    found["tensor_header"] = path.stat().st_size - sum(found.values())
    found["manifest"] = sum(files.get(Path(name), 0) for name in MANIFEST_FILES)
    found["other_files"] = sum(files.values()) - sum(found.values())
    return found
