"""`stepquant export`: a checkpoint in a format that other programs run, and what is lost on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from stepquant.cli.console import Settings, stdout_console, write_json
from stepquant.cli.outputs import refuse_existing
from stepquant.cli.work import prepare

__all__ = ["Format", "export"]

Format = Literal["torchao-int8", "comfyui", "onnx", "openvino"]


def export(checkpoint: Path, out: Path, format_: Format, settings: Settings, json_target: str | None) -> None:
    """Write it, and say what it lacks."""
    refuse_existing(out, overwrite=False)
    prepare(settings)
    if format_ == "torchao-int8":
        found = _torchao(checkpoint, out)
    elif format_ == "comfyui":
        found = _comfyui(checkpoint, out)
    else:
        found = _graph(checkpoint, out, format_)
    if json_target is not None:
        write_json(found, json_target)
    if json_target == "-" or settings.quiet:
        return
    console = stdout_console()
    console.print(f"{out} is written.")
    for sentence in found["lost"]:
        console.print(f"  {sentence}", highlight=False)


def _torchao(checkpoint: Path, out: Path) -> dict[str, Any]:
    from stepquant.integrations.stock import export_torchao

    made = export_torchao(checkpoint, out)
    return {"path": str(out), "int8": list(made.int8), "lost": list(made.lost)}


def _comfyui(checkpoint: Path, out: Path) -> dict[str, Any]:
    from stepquant.integrations.comfyui import export_comfyui

    made = export_comfyui(checkpoint, out)
    return {"path": str(out), "int8": list(made.int8), "lost": list(made.lost)}


def _graph(checkpoint: Path, out: Path, format_: Format) -> dict[str, Any]:
    from stepquant.integrations.graphs import export_onnx, export_openvino

    write = export_onnx if format_ == "onnx" else export_openvino
    made = write(checkpoint, out)
    return {
        "path": str(out),
        "inputs": list(made.inputs),
        "outputs": list(made.outputs),
        "float_layers": dict(made.float_layers),
        "correction": None if made.correction is None else str(made.correction),
        "lost": list(made.notes),
    }
