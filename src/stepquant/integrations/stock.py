"""Write a quantized pipeline in a format that plain diffusers loads, without stepquant: torchao's int8.

The file holds the weights of linear layers as int8 levels with their scales, exactly those of the checkpoint. All that
has a time axis, and all that torchao's format has no place for, stays behind; `StockExport.lost` says what.
"""

from __future__ import annotations

import importlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.api import load, with_denoiser
from stepquant.errors import ModelError, SpecError
from stepquant.model.components import class_identity, json_config
from stepquant.model.correction import CorrectedScheduler
from stepquant.model.families import find_denoiser
from stepquant.model.layer import QuantizedLayer, QuantizedMatmul
from stepquant.model.quantizer import WeightQuantizer
from stepquant.model.surgery import quantized_layers

__all__ = ["StockExport", "dtype_text", "export_torchao", "levels_of", "losses_of", "refuse_additions"]


@dataclass(frozen=True)
class StockExport:
    """What an export wrote.

    folder: what `DiffusionPipeline.from_pretrained` takes. int8: linear layers whose weights are int8 there.
    lost: what the checkpoint has and the export has not, as sentences.
    """

    folder: Path
    int8: tuple[str, ...]
    lost: tuple[str, ...]


@torch.no_grad()
def export_torchao(source: Any, folder: Path | str, *, dtype: torch.dtype = torch.bfloat16) -> StockExport:
    """Write a pipeline folder whose denoiser has int8 weights in torchao's format; activations are in floating point.

    source: a checkpoint folder, or a pipeline with a quantized denoiser in simulated form.
    folder: must not exist. dtype: of everything else, and of the computation; diffusers loads such folders in bfloat16
        unless it is told otherwise.

    Weights of up to 8 bits are stored as their own levels less the zero point. They come back as they were, rounded to
    `dtype` as any weight of that dtype is.

    Raises SpecError if the folder exists or torchao is missing, ModelError for a denoiser that is not one of
    diffusers' models, is not quantized, or has layers that are more than a weight (transforms of the input, low-rank
    branches, stored first tokens, split inputs).
    """
    target = Path(folder)
    if target.exists():
        raise SpecError(f"{target} exists: choose another name.")
    torchao = _torchao()
    pipe = load(source, engine="simulated", schedule="nearest") if isinstance(source, str | Path) else source
    name, quantized = find_denoiser(pipe)
    layers = quantized_layers(quantized)
    if class_identity(quantized)[0] != "diffusers" or not layers:
        raise ModelError(
            f"{type(quantized).__name__} is not a quantized model of diffusers, so it has no place in a folder for it."
        )
    refuse_additions(quantized)
    kind: Any = type(quantized)
    denoiser = kind.from_config(json_config(quantized)).to(dtype).eval().requires_grad_(False)
    kept = set(denoiser.state_dict())
    denoiser.load_state_dict({key: value for key, value in quantized.state_dict().items() if key in kept})
    lost = losses_of(layers, pipe, "Activations are not quantized: their scales, also those by timestep, stay behind.")
    int8 = _place_levels_(denoiser, layers, dtype, torchao, lost)
    _attach_(denoiser, int8, torchao)
    plain = with_denoiser(pipe, name, denoiser)
    # Without what stepquant put onto the scheduler: a correction, and the guard of the schedule.
    bare = getattr(plain.scheduler, "uncorrected", plain.scheduler)
    plain.scheduler = type(bare).from_config(bare.config)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        plain.save_pretrained(partial)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return StockExport(target, tuple(int8), tuple(lost))


def _torchao() -> Any:
    try:
        return importlib.import_module("torchao.quantization")
    except ImportError as error:
        raise SpecError(f"torchao's format needs torchao: pip install torchao ({error})") from error


def refuse_additions(denoiser: nn.Module) -> None:
    """Raise ModelError for layers that are more than a weight."""
    for name, layer in quantized_layers(denoiser).items():
        if isinstance(layer, QuantizedLayer) and any(
            part is not None for part in (layer.input_transform, layer.branch, layer.first_token, layer.split)
        ):
            raise ModelError(
                f"{name} has a transform of its input, a low-rank branch, a stored first token or an input that is "
                "split between two quantizers, for which stock formats have no place. Quantize with a method without "
                "them to export."
            )
    adapted = [name for name, module in denoiser.named_modules() if hasattr(module, "base_layer")]
    if adapted:
        raise ModelError(f"{len(adapted)} layers have adapters, the first is {adapted[0]}: unload them first.")


def losses_of(layers: dict[str, QuantizedLayer | QuantizedMatmul], pipe: Any, activations: str) -> list[str]:
    """What every format without a time axis lacks. activations: what happens to quantized ones, as a sentence."""
    lost = []
    inputs = [layer.input_quantizer for layer in layers.values()]
    if any(quantizer is not None for quantizer in inputs):
        lost.append(activations)
    if any(isinstance(layer, QuantizedMatmul) for layer in layers.values()):
        lost.append("The matmuls of attention run in floating point.")
    few = {
        layer.weight_quantizer.spec.bits
        for layer in layers.values()
        if isinstance(layer, QuantizedLayer) and isinstance(layer.weight_quantizer, WeightQuantizer)
    }
    if min(few, default=8) < 8:
        lost.append(f"Weights of {', '.join(map(str, sorted(few - {8})))} bits take 8 bits each in the file.")
    if isinstance(pipe.scheduler, CorrectedScheduler):
        lost.append("The correction of the sampling steps stays behind: it was fitted to quantized activations.")
    lost.append("Sampling with other steps than those of the calibration is not noticed.")
    return lost


def _place_levels_(
    denoiser: nn.Module,
    layers: dict[str, QuantizedLayer | QuantizedMatmul],
    dtype: torch.dtype,
    torchao: Any,
    lost: list[str],
) -> list[str]:
    """int8 tensors in the place of the weights of linear layers; returns their names."""
    modules, int8, convolutions, wide = dict(denoiser.named_modules()), [], 0, []
    for name, layer in layers.items():
        if not isinstance(layer, QuantizedLayer) or not isinstance(layer.weight_quantizer, WeightQuantizer):
            continue
        if layer.geometry.kind != "linear":
            convolutions += 1
            continue
        levels, scale = levels_of(layer.weight_quantizer, layer.weight)
        if int(levels.min()) < -128 or int(levels.max()) > 127:
            wide.append(name)
            continue
        block = [1, levels.shape[1] // scale.shape[1]]
        module: Any = modules[name]
        module.weight = nn.Parameter(
            torchao.Int8Tensor(levels.to(torch.int8), scale, block, dtype), requires_grad=False
        )
        int8.append(name)
    if convolutions:
        lost.append(
            f"{convolutions} convolutions have weights in {dtype_text(dtype)}: torchao's int8 is for linear layers."
        )
    if wide:
        lost.append(
            f"{len(wide)} linear layers, the first is {wide[0]}, have asymmetric weights of 8 bits, which take nine: "
            f"they are in {dtype_text(dtype)}."
        )
    if not int8:
        raise ModelError("No linear layer of the model has weights that fit into int8: there is nothing to export.")
    return int8


def levels_of(quantizer: WeightQuantizer, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Levels less their zero points `[O, C]`, and scales `[O, G]`, float32."""
    levels = quantizer.levels(weight).to(torch.int32)
    rows, width = levels.shape
    groups = quantizer.scale.shape[1] if quantizer.scale.ndim == 3 else 1
    scale = quantizer.scale.reshape(-1, groups).expand(rows, groups)
    zero_point = quantizer.zero_point.reshape(-1, groups).expand(rows, groups).to(torch.int32)
    centred = levels.reshape(rows, groups, width // groups) - zero_point[..., None]
    return centred.reshape(rows, width), scale.contiguous()


def _attach_(denoiser: Any, int8: list[str], torchao: Any) -> None:
    """Make diffusers save the model as one that torchao quantized."""
    from diffusers import TorchAoConfig
    from diffusers.quantizers.torchao import TorchAoHfQuantizer

    taken = set(int8)
    others = [name for name, module in denoiser.named_modules() if isinstance(module, nn.Linear) and name not in taken]
    config = TorchAoConfig(torchao.Int8WeightOnlyConfig(), modules_to_not_convert=others)
    denoiser.register_to_config(quantization_config=config)
    denoiser.hf_quantizer = TorchAoHfQuantizer(config)
    denoiser.hf_quantizer.validate_environment()  # also where it sets what saving asks for
    denoiser.is_quantized, denoiser.quantization_method = True, config.quant_method


def dtype_text(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")
