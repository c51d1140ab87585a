"""Write a quantized denoiser as a file that ComfyUI loads without stepquant: int8 weights under original key names.

Source of the format: ComfyUI's QUANTIZATION.md ("Checkpoint Format") and the formats in `QUANT_ALGOS` of its
comfy/quant_ops.py, to which that page points; `int8_tensorwise` since ComfyUI 0.27 (Comfy-Org/ComfyUI#14636).

    LAYER.weight         int8     [O, C]     levels
    LAYER.weight_scale   float32  [O, 1]     weight = levels * weight_scale
    metadata of the file: "_quantization_metadata", JSON: {"format_version": "1.0", "layers": {LAYER: {"format": ...}}}

Everything else is in floating point. ComfyUI finds out what model it is from key names and shapes, and those are not
diffusers' but the first publishers'. The names are here for three families; anything else is refused.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from stepquant.api import load
from stepquant.errors import ModelError, SpecError
from stepquant.integrations.stock import dtype_text, levels_of, losses_of, refuse_additions
from stepquant.model.components import build_denoiser, class_identity, json_config
from stepquant.model.families import find_denoiser
from stepquant.model.layer import QuantizedLayer
from stepquant.model.quantizer import WeightQuantizer
from stepquant.model.surgery import quantized_layers

__all__ = ["FORMAT", "ComfyExport", "export_comfyui"]

FORMAT = "int8_tensorwise"
"""ComfyUI's name for int8 levels with a scale for each row, or for all."""

METADATA_KEY = "_quantization_metadata"


@dataclass(frozen=True)
class ComfyExport:
    """What an export wrote.

    path: the file, for ComfyUI/models/diffusion_models. int8: its layers with int8 weights, under their names there.
    lost: what the checkpoint has and the file has not, as sentences.
    """

    path: Path
    int8: tuple[str, ...]
    lost: tuple[str, ...]


@dataclass(frozen=True)
class _Place:
    """Where a parameter goes: rows of several layers may be one layer there.

    name: of the layer, or of the parameter if that is no weight or bias. part: which of its rows, in order.
    swapped: the two halves of the rows stand in the other order.
    """

    name: str
    part: int = 0
    swapped: bool = False


@torch.no_grad()
def export_comfyui(source: Any, path: Path | str, *, dtype: torch.dtype | None = None) -> ComfyExport:
    """Write the denoiser as a safetensors file for ComfyUI.

    source: a checkpoint folder, or a pipeline with a quantized denoiser in simulated form.
    path: ends in .safetensors and must not exist.
    dtype: of everything that is not int8; None is float16 for U-Nets and bfloat16 for transformers, as their
        publishers' files are.

    Linear layers whose weights have one scale a row and fit into eight bits less their zero points are stored as their
    own levels. Those with scales of groups, and asymmetric ones of 8 bits, which take nine, are rounded again, to a
    scale a row; `lost` says so. Where ComfyUI has one layer for several, all of them must be quantized, or none is.

    Raises SpecError for the path, ModelError for a model whose key names in ComfyUI are not known here, for one that is
    not quantized, and for layers that are more than a weight (transforms, low-rank branches, stored first tokens).
    """
    target = Path(path)
    if target.suffix != ".safetensors":
        raise SpecError(f"ComfyUI's file must end in .safetensors, found {target.name!r}.")
    if target.exists():
        raise SpecError(f"{target} exists: choose another name.")
    pipe = load(source, engine="simulated", schedule="nearest") if isinstance(source, str | Path) else source
    _, denoiser = find_denoiser(pipe)
    layers = quantized_layers(denoiser)
    kind = type(denoiser).__name__
    if class_identity(denoiser)[0] != "diffusers" or not layers:
        raise ModelError(f"{kind} is not a quantized model of diffusers, so it has no place in a file for ComfyUI.")
    config = json_config(denoiser)
    place = _places(kind, config)
    refuse_additions(denoiser)
    dtype = dtype or (torch.float16 if kind == "UNet2DConditionModel" else torch.bfloat16)
    groups = _grouped(denoiser.state_dict(), list(build_denoiser(kind, config, "meta").state_dict()), place, kind)
    lost = losses_of(
        layers,
        pipe,
        "The scales of activations, also those by timestep, stay behind: ComfyUI quantizes the inputs of int8 layers "
        "itself, row by row as they come.",
    )
    tensors: dict[str, Tensor] = {}
    int8: list[str] = []
    again: list[str] = []
    left: list[str] = []
    for name, parts in groups.items():
        own = [layers.get(source.removesuffix(".weight")) for source, _, _ in parts]  # of a bias: None
        swapped = parts[0][2]
        if name.endswith(".weight") and all(map(_is_int8, own)):
            found = [_int8(layer, values) for layer, (_, values, _) in zip(own, parts, strict=True)]
            levels = _joined([levels for levels, _, _ in found], swapped)
            scale = _joined([scale for _, scale, _ in found], swapped)
            again += [source for (_, _, exact), (source, _, _) in zip(found, parts, strict=True) if not exact]
            layer = name.removesuffix(".weight")
            tensors |= {name: levels, f"{layer}.weight_scale": scale}
            int8.append(layer)
        else:
            left += [source for layer, (source, _, _) in zip(own, parts, strict=True) if _is_quantized(layer)]
            tensors[name] = _joined([values.to(dtype) for _, values, _ in parts], swapped)
    if not int8:
        raise ModelError("No linear layer of the model has quantized weights: there is nothing to export.")
    if again:
        lost.append(
            f"{len(again)} layers, the first is {again[0].removesuffix('.weight')}, were rounded again: weights with a "
            "scale for each group have one for each row here, and asymmetric weights of 8 bits take nine."
        )
    if left:
        lost.append(
            f"{len(left)} layers, the first is {left[0].removesuffix('.weight')}, have weights in {dtype_text(dtype)}: "
            "convolutions, and layers that ComfyUI joins with such as are not quantized."
        )
    lost.append("The file has the denoiser alone: no text encoders, VAE or scheduler.")
    prediction = getattr(pipe.scheduler.config, "prediction_type", "epsilon")
    if kind == "UNet2DConditionModel" and prediction != "epsilon":
        lost.append(f"The model predicts {prediction}, which the file does not say: set it in ComfyUI.")
    described = {"format_version": "1.0", "layers": {layer: {"format": FORMAT} for layer in int8}}
    _write(tensors, target, {"format": "pt", METADATA_KEY: json.dumps(described)})
    return ComfyExport(target, tuple(int8), tuple(lost))


def _write(tensors: Mapping[str, Tensor], target: Path, metadata: dict[str, str]) -> None:
    """The whole file or none under its name."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, partial, metadata=metadata)
        partial.rename(target)
    finally:
        partial.unlink(missing_ok=True)


def _is_quantized(layer: Any) -> bool:
    return isinstance(layer, QuantizedLayer) and isinstance(layer.weight_quantizer, WeightQuantizer)


def _is_int8(layer: Any) -> bool:
    return _is_quantized(layer) and layer.geometry.kind == "linear"


def _int8(layer: Any, weight: Tensor) -> tuple[Tensor, Tensor, bool]:
    """int8 levels `[O, C]`, a scale for each row `[O, 1]`, and whether their products are the weights."""
    levels, scale = levels_of(layer.weight_quantizer, weight)
    if scale.shape[1] == 1 and int(levels.min()) >= -128 and int(levels.max()) <= 127:
        return levels.to(torch.int8), scale.float(), True
    wide = weight.float()
    largest = wide.abs().amax(1, keepdim=True)
    scale = torch.where(largest > 0, largest / 127, 1.0)
    return (wide / scale).round().to(torch.int8), scale, False


def _joined(parts: Sequence[Tensor], swapped: bool) -> Tensor:
    whole = torch.cat(list(parts)) if len(parts) > 1 else parts[0]
    return torch.cat(whole.chunk(2)[::-1]) if swapped else whole


def _grouped(
    state: Mapping[str, Tensor], names: Sequence[str], place: Callable[[str], _Place | None], kind: str
) -> dict[str, list[tuple[str, Tensor, bool]]]:
    """Name in the file -> what it is made of, in order: name here, value, whether halves are swapped."""
    found: dict[str, list[tuple[int, str, Tensor, bool]]] = {}
    for name in names:
        stem, dot, last = name.rpartition(".")
        is_layer = last in ("weight", "bias")
        where = place(stem if is_layer else name)
        if where is None:
            raise ModelError(
                f"{name} of {kind} has no name in ComfyUI that is known here. Models with additions to the published "
                "ones cannot be exported."
            )
        key = f"{where.name}{dot}{last}" if is_layer and not where.name.endswith(".scale") else where.name
        found.setdefault(key, []).append((where.part, name, state[name], where.swapped))
    return {key: [part[1:] for part in sorted(parts, key=lambda part: part[0])] for key, parts in found.items()}


def _places(kind: str, config: Mapping[str, Any]) -> Callable[[str], _Place | None]:
    """Layer here -> where it goes, for a class of models."""
    if kind == "UNet2DConditionModel":
        return _unet_places(config)
    known = {"FluxTransformer2DModel": _FLUX, "WanTransformer3DModel": _WAN}
    if kind not in known:
        raise ModelError(
            f"ComfyUI's key names are known here for UNet2DConditionModel (Stable Diffusion 1, 2, XL), "
            f"{' and '.join(known)}, found {kind}."
        )
    rules = [(re.compile(pattern), target) for pattern, target in known[kind].items()]

    def place(name: str) -> _Place | None:
        for pattern, target in rules:
            matched = pattern.fullmatch(name)
            if matched is not None:
                given = target if isinstance(target, _Place) else _Place(target)
                return _Place(matched.expand(given.name), given.part, given.swapped)
        return None

    return place


_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}

_UNET = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def _unet_places(config: Mapping[str, Any]) -> Callable[[str], _Place | None]:
    """The names of CompVis' latent diffusion, which Stable Diffusion XL has kept.

    Input blocks are numbered through: the first convolution, then the residual blocks of a level and its downsampling.
    """
    each = config["layers_per_block"]
    if not isinstance(each, int):
        raise ModelError(f"ComfyUI knows U-Nets with equally many blocks on each level, found {each}.")
    attending = {number for number, name in enumerate(config["up_block_types"]) if "Attn" in name}

    def module(name: str) -> str | None:
        if name in _UNET:
            return _UNET[name]
        matched = re.fullmatch(
            r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", name
        )
        if matched is not None:
            way, level, part, number, rest = matched[1], int(matched[2]), matched[3], int(matched[4]), matched[5]
            first = level * (each + 1)
            if part in ("resnets", "attentions"):
                block = f"input_blocks.{first + number + 1}" if way == "down" else f"output_blocks.{first + number}"
                return _inside(block, 0 if part == "resnets" else 1, rest)
            if rest != "conv":
                return None
            if part == "downsamplers":
                return f"input_blocks.{first + each + 1}.0.op"
            return f"output_blocks.{first + each}.{2 if level in attending else 1}.conv"
        matched = re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name)
        if matched is None:
            return None
        number = 2 * int(matched[2]) + (matched[1] == "attentions")
        return _inside("middle_block", number, matched[3])

    def place(name: str) -> _Place | None:
        found = module(name)
        return None if found is None else _Place(found)

    return place


def _inside(block: str, number: int, rest: str) -> str | None:
    """A residual block's layers have other names, an attention's the same."""
    if rest in _RESNET:
        return f"{block}.{number}.{_RESNET[rest]}"
    if rest in ("norm", "proj_in", "proj_out") or rest.startswith("transformer_blocks."):
        return f"{block}.{number}.{rest}"
    return None


def _flux_rules() -> dict[str, str | _Place]:
    """The names of Black Forest Labs: queries, keys, values and more of a layer are one matrix."""
    double, single = r"transformer_blocks\.(\d+)\.", r"single_transformer_blocks\.(\d+)\."
    rules: dict[str, str | _Place] = {
        "x_embedder": "img_in",
        "context_embedder": "txt_in",
        r"time_text_embed\.timestep_embedder\.linear_1": "time_in.in_layer",
        r"time_text_embed\.timestep_embedder\.linear_2": "time_in.out_layer",
        r"time_text_embed\.text_embedder\.linear_1": "vector_in.in_layer",
        r"time_text_embed\.text_embedder\.linear_2": "vector_in.out_layer",
        r"time_text_embed\.guidance_embedder\.linear_1": "guidance_in.in_layer",
        r"time_text_embed\.guidance_embedder\.linear_2": "guidance_in.out_layer",
        r"norm_out\.linear": _Place("final_layer.adaLN_modulation.1", swapped=True),
        "proj_out": "final_layer.linear",
        f"{double}norm1\\.linear": r"double_blocks.\1.img_mod.lin",
        f"{double}norm1_context\\.linear": r"double_blocks.\1.txt_mod.lin",
        f"{double}attn\\.to_out\\.0": r"double_blocks.\1.img_attn.proj",
        f"{double}attn\\.to_add_out": r"double_blocks.\1.txt_attn.proj",
        f"{double}ff\\.net\\.0\\.proj": r"double_blocks.\1.img_mlp.0",
        f"{double}ff\\.net\\.2": r"double_blocks.\1.img_mlp.2",
        f"{double}ff_context\\.net\\.0\\.proj": r"double_blocks.\1.txt_mlp.0",
        f"{double}ff_context\\.net\\.2": r"double_blocks.\1.txt_mlp.2",
        f"{single}norm\\.linear": r"single_blocks.\1.modulation.lin",
        f"{single}proj_out": r"single_blocks.\1.linear2",
        f"{single}proj_mlp": _Place(r"single_blocks.\1.linear1", 3),
    }
    for part, (own, added) in enumerate((("q", "add_q_proj"), ("k", "add_k_proj"), ("v", "add_v_proj"))):
        rules[f"{double}attn\\.to_{own}"] = _Place(r"double_blocks.\1.img_attn.qkv", part)
        rules[f"{double}attn\\.{added}"] = _Place(r"double_blocks.\1.txt_attn.qkv", part)
        rules[f"{single}attn\\.to_{own}"] = _Place(r"single_blocks.\1.linear1", part)
    for own, there in (("q", "query"), ("k", "key")):
        rules[f"{double}attn\\.norm_{own}"] = rf"double_blocks.\1.img_attn.norm.{there}_norm.scale"
        rules[f"{double}attn\\.norm_added_{own}"] = rf"double_blocks.\1.txt_attn.norm.{there}_norm.scale"
        rules[f"{single}attn\\.norm_{own}"] = rf"single_blocks.\1.norm.{there}_norm.scale"
    return rules


def _wan_rules() -> dict[str, str | _Place]:
    """The names of Wan's publishers."""
    block, image = r"blocks\.(\d+)\.", r"condition_embedder\.image_embedder\."
    rules: dict[str, str | _Place] = {
        "patch_embedding": "patch_embedding",
        r"condition_embedder\.time_embedder\.linear_1": "time_embedding.0",
        r"condition_embedder\.time_embedder\.linear_2": "time_embedding.2",
        r"condition_embedder\.text_embedder\.linear_1": "text_embedding.0",
        r"condition_embedder\.text_embedder\.linear_2": "text_embedding.2",
        r"condition_embedder\.time_proj": "time_projection.1",
        f"{image}norm1": "img_emb.proj.0",
        f"{image}ff\\.net\\.0\\.proj": "img_emb.proj.1",
        f"{image}ff\\.net\\.2": "img_emb.proj.3",
        f"{image}norm2": "img_emb.proj.4",
        "scale_shift_table": "head.modulation",
        "proj_out": "head.head",
        f"{block}scale_shift_table": r"blocks.\1.modulation",
        f"{block}norm2": r"blocks.\1.norm3",
        f"{block}ffn\\.net\\.0\\.proj": r"blocks.\1.ffn.0",
        f"{block}ffn\\.net\\.2": r"blocks.\1.ffn.2",
    }
    parts = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o", "norm_q": "norm_q", "norm_k": "norm_k"}
    added = {"add_k_proj": "k_img", "add_v_proj": "v_img", "norm_added_k": "norm_k_img"}
    for own, there in (("attn1", "self_attn"), ("attn2", "cross_attn")):
        for name, target in {**parts, **added}.items():
            rules[f"{block}{own}\\.{re.escape(name)}"] = rf"blocks.\1.{there}.{target}"
    return rules


_FLUX = _flux_rules()
_WAN = _wan_rules()
