"""The one file that knows diffusers' class names: where a pipeline keeps its denoiser, blocks and attention."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.errors import ModelError, UnsupportedPipeline, nearest
from stepquant.model.clock import clock_of
from stepquant.model.layer import Matmul

__all__ = [
    "ExplicitAttention",
    "block_classes",
    "end_layers",
    "find_denoiser",
    "make_attention_explicit_",
    "name_of_denoiser",
    "network_beside",
    "other_denoisers",
    "refuse_unsupported",
    "sensitive_layers",
    "several_denoisers",
    "timestep_argument",
    "writes_known_part",
]

# Where pipelines keep the network that runs at every step, in the order in which they are looked for.
DENOISER_NAMES = ("unet", "transformer", "prior", "denoiser")

# Residual, attention and transformer blocks: what block reconstruction fits as one unit.
BLOCK_CLASSES = frozenset(
    {
        "ResnetBlock2D",
        "ResnetBlockCondNorm2D",
        "BasicTransformerBlock",
        "Attention",
        "JointTransformerBlock",
        "FluxTransformerBlock",
        "FluxSingleTransformerBlock",
        "SanaTransformerBlock",
        "WanTransformerBlock",
        "TimestepEmbedding",
    }
)

# Schedulers whose noise comes from torchsde and not from generators.
OWN_NOISE = frozenset({"DPMSolverSDEScheduler", "CosineDPMSolverMultistepScheduler"})

# Layers that read the sample and that write the prediction, by name, first match wins.
FIRST_LAYERS = ("conv_in", "pos_embed.proj", "x_embedder", "patch_embedding", "proj_in")
LAST_LAYERS = ("conv_out", "proj_out_2", "proj_out")


def find_denoiser(pipe: Any, wanted: str | None = None) -> tuple[str, nn.Module]:
    """Name and module of the network that the pipeline runs at every step.

    wanted: the name of one of several denoisers that take turns ("transformer_2"); None is the quantized one if one of
        them is quantized, otherwise the first.
    Raises ModelError if there is none, or none of that name.
    """
    known = _denoisers(pipe)
    if wanted is None:
        return next((item for item in known.items() if clock_of(item[1]) is not None), next(iter(known.items())))
    if wanted not in known:
        raise ModelError(f"{type(pipe).__name__} has no denoiser {wanted!r}.{nearest(wanted, known)}")
    return wanted, known[wanted]


def _first_denoiser(pipe: Any) -> tuple[str, nn.Module]:
    for name in DENOISER_NAMES:
        module = getattr(pipe, name, None)
        if isinstance(module, nn.Module):
            return name, module
    raise ModelError(
        f"No denoiser was found in {type(pipe).__name__}: it has none of {', '.join(DENOISER_NAMES)}. Wrap a plain "
        "torch module and a scheduler in stepquant.DenoiserPipeline."
    )


def _parts(pipe: Any) -> Mapping[str, Any]:
    found: Mapping[str, Any] = getattr(pipe, "components", {})
    return found


def _denoisers(pipe: Any) -> dict[str, nn.Module]:
    """The denoiser, and those of its class that take turns with it, by name."""
    name, denoiser = _first_denoiser(pipe)
    others = {other: part for other, part in _parts(pipe).items() if type(part) is type(denoiser) and other != name}
    return {name: denoiser, **others}


def several_denoisers(pipe: Any) -> list[str]:
    """The names of the denoisers of a pipeline that switches between several; empty for any other."""
    try:
        names = [*_denoisers(pipe)]
    except ModelError:
        return []
    return names if len(names) > 1 else []


def name_of_denoiser(pipe: Any, denoiser: nn.Module) -> str:
    """Where the pipeline keeps this one of its denoisers."""
    return next(name for name, part in _denoisers(pipe).items() if part is denoiser)


def other_denoisers(pipe: Any, denoiser: nn.Module) -> list[nn.Module]:
    """Those that take turns with this one."""
    return [part for part in (getattr(pipe, name) for name in several_denoisers(pipe)) if part is not denoiser]


def network_beside(pipe: Any) -> nn.Module | None:
    """The network that reads the sample and hands residuals to the denoiser: a ControlNet, or None."""
    found = _parts(pipe).get("controlnet")
    return found if isinstance(found, nn.Module) else None


def writes_known_part(pipe: Any, denoiser: nn.Module) -> bool:
    """Whether this is inpainting with a denoiser that does not read the mask: the pipeline then writes what is known
    into the sample after every step.
    """
    latents = getattr(getattr(_parts(pipe).get("vae"), "config", None), "latent_channels", None)
    reads = getattr(getattr(denoiser, "config", None), "in_channels", None)
    accepted = inspect.signature(pipe.__call__).parameters
    return "mask_image" in accepted and latents is not None and latents == reads


def refuse_unsupported(pipe: Any, wanted: str | None = None) -> None:
    """Raise UnsupportedPipeline for sampling that could not be replayed, as far as the pipeline's parts tell.

    wanted: the denoiser to quantize, if there are several. What only shows while sampling is found by `seal`.
    """
    name, denoiser = find_denoiser(pipe, wanted)
    kind = type(pipe).__name__
    if getattr(pipe, "scheduler", None) is None:
        raise UnsupportedPipeline(f"{kind} has no scheduler, so its steps cannot be seen.")
    if OWN_NOISE & {base.__name__ for base in type(pipe.scheduler).__mro__}:
        raise UnsupportedPipeline(
            f"{type(pipe.scheduler).__name__} draws noise from a Brownian tree of its own (torchsde) and not from the "
            "images' generators, so its steps cannot be replayed. Use DPMSolverMultistepScheduler with "
            "algorithm_type='sde-dpmsolver++'."
        )
    if "generator" not in inspect.signature(pipe.__call__).parameters:
        raise UnsupportedPipeline(
            f"{kind} takes no `generator`, so its images cannot be tied to seeds. Wrap the denoiser and its scheduler "
            "in stepquant.DenoiserPipeline."
        )
    adapted = [layer for layer, module in denoiser.named_modules() if hasattr(module, "base_layer")]
    if adapted:
        raise UnsupportedPipeline(
            f"{len(adapted)} layers of {name} have adapters (LoRA), the first is {adapted[0]}, and a checkpoint has no "
            "place for them. Make them part of the weights first: pipe.fuse_lora() and pipe.unload_lora_weights()."
        )
    if any(getattr(module, "fused_projections", False) for module in denoiser.modules()):
        raise UnsupportedPipeline(
            f"{name} has fused projections, whose layers a loaded model would not have: call "
            f"pipe.{name}.unfuse_qkv_projections() before quantizing."
        )
    names = several_denoisers(pipe)
    if names and wanted is None:
        raise UnsupportedPipeline(
            f"{kind} switches between {' and '.join(names)} on the way. Quantize one after the other from full "
            f"precision, with denoiser={name!r} and so on, and load one checkpoint onto the other."
        )
    for other in names:
        if clock_of(getattr(pipe, other)) is not None:
            raise UnsupportedPipeline(
                f"{other} is quantized already, and a checkpoint holds one quantized denoiser. Quantize {name} of the "
                f"full-precision pipeline, and load its checkpoint onto the pipeline with the quantized {other}: "
                "load(folder, onto=pipe)."
            )
    if hasattr(network_beside(pipe), "nets"):
        raise UnsupportedPipeline(
            f"{kind} has a list of ControlNets, which a checkpoint could not hold. Quantize with a single one, and put "
            "the others in afterwards."
        )


def timestep_argument(denoiser: nn.Module) -> tuple[str, int]:
    """Name and position of the timestep among the arguments of the denoiser's `forward`."""
    names = list(inspect.signature(denoiser.forward).parameters)
    for wanted in ("timestep", "timesteps", "t", "time"):
        if wanted in names:
            return wanted, names.index(wanted)
    if len(names) >= 2:
        return names[1], 1
    raise ModelError(f"{type(denoiser).__name__}.forward{tuple(names)} has no timestep argument.")


def block_classes(denoiser: nn.Module) -> frozenset[str]:
    """Class names of the blocks that a reconstruction fits as one unit."""
    own = getattr(denoiser, "_repeated_blocks", None) or ()
    declared = getattr(denoiser, "stepquant_blocks", ())
    return BLOCK_CLASSES | set(own) | set(declared)


def sensitive_layers(denoiser: nn.Module, layers: Iterable[str]) -> list[str]:
    """The layers whose precision diffusers itself keeps, by the model's own lists.

    `_skip_layerwise_casting_patterns` are regular expressions of module names that must not be stored in eight bits of
    floating point (embeddings of patches and time, modulations of norms); `_keep_in_fp32_modules` are parts of names
    that stay in float32 when the model is cast.
    """
    patterns = tuple(getattr(denoiser, "_skip_layerwise_casting_patterns", None) or ())
    parts = set(getattr(denoiser, "_keep_in_fp32_modules", None) or ())
    return [
        name
        for name in layers
        if any(re.search(pattern, name) for pattern in patterns) or not parts.isdisjoint(name.split("."))
    ]


def end_layers(layers: list[str]) -> tuple[str, str]:
    """The layer that reads the sample and the one that writes the prediction.

    By name where one of diffusers' usual names is there, otherwise the first and last of `layers`, which are in order
    of execution.
    """

    def pick(names: tuple[str, ...], fallback: str) -> str:
        return next((name for name in names if name in layers), fallback)

    return pick(FIRST_LAYERS, layers[0]), pick(LAST_LAYERS, layers[-1])


class ExplicitAttention(nn.Module):
    """Attention processor for diffusers' `Attention` with its two matmuls as modules.

    Computes what `AttnProcessor` computes: softmax(q k^T * scale + mask) v, with group norm, cross attention,
    query and key norms, and the residual connection of the attention block.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scores = Matmul("scores")
        self.values = Matmul("values")

    # diffusers' `Attention` drops keyword arguments, `temb` among them, that the signature of `__call__` does not name.
    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        result: Tensor = super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        return result

    def forward(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        shape = hidden_states.shape
        if hidden_states.ndim == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        batch, length, _ = hidden_states.shape if encoder_hidden_states is None else encoder_hidden_states.shape
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        context = hidden_states
        if encoder_hidden_states is not None:
            context = encoder_hidden_states
            if attn.norm_cross:
                context = attn.norm_encoder_hidden_states(context)

        def heads(x: Tensor) -> Tensor:  # [B, T, heads * d] -> [B, heads, T, d]
            return x.reshape(*x.shape[:2], attn.heads, -1).transpose(1, 2)

        query, key, value = heads(attn.to_q(hidden_states)), heads(attn.to_k(context)), heads(attn.to_v(context))
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        scale = attn.scale if attn.scale is not None else 1 / math.sqrt(query.shape[-1])
        scores = self.scores(query, key.transpose(-1, -2)) * scale
        if attention_mask is not None:
            mask = attn.prepare_attention_mask(attention_mask, length, batch)
            scores = scores + mask.view(batch, attn.heads, -1, mask.shape[-1])
        weights = torch.softmax(scores.float(), dim=-1).to(value.dtype)
        result: Tensor = self.values(weights, value).transpose(1, 2).flatten(2)
        result = attn.to_out[1](attn.to_out[0](result))
        if len(shape) == 4:
            result = result.transpose(1, 2).reshape(shape)
        if attn.residual_connection:
            result = result + residual
        rescaled: Tensor = result / attn.rescale_output_factor
        return rescaled


def _is_standard(attention: Any, processor: str) -> bool:
    """Whether the processor computes what `ExplicitAttention` does for this attention.

    `AttnProcessor` ignores query and key norms, and `AttnProcessor2_0` always scales by 1 / sqrt(d).
    """
    if processor == "AttnProcessor":
        return attention.norm_q is None and attention.norm_k is None
    return processor == "AttnProcessor2_0" and bool(attention.scale_qk)


def make_attention_explicit_(denoiser: nn.Module) -> list[str]:
    """Give every diffusers `Attention` with the standard processor the explicit one.

    Returns the attention modules that were left as they are because their processor computes something else; their
    matmuls stay in floating point.
    """
    left: list[str] = []
    for name, module in denoiser.named_modules():
        processor = getattr(module, "processor", None)
        if processor is None or not hasattr(module, "set_processor"):
            continue
        if type(module).__name__ == "Attention" and _is_standard(module, type(processor).__name__):
            module.set_processor(ExplicitAttention())
        elif not isinstance(processor, ExplicitAttention):
            left.append(name)
    return left
