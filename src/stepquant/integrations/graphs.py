"""Write a quantized denoiser as a graph that other programs run: ONNX with Q/DQ operators, or OpenVINO's IR."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.api import load
from stepquant.engines.graph import GraphInput, GraphLayer, Lowered, export, lower, tensors_of
from stepquant.errors import EngineError, SpecError
from stepquant.model.correction import CorrectedScheduler
from stepquant.model.families import find_denoiser

__all__ = ["Exported", "export_onnx", "export_openvino"]


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    path: the graph. inputs, outputs: their names.
    float_layers: why layers do not run on integers in the graph, by name; the others do.
    notes: what the graph lacks or does otherwise than the pipeline, as sentences.
    correction: the table of the scheduler's correction, if there is one.
    """

    path: Path
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    float_layers: Mapping[str, str]
    notes: tuple[str, ...]
    correction: Path | None


def export_onnx(
    source: Any, path: Path | str, *, inputs: Mapping[str, Any] | None = None, overwrite: bool = False
) -> Exported:
    """Write the denoiser as an ONNX graph, opset 18, float32 but for its quantized layers.

    source: a checkpoint folder, a pipeline with a quantized denoiser in simulated form, or such a denoiser.
    inputs: what the denoiser is called with, by name, as examples. The graph has their shapes; the first axis of all
        that share the first input's is free. May be left out for a `UNet2DModel`, with labels or without.

    The timestep bin is computed in the graph from the timestep of the first image.
    Raises EngineError for a denoiser that cannot be exported, SpecError if `inputs` are needed or the file exists.
    """
    target = _target(path, ".onnx", overwrite)
    lowered, scheduler = _opened(source)
    arguments = _arguments(lowered, inputs)
    target.parent.mkdir(parents=True, exist_ok=True)
    outputs = export(lowered, arguments, target, bin_inside=True, batched=_batched(arguments))
    return _exported(target, lowered, arguments, outputs.names, scheduler)


def export_openvino(
    source: Any, path: Path | str, *, inputs: Mapping[str, Any] | None = None, overwrite: bool = False
) -> Exported:
    """Write the denoiser as OpenVINO IR, `path` (.xml) and its .bin beside it. The rest is as in `export_onnx`."""
    try:
        import openvino
    except ImportError as error:
        raise EngineError(f"OpenVINO's format needs OpenVINO: pip install openvino ({error})") from error
    target = _target(path, ".xml", overwrite)
    lowered, scheduler = _opened(source)
    arguments = _arguments(lowered, inputs)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="stepquant-") as folder:
        plain = Path(folder) / "graph.onnx"
        outputs = export(lowered, arguments, plain, bin_inside=True, batched=_batched(arguments))
        openvino.save_model(openvino.Core().read_model(str(plain)), str(target), compress_to_fp16=False)
    return _exported(target, lowered, arguments, outputs.names, scheduler)


def _target(path: Path | str, suffix: str, overwrite: bool) -> Path:
    target = Path(path)
    if target.suffix != suffix:
        raise SpecError(f"The graph's file must end in {suffix}, found {target.name!r}.")
    if target.exists() and not overwrite:
        raise SpecError(f"{target} exists: choose another name, or pass overwrite=True.")
    return target


def _opened(source: Any) -> tuple[Lowered, Any]:
    if isinstance(source, str | Path):
        source = load(source, engine="simulated", schedule="nearest")
    if isinstance(source, nn.Module):
        return lower(source), None
    return lower(find_denoiser(source)[1]), source.scheduler


def _arguments(lowered: Lowered, inputs: Mapping[str, Any] | None) -> dict[str, Any]:
    name = lowered.clock.argument
    if inputs is not None:
        if name not in inputs:
            raise SpecError(f"inputs must have the timestep argument {name!r}, found {', '.join(inputs)}.")
        return {**inputs, name: torch.as_tensor(inputs[name])}
    config = getattr(lowered.module, "config", {})
    size: Any = config.get("sample_size")
    if type(lowered.module).__name__ != "UNet2DModel" or size is None:
        raise SpecError(
            f"What a {type(lowered.module).__name__} is called with is not known: pass "
            f"inputs={{name: example tensor}}, {name!r} among them."
        )
    height, width = (size, size) if isinstance(size, int) else size
    known = {"sample": torch.zeros(2, config["in_channels"], height, width), name: torch.zeros(1, dtype=torch.int64)}
    labels = {"class_labels": torch.zeros(2, dtype=torch.int64)} if config.get("num_class_embeds") else {}
    return known | labels


def _batched(arguments: Mapping[str, Any]) -> tuple[str, ...]:
    tensors, _ = tensors_of(dict(arguments))
    batch = next((tensor.shape[0] for tensor in tensors.values() if tensor.ndim), 1)
    return tuple(name for name, tensor in tensors.items() if tensor.ndim and tensor.shape[0] == batch)


def _exported(
    target: Path, lowered: Lowered, arguments: Mapping[str, Any], outputs: tuple[str, ...], scheduler: Any
) -> Exported:
    modules = list(lowered.module.modules())
    switching = sum(isinstance(module, GraphInput) and module.several for module in modules)
    wide = sum(isinstance(module, GraphLayer) and module.rest is not None for module in modules)
    notes: list[str] = []
    if switching:
        notes.append(
            f"{switching} activation tables are chosen inside the graph by {lowered.clock.argument!r}: a batch must be "
            "at one timestep."
        )
    if wide:
        notes.append(
            f"{wide} layers have asymmetric weights of 8 bits, which take nine: each is two operators with the "
            "same sum."
        )
    if lowered.refusals:
        notes.append(f"{len(lowered.refusals)} quantized layers are simulated in floating point: see float_layers.")
    if target.suffix == ".onnx":
        notes.append(
            "OpenVINO runs convolutions and linear layers on int8. ONNX Runtime runs convolutions in floating point, "
            "because their outputs are not quantized."
        )
    table = None
    if isinstance(scheduler, CorrectedScheduler):
        table = target.with_suffix(".correction.json")
        tables: dict[str, Tensor] = scheduler.correction.tables()
        table.write_text(json.dumps({name: value.tolist() for name, value in tables.items()}), encoding="utf-8")
        notes.append(f"The correction of the predictions is no part of the graph: its table is {table.name}.")
    names = tuple(tensors_of(dict(arguments))[0])
    return Exported(target, names, outputs, dict(lowered.refusals), tuple(notes), table)
