"""Write a quantized denoiser as a graph that other programs run: ONNX with Q/DQ operators, or OpenVINO's IR."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.api import load
from stepquant.engines.graph import GraphInput, GraphLayer, GraphMatmul, Lowered, export, lower, tensors_of
from stepquant.engines.openvino import FLOAT_MATMUL
from stepquant.errors import EngineError, SpecError
from stepquant.manifest import read_manifest
from stepquant.model.correction import CorrectedScheduler
from stepquant.model.families import find_denoiser
from stepquant.model.layer import QuantizedLayer
from stepquant.model.quantizer import WeightQuantizer
from stepquant.model.surgery import quantized_layers

__all__ = ["Exported", "export_onnx", "export_openvino"]

CORRECTION = ".correction.json"


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

    overwrite: replace a graph of that name and what lies beside it: a correction that the new one does not have, too.

    The timestep bin is computed in the graph from the timestep of the first image.
    Raises EngineError for a denoiser that cannot be exported and for a folder that cannot be written, SpecError if
    `inputs` are needed or a file exists.
    """
    target = _target(path, ".onnx", overwrite)
    opened = _opened(source)
    arguments = _arguments(opened, inputs)
    with _written_at_once(target) as folder:
        outputs = export(opened.lowered, arguments, folder / target.name, bin_inside=True, batched=_batched(arguments))
        correction = _write_correction(folder, target, opened.scheduler)
    return _exported(target, opened, arguments, outputs.names, correction)


def export_openvino(
    source: Any, path: Path | str, *, inputs: Mapping[str, Any] | None = None, overwrite: bool = False
) -> Exported:
    """Write the denoiser as OpenVINO IR, `path` (.xml) and its .bin beside it. The rest is as in `export_onnx`."""
    try:
        import openvino
    except ImportError as error:
        raise EngineError(f"OpenVINO's format needs OpenVINO: pip install openvino ({error})") from error
    target = _target(path, ".xml", overwrite)
    opened = _opened(source)
    arguments = _arguments(opened, inputs)
    with tempfile.TemporaryDirectory(prefix="stepquant-") as plain, _written_at_once(target) as folder:
        graph = Path(plain) / "graph.onnx"
        outputs = export(opened.lowered, arguments, graph, bin_inside=True, batched=_batched(arguments))
        model = openvino.Core().read_model(str(graph))
        try:
            openvino.save_model(model, str(folder / target.name), compress_to_fp16=False)
        except RuntimeError as error:  # as for a full disk
            raise OSError(str(error).strip()) from error
        correction = _write_correction(folder, target, opened.scheduler)
    return _exported(target, opened, arguments, outputs.names, correction)


def _target(path: Path | str, suffix: str, overwrite: bool) -> Path:
    target = Path(path)
    if target.suffix != suffix:
        raise SpecError(f"The graph's file must end in {suffix}, found {target.name!r}.")
    there = [file.name for file in _beside(target) if file.exists()]
    if there and not overwrite:
        raise SpecError(
            f"{target.parent} has {' and '.join(there)} of that name already: choose another name or folder, or pass "
            "overwrite=True."
        )
    return target


def _beside(target: Path) -> tuple[Path, ...]:
    """The files that an export of this name may have written."""
    weights = (target.with_suffix(".bin"),) if target.suffix == ".xml" else ()
    return (target, *weights, target.with_suffix(CORRECTION))


@contextlib.contextmanager
def _written_at_once(target: Path) -> Iterator[Path]:
    """A folder for what is written. In the end its files take the place of those of an earlier export, all of them: a
    correction that was left would be taken for the new graph's. Raises EngineError where that cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=target.parent) as made:
            folder = Path(made)
            yield folder
            for file in _beside(target):
                if not (folder / file.name).exists():
                    file.unlink(missing_ok=True)
            for file in folder.iterdir():
                file.replace(target.parent / file.name)
    except OSError as error:
        raise EngineError(
            f"The graph could not be written to {target.parent}: {error}. Choose another folder."
        ) from error


def _write_correction(folder: Path, target: Path, scheduler: Any) -> Path | None:
    """Where the table of the scheduler's correction will lie, None if it has none."""
    if not isinstance(scheduler, CorrectedScheduler):
        return None
    table = target.with_suffix(CORRECTION)
    tables: dict[str, Tensor] = scheduler.correction.tables()
    text = json.dumps({name: value.tolist() for name, value in tables.items()})
    (folder / table.name).write_text(text, encoding="utf-8")
    return table


@dataclass(frozen=True)
class _Opened:
    """A denoiser to export.

    scheduler: the pipeline's, None for a denoiser alone. half: names of its parameters' types that are shorter than
    float32. narrow: number of integer layers whose weights have fewer than 8 bits.
    fractional: whether timesteps of its schedule are no whole numbers.
    """

    lowered: Lowered
    scheduler: Any
    half: tuple[str, ...]
    narrow: int
    fractional: bool


def _opened(source: Any) -> _Opened:
    schedule = None
    if isinstance(source, str | Path):
        folder = Path(source)
        source = load(folder, engine="simulated", schedule="nearest")
        schedule = read_manifest(folder).schedule
    denoiser, scheduler = (
        (source, None) if isinstance(source, nn.Module) else (find_denoiser(source)[1], source.scheduler)
    )
    lowered = lower(denoiser)
    types = {str(value.dtype).removeprefix("torch.") for value in denoiser.parameters()}
    steps = getattr(scheduler, "timesteps", None) if schedule is None else schedule["timesteps"]
    narrow = sum(
        isinstance(layer.weight_quantizer, WeightQuantizer) and layer.weight_quantizer.spec.bits < 8
        for name, layer in quantized_layers(denoiser).items()
        if isinstance(layer, QuantizedLayer) and name not in lowered.refusals
    )
    fractional = steps is not None and any(float(step) % 1 for step in steps)
    return _Opened(lowered, scheduler, tuple(sorted(types & {"bfloat16", "float16"})), narrow, fractional)


def _arguments(opened: _Opened, inputs: Mapping[str, Any] | None) -> dict[str, Any]:
    lowered = opened.lowered
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
    kind = torch.float32 if opened.fractional else torch.int64
    known = {"sample": torch.zeros(2, config["in_channels"], height, width), name: torch.zeros(1, dtype=kind)}
    labels = {"class_labels": torch.zeros(2, dtype=torch.int64)} if config.get("num_class_embeds") else {}
    return known | labels


def _batched(arguments: Mapping[str, Any]) -> tuple[str, ...]:
    tensors, _ = tensors_of(dict(arguments))
    batch = next((tensor.shape[0] for tensor in tensors.values() if tensor.ndim), 1)
    return tuple(name for name, tensor in tensors.items() if tensor.ndim and tensor.shape[0] == batch)


def _exported(
    target: Path, opened: _Opened, arguments: Mapping[str, Any], outputs: tuple[str, ...], correction: Path | None
) -> Exported:
    lowered = opened.lowered
    modules = list(lowered.module.modules())
    matmuls = [name for name, module in lowered.module.named_modules() if isinstance(module, GraphMatmul)]
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
    if matmuls:
        notes.append(
            f"{len(matmuls)} matmuls of attention round their operands to their levels; OpenVINO multiplies them in "
            "floating point: see float_layers."
        )
    if opened.narrow:
        notes.append(f"{opened.narrow} layers have weights of fewer than 8 bits, which take a byte each in the graph.")
    if opened.half:
        notes.append(f"What is {' and '.join(opened.half)} in the denoiser is float32 in the graph.")
    if target.suffix == ".onnx":
        notes.append(
            "OpenVINO runs convolutions and linear layers on int8. ONNX Runtime runs convolutions in floating point "
            "behind the rounding of their inputs, because their outputs are not quantized: that can be slower than its "
            "float32. Run the graph with OpenVINO, or use export_openvino."
        )
    if correction is not None:
        notes.append(f"The correction of the predictions is no part of the graph: its table is {correction.name}.")
    names = tuple(tensors_of(dict(arguments))[0])
    return Exported(
        target, names, outputs, {**lowered.refusals, **dict.fromkeys(matmuls, FLOAT_MATMUL)}, tuple(notes), correction
    )
